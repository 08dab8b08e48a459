"""Pruning under every ZeRO layout against one plain process."""

import pytest
import torch

from mgpp import GMP, Pruner
from mgpp.sharding.bitmask import pack_bits
from tests.cases import launch_cases
from tests.mgpp import odd_transformer as odd
from tests.mgpp.backends.checks import (
    check_is_near_reference,
    check_sparsity_is_exact_and_the_ranks_agree,
)

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]  # one launch for all layouts


FLOAT32 = [case for case in odd.CASES if case.endswith("-fp32")]  # weights and all


class Results:
    """What the ranks wrote of each case, read as a test asks for it."""

    def __init__(self, launched):
        self.launched = launched

    def __getitem__(self, case):
        folder = self.launched.folder(case)
        return [torch.load(folder / f"{case}-rank{r}.pt", weights_only=True) for r in (0, 1)]


def launch(which, cases, folder, timeout):
    return Results(
        launch_cases(
            "tests.mgpp.backends.zero_worker",
            which,
            str(folder),
            cases=cases,
            folder=folder,
            num_processes=2,
            timeout=timeout,
        )
    )


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    cases = (
        *odd.CASES,
        *odd.RIVAL_CASES,
        *odd.PLACED_CASES,
        *odd.TRANSFER_CASES,
        *odd.FURTHER_CASES,
        "refusals",
    )
    return launch("all", cases, tmp_path_factory.mktemp("zero"), timeout=800)


@pytest.fixture(scope="session")
def reference():
    return odd.reference(world_size=2)


@pytest.fixture(scope="session")
def rivals():
    return {name: odd.reference(world_size=2, method=name) for name in odd.RIVALS}


@pytest.fixture(scope="session")
def placed():
    return {name: odd.reference(world_size=2, placed=name) for name in odd.PLACED}


@pytest.fixture(scope="session")
def transferred():
    return odd.transfer_reference(world_size=2)


@pytest.fixture(scope="session")
def further():
    methods = {method for method, *_ in odd.FURTHER_CASES.values()}
    return {m: odd.reference(world_size=2, method=m, further=True) for m in methods}


def mask_hash(masks):
    """Hash dense masks with the pruner's own hash, in one process."""
    from mgpp import Shard

    shards = [
        Shard(
            name=name,
            index=i,
            full_shape=tuple(keep.shape),
            offset=0,
            numel=keep.numel(),
            flat=torch.zeros(keep.numel()),
            start=0,
        )
        for i, (name, keep) in enumerate(masks.items())
    ]
    shapes = {s.name: s.full_shape for s in shards}
    pruner = Pruner(shards, shapes, method=GMP(), schedule=odd.SCHEDULE)
    state = pruner.state_dict()
    for saved, keep in zip(state["masks"], masks.values(), strict=True):
        saved["keep"] = pack_bits(keep.reshape(-1))
    pruner.load_state_dict(state)
    return pruner.mask_hash()


def check_equals_reference(results, reference):
    weights, masks = reference
    for result in results:
        for name, expected in weights.items():
            difference = (result["weights"][name] - expected).abs().max().item()
            assert difference <= 1e-6, name
        assert result["hashes"] == [mask_hash(step) for step in masks]
        for name, keep in masks[-1].items():
            assert torch.equal(result["weights"][name] != 0, keep), name


@pytest.fixture(scope="session")
def moved():
    found = []
    odd.reference(world_size=2, moved=found)
    return found[-1]


@pytest.mark.parametrize("case", FLOAT32)
def test_how_far_pruned_weights_moved_is_that_of_one_process(case, trained, moved):
    for result in trained[case]:
        pruning = result["pruning"]
        assert pruning["revived"] == pytest.approx(float((moved > 1).float().mean()), abs=1e-12)
        for name, share in (("moved_median", 0.5), ("moved_p99", 0.99)):
            expected = float(moved.quantile(share, interpolation="higher"))
            assert pruning[name] == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("case", FLOAT32)
def test_fp32_equals_the_one_process_reference(case, trained, reference):
    check_equals_reference(trained[case], reference)


@pytest.mark.parametrize("case", [c for c in odd.RIVAL_CASES if c.endswith("-fp32")])
def test_rivals_equal_their_papers_equations(case, trained, rivals):
    name = odd.RIVAL_CASES[case][0]
    weights, masks = rivals[name]
    for result in trained[case]:
        assert result["hashes"] == [mask_hash(step) for step in masks]
        for weight, expected in weights.items():
            difference = (result["weights"][weight] - expected).abs().max().item()
            assert difference <= 1e-6, weight


@pytest.mark.parametrize(("gradients", "layouts"), [("bf16", 2), ("bf16+fp32", 3)])
@pytest.mark.parametrize("rival", odd.BF16_RIVALS)
def test_rivals_choose_the_same_in_any_layout_of_bf16(rival, gradients, layouts, trained):
    found = [
        trained[case][0]["hashes"]
        for case in odd.RIVAL_CASES
        if case.startswith(f"{rival}-stage") and case.endswith(f"-{gradients}")
    ]
    assert len(found) == layouts
    assert all(hashes == found[0] for hashes in found)


def test_float32_gradients_leave_the_same_weights_in_every_layout_that_reduces_each_micro_batch(
    trained,
):
    """The same numbers are added in the same order; the other stages add those of a rank first."""
    cases = [
        c for c in odd.CASES if c.endswith("-bf16+fp32") and c.startswith(("stage2", "stage3"))
    ]
    first, *others = [trained[case][0] for case in cases]
    assert len(others) == 4
    for other in others:
        assert other["hashes"] == first["hashes"]
        for name, weight in first["weights"].items():
            assert torch.equal(weight, other["weights"][name]), name


@pytest.mark.parametrize("case", odd.PLACED_CASES)
def test_placements_equal_sorting_in_one_process(case, trained, placed):
    weights, masks = placed[odd.PLACED_CASES[case][0]]
    for result in trained[case]:
        assert result["hashes"] == [mask_hash(step) for step in masks]
        for name, expected in weights.items():
            assert (result["weights"][name] - expected).abs().max().item() <= 1e-6, name
        pruned = {name: 1 - keep.double().mean().item() for name, keep in masks[-1].items()}
        assert result["by_weight"] == pytest.approx(pruned)


def test_placements_place_sparsity_as_they_say(placed):
    last = {name: masks[-1] for name, (_, masks) in placed.items()}
    for name, keep in last["budgets"].items():
        assert keep.double().mean() >= 0.2, name
    # Some reach their bound, so that it is really put to the test.
    shares = [keep.double().mean().item() for keep in last["budgets"].values()]
    assert min(shares) == pytest.approx(0.2)
    for keep in last["n-of-m"].values():
        assert bool((keep.view(-1, 5).sum(dim=1) == 2).all())
    for keep in last["blocks"].values():
        height = keep.view(-1, 5, keep.shape[1]).sum(dim=1)
        assert bool(((height == 0) | (height == 5)).all())


def test_rivals_choose_otherwise(rivals, reference):
    """So that the comparison above tells them apart."""
    last = [masks[-1] for _, masks in (*rivals.values(), reference)]
    for i, one in enumerate(last):
        for other in last[:i]:
            assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("case", [*odd.CASES, *odd.RIVAL_CASES])
def test_sparsity_is_exact_and_the_ranks_agree(case, trained, reference):
    check_sparsity_is_exact_and_the_ranks_agree(trained[case], reference)


@pytest.mark.parametrize("case", odd.CASES)
def test_updates_left_out_do_not_count(case, trained):
    """The scale of fp16 is found by updates that overflow; schedules go by those really made."""
    for result in trained[case]:
        assert len(result["hashes"]) == odd.SCHEDULE.num_steps
        assert (result["skipped"] > 0) == ("-fp16" in case)


@pytest.mark.parametrize("case", [c for c in odd.CASES if not c.endswith("-fp32")])
def test_low_precision_stays_near_the_reference(case, trained, reference):
    check_is_near_reference(trained[case][0], reference)


@pytest.mark.parametrize("case", odd.TRANSFER_CASES)
def test_sparse_transfer_keeps_the_zeros_it_finds(case, trained, transferred):
    weights, masks = transferred
    num_zeros = sum(int((~keep).sum()) for keep in masks.values())
    num_prunable = sum(keep.numel() for keep in masks.values())
    for result in trained[case]:
        assert set(result["hashes"]) == {mask_hash(masks)}  # from before the first step on
        assert len(result["hashes"]) == odd.TRANSFER_STEPS + 1
        assert result["zeros"] == result["pruning"]["num_pruned"] == num_zeros
        assert result["pruning"]["step"] == -1
        assert result["pruning"]["sparsity"] == num_zeros / num_prunable
        for name, keep in masks.items():
            assert torch.equal(result["weights"][name] != 0, keep), name
            assert result["by_weight"][name] == pytest.approx(1 - keep.float().mean().item())
        if case.endswith("fp32"):
            for name, expected in weights.items():
                assert (result["weights"][name] - expected).abs().max().item() <= 1e-6, name


@pytest.mark.parametrize("case", odd.FURTHER_CASES)
def test_pruned_further_the_zeros_of_the_start_stay(case, trained, further):
    method, _, precision, _ = odd.FURTHER_CASES[case]
    weights, masks = further[method]
    zeros = {name: p.detach() == 0 for name, p in odd.make_pruned_model().named_parameters()}
    k = int(sum(keep.numel() for keep in masks[-1].values()) * 0.85)
    for result in trained[case]:
        assert result["zeros"] == result["pruning"]["num_pruned"] == k
        for name in masks[-1]:
            found = result["weights"][name]
            assert not (found[zeros[name]] != 0).any(), name
            assert not torch.signbit(found[zeros[name]]).any(), name
            for during in result["during"]:  # after each step, also between two prunings
                assert not (during[name][zeros[name]] != 0).any(), name
        assert len(result["during"]) == odd.SCHEDULE.num_steps
        if precision == "fp32":
            assert result["hashes"] == [mask_hash(step) for step in masks]
            for name, expected in weights.items():
                assert (result["weights"][name] - expected).abs().max().item() <= 1e-6, name


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_first_group_that_holds_more_is_refused_and_left_alone(stage, trained):
    for refusals in trained["refusals"]:
        assert "must hold the prunable weights and nothing else" in refusals[stage]
        assert "mgpp.parameter_groups" in refusals[stage]


@pytest.fixture(scope="module")
def trained_on_nvme(tmp_path_factory):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("DeepSpeed's async_io cannot be built here: libaio is missing")
    return launch("nvme", odd.NVME_CASES, tmp_path_factory.mktemp("nvme"), timeout=1400)


@pytest.mark.torture
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("case", odd.NVME_CASES)
def test_parameters_on_nvme(case, trained_on_nvme, reference):
    results = trained_on_nvme[case]
    check_sparsity_is_exact_and_the_ranks_agree(results, reference)
    if case.endswith("-fp32"):
        check_equals_reference(results, reference)
    else:
        check_is_near_reference(results[0], reference)
