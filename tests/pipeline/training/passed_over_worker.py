"""Run on ranks: trains models of which a step leaves weights without a gradient."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.distributed as dist
from torch import Tensor, nn

import mgpp
from pipeline.context import Context
from pipeline.errors import ConfigError
from pipeline.models.source import ModelConfig
from pipeline.pruning.config import METHOD_CONFIGS, PruneSection
from pipeline.store.checkpoints import CheckpointStore
from pipeline.tasks import make_task
from pipeline.tasks.text_to_text import TextToTextConfig
from pipeline.training.config import TrainConfig
from pipeline.training.deepspeed import ZeroConfig
from pipeline.training.loop import train
from pipeline.worker_group import WorkerGroup
from tests.cases import run_cases

SLOW_IMPORTS = ("tests.slow_imports",)  # before the ranks are forked

# Experts that are modules of their own, of which each rank uses others.
TASK = TextToTextConfig(type="text-to-text", source="a", target="b")
TRAIN = TrainConfig(
    length=5, batch_size=8, micro_batch_size=2, lr=1e-3, lr_final_factor=1.0, eps=1e-4, log_every=1
)
FROZEN = ["*shared*", "*Attention*", "*layer_norm*", "*router*"]  # all but the experts
_GMP = {"method": METHOD_CONFIGS["gmp"](name="gmp"), "include": ["*.experts.*"]}
PRUNE = PruneSection(
    **_GMP, sparsity=0.5, initial_sparsity=0.2, start_after=1, finetune=1, interval=2
)
EXPERTS: dict[str, tuple[int, list[str]]] = {
    "experts-stage0": (0, []),
    "experts-stage3": (3, []),
    "experts-stage3-frozen": (3, FROZEN),
}
REFUSED = "experts-stage2"
SMALL = {"stage3_param_persistence_threshold": 0, "sub_group_size": 700}

# A layer that is used in some micro-batches, and one that never is, on all ranks alike.
LAYOUTS: dict[str, dict[str, Any]] = {
    "layers-stage0": {"stage": 0},
    "layers-stage1": {"stage": 1},
    "layers-stage2": {"stage": 2},
    "layers-stage3": {"stage": 3, **SMALL},
    "layers-stage1-offload": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
    "layers-stage2-offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "layers-stage3-offload": {"stage": 3, "offload_optimizer": {"device": "cpu"}, **SMALL},
}
NUM_STEPS, ACCUMULATION, CLIPPING = 6, 2, 0.05
ADAMW = {"lr": 1e-2, "eps": 1e-4, "weight_decay": 0.0}
PRUNING = mgpp.PruningConfig(sparsity=0.5, start_after=1, finetune=1, interval=2)


class Layers(nn.Module):
    """A layer that is always used, one that never is, one that sometimes is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, inputs: Tensor, sometimes: bool) -> Tensor:
        states = self.layers[0](inputs).tanh()
        if sometimes:
            states = states + self.layers[2](inputs)
        return states.square().mean()


def micro_batches(step: int, rank: int) -> Iterator[tuple[Tensor, bool]]:
    """Yield a step's inputs of a rank, and whether the third layer is used."""
    for micro in range(ACCUMULATION):
        generator = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
        yield torch.randn(4, 8, generator=generator), step % 2 == 0 and micro == 1


def train_layers(folder: Path, case: str) -> None:
    import deepspeed

    from mgpp.backends.deepspeed import clear_gradients

    model = Layers()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(mgpp.parameter_groups(model, PRUNING), **ADAMW),
        config={
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": ACCUMULATION,
            "gradient_clipping": CLIPPING,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {
                **LAYOUTS[case],
                "allgather_bucket_size": 1000,
                "reduce_bucket_size": 1000,
            },
        },
    )
    pruner = mgpp.attach(engine, PRUNING, NUM_STEPS, 1000)
    for step in range(NUM_STEPS):
        clear_gradients(engine)
        for inputs, sometimes in micro_batches(step, dist.get_rank()):
            engine.backward(engine(inputs, sometimes))
            engine.step()
    weights = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled="stage3" in case):
            weights[name] = parameter.detach().clone()
    found = {"weights": weights, "hash": pruner.mask_hash()}
    torch.save(found, folder / f"{case}-rank{dist.get_rank()}.pt")


def train_experts(folder: Path, case: str, stage: int, frozen: list[str]) -> None:
    workers, output = WorkerGroup.current(), folder / case
    extra = {"zero_optimization": SMALL} if stage == 3 else {}
    train(
        Context(
            inputs={"data": folder / "data"},
            model_kwargs={},
            output=output,
            workers=workers,
            checkpoints=CheckpointStore(f"{output}-checkpoints", workers, keep=1),
            progress=lambda record: None,
        ),
        model_config=ModelConfig(path=str(folder / "model")),
        task=make_task(TASK),
        config=TRAIN.model_copy(update={"freeze": frozen}),
        zero=ZeroConfig(stage=stage, precision="fp32", bucket_elements=10_000, extra=extra),
        prune=PRUNE,
    )


def be_refused(folder: Path) -> None:
    try:
        train_experts(folder, REFUSED, 2, [])
    except ConfigError as error:
        (folder / f"{REFUSED}-rank{dist.get_rank()}.txt").write_text(str(error))
    dist.barrier()


def main(name: str) -> None:
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False  # gloo carries everything; nothing to compile
    dist.init_process_group("gloo")
    folder = Path(name)
    run_cases(
        folder,
        {
            **{case: partial(train_experts, folder, case, *EXPERTS[case]) for case in EXPERTS},
            REFUSED: partial(be_refused, folder),
            **{case: partial(train_layers, folder, case) for case in LAYOUTS},
        },
        seconds=100,
    )
