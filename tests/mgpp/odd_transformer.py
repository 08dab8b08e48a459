"""A small transformer with odd sizes, its data, and a one-process reference that shares no pruning code.

The reference takes the prior's gradient by autograd, the threshold by sorting, and its masks are dense.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mgpp import Method, MixtureGaussianPrior, Placement, PruningSchedule, log_prior
from mgpp import make_method as make_method_of
from tests.mgpp.placements import kept as kept_by
from tests.mgpp.rivals import LR, REFERENCES, SoftMovement

MICRO_BATCH, ACCUMULATION, CLIPPING = 3, 2, 0.3
VOCABULARY, WIDTH, HEADS, FEED_FORWARD, LAYERS, LENGTH = 53, 15, 3, 37, 2, 7
NUM_EXAMPLES = 500
PRIOR = MixtureGaussianPrior(spike_var=1e-6, slab_var=0.05)
ADAMW = {"lr": LR, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.0}
SCHEDULE = PruningSchedule(
    num_steps=12,
    warmup_steps=2,
    finetune_steps=3,
    interval=3,
    initial_sparsity=0.3,
    final_sparsity=0.85,
)
FIRST, LAST = 2, 8  # step of its first pruning, and of its last
# What places sparsity otherwise: in a model whose sizes divide, how, how far, and by which method.
EVEN_FEED_FORWARD = 40
PLACED: dict[str, tuple[Placement, float, str]] = {
    "budgets": (
        Placement(scope="layer", budgets={"*.qkv.*": 0.75}, min_kept=0.2),
        0.7,
        "mgpp",
    ),
    "n-of-m": (Placement(pattern="2:5", scope="uniform"), 0.6, "mgpp"),
    "blocks": (Placement(pattern="5x1"), 0.7, "movement"),
}
RECOMPUTE = "recompute"  # activations, layer by layer; a setting of the model and none of ZeRO's
CASES: dict[str, tuple[int, str, dict[str, object]]] = {
    "stage0-fp32": (0, "fp32", {}),
    "stage1-fp32": (1, "fp32", {}),
    "stage2-fp32": (2, "fp32", {}),
    "stage3-fp32": (3, "fp32", {}),
    "stage3-subgroups-fp32": (3, "fp32", {"sub_group_size": 700}),
    "stage3-persistent-fp32": (3, "fp32", {"stage3_param_persistence_threshold": 500}),
    "stage2-offload-fp32": (2, "fp32", {"offload_optimizer": {"device": "cpu"}}),
    "stage3-offload-fp32": (3, "fp32", {"offload_optimizer": {"device": "cpu"}}),
    "stage1-offload-fp32": (1, "fp32", {"offload_optimizer": {"device": "cpu"}}),
    "stage3-offload-all-fp32": (
        3,
        "fp32",
        {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    ),
    "stage2-recompute-fp32": (2, "fp32", {RECOMPUTE: True}),
    "stage3-recompute-fp32": (3, "fp32", {RECOMPUTE: True}),
    "stage0-bf16": (0, "bf16", {}),
    "stage1-bf16": (1, "bf16", {}),
    "stage1-bf16+fp32": (1, "bf16+fp32", {}),
    "stage2-bf16": (2, "bf16", {}),
    "stage3-bf16": (3, "bf16", {}),
    "stage2-offload-bf16": (2, "bf16", {"offload_optimizer": {"device": "cpu"}}),
    "stage3-offload-bf16": (3, "bf16", {"offload_optimizer": {"device": "cpu"}}),
    "stage3-subgroups-bf16": (3, "bf16", {"sub_group_size": 700}),
    **{f"stage{stage}-bf16+fp32": (stage, "bf16+fp32", {}) for stage in (0, 2, 3)},
    "stage1-offload-bf16+fp32": (1, "bf16+fp32", {"offload_optimizer": {"device": "cpu"}}),
    "stage2-offload-bf16+fp32": (2, "bf16+fp32", {"offload_optimizer": {"device": "cpu"}}),
    "stage3-offload-bf16+fp32": (3, "bf16+fp32", {"offload_optimizer": {"device": "cpu"}}),
    "stage3-subgroups-bf16+fp32": (3, "bf16+fp32", {"sub_group_size": 700}),
    "stage1-fp16+fp32": (1, "fp16+fp32", {}),
    "stage2-fp16+fp32": (2, "fp16+fp32", {}),
    "stage3-fp16+fp32": (3, "fp16+fp32", {}),
    "stage1-fp16": (1, "fp16", {}),
    "stage2-fp16": (2, "fp16", {}),
    "stage3-fp16": (3, "fp16", {}),
    "stage2-offload-fp16": (2, "fp16", {"offload_optimizer": {"device": "cpu"}}),
    "stage3-offload-fp16": (3, "fp16", {"offload_optimizer": {"device": "cpu"}}),
    "stage3-subgroups-fp16": (3, "fp16", {"sub_group_size": 700}),
}
RIVALS = ("platon", "movement", "soft-movement", "pins", "mgpp-saliency", "mgpp-saliency-sparing")
BF16_RIVALS = ("soft-movement", "pins")  # they keep what the other two keep, and more
RIVAL_CASES: dict[str, tuple[str, int, str, dict[str, object]]] = {
    f"{method}-stage{stage}{'-subgroups' if zero else ''}-{precision}": (
        method,
        stage,
        precision,
        zero,
    )
    for method in RIVALS
    for stage, precision, zero in (
        (0, "fp32", {}),
        (1, "fp32", {}),
        (2, "fp32", {}),
        (3, "fp32", {}),
        (3, "fp32", {"sub_group_size": 700}),
        (2, "bf16", {}),
        (3, "bf16", {"sub_group_size": 700}),
        (1, "bf16+fp32", {}),
        (2, "bf16+fp32", {}),
        (3, "bf16+fp32", {"sub_group_size": 700}),
    )
    if precision == "fp32" or method in BF16_RIVALS
}
PLACED_CASES: dict[str, tuple[str, int, dict[str, object]]] = {
    f"{placed}-stage{stage}{'-subgroups' if zero else ''}": (placed, stage, zero)
    for placed in PLACED
    for stage, zero in ((0, {}), (1, {}), (2, {}), (3, {"sub_group_size": 700}))
}
TRANSFER_STEPS = 8
TRANSFER_CASES: dict[str, tuple[int, str, dict[str, object]]] = {
    **{f"transfer-stage{stage}-fp32": (stage, "fp32", {}) for stage in (0, 1, 2, 3)},
    "transfer-stage3-subgroups-fp32": (3, "fp32", {"sub_group_size": 700}),
    "transfer-stage0-bf16": (0, "bf16", {}),
    "transfer-stage2-bf16": (2, "bf16", {}),
    "transfer-stage3-fp16": (3, "fp16", {}),
}
# A model that is pruned already, pruned further: by what, at which stage, in which precision.
FURTHER_CASES: dict[str, tuple[str, int, str, dict[str, object]]] = {
    **{f"further-mgpp-stage{stage}-fp32": ("mgpp", stage, "fp32", {}) for stage in (0, 1, 2)},
    "further-platon-stage1-fp32": ("platon", 1, "fp32", {}),
    "further-movement-stage2-fp32": ("movement", 2, "fp32", {}),
    "further-mgpp-stage2-bf16": ("mgpp", 2, "bf16", {}),
    "further-mgpp-stage3-fp32": ("mgpp", 3, "fp32", {}),
    "further-mgpp-stage3-subgroups-fp32": ("mgpp", 3, "fp32", {"sub_group_size": 700}),
}
NVME_CASES: dict[str, tuple[int, str, dict[str, object]]] = {
    f"stage3-nvme-{precision}": (
        3,
        precision,
        {
            "offload_optimizer": {"device": "cpu"},
            "offload_param": {"device": "nvme", "buffer_size": 100_000},
            "sub_group_size": 700,
        },
    )
    for precision in ("fp32", "bf16")
}


class Layer(nn.Module):
    def __init__(self, feed_forward: int) -> None:
        super().__init__()
        # No bias: the softmax does not see a key's bias, so its gradient is rounding noise, which Adam
        # turns into whole steps.
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, feed_forward)
        self.down = nn.Linear(feed_forward, WIDTH)
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = self.qkv(self.norms[0](x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.down(functional.gelu(self.up(self.norms[1](x))))


class OddTransformer(nn.Module):
    def __init__(self, feed_forward: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([Layer(feed_forward) for _ in range(LAYERS)])
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.recompute = False

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        return self.head(x)


def make_model(feed_forward: int = FEED_FORWARD) -> OddTransformer:
    torch.manual_seed(0)
    return OddTransformer(feed_forward)


def make_pruned_model() -> OddTransformer:
    """As upstream pruning would leave it: the smaller 60% of the prunable weights are zero."""
    model = make_model()
    weights = dict(model.named_parameters())
    flat = torch.cat([weights[name].detach().reshape(-1) for name in prunable_names(model)])
    cut = flat.abs().sort().values[int(0.6 * flat.numel())]
    with torch.no_grad():
        for name in prunable_names(model):
            weights[name][weights[name].abs() < cut] = 0.0
    return model


def prunable_names(model: nn.Module) -> list[str]:
    return [n for n, p in model.named_parameters() if n.startswith("layers.") and p.dim() == 2]


def parameter_groups(model: nn.Module) -> list[dict[str, object]]:
    names = set(prunable_names(model))
    groups: list[list[nn.Parameter]] = [[], []]
    for name, parameter in model.named_parameters():
        groups[name not in names].append(parameter)
    return [{"params": group} for group in groups]


def make_method(name: str = "mgpp") -> Method:
    prior = {"spike_var": PRIOR.spike_var, "slab_var": PRIOR.slab_var}
    saliency = {"name": "mgpp-saliency", **prior, "decay": 0.98, "spare_pruned": False}
    settings = {
        "mgpp": prior,
        "mgpp-saliency": saliency,
        "mgpp-saliency-sparing": {**saliency, "spare_pruned": True},
        "soft-movement": {"penalty": SoftMovement.penalty},
    }
    spec = {"name": name, **settings.get(name, {})}
    return make_method_of(spec, num_examples=NUM_EXAMPLES)


def micro_batch(micro_step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * micro_step + rank)
    return torch.randint(VOCABULARY, (MICRO_BATCH, LENGTH), generator=generator)


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens)[:, :-1].float()
    return functional.cross_entropy(logits.reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1))


def reference(
    world_size: int,
    method: str = "mgpp",
    placed: str | None = None,
    moved: list[Tensor] | None = None,
    further: bool = False,
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Train in one plain process; return the final weights and the dense mask of each step.

    What is pruned at each pruning had moved so far from zero by it, in units of the largest magnitude set
    to zero: added to `moved`, of all matrices together, where that is given. With `further` it starts
    from the pruned model, whose zeros stay: they are pruned before all others, all of them each time.
    """
    placement, final = Placement(), 0.85
    if placed:
        placement, final, method = PLACED[placed]
    feed_forward = EVEN_FEED_FORWARD if placed else FEED_FORWARD
    model = make_pruned_model() if further else make_model(feed_forward)
    names = prunable_names(model)
    weights = dict(model.named_parameters())
    prunable = [weights[name] for name in names]
    rival = REFERENCES[method](prunable, SCHEDULE)
    optimizer = torch.optim.AdamW(parameter_groups(model), **ADAMW)  # type: ignore[arg-type]
    keep = {name: torch.ones_like(weights[name], dtype=torch.bool) for name in names}
    zeros = {name: (weights[name].detach() == 0) & further for name in names}
    keep = {name: keep[name] & ~zeros[name] for name in names}
    least = sum(int(zero.sum()) for zero in zeros.values())
    least_share = (least + 0.5) / sum(zero.numel() for zero in zeros.values()) if further else 0.0
    history = []
    for step in range(SCHEDULE.num_steps):
        optimizer.zero_grad()
        for micro in range(ACCUMULATION):
            for rank in range(world_size):
                batch = micro_batch(step * ACCUMULATION + micro, rank)
                (loss(model, batch) / ACCUMULATION / world_size).backward()
        _clip(list(weights.values()))
        if step <= SCHEDULE.prune_end:
            if method == "mgpp":
                _add_prior(prunable, step)
            rival.before_update([keep[name] for name in names], step)
        optimizer.step()
        with torch.no_grad():
            if step <= SCHEDULE.prune_end:
                rival.after_update([keep[name] for name in names], step)
            _zero(weights, zeros)
            if SCHEDULE.is_pruning_step(step):
                rival.before_pruning([keep[name] for name in names])
                scores = dict(zip(names, rival.scores(), strict=True))
                # Kept zeros lie below all scores, whichever sign those have.
                scores = {n: s.masked_fill(zeros[n], -float("inf")) for n, s in scores.items()}
                before = keep.copy()
                sparsity = max(_cubic(step, final), least_share)
                keep |= kept_by(placement, scores, sparsity, partial(_cubic, step))
                if moved is not None:
                    cut = max(float(scores[name][~keep[name]].max()) for name in names)
                    moved.append(torch.cat([scores[name][~before[name]] / cut for name in names]))
                _zero(weights, {name: ~keep[name] for name in names})
            if step > SCHEDULE.prune_end:
                _zero(weights, {name: ~keep[name] for name in names})
        history.append({name: mask.clone() for name, mask in keep.items()})
    return {name: w.detach().clone() for name, w in weights.items()}, history


def _zero(weights: dict[str, nn.Parameter], pruned: dict[str, Tensor]) -> None:
    for name, mask in pruned.items():
        weights[name][mask] = 0.0


def transfer_reference(world_size: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train the pruned model in one plain process; return the final weights and the dense masks."""
    model = make_pruned_model()
    weights = dict(model.named_parameters())
    keep = {name: weights[name].detach() != 0 for name in prunable_names(model)}
    optimizer = torch.optim.AdamW(parameter_groups(model), **ADAMW)  # type: ignore[arg-type]
    for step in range(TRANSFER_STEPS):
        optimizer.zero_grad()
        for micro in range(ACCUMULATION):
            for rank in range(world_size):
                batch = micro_batch(step * ACCUMULATION + micro, rank)
                (loss(model, batch) / ACCUMULATION / world_size).backward()
        _clip(list(weights.values()))
        optimizer.step()
        with torch.no_grad():
            for name, mask in keep.items():
                weights[name] *= mask
    return {name: w.detach().clone() for name, w in weights.items()}, keep


def _clip(parameters: list[nn.Parameter]) -> None:
    # DeepSpeed divides by (norm + 1e-6) / limit where that exceeds 1.
    norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
    factor = (norm + 1e-6) / CLIPPING
    if factor > 1:
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad /= factor


def _add_prior(weights: list[nn.Parameter], step: int) -> None:
    done = min(max((step - FIRST) / (LAST - FIRST), 0), 1)
    slab_prob = 0.1 + (0.0001 - 0.1) * done
    for weight in weights:
        exact = weight.detach().double().requires_grad_()
        (-log_prior(exact, PRIOR, slab_prob).sum() / NUM_EXAMPLES).backward()
        assert weight.grad is not None
        weight.grad += exact.grad.float()  # type: ignore[union-attr]


def _cubic(step: int, final: float) -> float:
    return final + (0.3 - final) * (1 - (step - FIRST) / (LAST - FIRST)) ** 3
