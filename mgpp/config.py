"""The settings of pruning: one class for training loops and for the pipeline's configuration files."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from mgpp.duration import ALLOWED, Duration
from mgpp.masking.allocation import Placement, Scope, check_scope
from mgpp.methods import METHODS, ONE_SHOT, Method, OneShotMethod, make_method, make_one_shot
from mgpp.prunable import check_known, select_prunable
from mgpp.schedule import PruningSchedule
from mgpp.settings import check_limits, check_number, default_of, documented, setting

# Settings that mean nothing for some methods.
_SCHEDULED = ("initial_sparsity", "start_after", "finetune", "interval")
_PLACED = ("scope", "budgets", "min_kept", "keep_zeros")
RENAMED = {"warmup": "start_after"}


@documented
@dataclass(frozen=True, kw_only=True)
class PruningConfig:
    """What is pruned, how far and when.

    Raises:
        ValueError: naming the setting that is out of range or means nothing for the method.
        TypeError: for patterns that are no list.
    """

    method: str | Mapping[str, Any] = setting(
        "mgpp", 'The pruning method: its name ("mgpp"), or a mapping with `name` and its settings.'
    )
    sparsity: float | None = setting(
        None,
        "Final share of the prunable weights that are zero. Required, but for `sparse-transfer`, which "
        "keeps the zeros of the model it starts from and takes none of the settings down to `pattern`.",
        ge=0,
        lt=1,
    )
    initial_sparsity: float = setting(0.0, "Share set to zero at the first pruning.", ge=0, lt=1)
    start_after: Duration | int | float | str = setting(
        Duration("10%"),
        "Training before the first pruning: steps (500), epochs ('2ep') or a share ('10%').",
    )
    finetune: Duration | int | float | str = setting(
        Duration("10%"), "Training after the last pruning, with the mask fixed; likewise."
    )
    interval: int = setting(10, "Steps between two prunings.", ge=1)
    scope: Scope = setting(
        "global",
        'Which weights are compared with one another: "global", all; "layer", those of one numbered '
        'layer; "uniform", those of one matrix, so that every matrix has the same sparsity; "lamp", all, '
        "by a score in which a matrix's scale does not count (by magnitude alone; no pattern).",
    )
    budgets: Mapping[str, float] = setting(
        {},
        "Final sparsity by pattern of weight names; the rest of `sparsity` falls to the other weights.",
    )
    min_kept: float = setting(
        0.0, "Share of every matrix that is kept, whatever is compared.", ge=0, lt=1
    )
    pattern: str | None = setting(
        None,
        'Structure of the zeros: "2:4" keeps 2 of every 4 consecutive inputs (any N:M); "32x1" prunes '
        "blocks of 32 outputs x 1 input. Single weights unless given.",
    )
    keep_zeros: bool = setting(
        False,
        "Prune a model further that is pruned already: what is zero at the start stays zero and counts "
        "within `sparsity`. Every pruning prunes these zeros first, and as many weights at least.",
    )
    include: tuple[str, ...] = setting(
        (), "Patterns of prunable weights' names; all matrices of the repeated layers unless given."
    )
    exclude: tuple[str, ...] = setting((), "Patterns of names of weights that are not pruned.")

    def __post_init__(self) -> None:
        for name in ("start_after", "finetune"):
            given = getattr(self, name)
            try:
                object.__setattr__(self, name, Duration(given))
            except ValueError as error:
                raise ValueError(f"{name}: got {given!r}; {ALLOWED}") from error
        for name in ("include", "exclude"):
            _check_patterns(name, getattr(self, name))
        self._check_method()
        check_limits(self)
        placement = self.placement()
        if self.method_name in METHODS:
            check_scope(METHODS[self.method_name], placement)
        if self.initial_sparsity > (self.sparsity or 0.0):
            raise ValueError(
                f"initial_sparsity: got {self.initial_sparsity}, which exceeds sparsity, {self.sparsity}"
            )

    def _check_method(self) -> None:
        if self.one_shot is not None:
            self._refuse((*_SCHEDULED, *_PLACED), "prunes once, untrained")
        elif self.build_method(num_examples=1).keeps_zeros:
            names = ("sparsity", *_SCHEDULED, *_PLACED, "pattern")
            self._refuse(names, "keeps the zeros of the model it starts from")
            return
        if self.sparsity is None:
            raise ValueError("sparsity: missing")
        if self.one_shot is not None:
            self.one_shot.count(1, self.sparsity)

    def _refuse(self, names: tuple[str, ...], reason: str) -> None:
        """Refuse settings that mean nothing for the method; defaults that are written out are none."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name in names and value != default_of(entry):
                got = value.text if isinstance(value, Duration) else value
                raise ValueError(
                    f"{entry.name}: means nothing for {self.method_name}, which {reason}; got {got!r}, "
                    "leave it out"
                )

    @property
    def method_name(self) -> str:
        """The method's name in the registry."""
        return str(self.method.get("name") if isinstance(self.method, Mapping) else self.method)

    @property
    def one_shot(self) -> OneShotMethod | None:
        """The method, if it is one that prunes once and trains nothing."""
        if self.method_name not in ONE_SHOT:
            return None
        return make_one_shot(self.method, pattern=self.pattern)

    def meaningless(self) -> tuple[str, ...]:
        """Return the settings that mean nothing for the method."""
        if self.one_shot is not None:
            return (*_SCHEDULED, *_PLACED)
        if METHODS[self.method_name].keeps_zeros:
            return ("sparsity", *_SCHEDULED, *_PLACED, "pattern")
        return ()

    def select(self, model: nn.Module) -> list[str]:
        """Return the names of a model's prunable weights.

        Raises:
            ValueError: if a pattern matches nothing, or nothing says of a weight what `pattern`,
                `scope` or `min_kept` go by.
        """
        names = select_prunable(model, self.include, self.exclude)
        by_matrix = "scope" if self.scope in ("uniform", "lamp") else None
        if by_matrix is None and self.min_kept:
            by_matrix = "min_kept"
        check_known(model, names, pattern=self.pattern is not None, by_matrix=by_matrix)
        return names

    def placement(self) -> Placement:
        """Return where sparsity is placed."""
        return Placement(
            scope=self.scope, budgets=self.budgets, min_kept=self.min_kept, pattern=self.pattern
        )

    def build_method(self, num_examples: int) -> Method:
        """Return the method for a number of training examples.

        Raises:
            ValueError: for a name or setting that is not known, or a method that prunes once.
        """
        if self.method_name in ONE_SHOT:
            raise ValueError(
                f"method: {self.method_name} prunes once and trains nothing: it has no training loop to "
                "be attached to; use `mgpp run`"
            )
        return make_method(self.method, num_examples=num_examples)

    def schedule(self, num_steps: int, steps_per_epoch: int | None = None) -> PruningSchedule:
        """Return the schedule of a run of `num_steps` optimizer steps.

        Args:
            num_steps: of the whole run.
            steps_per_epoch: needed where a length is given in epochs.

        Raises:
            ValueError: if the steps are no number of them, or prune_start is not before prune_end.
        """
        check_number("num_steps", num_steps, whole=True, at_least=1)
        if self.sparsity is None:
            return PruningSchedule.fixed_mask(num_steps)
        start_after, finetune = (
            self._steps(name, num_steps, steps_per_epoch) for name in ("start_after", "finetune")
        )
        return PruningSchedule(
            num_steps=num_steps,
            warmup_steps=start_after,
            finetune_steps=finetune,
            interval=self.interval,
            initial_sparsity=self.initial_sparsity,
            final_sparsity=self.sparsity,
        )

    def _steps(self, name: str, num_steps: int, steps_per_epoch: int | None) -> int:
        try:
            length = Duration(getattr(self, name))
            return length.steps(steps_per_epoch=steps_per_epoch, num_steps=num_steps)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def _check_patterns(name: str, given: Any) -> None:
    """Check that a setting is a list of patterns.

    Raises:
        TypeError: naming it.
    """
    is_list = isinstance(given, Collection) and not isinstance(given, str | bytes | Mapping)
    if not is_list or not all(isinstance(pattern, str) for pattern in given):
        got = "a string" if isinstance(given, str) else repr(given)
        raise TypeError(f"{name}: got {got}; give a list of patterns")


def read_config(config: PruningConfig | Mapping[str, Any]) -> PruningConfig:
    """Return the settings of a mapping.

    Raises:
        ValueError: naming a key that is not known, or a setting that is wrong.
    """
    if isinstance(config, PruningConfig):
        return config
    allowed = [entry.name for entry in fields(PruningConfig)]
    for key in sorted(set(config) - set(allowed)):
        if key in RENAMED:
            raise ValueError(f"{key}: renamed to {RENAMED[key]}")
        raise ValueError(f"{key}: unknown key; allowed are {', '.join(allowed)}")
    return PruningConfig(**config)
