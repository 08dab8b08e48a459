"""Patterns of sparsity: N of every M inputs stay, or whole blocks are pruned.

Rows are a weight's outputs and columns its inputs, as `nn.Linear` has it; `Conv1D` (GPT-2) is stored the
other way round, and its tilings are turned likewise.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

_N_OF_M = re.compile(r"^([1-9][0-9]*):([1-9][0-9]*)$")
_BLOCKS = re.compile(r"^([1-9][0-9]*)x([1-9][0-9]*)$")
_ALLOWED = 'allowed are N:M ("2:4": 2 of every 4 inputs stay) and blocks of ROWSxCOLUMNS ("32x1")'


@dataclass(frozen=True)
class NofM:
    """At most M - N of every M consecutive inputs of an output are pruned; at 1 - N/M exactly so many."""

    kept: int
    of: int

    unit = 1

    @property
    def max_share(self) -> Fraction:
        """The most that can be pruned of any weight."""
        return 1 - Fraction(self.kept, self.of)


@dataclass(frozen=True)
class Blocks:
    """Blocks of rows x columns (outputs x inputs) are pruned whole."""

    rows: int
    columns: int

    max_share = Fraction(1)

    @property
    def unit(self) -> int:
        """Weights that are pruned together."""
        return self.rows * self.columns


Pattern = NofM | Blocks


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a weight's groups or blocks lie in its flattened elements.

    Attributes:
        span: consecutive elements that make up whole groups or blocks.
        rows: of a span, as it is stored.
        columns: of a span that belong to one block; 1 where elements of a column are grouped.
    """

    span: int
    rows: int
    columns: int

    @property
    def width(self) -> int:
        """Elements of a stored row of a span."""
        return self.span // self.rows

    @property
    def num_tiles(self) -> int:
        """Groups or blocks of a span."""
        return self.width // self.columns


def parse_pattern(text: object) -> Pattern:
    """Read "N:M" or "ROWSxCOLUMNS".

    Raises:
        ValueError: if it is neither.
        TypeError: if it is no string.
    """
    if not isinstance(text, str):
        hint = ""
        if isinstance(text, int) and not isinstance(text, bool):
            read = f"{text // 60}:{text % 60}"
            hint = f"; YAML reads {read} without quotes as a number, so quote it"
        raise TypeError(f"pattern: got {text!r}; {_ALLOWED}{hint}")
    if match := _N_OF_M.match(text):
        kept, of = int(match[1]), int(match[2])
        if kept >= of:
            raise ValueError(f"pattern: got {text!r}, which prunes nothing; N must be below M")
        return NofM(kept, of)
    if match := _BLOCKS.match(text):
        return Blocks(int(match[1]), int(match[2]))
    raise ValueError(f"pattern: got {text!r}; {_ALLOWED}")


def tiling_of(pattern: Pattern, name: str, shape: tuple[int, ...], *, transposed: bool) -> Tiling:
    """Return how a pattern lies in a weight.

    Args:
        pattern: N:M or blocks.
        name: of the weight, for errors.
        shape: of the whole weight, as it is stored; of three dimensions it is a stack of matrices.
        transposed: whether matrices are stored inputs first, as `Conv1D` does.

    Raises:
        ValueError: if the weight is no matrix, or is not divisible.
    """
    if len(shape) not in (2, 3):
        raise ValueError(
            f"pattern: {name} has shape {shape}, and only matrices have rows of outputs and columns of "
            "inputs; exclude it, or leave the pattern out"
        )
    height, width = shape[-2:]
    outputs, inputs = (width, height) if transposed else (height, width)
    rows, columns = (
        (1, pattern.of) if isinstance(pattern, NofM) else (pattern.rows, pattern.columns)
    )
    for size, step, words in ((outputs, rows, "outputs"), (inputs, columns, "inputs")):
        if size % step:
            raise ValueError(
                f"pattern: {name} has {size} {words}, which do not divide by {step}; exclude it, or give "
                "another pattern"
            )
    if transposed:
        rows, columns = columns, rows
    if isinstance(pattern, NofM) and not transposed:
        return Tiling(span=pattern.of, rows=pattern.of, columns=1)  # a group is a span of its own
    return Tiling(span=rows * width, rows=rows, columns=columns)
