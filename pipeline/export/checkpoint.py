"""The export stage: a plain Hugging Face checkpoint that loads everywhere, read back and compared."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from pydantic import field_validator, model_validator

from mgpp.sparse.zeros import pattern_of
from pipeline.errors import Problem, SettingError
from pipeline.export.check import cast_fingerprints, check_export, without_values
from pipeline.export.model_card import write_card
from pipeline.export.packed import embedding_bytes, write_packed
from pipeline.export.weights import ExportedWeights
from pipeline.models.loading import load_tokenizer
from pipeline.models.source import ModelConfig
from pipeline.saving.checkpoint_files import TensorReader, write_index
from pipeline.saving.contents import Unit, contents_of
from pipeline.section import Section
from pipeline.storage.outputs import OutputFiles

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MODEL = "model"
_SIZE = re.compile(r"^\d+(\.\d+)?[KMGT]B$", re.ASCII)


class ExportConfig(Section):
    """How the pruned model is written."""

    max_shard_size: str = "5GB"
    """Largest safetensors file ("500MB", "5GB"); larger models are cut into several."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Of the weights in the files; auto keeps that of training: bf16 under zero.precision bf16."""
    format: tuple[Literal["plain", "packed", "onnx"], ...] = ("plain",)
    """Which copies are written: plain, which every tool reads; packed, which leaves out the zeros; onnx,
    for ONNX Runtime, of encoders with a classification or question-answering head."""
    onnx_int8: bool = False
    """With onnx, also write it with weights rounded to 8 bits."""
    bench: bool = False
    """Measure the exported model on the CPU, as `mgpp bench` does; tables and a figure in the report."""

    @field_validator("format")
    @classmethod
    def _has_plain(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        if "plain" not in given or len(set(given)) < len(given):
            raise ValueError("allowed are [plain], and packed and onnx beside it, each once")
        return given

    @model_validator(mode="after")
    def _has_onnx(self) -> "ExportConfig":
        if self.onnx_int8 and "onnx" not in self.format:
            hint = "add onnx to export.format"
            raise SettingError(Problem("onnx_int8", got=True, hint=hint))
        return self

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
    files: OutputFiles,
    exclude: Sequence[str] = (),
) -> dict[str, Any]:
    """Write `model`: safetensors, config with `pruning_config`, tokenizer and model card.

    The zeros are stored as zeros, so every tool that reads Hugging Face checkpoints loads it. Weights are
    copied to `files` a part at a time; all else is written to `output`. What is written is read back
    and compared, parameter by parameter, with the fingerprints taken of the weights in training. Where
    `config.dtype` casts, what was trained is compared with these, and what is written with what was
    trained, cast. `config.format` may ask for a packed copy in `packed`.

    Args:
        trained: the trained model's folder.
        weights: fingerprints by parameter name, from the training stage.
        auto_model: the transformers auto class.
        pruning: what goes to config.json under `pruning_config`, beside the zeros by kind of matrix; what
            is there already of a model that was pruned before goes under its `upstream`.
        card: figures for the model card.
        config: how it is written.
        trust_remote_code: run code that comes with the model.
        output: the stage's folder on this machine.
        files: what writes the weights: to the same folder, or storage. A model whose parameters
            transformers makes of several tensors each is compared in a folder: its weights are written
            to `output`.
        exclude: patterns of weights that were left out of pruning on purpose.

    Returns:
        Exact sparsity of the exported files, their dtype and sizes in bytes, and what of the model is
        prunable.

    Raises:
        StageError: if what was written is not what was trained, or does not load.
    """
    auto = getattr(transformers, auto_model)
    dtype = _DTYPES.get(config.dtype, "auto")
    model = without_values(trained, auto, dtype=dtype, trust_remote_code=trust_remote_code)
    reader, expected = TensorReader(str(trained)), weights
    if dtype != "auto":
        expected = cast_fingerprints(
            reader, weights, model, auto, trust_remote_code=trust_remote_code
        )
    # What it says of the model that this one began from, where that was pruned already.
    upstream = getattr(model.config, "pruning_config", None)
    units = contents_of(model)
    if not all(unit.direct for unit in units):
        files = OutputFiles(str(output))
    noted = {**pruning, "zeros": _zeros_by_pattern(units, expected)}
    model.config.pruning_config = {**noted, "upstream": upstream} if upstream else noted
    folder = output / MODEL
    model.save_pretrained(folder, state_dict={})  # all but the weights
    exported = ExportedWeights(reader, units, _size(config.max_shard_size))
    exported.write(files, MODEL)
    write_index(folder, exported.specs)
    load_tokenizer(ModelConfig(path=str(trained))).save_pretrained(folder)
    found = check_export(
        folder,
        TensorReader(f"{files.url}/{MODEL}", exported.files),
        expected,
        auto,
        trust_remote_code=trust_remote_code,
        exclude=exclude,
    )
    dtypes = {"dtype": _short(model.dtype), "cast_from": _cast_from(weights, expected)}
    of_files = {"upstream": upstream, "num_zeros": found["num_zeros"], **dtypes}
    write_card(folder, {**card, **of_files}, auto_model)
    found |= {
        **dtypes,
        "bytes": sum(files.written[f"{MODEL}/{file}"]["bytes"] for file in exported.files),
        "num_files": len(exported.files),
        "embedding_bytes": embedding_bytes(exported.weight_bytes, model, units),
    }
    if "packed" not in config.format:
        return found
    return write_packed(output, files, exported, model, units, found)


def _zeros_by_pattern(units: Iterable[Unit], weights: Mapping[str, Any]) -> dict[str, int]:
    """Return the zeros of prunable weights, as `mgpp.sparse.zeros` compares them with files."""
    found: dict[str, int] = {}
    for unit in units:
        zeros = [
            weights[name]["zeros"] for name in unit.sources if "zeros" in weights.get(name, {})
        ]
        if zeros:
            pattern = pattern_of(*unit.outputs)
            found[pattern] = found.get(pattern, 0) + sum(zeros)
    return found


def _cast_from(weights: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """Return the dtype that weights were trained in, if they are written in another."""
    dtypes = ((entry["dtype"], expected[name]["dtype"]) for name, entry in weights.items())
    return next((before for before, after in dtypes if before != after), None)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(text: str) -> int:
    """Return the bytes of a size such as 5GB."""
    return int(float(text[:-2]) * 1000 ** ("KMGT".index(text[-2]) + 1))


def read_weights(folder: Path, name: str) -> dict[str, Any]:
    """Read the fingerprints a training stage wrote."""
    values: dict[str, Any] = json.loads((folder / name).read_text())
    return values
