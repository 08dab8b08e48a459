"""Run on two ranks: writes models under DeepSpeed, and beside each what `save_pretrained` makes of it."""

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"

import deepspeed
import pytest
import torch
import torch.distributed as dist
import transformers

from mgpp.backends.deepspeed import weights as deepspeed_weights
from pipeline.context import Context
from pipeline.errors import StageError
from pipeline.models.loading import load_tokenizer
from pipeline.models.source import ModelConfig
from pipeline.models.weights import positive_zeros
from pipeline.saving import agreement
from pipeline.saving.model_files import write_model
from pipeline.storage import writing
from pipeline.storage.outputs import OutputFiles
from pipeline.store.checkpoints import CheckpointStore
from pipeline.tasks import make_task
from pipeline.training.deepspeed import ZeroConfig, deepspeed_config, init_deepspeed
from pipeline.worker_group import WorkerGroup, set_collective_timeout
from tests.cases import run_cases
from tests.disk import no_large_files
from tests.pipeline.architectures import ARCHITECTURES, config_of
from tests.pipeline.saving.models import JOINED, joined_config

SLOW_IMPORTS = ("tests.slow_imports",)  # before the ranks are forked

ROUND_BYTES = 3000  # so that tensors are cut
# Tied weights, experts cut up, buffers, padded shards, queries, keys and values that become one.
NAMES = ("llama-tied", "mixtral", "gpt-oss", "deepseek-v3", "t5", "bart", JOINED)
ZEROS: dict[str, dict[str, Any]] = {
    "stage3": {"stage": 3},
    "stage3-bf16": {"stage": 3, "precision": "bf16"},
    "stage3-offload": {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
    "stage2": {"stage": 2},
    "stage1-bf16": {"stage": 1, "precision": "bf16"},
    "stage0": {"stage": 0},
}
CASES = (
    *(f"{name}-stage3" for name in NAMES),
    *(f"llama-tied-{zero}" for zero in ZEROS if zero != "stage3"),
    "mixtral-stage2",
)
GATHERED, FULL, HANGS, S3, KILLED = "gathered", "full", "hangs", "s3", "killed"
SECOND = "model-00002-of-00002.safetensors"


def make_engine(name: str, zero: ZeroConfig) -> Any:
    """Return an engine that trains a random model with negative zeros in it."""
    torch.manual_seed(0)
    if name == JOINED:
        model: Any = transformers.AutoModelForMaskedLM.from_config(joined_config())
    else:
        auto = getattr(transformers, make_task(ARCHITECTURES[name].task).auto_model)
        model = auto.from_config(config_of(ARCHITECTURES[name]))
    model.to(zero.dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[::5] = -0.0
    settings = deepspeed_config(
        zero, micro_batch_size=1, accumulation=1, gradient_clipping=None, on_gpu=False
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def context_of(folder: Path, **changes: Any) -> Context:
    """Return a stage's context; the folder is the same for all ranks."""
    workers = WorkerGroup.current()
    folder.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {
        "inputs": {},
        "model_kwargs": {},
        "output": folder,
        "workers": workers,
        "checkpoints": CheckpointStore(str(folder / "checkpoints"), workers),
        "progress": lambda record: None,
    }
    return Context(**values | changes)


def write(context: Context, engine: Any, root: Path) -> None:
    """Write the engine's model in rounds of a few kilobytes."""
    tokenizer = load_tokenizer(ModelConfig(path=str(root / "tokenizer")))
    names = [name for name, p in engine.module.named_parameters() if p.dim() > 1]
    prunable = [n for n in names if ".layers." in n]
    write_model(
        context, engine.module, tokenizer=tokenizer, prunable=prunable, round_bytes=ROUND_BYTES
    )


def compare(case: str, root: Path) -> None:
    """Write a model, and the same with `save_pretrained` of all its weights."""
    name = next(n for n in NAMES if case.startswith(f"{n}-stage"))
    zero = ZeroConfig(
        **{"precision": "fp32", "bucket_elements": 10_000, **ZEROS[case.removeprefix(f"{name}-")]}
    )
    engine = make_engine(name, zero)
    write(context_of(root / case), engine, root)
    save_whole(engine.module, root / case / "whole")
    dist.barrier()
    engine.destroy()


def save_whole(model: Any, folder: Path) -> None:
    """Gather all weights and let transformers write them on the main worker."""
    parameters = [p for p in model.parameters() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(parameters, enabled=bool(parameters)):
        if dist.get_rank() == 0:
            state = {n: positive_zeros(t.detach()).clone() for n, t in model.state_dict().items()}
            same = {id(t): n for n, t in model.state_dict(keep_vars=True).items()}
            for name, tensor in model.state_dict(keep_vars=True).items():
                state[name] = state[same[id(tensor)]]  # tied weights are one tensor
            model.save_pretrained(folder, state_dict=state)


def gathered(root: Path) -> None:
    """Write what does not lie in memory in even shards: it is gathered by DeepSpeed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed_weights, "_is_plain", lambda parameter: False)
        engine = make_engine("llama-tied", ZeroConfig(stage=3, precision="fp32"))
        write(context_of(root / GATHERED), engine, root)
    save_whole(engine.module, root / GATHERED / "whole")
    dist.barrier()


def full(root: Path) -> None:
    """Write where the second worker's disk is full."""
    folder, rank = root / FULL, dist.get_rank()
    engine = make_engine("llama", ZeroConfig(stage=3, precision="fp32"))
    said = "nothing"
    try:
        with no_large_files(1000) if rank == 1 else nullcontext():
            write(context_of(folder), engine, root)
    except StageError as error:
        said = str(error)
    (folder / f"said-{rank}").write_text(said)
    dist.barrier()


def hangs(root: Path) -> None:
    """Write where the second worker's storage takes nothing for as long as the first one waits."""
    folder, rank = root / HANGS, dist.get_rank()
    set_collective_timeout(2)
    agreement.BEAT_SECONDS = 0.2
    fifo = folder / "fifo"
    if rank == 1:
        folder.mkdir(parents=True, exist_ok=True)
        os.mkfifo(fifo)
        writing._LocalFile = lambda path: fifo.open("wb")  # type: ignore[assignment,misc]
    dist.barrier()
    engine = make_engine("llama", ZeroConfig(stage=3, precision="fp32"))
    records: list[dict[str, Any]] = []
    said = "nothing"
    began = time.monotonic()
    try:
        write(context_of(folder, progress=records.append), engine, root)
    except (TimeoutError, RuntimeError) as error:
        said = f"{type(error).__name__}: {error}"
    waited = time.monotonic() - began
    (folder / f"said-{rank}").write_text(
        json.dumps({"said": said, "waited": waited, "records": records})
    )
    if rank == 0:  # lets the second worker's storage fail, and it come to its end
        os.close(os.open(fifo, os.O_RDONLY))


def to_s3(root: Path) -> None:
    """Write to S3: the main worker's other files to a folder of its own."""
    url = f"{os.environ['TEST_BUCKET']}/attempt"
    workers = WorkerGroup.current()
    files = OutputFiles(url)
    context = context_of(root / S3 / f"rank-{workers.rank}", files=files)
    engine = make_engine("mixtral", ZeroConfig(stage=3, precision="fp32"))
    write(context, engine, root)
    save_whole(engine.module, root / S3 / "whole")
    written = workers.gather(files.written)
    if written is not None:
        (root / S3 / "written.json").write_text(json.dumps(written))
    dist.barrier()


def killed(root: Path) -> None:
    """End the second worker in a round; the first says what it saw of it, and how soon."""
    rank = dist.get_rank()
    engine = make_engine("llama", ZeroConfig(stage=3, precision="fp32"))
    context = context_of(root / KILLED)
    if rank == 1:
        threading.Thread(target=_end_in_writing, args=(root / KILLED,), daemon=True).start()
        agreement.Agreement.step = _slowly(agreement.Agreement.step)  # type: ignore[method-assign]
    try:
        write(context, engine, root)
    except Exception as error:  # noqa: BLE001  # gloo raises what it likes
        (root / KILLED / "said-0").write_text(type(error).__name__)
    os._exit(0)


def _slowly(step: Callable[..., Any]) -> Callable[..., Any]:
    def slow(self: Any, what: str) -> Any:
        time.sleep(0.05)
        return step(self, what)

    return slow


def _end_in_writing(folder: Path) -> None:
    path = folder / "model" / SECOND
    while not (path.exists() and path.stat().st_size > ROUND_BYTES):
        time.sleep(0.001)
    os.kill(os.getpid(), 9)


def main(name: str) -> None:
    root = Path(name)
    dist.init_process_group("gloo")
    init_deepspeed("gloo")
    cases: dict[str, Callable[[], None]] = {case: partial(compare, case, root) for case in CASES}
    cases |= {
        GATHERED: partial(gathered, root),
        FULL: partial(full, root),
        S3: partial(to_s3, root),
        KILLED: partial(killed, root),
        HANGS: partial(hangs, root),
    }
    run_cases(root, cases, seconds=60)
