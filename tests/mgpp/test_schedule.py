import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpp import PruningSchedule, SlabProbAnnealing


def schedule(**changes: object) -> PruningSchedule:
    values: dict[str, object] = {
        "num_steps": 100,
        "warmup_steps": 10,
        "finetune_steps": 20,
        "interval": 7,
        "initial_sparsity": 0.3,
        "final_sparsity": 0.9,
    }
    return PruningSchedule(**(values | changes))  # type: ignore[arg-type]


def test_corners():
    s = schedule()
    assert (s.prune_start, s.prune_end) == (10, 79)
    assert s.sparsity(9) == 0.0
    assert s.sparsity(10) == pytest.approx(0.3)
    assert s.sparsity(79) == 0.9
    assert s.sparsity(99) == 0.9
    assert s.sparsity(44) == pytest.approx(0.9 - 0.6 * (1 - 34 / 69) ** 3)
    assert [s.phase(t) for t in (9, 10, 79, 80)] == ["warm-up", "gradual", "gradual", "fixed mask"]


def test_prunes_at_both_ends_and_at_multiples_of_the_interval_between():
    s = schedule()
    assert [t for t in range(100) if s.is_pruning_step(t)] == [
        10, 14, 21, 28, 35, 42, 49, 56, 63, 70, 77, 79,
    ]  # fmt: skip


def test_no_warmup_and_no_finetuning():
    s = schedule(warmup_steps=0, finetune_steps=0)
    assert (s.prune_start, s.prune_end) == (0, 99)
    assert s.is_pruning_step(0)
    assert s.is_pruning_step(99)


@given(st.integers(0, 99), st.integers(0, 99))
def test_sparsity_never_falls(a, b):
    low, high = sorted((a, b))
    assert schedule().sparsity(low) <= schedule().sparsity(high)


def test_slab_prob_is_constant_then_linear():
    annealing, s = SlabProbAnnealing(slab_prob=0.1, final_factor=0.001), schedule()
    assert annealing.at(0, s) == annealing.at(10, s) == pytest.approx(0.1)
    assert annealing.at(79, s) == annealing.at(99, s) == pytest.approx(1e-4)
    assert annealing.at(44, s) == pytest.approx(0.1 + (1e-4 - 0.1) * 34 / 69)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"final_sparsity": 1.0}, "final_sparsity must lie in"),
        ({"initial_sparsity": -0.1}, "initial_sparsity must lie in"),
        ({"initial_sparsity": 0.95}, "must not exceed"),
        ({"interval": 0}, "interval"),
        ({"finetune_steps": -1}, "negative"),
        ({"warmup_steps": 79}, "prune_start"),
        ({"warmup_steps": "9"}, "warmup_steps must be a number, got '9'"),
        ({"finetune_steps": 1.5}, "finetune_steps must be a whole number, got 1.5"),
        ({"interval": True}, "interval must be a number, got True"),
        ({"num_steps": float("nan")}, "num_steps must be a number, got nan"),
        ({"num_steps": None}, "num_steps must be a number, got None"),
        ({"final_sparsity": float("nan")}, "final_sparsity must be a number, got nan"),
        ({"final_sparsity": None}, "final_sparsity must be a number, got None"),
    ],
)
def test_bad_schedules_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        schedule(**changes)
