"""Which worker writes what of a model, and in which rounds it is gathered: shapes only."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.saving.contents import Unit

ROUND_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Part:
    """Elements `begin` to `end` of a tensor of the model, flattened.

    Attributes:
        unit: whose source it is.
        source: the tensor's name.
        begin: first element.
        end: behind the last one.
    """

    unit: Unit
    source: str
    begin: int
    end: int

    def overlap(self, begin: int, end: int) -> tuple[int, int]:
        """Return what of elements `begin` to `end` is in it: first and behind the last, maybe none."""
        first = max(self.begin, begin)
        return first, max(min(self.end, end), first)


Round = list[list[Part]]
"""By owner, what it writes in a round, in the order of its file."""


@dataclass(frozen=True, kw_only=True)
class SavingPlan:
    """How a model is written.

    Attributes:
        owners: by rank of those who write, the units of their files, in the files' order.
        rounds: in which they are gathered.
    """

    owners: list[list[Unit]]
    rounds: list[Round]


def plan_saving(
    units: Sequence[Unit], world_size: int, round_bytes: int = ROUND_BYTES
) -> SavingPlan:
    """Return who writes which units, balanced by bytes, and the rounds.

    A round holds at most `round_bytes` over all owners. Only a unit that must be converted as a whole may
    be larger; it is alone in its owner's part of a round. A model smaller than a round has one owner.

    Args:
        units: of the model; buffers are the first rank's, whose values count.
        world_size: workers.
        round_bytes: gathered at a time.
    """
    total = sum(unit.nbytes for unit in units)
    num_owners = max(min(world_size, -(-total // round_bytes)), 1)
    owners = _owners(units, num_owners)
    batches = [_batches(owned, max(round_bytes // num_owners, 1)) for owned in owners]
    num_rounds = max(map(len, batches))
    rounds = [[batch[i] if i < len(batch) else [] for batch in batches] for i in range(num_rounds)]
    return SavingPlan(owners=owners, rounds=rounds)


def _owners(units: Sequence[Unit], num_owners: int) -> list[list[Unit]]:
    """Give the largest units first, each to who has least."""
    owners: list[list[int]] = [[] for _ in range(num_owners)]
    loads = [0] * num_owners
    for index in sorted(range(len(units)), key=lambda i: -units[i].nbytes):
        owner = 0 if units[index].buffer else loads.index(min(loads))
        owners[owner].append(index)
        loads[owner] += units[index].nbytes
    # The widest numbers first, as a file holds them; else the model's order.
    return [
        [units[i] for i in sorted(owned, key=lambda i: (-units[i].itemsize, i))] for owned in owners
    ]


def _batches(units: Sequence[Unit], size: int) -> list[list[Part]]:
    """Cut an owner's units into batches of at most `size` bytes."""
    batches: list[list[Part]] = []
    left = 0
    for unit in units:
        if not unit.direct:
            batches.append([_whole(unit, source) for source in unit.sources])
            left = 0
            continue
        ((source, spec),) = unit.sources.items()
        width = spec.dtype.itemsize
        begin = 0
        while begin < spec.numel:
            if left < width:
                batches.append([])
                left = max(size, width)
            end = min(begin + left // width, spec.numel)
            batches[-1].append(Part(unit=unit, source=source, begin=begin, end=end))
            left -= (end - begin) * width
            begin = end
    return batches


def _whole(unit: Unit, source: str) -> Part:
    return Part(unit=unit, source=source, begin=0, end=unit.sources[source].numel)
