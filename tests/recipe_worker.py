"""Runs recipes for a few steps, all stages in this one process, on tiny models and rows made here."""

import contextlib
import json
import os
import random
import re
import sys
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("LOCAL_RANK", "0")
os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import deepspeed  # noqa: F401  (before the process group: it looks for an accelerator)
import torch.distributed as dist
from omegaconf import OmegaConf

from pipeline.context import Context
from pipeline.planner.plan import plan_run
from pipeline.runs.config import RunConfig, parse_config, read_config
from pipeline.runs.flow import plan_stages, run_stage
from pipeline.runs.hardware import NO_GPUS, settled
from pipeline.runs.validate import validate
from pipeline.store.artifacts import Artifact, ArtifactStore
from pipeline.tasks import make_task
from pipeline.training.loop import train
from pipeline.worker_group import WorkerGroup
from tests.pipeline.training.train_worker import InterruptedRunError, StoppingCheckpoints
from tests.processes import leave
from tests.recipe_models import WORDS, family, make_model

# Keys that say how long something is, wherever they stand, and what they are set to.
_SHORT: dict[str, Any] = {
    "length": 6,
    "start_after": 2,
    "finetune": 2,
    "interval": 2,
    "batch_size": 4,
    "micro_batch_size": None,
    "log_every": 2,
    "calibration_rows": 4,
}
_SHORT_TASK = {"max_length": 24, "max_target_length": 6, "stride": 4, "max_answer_length": 4}
_NUM_ROWS = 24


def main(folder: Path, recipes: list[str]) -> None:
    """Run each recipe and write what came of it: `found.json`, by recipe."""
    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = str(folder / "cache")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found: dict[str, Any] = {}
    for number, recipe in enumerate(recipes):
        started = time.monotonic()
        try:
            found[recipe] = run_recipe(Path(recipe), folder / str(number))
        except Exception:  # noqa: BLE001  (whatever is wrong with one recipe is that recipe's)
            found[recipe] = {"error": traceback.format_exc()}
        found[recipe]["seconds"] = time.monotonic() - started
        (folder / "found.json").write_text(json.dumps(found))
    leave()


def run_recipe(recipe: Path, folder: Path) -> dict[str, Any]:
    """Check a shortened recipe as `mgpp validate` does and run its stages; return their figures."""
    values, problems = read_config(str(recipe))
    assert problems == []
    short = folder / "short.yaml"
    folder.mkdir()
    OmegaConf.save(OmegaConf.create(shortened(values, folder)), short)
    config = settled(validate(str(short), [], None), NO_GPUS)
    artifacts = run_stages(config)
    figures: dict[str, Any] = {name: artifact.metrics for name, artifact in artifacts.items()}
    figures["planned"] = plan_run(config).num_prunable
    if config.task.type == "masked-lm":  # masks are drawn in training
        figures["resumed"] = resumed_as_it_would_have_ended(config, artifacts, folder)
    return figures


def resumed_as_it_would_have_ended(
    config: RunConfig, artifacts: dict[str, Artifact], folder: Path
) -> bool:
    """Train again, stopped after three steps and resumed; return whether the same weights come out."""
    checkpoints = StoppingCheckpoints(str(folder / "checkpoints"), WorkerGroup.current())

    context = Context(
        inputs={"data": artifacts["data"].path},
        model_kwargs=artifacts["data"].metrics["model_kwargs"],
        output=folder / "resumed",
        workers=WorkerGroup.current(),
        checkpoints=checkpoints,
        progress=lambda record: None,
    )

    def run() -> None:
        train(
            context,
            model_config=config.model,
            task=make_task(config.task),
            config=config.train.model_copy(update={"checkpoint_every": 1}),
            zero=config.zero,
            prune=config.prune,
        )

    checkpoints.stop_at = 3
    with contextlib.suppress(InterruptedRunError):
        run()
    checkpoints.stop_at = None
    run()
    ended = [path / "weights.json" for path in (folder / "resumed", artifacts["prune"].path)]
    return ended[0].read_text() == ended[1].read_text()


def run_stages(config: RunConfig) -> dict[str, Artifact]:
    """Run all stages of a configuration in this process."""
    store = ArtifactStore(config.storage)
    artifacts: dict[str, Artifact] = {}
    for stage in plan_stages(config):
        done = run_stage(
            stage,
            config,
            store,
            {name: artifacts[name] for name in stage.inputs},
            workers=WorkerGroup.current() if stage.on_all_workers else None,
            progress=lambda record: None,
        )
        assert done is not None
        artifacts[stage.name] = done
    return artifacts


def shortened(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a recipe's values with tiny models and rows in the place of its own, and a few steps."""
    config = settled(parse_config(values), NO_GPUS)
    task = make_task(config.task)
    short = {name: _short_section(section) for name, section in values.items()}
    short["task"] = values["task"] | {
        key: value for key, value in _SHORT_TASK.items() if hasattr(config.task, key)
    }
    short["model"] |= {"revision": None, "gguf_file": None}
    for name in _model_names(short):
        tiny = folder / "models" / re.sub(r"\W+", "-", name)
        if not tiny.exists():
            make_model(name, task.auto_model, tiny)
        _replace(short, name, str(tiny))
    short["data"] = _data(config, folder)
    short["dense"] = {**short.get("dense", {}), "length": 4}
    short["zero"] = {**short.get("zero", {}), "bucket_elements": 10_000, "nvme_path": None}
    short["evaluate"] = {**short.get("evaluate", {}), "batch_size": 4}
    short["cluster"] = {"num_workers": 1}
    short["storage"] = str(folder / "runs")
    return short


def _short_section(section: Any) -> Any:
    if not isinstance(section, dict):
        return section
    return {key: _SHORT.get(key, _short_section(value)) for key, value in section.items()}


def _model_names(values: dict[str, Any]) -> set[str]:
    """Return the names of models, the teacher's too where there is one, wherever they stand."""
    found = {values["model"]["path"]}
    for name, section in values.items():
        if isinstance(section, dict) and name not in ("data", "task", "model"):
            texts = [value for value in section.values() if isinstance(value, str)]
            found |= {text for text in texts if "/" in text and family(text)}
            found |= {
                section[key]["path"]
                for key in section
                if isinstance(section[key], dict) and "path" in section[key]
            }
            if "path" in section:
                found.add(section["path"])
    return found


def _replace(values: dict[str, Any], old: str, new: str) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            _replace(value, old, new)
        elif value == old:
            values[key] = new


# Rows.


def _data(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Write rows with the columns the task needs, and as many validation sets as the recipe has."""
    extra = getattr(config.data, "extra_validation", {})
    paths = {}
    for seed, name in enumerate(("train", "validation", *extra)):
        generator = random.Random(seed)
        paths[name] = folder / f"{name}.jsonl"
        rows = [_row(config, generator, i) for i in range(_NUM_ROWS)]
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "source": "files",
        "train": str(paths["train"]),
        "validation": str(paths["validation"]),
        "extra_validation": {name: str(paths[name]) for name in extra},
    }


def _row(config: RunConfig, generator: random.Random, number: int) -> dict[str, Any]:
    """Return a row: text in every column, but for labels and answers."""
    columns = make_task(config.task).columns()
    row: dict[str, Any] = {
        column: " ".join(generator.choices(WORDS, k=generator.randint(6, 12)))
        for column in columns.values()
    }
    if config.task.type == "classification":
        row[columns["task.label"]] = number % 2
    elif config.task.type == "regression":
        row[columns["task.label"]] = generator.uniform(0, 5)
    elif config.task.type == "question-answering":
        context = row[columns["task.context"]]
        answer = context.split()[2]
        row[columns["task.question"]] = generator.choice(WORDS)
        row[columns["task.answers"]] = {
            "text": [answer],
            "answer_start": [context.index(answer)],
        }
    return row


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
