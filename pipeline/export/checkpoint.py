"""The export stage: a plain Hugging Face checkpoint that loads everywhere, read back and compared."""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import transformers
from pydantic import field_validator, model_validator
from torch import Tensor

from mgpp import coverage_of
from mgpp.sparse.zeros import pattern_of
from mgpp.tensor_file import TensorFile
from pipeline.errors import Problem, SettingError, StageError
from pipeline.export.model_card import write_card
from pipeline.export.packed import embedding_bytes, write_packed
from pipeline.models.loading import load_tokenizer
from pipeline.models.source import ModelConfig
from pipeline.models.trial import on_a_copy
from pipeline.models.weights import Fingerprint, positive_zeros
from pipeline.saving.checkpoint_files import TensorReader, file_names, write_index
from pipeline.saving.contents import Spec, Unit, contents_of
from pipeline.section import Section

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
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
    exclude: Sequence[str] = (),
) -> dict[str, Any]:
    """Write `output/model`: safetensors, config with `pruning_config`, tokenizer and model card.

    The zeros are stored as zeros, so every tool that reads Hugging Face checkpoints loads it. Weights are
    copied from file to file a part at a time. What is written is read back and compared, parameter by
    parameter, with the fingerprints taken of the weights in training. Where `config.dtype` casts, what
    was trained is compared with these, and what is written with what was trained, cast. `config.format`
    may ask for a packed copy in `output/packed`.

    Args:
        trained: the trained model's folder.
        weights: fingerprints by parameter name, from the training stage.
        auto_model: the transformers auto class.
        pruning: what goes to config.json under `pruning_config`, beside the zeros by kind of matrix; what
            is there already of a model that was pruned before goes under its `upstream`.
        card: figures for the model card.
        config: how it is written.
        trust_remote_code: run code that comes with the model.
        output: the stage's folder.
        exclude: patterns of weights that were left out of pruning on purpose.

    Returns:
        Exact sparsity of the exported files, their dtype and sizes in bytes, and what of the model is
        prunable.

    Raises:
        StageError: if what was written is not what was trained, or does not load.
    """
    auto = getattr(transformers, auto_model)
    dtype = _DTYPES.get(config.dtype, "auto")
    model = _without_values(trained, auto, dtype=dtype, trust_remote_code=trust_remote_code)
    expected = weights
    if dtype != "auto":
        expected = _cast(trained, weights, model, auto, trust_remote_code=trust_remote_code)
    # What it says of the model that this one began from, where that was pruned already.
    upstream = getattr(model.config, "pruning_config", None)
    units = contents_of(model)
    noted = {**pruning, "zeros": _zeros_by_pattern(units, expected)}
    model.config.pruning_config = {**noted, "upstream": upstream} if upstream else noted
    folder = output / "model"
    model.save_pretrained(folder, state_dict={})  # all but the weights
    _write_weights(trained, folder, units, _size(config.max_shard_size))
    load_tokenizer(ModelConfig(path=str(trained))).save_pretrained(folder)
    found = check_export(
        folder, expected, auto, trust_remote_code=trust_remote_code, exclude=exclude
    )
    dtypes = {"dtype": _short(model.dtype), "cast_from": _cast_from(weights, expected)}
    of_files = {"upstream": upstream, "num_zeros": found["num_zeros"], **dtypes}
    write_card(folder, {**card, **of_files}, auto_model)
    found |= {
        **dtypes,
        "bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
        "num_files": len(list(folder.glob("*.safetensors"))),
        "embedding_bytes": embedding_bytes(folder, model, units),
    }
    return write_packed(output, model, units, found) if "packed" in config.format else found


def check_export(
    folder: Path,
    weights: dict[str, Any],
    auto: Any,
    *,
    trust_remote_code: bool,
    exclude: Sequence[str] = (),
) -> dict[str, Any]:
    """Compare a checkpoint's names with its model's, and every parameter with its fingerprint.

    Returns:
        Zeros and elements over all prunable weights and over the whole model, as found in the files.

    Raises:
        StageError: naming the first parameter that differs, or weights that would be newly initialized.
    """
    model = _without_values(folder, auto, trust_remote_code=trust_remote_code)
    prunable = [name for name, entry in weights.items() if "zeros" in entry]
    found = _read(folder, model, auto, prunable, trust_remote_code=trust_remote_code)
    _check_same(folder, weights, found)
    if found.unusable:
        raise StageError(f"{folder} holds {found.unusable}")
    parameters = dict(model.named_parameters())
    num_zeros = sum(found.zeros[name] for name in prunable)
    num_parameters = sum(p.numel() for p in parameters.values())
    covered = coverage_of(model, prunable, exclude)
    num_prunable = sum(parameters[name].numel() for name in prunable)
    model_zeros = sum(found.zeros.values())
    return {
        "num_zeros": num_zeros,
        "num_prunable": num_prunable,
        "sparsity": num_zeros / num_prunable if num_prunable else 0.0,
        "num_parameters": num_parameters,
        "model_zeros": model_zeros,
        "model_sparsity": model_zeros / num_parameters,
        "left_out": covered.left_out,
        "warnings": [covered.warning] if covered.warning else [],
    }


def _cast(
    trained: Path, weights: Mapping[str, Any], model: Any, auto: Any, *, trust_remote_code: bool
) -> dict[str, Any]:
    """Compare what was trained with its fingerprints, and return those of it in the model's dtypes.

    Raises:
        StageError: naming the first parameter that differs.
    """
    prunable = [name for name, entry in weights.items() if "zeros" in entry]
    as_trained = _without_values(trained, auto, trust_remote_code=trust_remote_code)
    found = _read(trained, as_trained, auto, prunable, trust_remote_code=trust_remote_code)
    _check_same(trained, weights, found)
    found = _read(trained, model, auto, prunable, trust_remote_code=trust_remote_code, cast=True)
    return found.entries


def _read(
    folder: Path,
    model: Any,
    auto: Any,
    prunable: Collection[str],
    *,
    trust_remote_code: bool,
    cast: bool = False,
) -> "_Found":
    """Read a checkpoint's parameters, and cast them to the model's dtypes or not.

    The files are read a part at a time. Only a model whose parameters transformers makes of several
    tensors each, which is none of the large ones, is loaded whole.
    """
    found = _Found(prunable)
    units = [unit for unit in contents_of(model) if not unit.buffer]
    if all(unit.direct for unit in units):
        _check_conversion(model, auto, units, trust_remote_code=trust_remote_code)
        reader = TensorReader(folder)
        for unit in units:
            ((name, spec),) = unit.sources.items()
            parts = (part for file in unit.outputs for part in reader.parts(file))
            found.add(name, spec, (part.to(spec.dtype) if cast else part for part in parts))
    else:
        loaded = auto.from_pretrained(
            folder, dtype=model.dtype if cast else "auto", trust_remote_code=trust_remote_code
        )
        for name, tensor in loaded.named_parameters():
            found.add(name, Spec(tensor.dtype, tuple(tensor.shape)), [tensor.detach()])
    return found


def _check_same(folder: Path, weights: Mapping[str, Any], found: "_Found") -> None:
    different = sorted(
        name for name in {*weights, *found.entries} if weights.get(name) != found.entries.get(name)
    )
    if different:
        name = different[0]
        raise StageError(
            f"{len(different)} of {len(weights)} parameters of {folder} differ from what was trained; "
            f"first {name}: trained {weights.get(name)}, found {found.entries.get(name)}"
        )


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


class _Found:
    """What parameters turn out to be as they are read, part by part.

    Attributes:
        entries: fingerprints by name.
        zeros: how many each holds, by name.
        unusable: what no export may hold, in words; empty if there is nothing of it.
    """

    def __init__(self, prunable: Collection[str]) -> None:
        self._prunable = set(prunable)
        self.entries: dict[str, dict[str, Any]] = {}
        self.zeros: dict[str, int] = {}
        self.unusable = ""

    def add(self, name: str, spec: Spec, parts: Iterable[Tensor]) -> None:
        """Read a parameter."""
        fingerprint = Fingerprint(count_zeros=name in self._prunable)
        self.zeros[name] = 0
        for part in parts:
            fingerprint.update(positive_zeros(part))
            zero = part == 0
            self.zeros[name] += int(zero.sum())
            if torch.signbit(part[zero]).any():
                self.unusable = "negative zeros"
            if part.is_floating_point() and not torch.isfinite(part).all():
                self.unusable = f"values of {name} that are not finite"
        self.entries[name] = fingerprint.entry(spec.shape, spec.dtype)


def _without_values(
    folder: Path, auto: Any, *, trust_remote_code: bool, dtype: torch.dtype | str = "auto"
) -> Any:
    """Return a checkpoint's model on the meta device.

    Raises:
        StageError: if its names and shapes are not the model's.
    """
    model, report = auto.from_pretrained(
        folder,
        dtype=dtype,
        device_map="meta",
        output_loading_info=True,
        trust_remote_code=trust_remote_code,
    )
    wrong = {kind: sorted(names) for kind, names in report.items() if names}
    if wrong:
        raise StageError(f"{folder} does not load cleanly: {wrong}")
    return model


def _write_weights(trained: Path, folder: Path, units: list[Unit], max_bytes: int) -> None:
    """Copy the weights with plain zeros, cast, a part at a time, to files of at most so many bytes."""
    reader = TensorReader(trained)
    files: list[dict[str, Spec]] = []
    room = 0
    for name, spec in ((name, spec) for unit in units for name, spec in unit.outputs.items()):
        if spec.nbytes > room:
            files.append({})
            room = max_bytes
        files[-1][name] = spec
        room -= spec.nbytes
    named = dict(zip(file_names(len(files)), files, strict=True))
    for file_name, specs in named.items():
        with (folder / file_name).open("wb") as stream:
            tensors = {name: (spec.dtype, spec.shape) for name, spec in specs.items()}
            file = TensorFile(stream, tensors, {"format": "pt"})
            for name in file.order:
                for part in reader.parts(name):
                    file.write(name, positive_zeros(part.to(specs[name].dtype)))
            file.finish()
    write_index(folder, named)


def _check_conversion(
    model: Any, auto: Any, units: Iterable[Unit], *, trust_remote_code: bool
) -> None:
    """Make sure that transformers loads what it cuts up, such as experts, as what it was.

    It does so to a small copy of the model with values.

    Raises:
        StageError: if a parameter of the copy is another after it was saved and loaded.
    """
    if not any(unit.reshapes for unit in units):
        return

    def different(copy: Any) -> list[str]:
        with TemporaryDirectory() as folder:
            copy.save_pretrained(folder)
            loaded = auto.from_pretrained(folder, trust_remote_code=trust_remote_code)
        pairs = zip(copy.named_parameters(), loaded.named_parameters(), strict=True)
        return [name for (name, saved), (_, back) in pairs if not torch.equal(saved, back)]

    wrong = on_a_copy(model.config, auto.__name__, trust_remote_code, different)
    if wrong is None:
        raise StageError(f"no small copy of {type(model).__name__} could be saved and loaded")
    if wrong:
        raise StageError(f"transformers does not load {wrong[0]} of a small copy as it saved it")


def _size(text: str) -> int:
    """Return the bytes of a size such as 5GB."""
    return int(float(text[:-2]) * 1000 ** ("KMGT".index(text[-2]) + 1))


def read_weights(folder: Path, name: str) -> dict[str, Any]:
    """Read the fingerprints a training stage wrote."""
    values: dict[str, Any] = json.loads((folder / name).read_text())
    return values
