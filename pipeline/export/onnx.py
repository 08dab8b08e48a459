"""The ONNX copy of an exported checkpoint: an encoder with a head, checked on real rows."""

import logging
import shutil
import warnings
import zlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from hashlib import sha256
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from pipeline.errors import Problem, StageError, error_text
from pipeline.models.trial import draw, on_a_copy

ONNX = "onnx"
MODEL, INT8 = "model.onnx", "model_int8.onnx"
TOLERANCE = 1e-4  # of logits, absolute
# What a model with each head returns.
OUTPUTS = {
    "AutoModelForSequenceClassification": ("logits",),
    "AutoModelForQuestionAnswering": ("start_logits", "end_logits"),
}
_NEEDED = ("onnx", "onnxruntime", "onnxscript")
_COPIES = (
    5  # of the weights in float32, in memory at once: torch, the graph, its bytes, ONNX Runtime
)
_PART = 1 << 20  # bytes that are compressed at a time
_CARD = """
<!-- mgpp-onnx -->

## ONNX

This copy is for ONNX Runtime, with `pip install onnxruntime transformers`:

```python
inputs = AutoTokenizer.from_pretrained(FOLDER)("some text", return_tensors="np")
session = onnxruntime.InferenceSession(f"{{FOLDER}}/{file}")
[{outputs}] = session.run(None, {{name: value.astype("int64") for name, value in inputs.items()}})
```

Batch and length are free. The weights are float32{int8}; zeros are stored as zeros.

<!-- /mgpp-onnx -->
"""

Batch = Mapping[str, Tensor]


def onnx_problems(
    settings: Any, auto_model: str, task_type: str, *, names: Sequence[str], trust_remote_code: bool
) -> list[Problem]:
    """Return why a model cannot be exported to ONNX; a small copy of it is exported to see.

    Args:
        settings: the model's own configuration.
        auto_model: the transformers auto class that builds it.
        task_type: of the run.
        names: of the inputs that its tokenizer makes.
        trust_remote_code: run code that comes with the model.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    key, got = "export.format", ONNX
    if missing:
        hint = "pip install 'mgpp[onnx]'"
        return [Problem(key, f"needs {', '.join(missing)}", got=got, hint=hint)]
    what = "only encoders with a classification or question-answering head are exported to ONNX"
    if auto_model not in OUTPUTS:
        return [Problem(key, f"{what}, not task.type {task_type}", got=got, hint="leave it out")]
    if not is_encoder(settings):
        kind = settings.model_type
        return [Problem(key, f"{what}; {kind} has a decoder", got=got, hint="leave it out")]

    def look(model: Any) -> str:
        ids = draw(model, 8)
        fill = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs = {name: fill.get(name, torch.zeros_like(ids)).repeat(2, 1) for name in names}
        try:
            _program(model, inputs, OUTPUTS[auto_model])
        except Exception as error:  # noqa: BLE001  # torch's exporter raises what the model's code does
            return error_text(error.__cause__ or error)
        return ""

    failed = on_a_copy(settings, auto_model, trust_remote_code, look)
    if not failed:
        return []
    why = f"torch cannot export {settings.model_type} to ONNX: {failed}"
    return [Problem(key, why, got=got, hint="leave it out")]


def is_encoder(settings: Any) -> bool:
    """Return whether a model, by its configuration, reads a whole text at once and writes none."""
    kind = settings.model_type
    only_decodes = (
        kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )
    marked = settings.is_encoder_decoder or getattr(settings, "is_decoder", False)
    return not (marked or only_decodes)


def onnx_memory(num_bytes: int, itemsize: int) -> int:
    """Return the memory that an export to ONNX takes, in bytes.

    Args:
        num_bytes: of the weights as they were trained.
        itemsize: bytes of one of these.
    """
    return _COPIES * num_bytes * 4 // itemsize


def write_onnx(
    output: Path,
    auto_model: str,
    batches: Sequence[Batch],
    *,
    prunable: Collection[str],
    int8: bool,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Write `output/onnx` of `output/model`: float32, with its zeros, and compare the two on rows.

    Args:
        output: the stage's folder.
        auto_model: the transformers auto class.
        batches: of real rows, of several sizes and lengths; the largest is traced.
        prunable: names of the parameters whose zeros are looked for.
        int8: also write weights rounded to 8 bits, inputs of products rounded as they come.
        trust_remote_code: run code that comes with the model.

    Returns:
        Sizes in bytes, plain and compressed, the largest difference of logits, and the zeros that were
        found.

    Raises:
        StageError: if torch cannot export the model, logits differ, or zeros are lost.
    """
    source, folder = output / "model", output / ONNX
    auto, names = getattr(transformers, auto_model), OUTPUTS[auto_model]
    model = auto.from_pretrained(
        source, dtype=torch.float32, trust_remote_code=trust_remote_code
    ).eval()
    folder.mkdir()
    largest = max(batches, key=lambda batch: batch["input_ids"].numel())
    try:
        program = _program(model, largest, names)
    except Exception as error:
        raise StageError(
            f"torch cannot export the model to ONNX: {error_text(error.__cause__ or error)}"
        ) from error
    program.save(folder / MODEL)  # above 2 GB the weights are in a file beside it
    del program
    parameters = {name: p.detach() for name, p in model.named_parameters() if name in prunable}
    found: dict[str, Any] = {"onnx_num_zeros": _num_zeros(folder / MODEL, parameters)}
    found["onnx_difference"] = _difference(folder / MODEL, model, batches, names)
    if not found["onnx_difference"] <= TOLERANCE:
        raise StageError(
            f"logits of {folder / MODEL} differ by {found['onnx_difference']:.2g} from those of torch "
            f"on validation rows; at most {TOLERANCE:g} is allowed"
        )
    found |= _sizes(folder, MODEL, "onnx")
    if int8:
        _quantize(folder)
        found["onnx_int8_difference"] = _difference(folder / INT8, model, batches, names)
        found |= _sizes(folder, INT8, "onnx_int8")
    _copy_rest(source, folder, names, int8=int8)
    return found


def batches_of(rows: Any, lengths: Sequence[int], collate: Any) -> list[Batch]:
    """Return batches of real rows, of several sizes and lengths, without labels.

    Args:
        rows: tokenized.
        lengths: of each row.
        collate: makes a batch of rows.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    chosen = [order[:1], (order * 2)[-2:], order[:: max(1, len(order) // 16)], order[-8:]]
    made = [_inputs(collate([rows[i] for i in some])) for some in chosen]
    longest = made[-1]["input_ids"].shape[1]
    # Where all rows are of one length, another one all the same.
    return [*made, {name: values[:, : (longest + 1) // 2] for name, values in made[-1].items()}]


def _inputs(batch: Batch) -> dict[str, Tensor]:
    return {name: values for name, values in batch.items() if name != "labels"}


def _program(model: Any, inputs: Batch, names: Sequence[str]) -> Any:
    """Return torch's ONNX program of a model, with batch and length free."""
    for extra in ("output_hidden_states", "output_attentions", "use_cache"):
        if hasattr(model.config, extra):
            setattr(model.config, extra, False)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with _quiet(), torch.no_grad():
        return torch.onnx.export(
            model,
            (),
            kwargs=dict(inputs),
            dynamo=True,
            verbose=False,
            input_names=list(inputs),
            output_names=list(names),
            dynamic_shapes=dict.fromkeys(inputs, free),
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep hints of torch and ONNX Runtime for their developers from between a run's lines.

    What torch cannot export is raised, and printed besides with its whole graph.
    """
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@torch.inference_mode()
def _difference(path: Path, model: Any, batches: Sequence[Batch], names: Sequence[str]) -> float:
    """Return the largest difference of logits over batches; infinite where one is not a number."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    known = {
        each.name for each in session.get_inputs()
    }  # what a graph does not use is no input of it
    largest = 0.0
    for batch in batches:
        want = model(**batch)
        given = {name: values.numpy() for name, values in batch.items() if name in known}
        for name, got in zip(names, session.run(list(names), given), strict=True):
            expected = want[name].numpy()
            if got.shape != expected.shape:
                return float("inf")
            difference = float(np.abs(got - expected).max())
            largest = max(largest, difference) if np.isfinite(difference) else float("inf")
    return largest


def _num_zeros(path: Path, parameters: Mapping[str, Tensor]) -> int:
    """Return the zeros of parameters as the file has them; each is found by its numbers, in any order.

    An exporter transposes matrices and gives them other names.

    Raises:
        StageError: naming the first one whose numbers are in no tensor of the file.
    """
    import onnx
    from onnx import numpy_helper

    sizes = {parameter.numel() for parameter in parameters.values()}
    zeros: dict[bytes, list[int]] = defaultdict(list)
    for tensor in onnx.load(path).graph.initializer:
        if np.prod(tensor.dims, dtype=np.int64) in sizes:
            values = numpy_helper.to_array(tensor, str(path.parent))
            zeros[_numbers(values)].append(int((values == 0).sum()))
    total = 0
    for name, parameter in parameters.items():
        found = zeros.get(_numbers(parameter.numpy()))
        if found is None:
            raise StageError(f"{path}: no tensor has the numbers of {name}: its zeros are lost")
        total += found[0]
    return total


def _numbers(values: np.ndarray) -> bytes:
    """Return what tells numbers from others, whatever their order and shape."""
    return sha256(np.sort(values, axis=None).tobytes()).digest()


def _quantize(folder: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    large = len(list(folder.glob(f"{MODEL}*"))) > 1
    with _quiet():
        quantize_dynamic(
            folder / MODEL,
            folder / INT8,
            weight_type=QuantType.QInt8,  # symmetric: zero stays zero
            use_external_data_format=large,
        )


def _sizes(folder: Path, file: str, name: str) -> dict[str, int]:
    """Return the bytes of a model's files, and what they come to compressed as gzip does."""
    files = sorted(folder.glob(f"{file}*"))
    return {
        f"{name}_bytes": sum(path.stat().st_size for path in files),
        f"{name}_compressed_bytes": sum(map(_compressed, files)),
    }


def _compressed(path: Path) -> int:
    packer, size = zlib.compressobj(6), 0
    with path.open("rb") as stream:
        while part := stream.read(_PART):
            size += len(packer.compress(part))
    return size + len(packer.flush())


def _copy_rest(source: Path, folder: Path, names: Sequence[str], *, int8: bool) -> None:
    """Copy tokenizer and configuration, and say in the card how to load it."""
    for path in source.iterdir():
        if path.is_file() and ".safetensors" not in path.name:
            shutil.copyfile(path, folder / path.name)
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    words = f"; those of `{INT8}` are 8 bits" if int8 else ""
    values = {"file": MODEL, "outputs": ", ".join(names), "int8": words}
    card.write_text(text + _CARD.format(**values), encoding="utf-8")
