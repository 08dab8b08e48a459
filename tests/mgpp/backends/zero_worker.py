"""Run on ranks: trains the odd transformer under DeepSpeed in every layout, writes what came out."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
import torch.distributed as dist

import mgpp
from mgpp.backends.deepspeed import attach
from tests.cases import run_cases
from tests.mgpp import odd_transformer as odd

SLOW_IMPORTS = ("deepspeed.runtime.zero.muon.muon_optimizer",)  # before the ranks are forked


def config(stage: int, precision: str, **zero: object) -> dict[str, object]:
    values: dict[str, object] = {
        "train_micro_batch_size_per_gpu": odd.MICRO_BATCH,
        "gradient_accumulation_steps": odd.ACCUMULATION,
        "gradient_clipping": odd.CLIPPING,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "allgather_bucket_size": 100_000,
            "reduce_bucket_size": 100_000,
            **zero,
        },
    }
    if precision.startswith("bf16"):
        values["bf16"] = {"enabled": True}
    if precision.startswith(
        "fp16"
    ):  # a scale far too large: the first updates overflow and are left out
        values["fp16"] = {"enabled": True, "initial_scale_power": 20, "hysteresis": 1}
    if precision.endswith("+fp32"):  # gradients are reduced and accumulated in float32
        values["communication_data_type"] = "fp32"
        if stage:
            values["data_types"] = {"grad_accum_dtype": "fp32"}
    return values


def train(
    stage: int,
    precision: str,
    method: str = "mgpp",
    placed: str = "",
    further: bool = False,
    **zero: object,
) -> dict[str, object]:
    rank = dist.get_rank()
    placement, schedule = None, odd.SCHEDULE
    transfers = method == "sparse-transfer"
    if placed:
        placement, final, method = odd.PLACED[placed]
        schedule = replace(schedule, final_sparsity=final)
    if transfers:
        schedule = mgpp.PruningSchedule.fixed_mask(odd.TRANSFER_STEPS)
    model = (
        odd.make_pruned_model()
        if transfers or further
        else odd.make_model(odd.EVEN_FEED_FORWARD if placed else odd.FEED_FORWARD)
    )
    model.recompute = bool(zero.pop(odd.RECOMPUTE, False))
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    model = model.to(dtypes[precision.partition("+")[0]])
    names = odd.prunable_names(model)
    optimizer = torch.optim.AdamW(odd.parameter_groups(model), **odd.ADAMW)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config(stage, precision, **zero)
    )
    if precision == "bf16+fp32" and stage == 0:  # by autograd itself; DeepSpeed has no such setting
        for parameter in engine.module.parameters():
            parameter.grad_dtype = torch.float32
    prunable = {name: p for name, p in engine.module.named_parameters() if name in names}
    pruner = attach(
        engine,
        prunable,
        method=odd.make_method(method),
        schedule=schedule,
        placement=placement,
        keep_zeros=further,
    )
    hashes = [pruner.mask_hash()] if transfers else []
    during: list[dict[str, torch.Tensor]] = []
    while pruner.step < schedule.num_steps:
        step = pruner.step
        for micro in range(odd.ACCUMULATION):
            tokens = odd.micro_batch(step * odd.ACCUMULATION + micro, rank).to(engine.device)
            engine.backward(odd.loss(engine, tokens))
            engine.step()
        if pruner.step > step:
            hashes.append(pruner.mask_hash())
            if further:
                during.append(whole_weights(engine))
    return {
        "weights": whole_weights(engine),
        "during": during,
        "hashes": hashes,
        "skipped": engine.skipped_steps,
        "zeros": pruner.num_zeros(),
        "pruning": vars(pruner.last_pruning),
        "by_weight": pruner.sparsity_by_weight(),
    }


def whole_weights(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """Return the weights that the model computes with, by name."""
    weights = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters(
            [parameter], enabled=engine.zero_optimization_stage() == 3
        ):
            weights[name] = parameter.detach().float().cpu().clone()
    return weights


def refusal(stage: int) -> str:
    """Return what is said where the first parameter group holds more than what is pruned."""
    model = odd.make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config(stage, "fp32")
    )
    before = [p.detach().clone() for p in engine.module.parameters()]
    try:
        mgpp.attach(engine, {"sparsity": 0.5}, 20, 100)
    except ValueError as error:
        after = engine.module.parameters()
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        return str(error)
    return ""


def save(folder: Path, case: str, result: object) -> None:
    torch.save(result, folder / f"{case}-rank{dist.get_rank()}.pt")


def all_cases() -> dict[str, Callable[[], object]]:
    """Return what trains in each layout, by the names of the cases."""
    cases: dict[str, Callable[[], object]] = {}
    for case, (stage, precision, zero) in odd.CASES.items():
        cases[case] = partial(train, stage, precision, **zero)
    for case, (method, stage, precision, zero) in odd.RIVAL_CASES.items():
        cases[case] = partial(train, stage, precision, method, **zero)
    for case, (placed, stage, zero) in odd.PLACED_CASES.items():
        cases[case] = partial(train, stage, "fp32", placed=placed, **zero)
    for case, (stage, precision, zero) in odd.TRANSFER_CASES.items():
        cases[case] = partial(train, stage, precision, "sparse-transfer", **zero)
    for case, (method, stage, precision, zero) in odd.FURTHER_CASES.items():
        cases[case] = partial(train, stage, precision, method, further=True, **zero)
    cases["refusals"] = lambda: {stage: refusal(stage) for stage in (0, 1, 2, 3)}
    return cases


def nvme_cases(folder: str) -> dict[str, Callable[[], object]]:
    """Return what trains with the parameters on disk; its extension compiles for minutes."""
    cases: dict[str, Callable[[], object]] = {}
    for case, (stage, precision, zero) in odd.NVME_CASES.items():
        zero["offload_param"] |= {"nvme_path": folder}  # type: ignore[operator]
        cases[case] = partial(train, stage, precision, **zero)
    return cases


def main(which: str, folder: str) -> None:
    start()
    cases = all_cases() if which == "all" else nvme_cases(folder)
    run_cases(
        Path(folder),
        {case: lambda c=case, w=work: save(Path(folder), c, w()) for case, work in cases.items()},
        seconds=120 if which == "all" else 1200,
    )


def start(backend: str = "gloo") -> None:
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.ops import __compatible_ops__

    CPU_Accelerator.is_fp16_supported = lambda _: True  # slow on most CPUs, but it computes
    __compatible_ops__["deepspeed_shm_comm"] = False  # gloo carries everything; nothing to compile
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False)
