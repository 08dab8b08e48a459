"""What an export holds, read back and compared with what was trained."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor

from mgpp import coverage_of
from pipeline.errors import StageError
from pipeline.export.weights import FILES_AT_ONCE
from pipeline.models.trial import on_a_copy
from pipeline.models.weights import Fingerprint, positive_zeros
from pipeline.saving.checkpoint_files import TensorReader
from pipeline.saving.contents import Spec, Unit, contents_of
from pipeline.storage.writing import run_at_once


def check_export(
    folder: Path,
    tensors: TensorReader,
    weights: dict[str, Any],
    auto: Any,
    *,
    trust_remote_code: bool,
    exclude: Sequence[str] = (),
) -> dict[str, Any]:
    """Compare a checkpoint's names with its model's, and every parameter with its fingerprint.

    Args:
        folder: with the model's configuration.
        tensors: its weights, which may be elsewhere.
        weights: fingerprints by parameter name.
        auto: the transformers auto class.
        trust_remote_code: run code that comes with the model.
        exclude: patterns of weights that were left out of pruning on purpose.

    Returns:
        Zeros and elements over all prunable weights and over the whole model, as found in the files.

    Raises:
        StageError: naming the first parameter that differs, or weights that would be newly initialized.
    """
    model = _model_of(folder, tensors, auto, trust_remote_code=trust_remote_code)
    prunable = [name for name, entry in weights.items() if "zeros" in entry]
    found = _read(tensors, model, auto, prunable, trust_remote_code=trust_remote_code)
    _check_same(tensors.url, weights, found)
    if found.unusable:
        raise StageError(f"{tensors.url} holds {found.unusable}")
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


def cast_fingerprints(
    trained: TensorReader,
    weights: Mapping[str, Any],
    model: Any,
    auto: Any,
    *,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Compare what was trained with its fingerprints, and return those of it in the model's dtypes.

    Args:
        trained: the trained weights, in a local folder.
        weights: fingerprints by parameter name.
        model: on the meta device, in the dtypes that are asked for.
        auto: the transformers auto class.
        trust_remote_code: run code that comes with the model.

    Raises:
        StageError: naming the first parameter that differs.
    """
    prunable = [name for name, entry in weights.items() if "zeros" in entry]
    as_trained = without_values(Path(trained.url), auto, trust_remote_code=trust_remote_code)
    found = _read(trained, as_trained, auto, prunable, trust_remote_code=trust_remote_code)
    _check_same(trained.url, weights, found)
    found = _read(trained, model, auto, prunable, trust_remote_code=trust_remote_code, cast=True)
    return found.entries


def without_values(
    folder: Path, auto: Any, *, trust_remote_code: bool, dtype: torch.dtype | str = "auto"
) -> Any:
    """Return a local checkpoint's model on the meta device.

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
    _check_report(str(folder), report)
    return model


def _model_of(folder: Path, tensors: TensorReader, auto: Any, *, trust_remote_code: bool) -> Any:
    """Return on the meta device what transformers makes of a configuration and of tensors' shapes.

    Raises:
        StageError: if names and shapes are not the model's.
    """
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        kind = type(auto.from_config(config, trust_remote_code=trust_remote_code))
        empty = {n: torch.empty(s.shape, dtype=s.dtype) for n, s in tensors.specs.items()}
    model, report = kind.from_pretrained(
        None,
        config=config,
        state_dict=empty,
        dtype="auto",
        device_map="meta",
        output_loading_info=True,
    )
    _check_report(tensors.url, report)
    return model


def _check_report(url: str, report: Mapping[str, Any]) -> None:
    wrong = {kind: sorted(names) for kind, names in report.items() if names}
    if wrong:
        raise StageError(f"{url} does not load cleanly: {wrong}")


def _read(
    tensors: TensorReader,
    model: Any,
    auto: Any,
    prunable: Collection[str],
    *,
    trust_remote_code: bool,
    cast: bool = False,
) -> "_Found":
    """Read a checkpoint's parameters, and cast them to the model's dtypes or not.

    The files are read a part at a time, several parameters at once. Only a model whose parameters
    transformers makes of several tensors each, which is none of the large ones, is loaded whole, from a
    local folder.
    """
    found = _Found(prunable)
    units = [unit for unit in contents_of(model) if not unit.buffer]
    if all(unit.direct for unit in units):
        _check_conversion(model, auto, units, trust_remote_code=trust_remote_code)

        def read(unit: Unit) -> None:
            ((name, spec),) = unit.sources.items()
            parts = (part for file in unit.outputs for part in tensors.parts(file))
            found.add(name, spec, (part.to(spec.dtype) if cast else part for part in parts))

        run_at_once((partial(read, unit) for unit in units), FILES_AT_ONCE)
    else:
        loaded = auto.from_pretrained(
            tensors.url,
            dtype=model.dtype if cast else "auto",
            trust_remote_code=trust_remote_code,
        )
        for name, tensor in loaded.named_parameters():
            found.add(name, Spec(tensor.dtype, tuple(tensor.shape)), [tensor.detach()])
    return found


def _check_same(url: str, weights: Mapping[str, Any], found: "_Found") -> None:
    different = sorted(
        name for name in {*weights, *found.entries} if weights.get(name) != found.entries.get(name)
    )
    if different:
        name = different[0]
        raise StageError(
            f"{len(different)} of {len(weights)} parameters of {url} differ from what was trained; "
            f"first {name}: trained {weights.get(name)}, found {found.entries.get(name)}"
        )


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
