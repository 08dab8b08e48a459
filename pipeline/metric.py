"""A metric: its name, whether a larger value is better, and how its values are written for people."""

import math
from dataclasses import dataclass

ABSENT = "n/a"
_LARGEST = 1e12  # in full; e^700 has 305 digits


def defined(value: float | None) -> float | None:
    """Return a figure as JSON can hold it: None if it is no number, such as a constant's correlation."""
    return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One figure that models are scored by.

    Attributes:
        name: of it, as among a task's metrics.
        higher_is_better: whether a larger value is a better one.
        digits: written after the point.
        scale: what a value is multiplied by to be written: 100 writes a share in percent.
        unit: "%" of what is written in percent, else empty.
    """

    name: str
    higher_is_better: bool
    digits: int
    scale: float = 1.0
    unit: str = ""

    @property
    def title(self) -> str:
        """The name for the head of a table or an axis, with the unit of the numbers below it."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    def number(self, value: float | None) -> str:
        """Return a value without its unit; "n/a" where there is none."""
        if value is None or not math.isfinite(value):
            return ABSENT
        shown = value * self.scale
        return f"{shown:z,.{self.digits}f}" if abs(shown) < _LARGEST else f"{shown:.3g}"

    def text(self, value: float | None) -> str:
        """Return a value with its unit."""
        number = self.number(value)
        return number if number == ABSENT else number + self.unit

    def difference(self, value: float | None) -> str:
        """Return a difference of two values with its sign; of percents, in percentage points."""
        number = self.number(value)
        if number == ABSENT:
            return number
        sign = "" if number.startswith("-") else "+"
        return f"{sign}{number}{' points' if self.unit else ''}"

    def mean_and_spread(self, mean: float, spread: float | None) -> str:
        """Return a mean and the standard deviation about it, without unit; None writes no deviation."""
        return (
            self.number(mean) if spread is None else f"{self.number(mean)} ± {self.number(spread)}"
        )


def share(name: str) -> Metric:
    """Return a metric in [0, 1] that is written in percent, as accuracy is."""
    return Metric(name=name, higher_is_better=True, digits=2, scale=100.0, unit="%")


def percentage(name: str) -> Metric:
    """Return a metric that is computed in percent already, as ROUGE and SQuAD's scores are."""
    return Metric(name=name, higher_is_better=True, digits=2, unit="%")


def correlation(name: str) -> Metric:
    """Return a metric in [-1, 1]."""
    return Metric(name=name, higher_is_better=True, digits=4)


def perplexity(name: str) -> Metric:
    """Return a perplexity: at least 1, smaller is better."""
    return Metric(name=name, higher_is_better=False, digits=2)


def error(name: str) -> Metric:
    """Return a loss in nats or an error in the labels' own unit: smaller is better."""
    return Metric(name=name, higher_is_better=False, digits=4)


def count(name: str, *, digits: int = 0) -> Metric:
    """Return a number of things, or with digits the mean of one; that more is better says little."""
    return Metric(name=name, higher_is_better=True, digits=digits)
