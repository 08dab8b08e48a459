"""A pruned checkpoint, plain or packed, as a model that passes over its zeros."""

import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from mgpp.sparse.sparsify import TOKENS, sparsify_
from mgpp.sparse.speed import SpeedTable


def load(
    folder: str | Path,
    *,
    tokens: Sequence[int] = TOKENS,
    table: SpeedTable | None = None,
    **settings: Any,
) -> Any:
    """Load a checkpoint for inference in float32 on a CPU, with sparse layers where they are faster.

    Warns, with the most frequent reason, if no layer is.

    Args:
        folder: plain or packed, of Hugging Face's layout.
        tokens: as `sparsify_` takes them.
        table: likewise.
        settings: further arguments of `from_pretrained`.

    Returns:
        The model of the class that its configuration names, in evaluation mode.

    Raises:
        ModuleNotFoundError: if transformers is not installed.
        ValueError: if the configuration names no class of transformers.
    """
    model = load_dense(folder, **settings)
    found = sparsify_(model, tokens=tokens, table=table)
    if not found.replaced:
        warnings.warn(f"{folder}: all layers stay dense: {found.most_kept}", stacklevel=2)
    return model


def load_dense(folder: str | Path, *, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """Load a checkpoint for inference as the class that its configuration names, all layers dense.

    Args:
        folder: plain or packed, of Hugging Face's layout.
        dtype: of the weights in memory.
        settings: further arguments of `from_pretrained`.

    Raises:
        ModuleNotFoundError: if transformers is not installed.
        ValueError: if the configuration names no class of transformers.
    """
    try:
        transformers = import_module("transformers")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "mgpp.sparse.load needs transformers: pip install 'mgpp[pipeline]'", name="transformers"
        ) from error
    import_module("mgpp.integrations.transformers")  # which registers the packed format
    named = transformers.AutoConfig.from_pretrained(folder).architectures or [""]
    head = getattr(transformers, named[0], None)
    if head is None:
        raise ValueError(
            f"{folder}: config.json names no model class of transformers (architectures: {named[0]!r}); "
            "load it yourself and call mgpp.sparse.sparsify_"
        )
    return head.from_pretrained(folder, dtype=dtype, **settings).eval()
