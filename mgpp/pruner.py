"""The lifecycle of pruning: what is done to the shards before and after each optimizer step."""

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mgpp.masking.allocation import Allocation, Placement, check_scope
from mgpp.masking.kept_zeros import KeptZeros
from mgpp.masking.mask_search import MaskSearch
from mgpp.methods.base import Method
from mgpp.schedule import PruningSchedule
from mgpp.sharding import stats
from mgpp.sharding.bitmask import all_kept, pack_bits, unpack_bits
from mgpp.sharding.collectives import Collectives
from mgpp.sharding.displacement import NUM_BINS, count_displacements, displacement_quantile
from mgpp.sharding.masks import compare_masks, zero_pruned_
from mgpp.sharding.shards import Shard, check_coverage
from mgpp.sharding.stacks import Stacks

# A model with fewer zeros among its prunable weights was not pruned; a few happen to be zero anywhere.
_LEAST_SPARSITY = 0.001
_SHOWN = 3  # weights that a message names


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """What one pruning did, over all ranks.

    Attributes:
        step: the optimizer step at whose end it happened; -1 for a mask that was there before the first.
        num_pruned: weights set to zero.
        sparsity: num_pruned over all prunable weights.
        threshold: the largest magnitude set to zero, or the largest score where a method has one; of
            blocks, the largest mean. Where weights are cut apart (by scope, budget or bound), the largest
            of their cuts.
        churn: share of the pruned weights that the pruning before had kept.
        mask_hash: hash of all masks over all ranks; it does not depend on the sharding.
        revived: share of what the pruning before had pruned that this one keeps.
        moved_median: of the weights that were pruned before, how far half had moved from zero by now, in
            units of their cut: |w| over the largest magnitude set to zero among what each is compared
            with. Above 1 a weight comes back. To less than one in a hundred, from counts summed over the
            ranks. None at the first pruning, for methods that prune by another score, for blocks, and
            where a cut is at 0.
        moved_p99: the same of 99 in a hundred.
    """

    step: int
    num_pruned: int
    sparsity: float
    threshold: float
    churn: float
    mask_hash: str
    revived: float = 0.0
    moved_median: float | None = None
    moved_p99: float | None = None


class Pruner:
    """Applies a method on a schedule to this rank's shards.

    The order of a step, driven by a backend's hooks on the optimizer:

        before_update(shards)   gradients are reduced, averaged and clipped: the prior is added
        optimizer updates these shards
        after_update(shards)    past prune_end: the fixed mask is applied again
        finish_step()           once every shard was updated: prune if the schedule says so

    Args:
        shards: this rank's shards, in the order of `Shard.index`.
        full_shapes: shape of each whole prunable weight, by name, in the order of `Shard.index`.
        method: what is added to plain magnitude pruning.
        schedule: when to prune and how far.
        collectives: the group over which the weights are sharded.
        replica_group: all ranks that must come to the same masks; the same group unless the weights are
            replicated.
        group: the optimizer's parameter group that holds the weights, for its learning rate.
        placement: how sparsity is distributed; over all weights unless given.
        transposed: names of the weights stored inputs first (`Conv1D`), for patterns.
        keep_zeros: whether the weights that are zero now stay zero, and are among what every pruning
            prunes: as many at least as they are, and the first whatever the method's score.

    With `PruningSchedule.fixed_mask` the weights that are zero now are the mask, from the first step on.

    Raises:
        ValueError: if the sparsity cannot be placed so.
        RuntimeError: if the shards of all ranks do not make up the weights.
        ValueError: if the mask is to be that of the zeros, or they are to be kept, and there are none to
            speak of. Zeros that the schedule leaves no room for are refused at the first step, not here:
            a state that is loaded before brings the zeros of the run's beginning.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        full_shapes: dict[str, tuple[int, ...]],
        *,
        method: Method,
        schedule: PruningSchedule,
        collectives: Collectives | None = None,
        replica_group: Collectives | None = None,
        group: Mapping[str, Any] | None = None,
        placement: Placement | None = None,
        transposed: Collection[str] = (),
        keep_zeros: bool = False,
    ) -> None:
        self.shards = tuple(shards)
        self.names = tuple(full_shapes)
        self.full_numels = tuple(_numel(shape) for shape in full_shapes.values())
        self.method = method
        self.schedule = schedule
        self.collectives = collectives or Collectives()
        self.replica_group = replica_group or self.collectives
        self.group = group or {"lr": 0.0}
        assert method.keeps_zeros == schedule.is_fixed_mask
        assert not (keep_zeros and schedule.is_fixed_mask)
        self.step = 0
        self.last_pruning: Pruning | None = None
        check_coverage(self.shards, self.full_numels, self.collectives)
        placement = placement or Placement()
        check_scope(method, placement)
        self._settings = {
            "method": method.name,
            **method.settings(),
            **{k: dict(v) if isinstance(v, Mapping) else v for k, v in vars(placement).items()},
            **asdict(schedule),
            "keep_zeros": keep_zeros,
        }
        self._shapes = {name: list(shape) for name, shape in full_shapes.items()}
        self.allocation = Allocation(placement, full_shapes, schedule, transposed)
        zeros = None
        if keep_zeros or schedule.is_fixed_mask:
            zeros = KeptZeros(self.shards, self.allocation, self.collectives)
        self._zeros = zeros if keep_zeros else None
        self.misfit = "" if self._zeros is None else self._zeros.misfit()
        self._mask_search = MaskSearch(self.shards, self.allocation, self.collectives, self._zeros)
        self._keep = [all_kept(shard.numel, shard.flat.device) for shard in self.shards]
        self._position = {id(shard): i for i, shard in enumerate(self.shards)}
        method.num_matrices, method.kept = len(self.allocation.names), self.mask
        # Schedulers of torch note the peak there, and may have set the rate of the first step already.
        method.begin(float(self.group.get("initial_lr", self.group["lr"])))
        if zeros is not None:
            self.last_pruning = self._take_zeros(zeros)

    @property
    def num_prunable(self) -> int:
        """All prunable weights of the model, over all ranks."""
        return sum(self.full_numels)

    @property
    def mask_sparsity(self) -> float:
        """Share of the prunable weights that the last mask prunes, over all ranks.

        Until the mask is fixed, at prune_end, its weights train on between two prunings: the model holds
        fewer zeros, or none. `sparsity` counts them.
        """
        return self.last_pruning.sparsity if self.last_pruning else 0.0

    def sparsity(self) -> float:
        """Count the share of the prunable weights that are zero at this moment; all ranks call."""
        return self.num_zeros() / self.num_prunable

    def finish(self) -> float:
        """Make sure at the end of the training that the model is as sparse as its schedule says.

        Returns:
            The counted share of the prunable weights that are zero. All ranks call.

        Raises:
            RuntimeError: if the training ended before the last pruning, which fixes the mask, weights
                that were pruned are not zero, or weights are not finite.
        """
        broken = self.collectives.sum([stats.num_not_finite(self.shards)])[0]
        if broken:
            raise RuntimeError(
                f"{broken} of {self.num_prunable} prunable weights are not finite: the training "
                "diverged; lower the learning rate"
            )
        zeros, schedule = self.num_zeros(), self.schedule
        count = f"{zeros} of {self.num_prunable} prunable weights are zero"
        if self.step <= schedule.prune_end:
            raise RuntimeError(
                f"the training ended after {self.step} optimizer steps, before the last pruning, in step "
                f"{schedule.prune_end} of {schedule.num_steps}: {count}, and nothing keeps them so. "
                "Train for all the steps that were announced, or announce fewer: num_steps counts "
                "optimizer steps, not the batches they are accumulated of. After a resume, load the "
                "pruner's state"
            )
        if self.last_pruning and zeros < self.last_pruning.num_pruned:
            raise RuntimeError(
                f"{self.last_pruning.num_pruned} weights were pruned, but {count}: they were changed "
                "after the optimizer's steps, or another model was loaded into them"
            )
        if self.step < schedule.num_steps:
            warnings.warn(
                f"the training ended after {self.step} of {schedule.num_steps} announced optimizer "
                "steps: the mask is final, but it was fine-tuned for fewer steps than planned",
                stacklevel=2,
            )
        return zeros / self.num_prunable

    def before_update(self, shards: Iterable[Shard]) -> None:
        """Let the method change the gradients of shards that are about to be updated.

        Raises:
            ValueError: if zeros are to be kept that the schedule leaves no room for.
        """
        if self.misfit:
            raise ValueError(self.misfit)
        if self.step <= self.schedule.prune_end:
            self.method.lr = float(self.group["lr"])
            for shard in shards:
                self.method.adjust_grad(shard, self.step, self.schedule)

    def after_update(self, shards: Sequence[Shard]) -> None:
        """Let the method see shards that were just updated; hold them to the mask once it is fixed."""
        fixed = self.step > self.schedule.prune_end
        if not fixed:
            for shard in shards:
                self.method.observe(shard, self.step, self.schedule)
        if fixed or (self.method.holds_mask and self.last_pruning):
            self._apply_masks(shards)
        elif self._zeros is not None:
            self._apply_masks(shards, self._zeros.masks)

    def finish_step(self) -> Pruning | None:
        """End a step, after all shards were updated; return the pruning if there was one.

        Raises:
            RuntimeError: if the ranks do not come to the same masks.
        """
        pruning = None
        if self.schedule.is_pruning_step(self.step):
            pruning = self._prune(self.allocation.num_pruned(self.step))
        self.step += 1
        return pruning

    def mask(self, shard: Shard) -> Tensor:
        """Return the mask of one shard: 1-D bool, True = kept."""
        return unpack_bits(self._keep[self._position[id(shard)]], shard.numel)

    def sparsity_by_weight(self) -> dict[str, float]:
        """Return the share pruned of each weight by the current mask, over all ranks."""
        pruned = [0] * len(self.names)
        _, kept, *_ = self._compare_masks(self._keep).tolist()
        for shard, count in zip(self.shards, kept, strict=True):
            pruned[shard.index] += shard.numel - count
        totals = self.collectives.sum(pruned)
        return {
            name: count / numel
            for name, count, numel in zip(self.names, totals, self.full_numels, strict=True)
        }

    def num_zeros(self) -> int:
        """Count the prunable weights that are zero at this moment, over all ranks."""
        return self.collectives.sum(stats.counts_around(self.shards, 0.0))[1]

    def spike_share(self, spike_threshold: float) -> float:
        """Return the share of prunable weights with magnitude below `spike_threshold`."""
        counts = stats.counts_around(self.shards, spike_threshold)
        return self.collectives.sum(counts)[0] / self.num_prunable

    def mask_hash(self) -> str:
        """Return a hash of all masks over all ranks; it does not depend on the sharding."""
        return _hexadecimal(self.collectives.sum(self._compare_masks(self._keep).sum(dim=1))[0])

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state: step, settings, last pruning, packed masks, what the method keeps."""
        masks = [
            {
                **mask,
                **{key: mask[key].clone() for key in ("keep", "zeros") if key in mask},
                "state": {k: v.clone() for k, v in mask["state"].items()},
            }
            for mask in self.masks_in_place()
        ]
        return {**self.counters(), "masks": masks}

    def counters(self) -> dict[str, Any]:
        """Return the part of the state that is the same on all ranks, plain values: all but `masks`."""
        return {
            "step": self.step,
            "settings": dict(self._settings),
            "shapes": {name: list(shape) for name, shape in self._shapes.items()},
            "last_pruning": vars(self.last_pruning).copy() if self.last_pruning else None,
        }

    def masks_in_place(self) -> Iterator[dict[str, Any]]:
        """Give the `masks` of `state_dict` without copying them: the next step changes their tensors."""
        for place, (shard, keep) in enumerate(zip(self.shards, self._keep, strict=True)):
            yield {
                "name": shard.name,
                "offset": shard.offset,
                "numel": shard.numel,
                "keep": keep,
                **({} if self._zeros is None else {"zeros": self._zeros.masks[place]}),
                "state": dict(self.method.state(shard)),
            }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state; all ranks must call.

        Its masks may be cut otherwise than these shards are, as on another number of ranks, so long as
        they cover these shards: join then the `masks` of the states of all ranks.

        Args:
            state: as `state_dict` gave it; `masks` may be any iterable of such entries.

        Raises:
            ValueError: if it was saved under other settings of method, schedule or placement, for other
                weights, or the saved masks do not cover these shards.
            RuntimeError: if the restored masks are not those that were saved.
        """
        if not {"settings", "shapes"} <= set(state):
            raise ValueError(
                "this is no state of a pruner, or one of another version of mgpp: give what `state_dict` "
                "returned"
            )
        self._check_settings(state["settings"])
        self._check_shapes(state["shapes"])
        places = {shard.name: i for i, shard in enumerate(self.shards)}
        missing = [shard.numel for shard in self.shards]
        for saved in state["masks"]:
            if saved["name"] in places:
                place = places[saved["name"]]
                missing[place] -= self._take_mask(place, saved)
        if self.replica_group.sum([sum(missing)])[0]:
            here = ", ".join(
                f"{count} of the {shard.numel} elements of {shard.name} from {shard.offset} on"
                for shard, count in zip(self.shards, missing, strict=True)
                if count
            )
            raise ValueError(
                f"the saved masks do not cover {here or 'what other ranks hold'}: load the state of the "
                "same model and selection, and of all ranks if their number or the ZeRO stage was another"
            )
        self.step, self.misfit = int(state["step"]), ""
        if self._zeros is not None:
            self._zeros.count()
        last = state["last_pruning"]
        self.last_pruning = Pruning(**last) if last else None
        if self.last_pruning and (found := self.mask_hash()) != self.last_pruning.mask_hash:
            raise RuntimeError(
                f"the restored masks have the hash {found}, those of the last pruning had "
                f"{self.last_pruning.mask_hash}: are they of the same step?"
            )

    def _check_settings(self, saved: Mapping[str, Any]) -> None:
        saved = {"keep_zeros": False, **saved}  # of before there was this setting
        other = [
            f"{name} {saved.get(name)!r} (here {ours!r})"
            for name, ours in self._settings.items()
            if saved.get(name) != ours
        ]
        if other:
            raise ValueError(
                f"the pruner's state was saved with {', '.join(other)}: resume with the settings the "
                "run began with"
            )

    def _check_shapes(self, saved: Mapping[str, Any]) -> None:
        missing = [name for name in self._shapes if name not in saved]
        further = [name for name in saved if name not in self._shapes]
        other = [n for n, shape in self._shapes.items() if n in saved and list(saved[n]) != shape]
        wrong = ""
        if missing:
            wrong = f"does not hold {_counted(missing)} prunable here: {_listed(missing)}"
        elif further:
            wrong = f"holds {_counted(further)} not prunable here: {_listed(further)}"
        elif other:
            name = other[0]
            ours = tuple(self._shapes[name])
            wrong = f"holds {name} of shape {tuple(saved[name])}, here it is {ours}"
        if wrong:
            raise ValueError(
                f"the pruner's state {wrong}; resume with the model and the patterns (include, "
                "exclude) the run began with"
            )

    def _take_mask(self, place: int, saved: dict[str, Any]) -> int:
        """Copy what of a saved mask is of one shard; return how many elements that were."""
        shard = self.shards[place]
        begin = max(shard.offset, saved["offset"])
        end = min(shard.offset + shard.numel, saved["offset"] + saved["numel"])
        if begin >= end:
            return 0
        here = slice(begin - shard.offset, end - shard.offset)
        there = slice(begin - saved["offset"], end - saved["offset"])
        masks = {"keep": self._keep[place]}
        if self._zeros is not None:
            masks["zeros"] = self._zeros.masks[place]
        for key, packed in masks.items():
            ours = unpack_bits(packed, shard.numel)
            ours[here] = unpack_bits(saved[key].to(packed.device), saved["numel"])[there]
            packed.copy_(pack_bits(ours))
        for name, values in self.method.state(shard).items():
            values[here] = saved["state"][name][there]
        return int(end - begin)

    def _take_zeros(self, zeros: KeptZeros) -> Pruning:
        """Take the weights that are zero as pruned, whatever made them so."""
        self._keep = [mask.clone() for mask in zeros.masks]
        digest, kept, *_ = self.collectives.sum(self._compare_masks(self._keep).sum(dim=1))
        num_pruned = self.num_prunable - kept
        sparsity = num_pruned / self.num_prunable
        if sparsity < _LEAST_SPARSITY:
            prefix, name, advice = "", self.method.name, "prune by another method"
            if self._zeros is not None:
                prefix, name, advice = "keep_zeros: ", "keep_zeros", "leave keep_zeros out"
            raise ValueError(
                f"{prefix}{num_pruned} of the {self.num_prunable} prunable weights are zero, less than "
                f"{_LEAST_SPARSITY:.1%}: there is no mask to keep; {name} starts from a model that was "
                f"pruned before, so give such a model, or {advice}"
            )
        self._check_agreement(num_pruned, num_pruned, digest)
        return Pruning(
            step=-1,
            num_pruned=num_pruned,
            sparsity=sparsity,
            threshold=0.0,
            churn=1.0,
            mask_hash=_hexadecimal(digest),
        )

    def _prune(self, k: int) -> Pruning:
        weights = [shard.weight for shard in self.shards]
        aside = [
            state["pruned_weight"]
            for state in map(self.method.state, self.shards)
            if "pruned_weight" in state
        ]
        if aside:
            torch._foreach_add_(weights, aside)
        found = self._mask_search.search(self.method, k, self.step)
        moved = self._displacement(found.cuts)
        digest, kept, kept_before, churned = self.collectives.sum(
            self._compare_masks(found.keep).sum(dim=1)
        )
        self._keep = found.keep
        if aside:
            torch._foreach_copy_(aside, weights)
        self._apply_masks(self.shards)
        if aside:
            torch._foreach_sub_(aside, weights)
        num_pruned, before = self.num_prunable - kept, self.num_prunable - kept_before
        self._check_agreement(found.num_pruned, num_pruned, digest ^ found.digest)
        self.last_pruning = Pruning(
            step=self.step,
            num_pruned=num_pruned,
            sparsity=num_pruned / self.num_prunable,
            threshold=found.threshold,
            churn=churned / max(num_pruned, 1),
            mask_hash=_hexadecimal(digest),
            revived=(before + churned - num_pruned) / max(before, 1),
            **moved,
        )
        return self.last_pruning

    def _displacement(self, cuts: Mapping[int, float] | None) -> dict[str, float]:
        """Return how far pruned weights have moved, before the new masks are applied."""
        if self.last_pruning is None or cuts is None or not all(cuts.values()):
            return {}
        counts = torch.zeros(NUM_BINS, dtype=torch.int64)
        if self.shards:
            stacks = self._stacks()
            by_matrix = [cuts[number] for number in range(stacks.num_matrices)]
            keep = self._keep
            if self._zeros is not None:  # held at zero: they say nothing of how far weights move
                keep = [k | ~zeros for k, zeros in zip(keep, self._zeros.masks, strict=True)]
            counts = count_displacements(
                stacks.values,
                stacks.places,
                keep,
                stacks.of_matrices(by_matrix, torch.float32),
            )
        summed = self.collectives.sum(counts)
        if not any(summed):
            return {}
        shares = {"moved_median": 0.5, "moved_p99": 0.99}
        return {name: displacement_quantile(summed, share) for name, share in shares.items()}

    def _check_agreement(self, k: int, num_pruned: int, digest: int) -> None:
        digests = self.replica_group.by_rank(digest)
        if num_pruned != k or len(set(digests)) > 1:
            found = ", ".join(_hexadecimal(digest) for digest in digests)
            raise RuntimeError(
                f"the ranks disagree on the masks of step {self.step}: {num_pruned} weights were pruned "
                f"where {k} were to be; hashes by rank: {found}. Do all ranks hold the same weights, "
                "and is the pruner attached on every one?"
            )

    def _stacks(self) -> Stacks:
        sizes, device = self.allocation.numels, self.collectives.device
        return self.allocation.matrices.stacks(self.shards, sizes, device)

    def _compare_masks(self, keep: list[Tensor]) -> Tensor:
        """Compare masks of this rank's shards with the current ones: as `compare_masks`."""
        if not self.shards:
            return torch.zeros(4, 0, dtype=torch.int64)
        starts = list(accumulate(self.full_numels, initial=0))
        return compare_masks(
            keep,
            self._keep,
            [shard.numel for shard in self.shards],
            [starts[shard.index] + shard.offset for shard in self.shards],
        )

    def _apply_masks(self, shards: Sequence[Shard], masks: Sequence[Tensor] | None = None) -> None:
        """Zero what masks prune of some shards: the current masks unless others, of all, are given."""
        masks = self._keep if masks is None else masks
        if shards:
            keep = [masks[self._position[id(shard)]] for shard in shards]
            zero_pruned_([shard.weight for shard in shards], keep)


def claim(optimizer: Any, weights: Iterable[Tensor], pruner: Pruner) -> None:
    """Note on an optimizer which of its weights a pruner prunes: its hooks stay for good.

    Raises:
        ValueError: if another one prunes some of them already.
    """
    claimed: dict[int, Pruner] = vars(optimizer).setdefault("_mgpp_pruners", {})
    mine = {id(weight) for weight in weights}
    if mine & set(claimed):
        raise ValueError(
            "these weights are pruned already under this optimizer: attach once, and make a new "
            "optimizer to prune again"
        )
    claimed.update(dict.fromkeys(mine, pruner))


def _counted(names: Sequence[str]) -> str:
    return f"{len(names)} weight{'s that are' if len(names) > 1 else ' that is'}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join([*names[:_SHOWN], *(["..."] if len(names) > _SHOWN else [])])


def _hexadecimal(hash_: int) -> str:
    return f"{hash_ & 0xFFFFFFFFFFFFFFFF:016x}"


def _numel(shape: tuple[int, ...]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel
