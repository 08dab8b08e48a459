"""The export stage: the pruned model as a plain Hugging Face checkpoint with a model card."""

import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.benchmarks.measure import NotMeasurableError, Workload, measure
from pipeline.export.checkpoint import export_model, read_weights
from pipeline.export.packed import PACKED
from pipeline.models.weights import WEIGHTS_FILE
from pipeline.runs.config import RunConfig
from pipeline.runs.stage import Stage, StageContext, every
from pipeline.saving.contents import EXPORT_BYTES
from pipeline.store.artifacts import Artifact
from pipeline.tasks import make_task
from pipeline.tracking.recorder import Progress

_PACKAGES = ("mgpp", "torch", "deepspeed", "ray", "transformers", "datasets")


class ExportStage(Stage):
    """Writes the pruned model for others to load."""

    name = "export"
    version = 3
    settings = {"export": every, "name": every}
    for_pruned = True
    compared = {"pruned model": "model", "packed model": PACKED}

    def num_cpus(self, config: RunConfig) -> int | str:
        """Return one core, or for a benchmark all that are free on a node."""
        return "auto" if config.export.bench else 1

    def inputs(self, config: RunConfig) -> tuple[str, ...]:
        """Return the pruned model and what the model card says of it."""
        return ("data", "prune", "evaluate")

    def memory(self, artifacts: Mapping[str, Artifact]) -> int:
        """Return what the pruning stage found that this takes."""
        return int(artifacts["prune"].metrics.get("export_bytes", EXPORT_BYTES))

    def run(self, context: StageContext) -> dict[str, Any]:
        """Write `model/`, and return what was found in it when it was read back."""
        pruned = context.inputs["prune"]
        found = export_model(
            trained=pruned / "model",
            weights=read_weights(pruned, WEIGHTS_FILE),
            auto_model=make_task(context.config.task).auto_model,
            pruning=_pruning(context),
            card=_card(context),
            config=context.config.export,
            trust_remote_code=context.config.model.trust_remote_code,
            output=context.output,
            exclude=context.config.prune.settings.exclude,
        )
        if not context.config.export.bench:
            return found
        folder = context.output / "model"
        return with_bench(found, folder, threads=context.cores, progress=context.progress)


def with_bench(
    found: dict[str, Any], folder: Path, *, threads: int, progress: Progress, memory: bool = True
) -> dict[str, Any]:
    """Return an export's figures with those of a benchmark; where none can be made, that is a warning.

    Args:
        found: the figures.
        folder: of the checkpoint.
        threads: of torch.
        progress: called with records for people to watch.
        memory: measure peak memory, too.
    """

    def step(text: str, done: int, total: int) -> None:
        progress({"event": "bench", "text": text, "step": done, "num_steps": total})

    try:
        bench = measure(folder, Workload(threads=threads, memory=memory), step)
    except NotMeasurableError as error:
        return {**found, "warnings": [*found["warnings"], f"export.bench: not measured: {error}"]}
    warnings = [f"export.bench: {warning}" for warning in bench["warnings"]]
    return {**found, "bench": bench, "warnings": [*found["warnings"], *warnings]}


def _pruning(context: StageContext) -> dict[str, Any]:
    """Return what the model's own configuration says of its pruning."""
    config, figures = context.config, context.artifacts["prune"].metrics
    return {
        "model": config.model.path,
        "method": config.prune.method.model_dump(mode="json"),
        "sparsity": figures["sparsity"],
        "num_pruned": figures["num_pruned"],
        "mask_hash": figures["mask_hash"],
        "scope": config.prune.settings.scope,
        **config.prune.placement_given(),
        **_schedule(figures),
        "tool": f"mgpp {version('mgpp')}",
    }


def _card(context: StageContext) -> dict[str, Any]:
    """Return the figures of the model card."""
    config, figures = context.config, context.artifacts["prune"].metrics
    num_rows = context.artifacts["data"].metrics["num_rows"]["validation"]
    return {
        "name": config.name,
        "model": config.model.path,
        "method": config.prune.method.name,
        "sparsity": figures["sparsity"],
        "num_pruned": figures["num_pruned"],
        "metrics": make_task(config.task).written(context.artifacts["evaluate"].metrics),
        "num_rows": min(num_rows, config.evaluate.max_rows or sys.maxsize),
        "config": config.to_yaml(),
        "versions": package_versions(),
        **_schedule(figures),
    }


def _schedule(figures: dict[str, Any]) -> dict[str, Any]:
    return {k: figures[k] for k in ("prune_start", "prune_end", "num_steps", "num_prunable")}


def embedding_sizes(figures: Mapping[str, Any]) -> dict[str, int]:
    """Return the bytes of embeddings in what was exported, by what it is called."""
    names = {"pruned model": "embedding_bytes", "packed model": "packed_embedding_bytes"}
    return {label: figures[name] for label, name in names.items() if name in figures}


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    return {package: version(package) for package in _PACKAGES}


EXPORT = ExportStage()
