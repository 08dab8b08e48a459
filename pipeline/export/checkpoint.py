"""The export stage: a plain Hugging Face checkpoint that loads everywhere, checked by loading it back."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import field_validator

from mgpp import coverage_of
from pipeline.errors import StageError
from pipeline.export.model_card import write_card
from pipeline.models.loading import load_model, load_tokenizer
from pipeline.models.source import ModelConfig
from pipeline.models.weights import fingerprints, positive_zeros
from pipeline.section import Section

_SIZE = re.compile(r"^\d+(\.\d+)?[KMGT]B$", re.ASCII)


class ExportConfig(Section):
    """How the pruned model is written."""

    max_shard_size: str = "5GB"
    """Largest safetensors file ("500MB", "5GB"); larger models are cut into several."""

    @field_validator("max_shard_size")
    @classmethod
    def _is_a_size(cls, given: str) -> str:
        if not _SIZE.match(given) or not float(given[:-2]):
            raise ValueError("not a size; allowed are KB, MB, GB and TB (500MB)")
        return given


def export_model(
    *,
    trained: Path,
    weights: dict[str, Any],
    auto_model: str,
    pruning: dict[str, Any],
    card: dict[str, Any],
    config: ExportConfig,
    trust_remote_code: bool,
    output: Path,
    exclude: Sequence[str] = (),
) -> dict[str, Any]:
    """Write `output/model`: safetensors, config with `pruning_config`, tokenizer and model card.

    The zeros are stored as zeros, so every tool that reads Hugging Face checkpoints loads it. What is
    written is loaded back and compared, tensor by tensor, with the fingerprints taken of the weights
    in training.

    Args:
        trained: the trained model's folder.
        weights: fingerprints by parameter name, from the training stage.
        auto_model: the transformers auto class.
        pruning: what goes to config.json under `pruning_config`; what is there already of a model that
            was pruned before goes under its `upstream`.
        card: figures for the model card.
        config: how it is written.
        trust_remote_code: run code that comes with the model.
        output: the stage's folder.
        exclude: patterns of weights that were left out of pruning on purpose.

    Returns:
        Exact sparsity of the exported files and their sizes in bytes, and what of the model is prunable.

    Raises:
        StageError: if what loads back is not what was trained.
    """
    model = load_model(
        ModelConfig(path=str(trained), trust_remote_code=trust_remote_code),
        auto_model,
        model_kwargs={},
        dtype="auto",
        seed=0,
        new_head=False,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(positive_zeros(parameter))
    # What it says of the model that this one began from, where that was pruned already.
    upstream = getattr(model.config, "pruning_config", None)
    model.config.pruning_config = {**pruning, "upstream": upstream} if upstream else pruning
    folder = output / "model"
    model.save_pretrained(folder, max_shard_size=config.max_shard_size)
    del model
    load_tokenizer(ModelConfig(path=str(trained))).save_pretrained(folder)
    auto = getattr(transformers, auto_model)
    found = check_export(
        folder, weights, auto, trust_remote_code=trust_remote_code, exclude=exclude
    )
    write_card(folder, {**card, "upstream": upstream})
    return {
        **found,
        "bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
        "num_files": len(list(folder.glob("*.safetensors"))),
    }


def check_export(
    folder: Path,
    weights: dict[str, Any],
    auto: Any,
    *,
    trust_remote_code: bool,
    exclude: Sequence[str] = (),
) -> dict[str, Any]:
    """Load a checkpoint back and compare every parameter with its fingerprint.

    Returns:
        Zeros and elements over all prunable weights and over the whole model, as found in what was
        loaded.

    Raises:
        StageError: naming the first parameter that differs, or weights that were newly initialized.
    """
    model, report = auto.from_pretrained(
        folder, dtype="auto", output_loading_info=True, trust_remote_code=trust_remote_code
    )
    wrong = {kind: sorted(names) for kind, names in report.items() if names}
    if wrong:
        raise StageError(f"{folder} does not load cleanly: {wrong}")
    prunable = [name for name, entry in weights.items() if "zeros" in entry]
    loaded = fingerprints(model.named_parameters(), prunable)
    different = sorted(
        name for name in {*weights, *loaded} if weights.get(name) != loaded.get(name)
    )
    if different:
        name = different[0]
        raise StageError(
            f"{len(different)} of {len(weights)} parameters of {folder} differ from what was trained; "
            f"first {name}: trained {weights.get(name)}, loaded {loaded.get(name)}"
        )
    parameters = dict(model.named_parameters())
    if any(torch.signbit(p[p == 0]).any() for p in parameters.values()):
        raise StageError(f"{folder} holds negative zeros")
    zeros = {name: int((parameter == 0).sum()) for name, parameter in parameters.items()}
    num_zeros = sum(zeros[name] for name in prunable)
    num_parameters = sum(p.numel() for p in parameters.values())
    covered = coverage_of(model, prunable, exclude)
    num_prunable = sum(parameters[name].numel() for name in prunable)
    return {
        "num_zeros": num_zeros,
        "num_prunable": num_prunable,
        "sparsity": num_zeros / num_prunable if num_prunable else 0.0,
        "num_parameters": num_parameters,
        "model_zeros": sum(zeros.values()),
        "model_sparsity": sum(zeros.values()) / num_parameters,
        "left_out": covered.left_out,
        "warnings": [covered.warning] if covered.warning else [],
    }


def read_weights(folder: Path, name: str) -> dict[str, Any]:
    """Read the fingerprints a training stage wrote."""
    values: dict[str, Any] = json.loads((folder / name).read_text())
    return values
