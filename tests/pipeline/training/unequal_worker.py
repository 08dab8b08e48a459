"""Run on ranks: trains on rows of which some have many targets and some few, cut in several ways."""

from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.context import Context
from pipeline.models.source import ModelConfig
from pipeline.pruning.config import METHOD_CONFIGS, PruneSection
from pipeline.store.checkpoints import CheckpointStore
from pipeline.tasks import make_task
from pipeline.tasks.causal_lm import CausalLMConfig
from pipeline.tasks.instruction import InstructionConfig
from pipeline.tasks.masked_lm import MaskedLMConfig
from pipeline.tasks.text_to_text import TextToTextConfig
from pipeline.training.config import TrainConfig
from pipeline.training.deepspeed import ZeroConfig
from pipeline.training.distill import DistillConfig
from pipeline.training.loop import train
from pipeline.training.teacher import TeacherSpec
from pipeline.worker_group import WorkerGroup
from tests.cases import run_cases
from tests.pipeline.training import train_worker  # noqa: F401  (sets DeepSpeed's accelerator)

INSTRUCTION = InstructionConfig(type="instruction", prompt="prompt", response="answer")
TASKS: dict[str, Any] = {
    "instruction": INSTRUCTION,
    "routed": INSTRUCTION,  # a mixture of experts, whose routers have a loss of each micro-batch
    "causal-lm": CausalLMConfig(type="causal-lm", max_length=8),
    "masked-lm": MaskedLMConfig(type="masked-lm", max_length=8, mask_share=0.1),
    "text-to-text": TextToTextConfig(type="text-to-text", source="prompt", target="answer"),
}
DISTILLED = tuple(f"distilled-{name}" for name in TASKS if name not in ("routed", "causal-lm"))
ROUTED_ROWS = 4
CUTS_OF = {  # (ranks, micro-batch, ZeRO stage)
    **dict.fromkeys(TASKS, ((1, 2, 2), (2, 4, 2), (2, 2, 3), (4, 1, 2))),
    **dict.fromkeys(DISTILLED, ((2, 2, 3), (4, 1, 2))),
    "routed": ((1, ROUTED_ROWS, 2), (2, ROUTED_ROWS, 2), (4, ROUTED_ROWS, 2)),
    "causal-lm": (
        (2, 4, 2),
        (4, 1, 2),
    ),  # blocks of one length: every micro-batch has as many targets
}
CASES = [(family, *cut) for family, cuts in CUTS_OF.items() for cut in cuts]
NUM_STEPS, BATCH_SIZE = 12, 16
# Adam turns gradients that are nothing but rounding, as attention's key bias has, into whole steps.
TRAIN = TrainConfig(
    length=NUM_STEPS,
    batch_size=BATCH_SIZE,
    lr=1e-3,
    lr_final_factor=1.0,
    log_every=1,
    freeze=["*bias"],
)
PRUNE = PruneSection(
    method=METHOD_CONFIGS["gmp"](name="gmp"),
    sparsity=0.5,
    initial_sparsity=0.2,
    start_after=2,
    finetune=3,
    interval=2,
)
DISTILL = DistillConfig(temperature=3.0, hidden_weight=0.5)


def name_of(family: str, ranks: int, micro_batch: int, stage: int) -> str:
    """Name a case, and the folder it writes."""
    return f"{family}-{ranks}-{micro_batch}-{stage}"


def run(root: Path, family: str, micro_batch: int, stage: int) -> None:
    """Train one family, cut so."""
    workers = WorkerGroup.current()
    kind = family.removeprefix("distilled-")
    output = root / "out" / name_of(family, workers.world_size, micro_batch, stage)
    teacher = TeacherSpec(config=DISTILL, model=ModelConfig(path=str(root / kind / "teacher")))
    # "freeze" must match: decoders and T5 have no bias.
    changes = {
        "micro_batch_size": micro_batch,
        "freeze": TRAIN.freeze if kind == "masked-lm" else [],
    }
    train(
        Context(
            inputs={"data": root / kind / "data"},
            model_kwargs={},
            output=output,
            workers=workers,
            checkpoints=CheckpointStore(f"{output}-checkpoints", workers, keep=1),
            progress=lambda record: None,
        ),
        model_config=ModelConfig(path=str(root / kind / "model")),
        task=make_task(TASKS[kind]),
        config=TRAIN.model_copy(update=changes),
        zero=ZeroConfig(stage=stage, precision="fp32", bucket_elements=10_000),
        prune=PRUNE,
        teacher=teacher if family in DISTILLED else None,
    )


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    root, ranks = Path(folder), dist.get_world_size()
    cases = {
        name_of(*case): partial(run, root, case[0], *case[2:]) for case in CASES if case[1] == ranks
    }
    run_cases(root / "out", cases, seconds=100)
