"""The trained model as a Hugging Face checkpoint, written by all workers.

    model/model-00001-of-00002.safetensors    each worker's own file, gathered in rounds
    model/model.safetensors.index.json        which file holds a tensor (model.safetensors if it is one)
    model/config.json, tokenizer.json, ...    by the main worker
    weights.json                              fingerprints of the model's parameters

In a round every worker sends the others what they write of its shards, and writes what it got; then all
wait for each other on the host. So no worker holds more than its part of a round beyond its own state.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mgpp.backends.deepspeed import local_shards, shard_numel
from mgpp.tensor_file import TensorFile
from pipeline.context import Context
from pipeline.models.weights import WEIGHTS_FILE, Fingerprint, positive_zeros
from pipeline.saving.agreement import BEAT_SECONDS, Agreement
from pipeline.saving.checkpoint_files import file_names, write_index
from pipeline.saving.contents import Unit, contents_of, converted, export_bytes
from pipeline.saving.rounds import ROUND_BYTES, Part, Round, plan_saving
from pipeline.storage.outputs import OutputFiles
from pipeline.worker_group import WorkerGroup


def write_model(
    context: Context,
    model: Any,
    *,
    tokenizer: Any,
    prunable: Iterable[str],
    round_bytes: int = ROUND_BYTES,
) -> int:
    """Write `model`, a Hugging Face checkpoint, and fingerprints of its parameters beside it.

    The files are those of `save_pretrained`, cut otherwise. Negative zeros become zeros.

    Args:
        context: the workers, all of which call this function, and where they write.
        model: of transformers, sharded by ZeRO 3 or whole on every worker.
        tokenizer: goes with it.
        prunable: names of its prunable weights.
        round_bytes: gathered at a time, over all workers.

    Returns:
        The memory that its export takes, in bytes.

    Raises:
        StageError: on all workers, if storage does not take what any of them writes.
    """
    workers = context.workers
    files = context.files or OutputFiles(str(context.output))
    units = contents_of(model)
    plan = plan_saving(units, workers.world_size, round_bytes)
    names = file_names(len(plan.owners))
    source = _Source(model, workers)
    progress = _Progress(context, len(plan.rounds))
    owned = plan.owners[workers.rank] if workers.rank < len(plan.owners) else []
    with Agreement(workers, progress.beat) as together, ExitStack() as stack:
        file = _OwnFile(model, owned, set(prunable))
        with together.step("write the model's configuration"):
            if workers.is_main:  # first, for it clears the folder of such files
                _write_rest(context.output, model, tokenizer)
        with together.step("begin its file of the model"):
            if owned:
                file.begin(stack.enter_context(files.open(f"model/{names[workers.rank]}")))
        for number, round_ in enumerate(plan.rounds):
            progress.begin(number)
            gathered = source.gather(round_)
            with together.step("write its part of the model"):
                for part, values in gathered:
                    file.write(part, values)
        with together.step("finish its file of the model"):
            if owned:
                file.finish()
                stack.close()
        fingerprints = workers.gather(file.fingerprints)
        with together.step("write the model's index"):
            if fingerprints is not None:
                _write_index(context.output, names, plan.owners)
                _write_fingerprints(context.output, model, fingerprints)
    return export_bytes(units)


class _Source:
    """Gives owners the values of the parts they write."""

    def __init__(self, model: nn.Module, workers: WorkerGroup) -> None:
        self._workers = workers
        self._tensors: dict[str, Tensor] = dict(model.named_buffers())
        self._tensors |= dict(model.named_parameters())

    def gather(self, round_: Round) -> Iterator[tuple[Part, Tensor]]:
        """Yield the values of this worker's parts of a round, in order; all workers must call.

        What moves between workers moves before this returns.
        """
        rank = self._workers.rank
        mine = round_[rank] if rank < len(round_) else []
        sharded = [[p for p in parts if self._is_sharded(p.source)] for parts in round_]
        received: list[Tensor] = []
        if any(sharded):
            received = self._exchange(sharded)
        return self._values(mine, received)

    def _exchange(self, round_: list[list[Part]]) -> list[Tensor]:
        """Send every owner what it writes of this worker's shards; return what each rank sent."""
        workers = self._workers
        names = list(dict.fromkeys(part.source for parts in round_ for part in parts))
        every = [(owner, part) for owner, parts in enumerate(round_) for part in parts]
        num_outgoing = [0] * workers.world_size
        with local_shards([self._tensors[name] for name in names]) as shards:
            held = dict(zip(names, shards, strict=True))
            cuts = [self._cut(part, held[part.source]).to(workers.device) for _, part in every]
            outgoing = torch.cat(cuts)
        for (owner, _), cut in zip(every, cuts, strict=True):
            num_outgoing[owner] += cut.numel()
        del cuts
        mine = round_[workers.rank] if workers.rank < len(round_) else []
        num_incoming = [
            sum(self._size(part, rank) * self._width(part) for part in mine)
            for rank in range(workers.world_size)
        ]
        return workers.exchange(outgoing, num_outgoing, num_incoming)

    def _cut(self, part: Part, shard: Tensor) -> Tensor:
        offset = self._workers.rank * shard_numel(self._tensors[part.source])
        begin, end = part.overlap(offset, offset + shard.numel())
        return shard[begin - offset : end - offset].view(torch.uint8)

    def _size(self, part: Part, rank: int) -> int:
        """Return how many elements of a part a rank holds."""
        size = shard_numel(self._tensors[part.source])
        begin, end = part.overlap(rank * size, (rank + 1) * size)
        return end - begin

    def _values(self, parts: list[Part], received: list[Tensor]) -> Iterator[tuple[Part, Tensor]]:
        at = [0] * len(received)
        for part in parts:
            if not self._is_sharded(part.source):
                flat = self._tensors[part.source].detach().reshape(-1)
                yield part, positive_zeros(flat[part.begin : part.end].cpu())
                continue
            dtype = self._tensors[part.source].dtype
            for rank, sent in enumerate(received):
                length = self._size(part, rank) * dtype.itemsize
                if length:
                    data = sent[at[rank] : at[rank] + length].cpu()
                    at[rank] += length
                    if data.storage_offset() % dtype.itemsize:
                        data = data.clone()
                    yield part, positive_zeros(data.view(dtype))

    def _is_sharded(self, name: str) -> bool:
        return hasattr(self._tensors[name], "ds_id")

    def _width(self, part: Part) -> int:
        return self._tensors[part.source].dtype.itemsize


class _OwnFile:
    """One worker's file, and the fingerprints of the parameters in it."""

    def __init__(self, model: Any, units: list[Unit], prunable: set[str]) -> None:
        self._model = model
        self._units = units
        self._file: TensorFile | None = None
        self._left = {name: spec.numel for unit in units for name, spec in unit.outputs.items()}
        self._collected: dict[str, list[Tensor]] = {}
        self._fingerprints = {
            name: Fingerprint(count_zeros=name in prunable)
            for unit in units
            if not unit.buffer
            for name in unit.sources
        }

    def begin(self, stream: Any) -> None:
        """Write the header."""
        tensors = {
            name: (spec.dtype, spec.shape) for u in self._units for name, spec in u.outputs.items()
        }
        self._file = TensorFile(stream, tensors, {"format": "pt"})

    def write(self, part: Part, values: Tensor) -> None:
        """Take the next values of a part."""
        if part.source in self._fingerprints:
            self._fingerprints[part.source].update(values)
        if part.unit.direct:
            self._append(part.unit, values)
        else:
            self._collect(part.unit, part.source, values)

    def finish(self) -> None:
        """Check that all is written."""
        assert self._file is not None
        self._file.finish()

    @property
    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """Of the parameters that this worker wrote, by name."""
        specs = {name: spec for unit in self._units for name, spec in unit.sources.items()}
        return {
            name: found.entry(specs[name].shape, specs[name].dtype)
            for name, found in self._fingerprints.items()
        }

    def _append(self, unit: Unit, values: Tensor) -> None:
        assert self._file is not None
        for name in unit.outputs:
            taken, values = values[: self._left[name]], values[self._left[name] :]
            self._left[name] -= taken.numel()
            self._file.write(name, taken) if taken.numel() else None
            if not values.numel():
                return

    def _collect(self, unit: Unit, source: str, values: Tensor) -> None:
        """Convert a unit once all its sources are whole."""
        assert self._file is not None
        self._collected.setdefault(source, []).append(values)
        sizes = {
            name: sum(v.numel() for v in self._collected.get(name, ())) for name in unit.sources
        }
        if any(sizes[name] < spec.numel for name, spec in unit.sources.items()):
            return
        whole = {
            key: torch.cat(self._collected.pop(name)).view(spec.shape)
            for key, (name, spec) in zip(unit.keys, unit.sources.items(), strict=True)
        }
        made = converted(self._model, whole)
        for name in unit.outputs:
            self._file.write(name, made.pop(name))


class _Progress:
    """Shows now and then how far the writing is."""

    def __init__(self, context: Context, num_rounds: int) -> None:
        self._context = context
        self._num_rounds = num_rounds
        self._round = 0
        self._shown = time.monotonic()

    def begin(self, number: int) -> None:
        """Begin a round."""
        self._round = number
        if time.monotonic() - self._shown > BEAT_SECONDS:
            self.beat()

    def beat(self) -> None:
        """Send a heartbeat."""
        self._shown = time.monotonic()
        self._context.progress(
            {"event": "write", "step": self._round, "num_steps": max(self._num_rounds, 1)}
        )


def _write_rest(output: Path, model: Any, tokenizer: Any) -> None:
    """Write what goes with the weights: configuration, code that came with the model, tokenizer."""
    model.save_pretrained(output / "model", state_dict={})
    tokenizer.save_pretrained(output / "model")


def _write_index(output: Path, names: list[str], owners: list[list[Unit]]) -> None:
    outputs = [{n: s for unit in owned for n, s in unit.outputs.items()} for owned in owners]
    write_index(output / "model", dict(zip(names, outputs, strict=True)))


def _write_fingerprints(
    output: Path, model: nn.Module, found: list[Mapping[str, dict[str, Any]]]
) -> None:
    every = {name: entry for of_worker in found for name, entry in of_worker.items()}
    ordered = {name: every[name] for name, _ in model.named_parameters() if name in every}
    (output / WEIGHTS_FILE).write_text(json.dumps(ordered, indent=1))
