"""The zeros of a checkpoint's matrices, and whether those that pruning made are still there.

An export notes them in `config.json`, under `pruning_config.zeros`: zeros by name in the files, with "*"
for the numbers of layers and experts, and names joined where one count is of several. Tools that write
the model anew keep that note, and not always the zeros.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from mgpp.sparse.reading import (
    config_of,
    contents,
    packed_weights,
    read_tensor,
    weight_files,
)

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_JOINT = ", "


@dataclass(frozen=True, kw_only=True)
class Zeros:
    """Zeros of one or more matrices.

    Attributes:
        matrices: how many there are.
        zeros: in all of them.
        numel: their elements.
    """

    matrices: int
    zeros: int
    numel: int

    @classmethod
    def total(cls, parts: Iterable["Zeros"]) -> "Zeros":
        """Return the sum."""
        parts = list(parts)
        return cls(
            matrices=sum(part.matrices for part in parts),
            zeros=sum(part.zeros for part in parts),
            numel=sum(part.numel for part in parts),
        )


def count_zeros(folder: Path) -> dict[str, Zeros]:
    """Count the zeros of each floating-point matrix of a checkpoint, packed or not, by name.

    Raises:
        PackedError: if there is no such checkpoint, or a file is damaged.
    """
    entries = packed_weights(config_of(folder)) or {}
    found = {}
    for file in weight_files(folder):
        for name in contents(file)[0]:
            values = read_tensor(file, name)
            shape = entries[name]["shape"] if name in entries else list(values.shape)
            if len(shape) > 1 and values.is_floating_point():
                numel = prod(shape)
                zeros = numel - int(values.count_nonzero())
                found[name] = Zeros(matrices=1, zeros=zeros, numel=numel)
    return dict(sorted(found.items()))


def by_pattern(counted: Mapping[str, Zeros]) -> dict[str, Zeros]:
    """Return the sums over layers and experts, by name with "*" for their numbers."""
    groups: dict[str, list[Zeros]] = {}
    for name, zeros in counted.items():
        groups.setdefault(pattern_of(name), []).append(zeros)
    return {pattern: Zeros.total(group) for pattern, group in groups.items()}


def pattern_of(*names: str) -> str:
    """Return the names with "*" for the numbers of layers and experts, each once, joined."""
    return _JOINT.join(dict.fromkeys(_NUMBER.sub("*", name) for name in names))


def noted_zeros(folder: Path) -> dict[str, int]:
    """Return the zeros that were there when the model was exported; {} if there is no note of them."""
    noted = config_of(folder).get("pruning_config")
    zeros = noted.get("zeros") if isinstance(noted, Mapping) else None
    return dict(zeros) if isinstance(zeros, Mapping) else {}


def kept_zeros(noted: Mapping[str, int], found: Mapping[str, Zeros]) -> dict[str, int]:
    """Return how many zeros are there now, for each entry of a note.

    Args:
        noted: of `noted_zeros`.
        found: of `by_pattern`. Names may have the prefix of a base model that those noted lack, and the
            reverse.
    """
    return {
        pattern: sum(
            zeros.zeros
            for name, zeros in found.items()
            if any(_same(name, part) for part in pattern.split(_JOINT))
        )
        for pattern in noted
    }


def _same(name: str, other: str) -> bool:
    return name == other or name.endswith(f".{other}") or other.endswith(f".{name}")
