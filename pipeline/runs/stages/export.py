"""The export stage: the pruned model as a plain Hugging Face checkpoint with a model card."""

import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.benchmarks.measure import NotMeasurableError, Workload, measure
from pipeline.benchmarks.memory import bench_memory
from pipeline.export.checkpoint import export_model, read_weights
from pipeline.export.onnx import ONNX, batches_of, onnx_memory, write_onnx
from pipeline.export.packed import PACKED
from pipeline.models.loading import load_tokenizer
from pipeline.models.source import ModelConfig
from pipeline.models.weights import WEIGHTS_FILE
from pipeline.runs.config import RunConfig
from pipeline.runs.stage import Stage, StageContext, every
from pipeline.saving.contents import EXPORT_BYTES
from pipeline.storage.outputs import OutputFiles
from pipeline.store.artifacts import Artifact
from pipeline.tasks import make_task
from pipeline.tasks.base import token_lengths
from pipeline.tracking.recorder import Progress

_NUM_ROWS = 256  # of the validation rows, that ONNX batches are chosen from
_ONNX = {"ONNX": "onnx", "ONNX int8": "onnx_int8"}
_PACKAGES = ("mgpp", "torch", "deepspeed", "ray", "transformers", "datasets")


class ExportStage(Stage):
    """Writes the pruned model for others to load."""

    name = "export"
    version = 4
    settings = {"export": every, "name": every}
    for_pruned = True
    compared = {"pruned model": "model", "packed model": PACKED}
    onnx = ONNX

    def num_cpus(self, config: RunConfig) -> int | str:
        """Return one core, or for a benchmark all that are free on a node."""
        return "auto" if config.export.bench else 1

    def inputs(self, config: RunConfig) -> tuple[str, ...]:
        """Return the pruned model and what the model card says of it."""
        return ("data", "prune", "evaluate")

    def memory(self, config: RunConfig, artifacts: Mapping[str, Artifact]) -> int:
        """Return what the pruning stage found that this takes, and what ONNX or a benchmark takes."""
        pruned = artifacts["prune"]
        trained = pruned.weight_bytes("model"), config.zero.dtype.itemsize
        onnx = onnx_memory(*trained) if ONNX in config.export.format else 0
        bench = bench_memory(*trained) if config.export.bench else 0
        return int(pruned.metrics.get("export_bytes", EXPORT_BYTES)) + max(onnx, bench)

    def run(self, context: StageContext) -> dict[str, Any]:
        """Write `model/` and what is made of it; return what was found when it was read back."""
        pruned, config = context.inputs["prune"], context.config
        weights, auto_model = read_weights(pruned, WEIGHTS_FILE), make_task(config.task).auto_model
        found = export_model(
            trained=pruned / "model",
            weights=weights,
            auto_model=auto_model,
            pruning=_pruning(context),
            card=_card(context),
            config=config.export,
            trust_remote_code=config.model.trust_remote_code,
            output=context.output,
            files=_files(context),
            exclude=config.prune.settings.exclude,
        )
        if ONNX in config.export.format:
            found |= write_onnx(
                context.output,
                auto_model,
                _batches(context),
                prunable={name for name, entry in weights.items() if "zeros" in entry},
                int8=config.export.onnx_int8,
                trust_remote_code=config.model.trust_remote_code,
            )
        if not config.export.bench:
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


def _files(context: StageContext) -> OutputFiles:
    """Return what writes the weights: straight to storage, unless something here reads the folder."""
    export = context.config.export
    is_read = export.bench or ONNX in export.format
    return OutputFiles(str(context.output)) if is_read or not context.files else context.files


def _batches(context: StageContext) -> list[Any]:
    """Return batches of validation rows."""
    rows = context.rows()["validation"]
    rows = rows.select(range(min(len(rows), _NUM_ROWS)))
    tokenizer = load_tokenizer(ModelConfig(path=str(context.data / "tokenizer")))
    lengths = token_lengths(rows).tolist()
    return batches_of(rows, lengths, make_task(context.config.task).collator(tokenizer))


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


def onnx_sizes(figures: Mapping[str, Any]) -> dict[str, int]:
    """Return the bytes of ONNX files, by what they are called."""
    return {label: figures[f"{n}_bytes"] for label, n in _ONNX.items() if f"{n}_bytes" in figures}


def compressed_sizes(figures: Mapping[str, Any]) -> dict[str, int]:
    """Return the bytes of ONNX files when compressed, by what they are called."""
    return {label: figures[f"{_ONNX[label]}_compressed_bytes"] for label in onnx_sizes(figures)}


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    return {package: version(package) for package in _PACKAGES}


EXPORT = ExportStage()
