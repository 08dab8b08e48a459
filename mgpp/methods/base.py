"""What a pruning method may change of the shared schedule, shards and threshold."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from mgpp.schedule import PruningSchedule
from mgpp.settings import check_limits, check_number
from mgpp.sharding.shards import Shard


@dataclass(kw_only=True, eq=False)
class Method:
    """Magnitude pruning with nothing added; methods override what they change.

    A method is a dataclass: those of its fields that are declared by `setting` are what
    configurations may give.

    Pruning sets weights to zero and leaves the optimizer's own state of them alone: a weight that comes
    back does so with the moments it has by then, as in the published code of all these methods. Unless a
    method changes gradients, those of pruned weights reach the optimizer and count in the clipped norm
    as all others do, also once the mask is fixed. What is kept in "pruned_weight" decays by no weight
    decay, for the optimizer sees a zero in its place.

    Attributes:
        num_examples: n, training examples.
        lr: the optimizer's learning rate at the step under way; 0 where it has none.
        peak_lr: its learning rate when pruning was attached.
        num_matrices: how many prunable matrices the model has, each of a stack counted.
        kept: gives the current mask of a shard, 1-D bool, True = kept.
        name: the registry's name of the method.
        title: what people call it.
        state_names: what the method keeps of every weight, float32, in checkpoints too. With
            "pruned_weight" among them, what was pruned is put there, and comes back as the method left
            it before the next pruning chooses again.
        holds_mask: whether what is pruned stays zero until the next pruning.
        keeps_zeros: whether the mask is that of the weights that are zero when pruning is attached; it
            takes no schedule then.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    state_names: ClassVar[tuple[str, ...]] = ()
    holds_mask: ClassVar[bool] = False
    keeps_zeros: ClassVar[bool] = False

    num_examples: int = 1
    lr: float = field(default=0.0, init=False)
    peak_lr: float = field(default=0.0, init=False)
    num_matrices: int = field(default=1, init=False)
    kept: Callable[[Shard], Tensor] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the settings against their limits.

        Raises:
            ValueError: naming the first that is out of range.
        """
        self._state: dict[str, dict[str, Tensor]] = {}
        check_number("num_examples", self.num_examples, whole=True, at_least=1)
        check_limits(self)

    def settings(self) -> dict[str, Any]:
        """Return what it was made with, by name: its settings and `num_examples`."""
        given = [entry.name for entry in fields(self) if "description" in entry.metadata]
        return {name: getattr(self, name) for name in ("num_examples", *given)}

    def begin(self, lr: float) -> None:
        """Learn of the optimizer's learning rate as pruning is attached.

        Raises:
            ValueError: if the settings do not fit it.
        """
        self.lr = self.peak_lr = lr

    def adjust_grad(self, shard: Shard, step: int, schedule: PruningSchedule) -> None:
        """Change the shard's gradient in place before the optimizer uses it.

        Called at every step up to prune_end, after reduction, averaging and clipping.
        """

    def observe(self, shard: Shard, step: int, schedule: PruningSchedule) -> None:
        """See the shard right after its update, its gradient still there; steps as above."""

    @classmethod
    def prunes_by_magnitude(cls) -> bool:
        """Tell whether the lowest magnitudes are pruned, and not the lowest of a score of its own."""
        return cls.score is Method.score

    def score(self, shard: Shard) -> Tensor | None:
        """Return what is pruned lowest first: 1-D float32, not negative; None for the magnitude."""
        return None

    def addable_score(self, shard: Shard) -> Tensor:
        """Return scores that blocks are scored by the mean of: 1-D float32.

        They may be negative, where `ordered` undoes it.
        """
        scores = self.score(shard)
        return shard.weight.abs() if scores is None else scores

    def ordered(self, scores: Tensor) -> Tensor:
        """Return (means of) addable scores as floats that are not negative, in the same order."""
        return scores

    def threshold(self, score: float) -> float:
        """Return the method's own value for the largest score that was pruned."""
        return score

    def log_values(self, step: int, schedule: PruningSchedule) -> dict[str, float]:
        """Return the method's own quantities at this step, for logs."""
        return {}

    def state(self, shard: Shard) -> dict[str, Tensor]:
        """Return what the method keeps of a shard: 1-D float32 of its size by name, zeros at first."""
        if shard.name not in self._state:
            self._state[shard.name] = {
                name: torch.zeros(shard.numel, dtype=torch.float32, device=shard.flat.device)
                for name in self.state_names
            }
        return self._state[shard.name]
