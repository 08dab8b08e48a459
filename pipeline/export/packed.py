"""The packed copy of an exported checkpoint, and how much of the files are embeddings."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from mgpp.sparse.checkpoint import NothingToPackError, pack_checkpoint, tensor_bytes
from pipeline.saving.contents import Unit

PACKED = "packed"


def write_packed(
    output: Path, model: Any, units: Iterable[Unit], figures: dict[str, Any]
) -> dict[str, Any]:
    """Write `output/packed` of `output/model`; where nothing gets smaller, that is a warning.

    Args:
        output: the stage's folder.
        model: on the meta device is enough.
        units: what its files hold.
        figures: of the plain checkpoint.

    Returns:
        The figures, with sizes of the packed one in bytes.
    """
    folder = output / PACKED
    try:
        found = pack_checkpoint(output / "model", folder)
    except NothingToPackError:
        warning = "no packed copy is written: no matrix has so many zeros that it would be smaller"
        return {**figures, "warnings": [*figures["warnings"], warning]}
    return {
        **figures,
        "packed_bytes": found.packed_bytes,
        "packed_embedding_bytes": embedding_bytes(folder, model, units),
    }


def embedding_bytes(folder: Path, model: Any, units: Iterable[Unit]) -> int:
    """Return the bytes of a checkpoint's embeddings, of inputs and outputs, packed or not.

    Args:
        folder: of the checkpoint.
        model: on the meta device is enough.
        units: what its files hold.
    """
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    modules += [module for module in [model.get_output_embeddings()] if module is not None]
    held = {id(parameter) for module in modules for parameter in module.parameters()}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in held}
    files = {file for unit in units if names & unit.sources.keys() for file in unit.outputs}
    return sum(size for name, size in tensor_bytes(folder).items() if name in files)
