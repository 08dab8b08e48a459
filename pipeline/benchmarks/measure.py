"""Latency, memory, file size and outputs of a checkpoint's variants, side by side.

for each size:  A B C D  A B C D  ...   one forward pass each, in one process; medians
for each variant: a process of its own  peak memory
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from mgpp.sparse.speed import interleaved, processor
from pipeline.benchmarks.inputs import longest_input, random_inputs, result_of
from pipeline.benchmarks.memory import peak_memory
from pipeline.benchmarks.summary import fastest, summary_of
from pipeline.benchmarks.variants import FP32, VARIANTS, UnavailableError
from pipeline.errors import error_text

LENGTHS = (16, 128)
TOLERANCE = 1e-5
"""How far sparse outputs may be from dense ones, as a share of the largest."""
DISTURBED = 1.5
"""A third quartile over the first, beyond which times are not to be relied on."""
_GENERATE_ROUNDS = 5

Progress = Callable[[str, int, int], None]
"""Called with what is done next, the steps that are done, and all."""


def _unseen(text: str, done: int, total: int) -> None:
    """Show no progress."""


class NotMeasurableError(ValueError):
    """A checkpoint that cannot be measured; says why."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is measured.

    Attributes:
        batches: rows of a forward pass.
        lengths: tokens of a row; None for 16 and 128, or what the model takes.
        variants: keys of VARIANTS; fp32, which the others are compared with, is always among them.
        threads: of torch; None leaves them as they are.
        rounds: timed passes of each variant at each size.
        new_tokens: that `generate` makes, of models that generate; 0 leaves that out.
        memory: measure peak memory, in a process for each variant.
    """

    batches: tuple[int, ...] = (1, 8)
    lengths: tuple[int, ...] | None = None
    variants: tuple[str, ...] = tuple(VARIANTS)
    threads: int | None = None
    rounds: int = 20
    new_tokens: int = 16
    memory: bool = True

    @property
    def chosen(self) -> list[str]:
        """The variants, in their order."""
        return [name for name in VARIANTS if name == FP32 or name in self.variants]


def measure(folder: Path, workload: Workload, progress: Progress = _unseen) -> dict[str, Any]:
    """Measure a checkpoint.

    Args:
        folder: plain or packed.
        workload: what is measured.
        progress: called before each step.

    Returns:
        JSON values. `variants`: by name, what each takes, or the `reason` why it does not run. `sizes`:
        for each batch and length, seconds by variant. `summary`: sentences. `warnings`. `machine`.

    Raises:
        NotMeasurableError: if not even the dense float32 model runs.
    """
    with _threads(workload.threads):
        run = _Run(folder, workload, progress)
        run.load()
        sizes = run.sizes()
        run.compare(sizes)
        measured = [run.time(batch, length) for batch, length in sizes]
        if workload.memory:
            run.measure_memory(max(sizes, key=lambda size: size[0] * size[1]))
        return {
            "machine": {
                "processor": processor(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            },
            "rounds": workload.rounds,
            "sparse_tokens": run.tokens(),
            "new_tokens": workload.new_tokens if run.generates else 0,
            "variants": run.variants,
            "sizes": measured,
            "summary": summary_of(run.variants, measured),
            "warnings": run.warnings,
        }


@dataclass
class _Run:
    """One benchmark as it proceeds.

    Attributes:
        models: those that run, by variant.
        variants: what is found of each variant.
        warnings: what the reader must know.
    """

    folder: Path
    workload: Workload
    progress: Progress
    models: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    done: int = 0

    @property
    def generates(self) -> bool:
        """Whether `generate` is measured."""
        model = self.models[FP32]
        return (
            bool(self.workload.new_tokens) and hasattr(model, "generate") and model.can_generate()
        )

    def load(self) -> None:
        """Load each variant."""
        for name in self.workload.chosen:
            variant = VARIANTS[name]
            self._step(f"load {variant.title}")
            self.variants[name] = {"title": variant.title}
            try:
                loaded = variant.load(self.folder, self.tokens())
                self.models[name] = loaded.model
                size = variant.file_bytes(self.models[FP32], loaded.model)
                self.variants[name] |= {"note": loaded.note, "file_bytes": size}
            except UnavailableError as error:
                self._leave_out(name, str(error))
            except (ValueError, OSError) as error:  # which say what is wrong with the checkpoint
                self._leave_out(name, " ".join(str(error).split()))
            except Exception as error:  # noqa: BLE001  # of transformers and torch; it is reported
                self._leave_out(name, error_text(error))

    def sizes(self) -> list[tuple[int, int]]:
        """Return the batches and lengths."""
        return list(product(self.workload.batches, self._lengths()))

    def compare(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Run each variant once at each size, and note how far its outputs are from dense float32."""
        expected: dict[tuple[int, int], torch.Tensor] = {}
        for name, model in list(self.models.items()):
            self._step(f"outputs of {VARIANTS[name].title}")
            far = 0.0
            try:
                for size in sizes:
                    with torch.inference_mode():
                        found = result_of(model(**random_inputs(model.config, *size)))
                    want = expected.setdefault(size, found)
                    far = max(far, float((found - want).abs().max() / want.abs().max()))
            except Exception as error:  # noqa: BLE001  # likewise
                self._leave_out(name, f"it does not run: {error_text(error)}")
            else:
                self.variants[name]["difference"] = far
        far = self.variants.get("sparse", {}).get("difference", 0.0)
        if not far <= TOLERANCE:
            self.warnings.append(
                f"sparse outputs differ from dense ones by {far:.1e} of the largest; "
                f"at most {TOLERANCE:.0e} was expected"
            )

    def time(self, batch: int, length: int) -> dict[str, Any]:
        """Return the seconds of each variant at a size."""
        inputs = random_inputs(self.models[FP32].config, batch, length)
        works = [partial(model, **inputs) for model in self.models.values()]
        rounds = []
        with torch.inference_mode():
            for seconds in interleaved(works, self.workload.rounds):
                self._step(f"batch {batch}, length {length}")
                rounds.append(seconds)
        by_name = dict(zip(self.models, map(list, zip(*rounds, strict=True)), strict=True))
        medians = {name: median(own) for name, own in by_name.items()}
        # Of each round: what disturbs one pass mostly disturbs its neighbours too.
        ratios = {
            name: median(first / value for first, value in zip(by_name[FP32], own, strict=True))
            for name, own in by_name.items()
        }
        quartiles = {name: _quartiles(own) for name, own in by_name.items()}
        disturbed = any(high > DISTURBED * low for low, high in quartiles.values())
        found: dict[str, Any] = {
            "batch": batch,
            "length": length,
            "seconds": medians,
            "quartiles": quartiles,
            "times_as_fast": ratios,
            "disturbed": disturbed,
            "rows_per_second": {name: batch / value for name, value in medians.items()},
            "fastest": fastest(ratios),
        }
        if disturbed:
            self.warnings.append(
                f"times at {batch} x {length} vary by more than {DISTURBED - 1:.0%} between rounds: "
                "something else is running; measure again on a machine that is idle"
            )
        if self.generates:
            found["generated_per_second"] = self._generate(batch, length)
        return found

    def measure_memory(self, size: tuple[int, int]) -> None:
        """Note the peaks of each variant, at the largest size."""
        for name in self.models:
            self._step(f"memory of {VARIANTS[name].title}")
            try:
                self.variants[name]["memory"] = peak_memory(
                    self.folder,
                    name,
                    batch=size[0],
                    length=size[1],
                    tokens=self.tokens(),
                    threads=torch.get_num_threads(),
                )
            except (RuntimeError, OSError, ValueError) as error:
                self.warnings.append(f"memory of {VARIANTS[name].title}: {error_text(error)}")

    def _generate(self, batch: int, length: int) -> dict[str, float]:
        """Return the new tokens per second of each variant."""
        count = self.workload.new_tokens
        config = self.models[FP32].config
        longest = longest_input(config)
        if longest is not None and length + count > longest:
            return {}
        inputs = random_inputs(config, batch, length)
        inputs.pop("decoder_input_ids", None)
        greedy = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        works = [partial(m.generate, **inputs, **greedy, num_beams=1) for m in self.models.values()]
        rounds = []
        try:
            for seconds in interleaved(works, min(_GENERATE_ROUNDS, self.workload.rounds)):
                self._step(f"generate, batch {batch}, length {length}")
                rounds.append(seconds)
        except Exception as error:  # noqa: BLE001  # of transformers and torch; it is reported
            self.warnings.append(
                f"generate is not measured at {batch} x {length}: {error_text(error)}"
            )
            return {}
        values = (median(own) for own in zip(*rounds, strict=True))
        return {
            name: batch * count / value for name, value in zip(self.models, values, strict=True)
        }

    def _lengths(self) -> Sequence[int]:
        if self.workload.lengths is not None:
            return self.workload.lengths
        longest = longest_input(self.models[FP32].config) if FP32 in self.models else None
        most = longest or max(LENGTHS)
        return [length for length in LENGTHS if length <= most] or [most]

    def tokens(self) -> list[int]:
        """Return the numbers of tokens that sparse layers are to be fast for."""
        each = {batch * length for batch, length in self.sizes()}
        if FP32 in self.models and self.generates:
            each |= set(self.workload.batches)  # each new token of a row by itself
        return sorted(each)

    def _leave_out(self, name: str, reason: str) -> None:
        if name == FP32:
            raise NotMeasurableError(reason)
        self.models.pop(name, None)
        self.variants[name] = {"title": VARIANTS[name].title, "reason": reason}

    def _step(self, text: str) -> None:
        """Announce a step."""
        work = self.workload
        generated = min(_GENERATE_ROUNDS, work.rounds) if self.models and self.generates else 0
        rounds = len(self.sizes()) * (work.rounds + generated)
        total = len(work.chosen) * (2 + work.memory) + rounds
        self.progress(text, min(self.done, total), total)
        self.done += 1


def _quartiles(seconds: Sequence[float]) -> list[float]:
    """Return the first and the third."""
    if len(seconds) < 2:
        return [seconds[0], seconds[0]]
    low, _, high = quantiles(seconds, n=4, method="inclusive")
    return [low, high]


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Have torch use so many threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
