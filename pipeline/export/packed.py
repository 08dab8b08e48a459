"""The packed copy of an exported checkpoint, and how much of the files are embeddings."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mgpp.sparse.checkpoint import write_packed_rest
from mgpp.sparse.packed_files import plan_packing, write_packed_files
from pipeline.export.weights import ExportedWeights, PackedOutput
from pipeline.saving.contents import Unit
from pipeline.storage.outputs import OutputFiles

PACKED = "packed"


def write_packed(
    output: Path,
    files: OutputFiles,
    weights: ExportedWeights,
    model: Any,
    units: Iterable[Unit],
    figures: dict[str, Any],
) -> dict[str, Any]:
    """Write `packed` beside the plain `model`; where nothing gets smaller, that is a warning.

    Args:
        output: the stage's folder, with the plain checkpoint, whose weights may be elsewhere.
        files: what writes the weights.
        weights: of the plain checkpoint.
        model: on the meta device is enough.
        units: what its files hold.
        figures: of the plain checkpoint.

    Returns:
        The figures, with sizes of the packed one in bytes.
    """
    plan = plan_packing(weights)
    if not plan.entries:
        warning = "no packed copy is written: no matrix has so many zeros that it would be smaller"
        return {**figures, "warnings": [*figures["warnings"], warning]}
    write_packed_files(plan, weights, PackedOutput(files, PACKED))
    folder = output / PACKED
    folder.mkdir(exist_ok=True)
    write_packed_rest(plan, output / "model", folder)
    return {
        **figures,
        "packed_bytes": sum(files.written[f"{PACKED}/{file}"]["bytes"] for file in plan.files),
        "packed_embedding_bytes": embedding_bytes(plan.weight_bytes, model, units),
    }


def embedding_bytes(sizes: Mapping[str, int], model: Any, units: Iterable[Unit]) -> int:
    """Return the bytes of a checkpoint's embeddings, of inputs and outputs, packed or not.

    Args:
        sizes: bytes of its weights, by their names in the files.
        model: on the meta device is enough.
        units: what its files hold.
    """
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    modules += [module for module in [model.get_output_embeddings()] if module is not None]
    held = {id(parameter) for module in modules for parameter in module.parameters()}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in held}
    files = {file for unit in units if names & unit.sources.keys() for file in unit.outputs}
    return sum(size for name, size in sizes.items() if name in files)
