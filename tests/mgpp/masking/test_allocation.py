"""How many units of which weights go: numbers that add up, and what cannot be, with the reason."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgpp import Allocation, Placement, PruningSchedule
from mgpp.masking.allocation import apportion, layer_of

SHAPES = {
    f"model.layers.{i}.{name}.weight": shape
    for i in range(3)
    for name, shape in (("attention.q", (8, 12)), ("attention.o", (12, 8)), ("mlp", (16, 12)))
}
TOTAL = 3 * (96 + 96 + 192)


def schedule_to(sparsity, initial=0.0):
    return PruningSchedule(
        num_steps=20,
        warmup_steps=2,
        finetune_steps=3,
        interval=3,
        initial_sparsity=initial,
        final_sparsity=sparsity,
    )


def allocation(sparsity=0.7, initial=0.0, shapes=SHAPES, transposed=(), **placement):
    return Allocation(Placement(**placement), shapes, schedule_to(sparsity, initial), transposed)


def counts(made, step):
    """Return the units that go, by the weights that are cut together."""
    groups = made.groups(made.num_pruned(step), step)
    return {group.indices: group.k for group in groups}


@settings(max_examples=200)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=8),
    most=st.fractions(0, 1),
    share=st.floats(0, 1),
)
def test_shares_add_up_and_are_rounded_down_or_up(sizes, most, share):
    caps = [int(most * size) for size in sizes]
    total = int(share * sum(caps))
    found = apportion(total, sizes, caps)
    assert sum(found) == total
    exact = [Fraction(size * total, sum(sizes)) for size in sizes]
    for share_of_it, cap, count in zip(exact, caps, found, strict=True):
        assert count <= cap
        assert count == cap or share_of_it - 1 < count
    if all(count < cap for count, cap in zip(found, caps, strict=True)):
        assert all(abs(count - e) < 1 for count, e in zip(found, exact, strict=True))


def test_the_largest_remainders_are_rounded_up_and_of_equals_the_first():
    assert apportion(10, [3, 3, 3, 6], [9] * 4) == [2, 2, 2, 4]
    assert apportion(5, [1, 1, 1], [9] * 3) == [2, 2, 1]
    assert apportion(5, [10, 7, 4], [9] * 3) == [2, 2, 1]  # 2.38, 1.67, 0.95
    assert apportion(5, [4, 4, 4], [1, 2, 2]) == [1, 2, 2]


@pytest.mark.parametrize("scope", ["global", "layer", "uniform", "lamp"])
@pytest.mark.parametrize("step", [2, 3, 9, 15, 16])
def test_every_scope_prunes_the_same_number(scope, step):
    made = allocation(0.73, 0.2, scope=scope)
    found = counts(made, step)
    assert sum(found.values()) == int(TOTAL * made.schedule.sparsity(step))
    assert sorted(i for indices in found for i in indices) == list(range(9))
    assert len(found) == {"global": 1, "layer": 3, "uniform": 9, "lamp": 1}[scope]
    for indices, k in found.items():
        exact = sum(made.sizes[i] for i in indices) * made.schedule.sparsity(step)
        assert abs(k - exact) <= 1


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("bert.encoder.layer.11.output.dense.weight", "bert.encoder.layer.11"),
        ("decoder.block.0.layer.1.weight", "decoder.block.0"),
        ("layers.3.experts.5.w1.weight", "layers.3"),
        ("0.weight", "0"),
        ("conv2.weight", "conv2.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_a_layer_is_named_by_the_first_number(name, layer):
    assert layer_of(name) == layer


def test_budgets_follow_the_same_cubic_and_the_rest_takes_what_remains():
    made = allocation(0.7, 0.3, budgets={"*.attention.q.*": 0.9, "*.attention.o.*": 0.1})
    for step in (2, 3, 9, 16):
        found = counts(made, step)
        r = 1 - (step - 2) / 14
        due = int(288 * (0.9 + (0.3 - 0.9) * r**3))
        assert found[0, 3, 6] == due
        assert found[1, 4, 7] == int(288 * 0.1)  # never above its final sparsity
        whole = int(TOTAL * (0.7 + (0.3 - 0.7) * r**3))
        assert found[2, 5, 8] == whole - due - 28


def test_scope_holds_within_a_budget_too():
    made = allocation(0.7, scope="uniform", budgets={"*.attention.*": 0.8})
    found = counts(made, 16)
    assert sum(k for indices, k in found.items() if indices[0] % 3 != 2) == int(576 * 0.8)
    assert {k for indices, k in found.items() if indices[0] % 3 != 2} == {76, 77}
    assert sum(found.values()) == int(TOTAL * 0.7)


def test_budgets_of_all_weights_must_make_up_the_sparsity():
    budgets = {"*.attention.*": 0.5, "*.mlp.*": 0.7}
    found = counts(allocation(0.6, budgets=budgets), 16)  # 691 of 1152; 70% of 576 are 403.2
    assert (found[0, 1, 3, 4, 6, 7], found[2, 5, 8]) == (288, 403)
    assert sum(found.values()) == int(TOTAL * 0.6)
    with pytest.raises(ValueError, match=r"or set sparsity to 0\.6002") as raised:
        allocation(0.65, budgets=budgets)
    share = float(str(raised.value).rpartition(" ")[2])
    allocation(share, budgets=budgets)


@pytest.mark.parametrize(
    ("sparsity", "settings"),
    [
        (0.4, {"budgets": {"*.attention.*": 0.8}}),  # nothing remains for the others
        (0.5, {"budgets": {"*.q.*": 0.5, "*.o.*": 0.5}, "pattern": "2:4"}),  # all at their bounds
        (0.5, {"budgets": {"*.0.*": 0.5, "*.1.*": 0.5, "*.2.*": 0.5}}),
        (0.45, {"budgets": {"*.q.*": 0.3, "*.o.*": 0.6}, "pattern": "4x2", "scope": "layer"}),
        (0.9, {"budgets": {"*.q.*": 0.9, "*.o.*": 0.9}, "min_kept": 0.1, "pattern": "1x2"}),
    ],
)
def test_rounding_never_stops_a_run_under_way(sparsity, settings):
    shapes = {name: (20 * a, 20 * b) for name, (a, b) in SHAPES.items()}
    schedule = PruningSchedule(
        num_steps=1500, warmup_steps=1, finetune_steps=9, interval=1, final_sparsity=sparsity
    )
    made = Allocation(Placement(**settings), shapes, schedule)
    for step in range(1500):
        num_pruned = made.num_pruned(step)
        assert sum(group.k for group in made.groups(num_pruned, step)) == num_pruned // made.unit


def test_min_kept_caps_every_matrix():
    made = allocation(0.7, min_kept=0.1)
    assert made.caps == [86, 86, 172] * 3  # 96 - 10, 192 - 20
    assert allocation(0.9, min_kept=0.1, shapes={"layers.0.w": (10, 10)}).caps == [90]


def test_blocks_are_counted_whole():
    made = allocation(0.7, pattern="4x2", min_kept=0.1)
    assert made.sizes == [12, 12, 24] * 3
    assert made.caps == [10, 10, 21] * 3
    assert counts(made, 16) == {tuple(range(9)): int(TOTAL * 0.7) // 8}


def test_where_nothing_fits_the_numbers_are_told():
    with pytest.raises(
        ValueError, match=r"budgets: of 1152 weights 806 are to be pruned at the last pruning"
    ):
        allocation(0.7, budgets={"*.mlp.*": 0.1})
    with pytest.raises(ValueError, match=r"budgets: .* asks -173 of the other weights"):
        allocation(0.3, budgets={"*.mlp.*": 0.9})
    # 10% of 96 is 9.6: ten stay, so that less than 90% can go.
    with pytest.raises(
        ValueError,
        match=r"min_kept: of 1152 weights 1036 are to be pruned .* to 1032 may be pruned",
    ):
        allocation(0.9, min_kept=0.1)


@pytest.mark.parametrize(
    ("placement", "problem"),
    [
        ({"scope": "matrix"}, "scope: got 'matrix'; allowed are global, layer, uniform"),
        ({"budgets": {"*": 1.0}}, r"budgets: '\*' must lie in \[0, 1\), got 1.0"),
        ({"min_kept": 1.0}, "min_kept: must lie in"),
        ({"pattern": "2/4"}, "pattern: got '2/4'; allowed are N:M"),
        ({"pattern": "4:4"}, "pattern: got '4:4', which prunes nothing"),
        ({"budgets": {"*.k.*": 0.5}}, r"budgets: pattern '\*\.k\.\*' matches no prunable weight"),
        (
            {"budgets": {"*.q.*": 0.5, "*.0.*": 0.6}},
            r"budgets: patterns '\*\.q\.\*' and '\*\.0\.\*' both match model\.layers\.0\.attention\.q",
        ),
        ({"min_kept": 0.4}, r"sparsity: got 0\.7, but min_kept 0\.4 allows 0\.6 at most"),
        ({"pattern": "2:4"}, r"sparsity: got 0\.7, but pattern 2:4 allows 0\.5 at most"),
        (
            {"pattern": "1:4", "budgets": {"*.q.*": 0.8}},
            r"budgets: '\*\.q\.\*': got 0\.8, but pattern 1:4 allows 0\.75 at most",
        ),
        ({"pattern": "1:8"}, r"attention\.q\.weight has 12 inputs, which do not divide by 8"),
        ({"pattern": "16x1"}, r"attention\.q\.weight has 8 outputs, which do not divide by 16"),
    ],
)
def test_settings_that_cannot_be(placement, problem):
    with pytest.raises(ValueError, match=problem):
        allocation(**placement)


def test_a_pattern_that_yaml_read_as_a_number_and_budgets_that_are_no_mapping():
    with pytest.raises(TypeError, match="YAML reads 2:4 without quotes"):
        Placement(pattern=124)
    for value in (True, False, 2.5, ["2:4"]):
        with pytest.raises(TypeError, match=r"^pattern: got .*x1.\)$"):
            Placement(pattern=value)
    with pytest.raises(TypeError, match="give a mapping"):
        Placement(budgets=["*"])


@pytest.mark.parametrize(("pattern", "share"), [("2:5", 0.6), ("1:3", 2 / 3), ("1:6", 5 / 6)])
def test_the_most_that_n_of_m_allows_is_not_rounded_down(pattern, share):
    shapes = {f"layers.{i}.w": (7, 30) for i in range(11)}
    made = allocation(share, shapes=shapes, pattern=pattern)
    assert made.num_pruned(16) == round(11 * 210 * share)
    with pytest.raises(ValueError, match="allows"):
        allocation(share + 1e-6, shapes=shapes, pattern=pattern)


def test_what_is_no_matrix_has_no_pattern():
    shapes = {"layers.0.conv": (4, 8, 3, 3)}
    with pytest.raises(ValueError, match=r"conv has shape \(4, 8, 3, 3\), and only matrices"):
        allocation(0.5, shapes=shapes, pattern="2:4")
    allocation(0.5, shapes=shapes)


def test_transposed_weights_are_divided_along_their_own_inputs():
    shapes = {"h.0.c_attn.weight": (6, 8)}  # Conv1D: 6 inputs, 8 outputs
    with pytest.raises(ValueError, match="has 6 inputs"):
        allocation(0.5, shapes=shapes, pattern="2:4", transposed=set(shapes))
    allocation(0.5, shapes=shapes, pattern="2:4")
