import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mgpp import Collectives
from mgpp.masking.threshold import Group, find_cuts, packed_masks, sent_bytes
from mgpp.sharding.bitmask import unpack_bits
from tests.mgpp.ranks import contiguous_shards, per_weight_shards, run_ranks, stacks_of

LAYOUTS = [contiguous_shards, per_weight_shards]


def cut_all(weights, shards, k, collectives):
    """Return the shards as stacks, and one cut over all of them."""
    stacks, numels = stacks_of(shards, len(weights)), [w.numel() for w in weights]
    group = Group(indices=tuple(range(len(weights))), k=k)
    return stacks, find_cuts(stacks, [group], numels, collectives)[0]


def prune_sharded(weights, k, world_size, cut_into):
    """Return (threshold, bool over the concatenated weights: goes), found on `world_size` ranks."""
    starts = torch.tensor([0] + [w.numel() for w in weights]).cumsum(0)
    goes_all = torch.zeros(int(starts[-1]), dtype=torch.bool)

    def work(collectives):
        shards = cut_into(weights, collectives.rank, world_size)
        stacks, cut = cut_all(weights, shards, k, collectives)
        masks = packed_masks(stacks, dict.fromkeys(range(len(weights)), cut))
        for shard, mask in zip(shards, masks, strict=True):
            goes = ~unpack_bits(mask, shard.numel)
            begin = int(starts[shard.index]) + shard.offset
            goes_all[begin : begin + shard.numel] |= goes
        return cut.threshold

    thresholds = run_ranks(world_size, work)
    assert len(set(thresholds)) == 1
    return thresholds[0], goes_all


def reference(weights, k):
    """The k smallest by a stable sort: ties go in order of position."""
    magnitudes = torch.cat([w.reshape(-1) for w in weights]).abs()
    goes = torch.zeros_like(magnitudes, dtype=torch.bool)
    goes[magnitudes.sort(stable=True).indices[:k]] = True
    return goes


def random_weights(seed, shapes=((31, 17), (1, 5), (64, 3))):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("cut_into", LAYOUTS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_threshold_equals_kthvalue(world_size, cut_into):
    weights = random_weights(0)
    magnitudes = torch.cat([w.reshape(-1) for w in weights]).abs()
    for k in (1, 2, 100, 517, magnitudes.numel() - 1, magnitudes.numel()):
        threshold, goes = prune_sharded(weights, k, world_size, cut_into)
        assert threshold == magnitudes.kthvalue(k).values.item()
        assert int(goes.sum()) == k
        assert torch.equal(goes, reference(weights, k))


@pytest.mark.parametrize("cut_into", LAYOUTS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ties_zeros_and_negative_zeros_go_in_global_order(world_size, cut_into):
    weights = random_weights(1)
    weights[0].view(-1)[::3] = 0.0
    weights[0].view(-1)[1::3] = -0.0
    weights[2].view(-1)[:50] = 0.25
    weights[1].view(-1)[:] = -0.25
    num_zeros = int((torch.cat([w.view(-1) for w in weights]) == 0).sum())
    total = sum(w.numel() for w in weights)
    for k in (0, 1, num_zeros - 1, num_zeros, num_zeros + 1, num_zeros + 100, total):
        _, goes = prune_sharded(weights, k, world_size, cut_into)
        assert int(goes.sum()) == k
        assert torch.equal(goes, reference(weights, k))


@settings(max_examples=60)
@given(
    values=st.lists(
        st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1.5, -1.5, 1e30, float("inf")]),
        min_size=1,
        max_size=40,
    ),
    share=st.floats(0, 1),
    world_size=st.integers(1, 4),
    cut_into=st.sampled_from(LAYOUTS),
)
def test_any_values_on_any_number_of_ranks(values, share, world_size, cut_into):
    middle = len(values) // 2
    weights = [torch.tensor(v).view(1, -1) for v in (values[:middle], values[middle:]) if v]
    k = int(share * len(values))
    _, goes = prune_sharded(weights, k, world_size, cut_into)
    assert torch.equal(goes, reference(weights, k))


def test_larger_than_a_chunk():
    weights = [torch.randn(700, 1000, generator=torch.Generator().manual_seed(2))]
    weights[0].view(-1)[300_000:600_000] = 0.0
    for k in (299_999, 630_000):
        _, goes = prune_sharded(weights, k, 2, contiguous_shards)
        assert torch.equal(goes, reference(weights, k))


def large_weights(case):
    """Three million weights, so that the sample takes every third or seventh only."""
    weight = torch.randn(3_000_000, generator=torch.Generator().manual_seed(3))
    if case == "mostly zeros":
        weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(4)) < 0.9] = 0.0
    if case == "a sample that misleads":  # small where it looks, large everywhere else
        weight[3::3] *= 1e-6
    if case == "half ways between bfloat16 numbers":
        weight.view(torch.int32).bitwise_and_(~0xFFFF).bitwise_or_(0x8000)
    if case == "beside these half ways":
        beside = torch.arange(len(weight), dtype=torch.int32) % 3 + 0x7FFF
        weight.view(torch.int32).bitwise_and_(~0xFFFF).bitwise_or_(beside)
    if case == "nearly all the same":
        weight.mul_(1e-4).add_(1.0)
    if case == "subnormal":
        weight.mul_(1e-39)
    if case == "partly infinite":
        weight[weight.abs() > 0.5] = float("inf")
    if case == "at the largest numbers":
        weight.clamp_(-1, 1).mul_(3.4028e38)
    return [weight.view(3000, 1000)]


@pytest.mark.parametrize(
    "case",
    [
        "smooth",
        "mostly zeros",
        "a sample that misleads",
        "half ways between bfloat16 numbers",
        "beside these half ways",
        "nearly all the same",
        "subnormal",
        "partly infinite",
        "at the largest numbers",
    ],
)
@pytest.mark.parametrize("share", [0.3, 0.95])
def test_many_weights_however_they_are_spread(case, share):
    weights = large_weights(case)
    k = int(share * weights[0].numel())
    _, goes = prune_sharded(weights, k, 2, contiguous_shards)
    assert torch.equal(goes, reference(weights, k))


@pytest.mark.parametrize(("k", "world_size"), [(1_000_000, 1), (2_900_000, 2)])
def test_bytes_sent_stay_below_one_mebibyte(k, world_size):
    for case in ("smooth", "mostly zeros", "a sample that misleads"):
        weights = large_weights(case)
        sent = []

        def work(collectives, weights=weights, sent=sent):
            def all_reduce(tensor):
                sent.append(tensor.numel() * tensor.element_size())
                collectives.all_reduce(tensor)

            counting = Collectives(collectives.rank, collectives.world_size, all_reduce)
            shards = contiguous_shards(weights, counting.rank, world_size)
            cut_all(weights, shards, k, counting)

        run_ranks(world_size, work)
        assert sum(sent) / world_size <= sent_bytes(world_size, 1) < 2**20


@pytest.mark.parametrize("k", [-1, 729])
def test_impossible_k_is_refused(k):
    weights = random_weights(0)
    assert sum(w.numel() for w in weights) < 729
    with pytest.raises(ValueError, match=r"must not be negative|exceeds the"):
        prune_sharded(weights, k, 1, contiguous_shards)
