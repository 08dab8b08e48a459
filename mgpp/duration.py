"""Lengths of training as people give them: steps, epochs or a share of the run."""

import re

ALLOWED = "allowed are steps (500), epochs ('2ep') or a share of all steps ('10%')"
_PATTERN = re.compile(r"^(?P<value>[0-9]+(\.[0-9]+)?)(?P<unit>ep|%)?$")
_LONGEST = 2**53  # steps and epochs; whole numbers are exact as floats up to it


class Duration:
    """A length of training: steps (`500`), epochs (`"2ep"`) or a share of all steps (`"10%"`, `0.1`).

    Args:
        given: an int for steps, a float in [0, 1) for a share, or any of them as text; text without a
            unit means steps.

    Raises:
        ValueError: if it is none of these.
    """

    def __init__(self, given: "str | int | float | Duration") -> None:
        if isinstance(given, float) and 0 <= given < 1:
            given = f"{given * 100:.12g}%"
        text = str(given).strip()
        match = _PATTERN.match(text) if not isinstance(given, bool | float) else None
        if match is None or (match["unit"] is None and "." in match["value"]):
            raise ValueError(f"not a length; {ALLOWED}")
        self.text: str = text
        self.value = float(match["value"])
        if self.value > _LONGEST:
            raise ValueError(f"longer than {_LONGEST}; {ALLOWED}")
        self.unit = match["unit"] or "steps"

    def steps(self, *, steps_per_epoch: int | None, num_steps: int | None = None) -> int:
        """Return the length in optimizer steps.

        Args:
            steps_per_epoch: optimizer steps in one pass over the training data; None if not known.
            num_steps: all steps of the run, which a share is taken of.

        Raises:
            ValueError: if what the unit needs is not known.
        """
        if self.unit == "ep":
            if steps_per_epoch is None:
                raise ValueError(
                    f"{self.text!r} is in epochs, whose steps are not known; give steps"
                )
            return round(self.value * steps_per_epoch)
        if self.unit == "%":
            if num_steps is None:
                raise ValueError(f"{self.text!r} is a share of the run and cannot be its length")
            return round(self.value / 100 * num_steps)
        return int(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Duration) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Duration({self.text!r})"
