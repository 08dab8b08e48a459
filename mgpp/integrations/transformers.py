"""Pruning under `transformers.Trainer`: one callback.

Importing it also lets `from_pretrained` load packed checkpoints (`mgpp.sparse`).
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mgpp import Pruner, PruningConfig, PruningSchedule, attach
from mgpp.config import read_config

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    from mgpp.integrations.packed_weights import register
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"mgpp.integrations.transformers needs {error.name}: pip install 'mgpp[pipeline]'",
        name=error.name,
    ) from error

register()
_STATE_FILE = "mgpp_pruner.pt"


class PruningCallback(TrainerCallback):  # type: ignore[misc]
    """Prunes the model that a Trainer trains, on one process or under DistributedDataParallel.

    The pruner's state is kept in the Trainer's checkpoints and restored at a resume.

    Args:
        config: a PruningConfig, or a mapping with its keys.
        num_examples: training examples; the length of the Trainer's dataset unless given.

    Attributes:
        pruner: from the beginning of the training on.
    """

    def __init__(
        self, config: PruningConfig | Mapping[str, Any], num_examples: int | None = None
    ) -> None:
        self._config = config
        self._num_examples = num_examples
        self.pruner: Pruner | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach the pruner; at a resume, with the state the checkpoint has of it.

        Raises:
            ValueError: under DeepSpeed or FSDP; if the checkpoint has no pruner in it, or that of other
                settings; if the best model, loaded at the end, may be one that is not pruned yet.
        """
        if args.deepspeed or args.fsdp:
            raise ValueError(
                "PruningCallback does not reach weights that DeepSpeed or FSDP shards: use `mgpp run`, "
                "or mgpp.attach with the DeepSpeed engine in a loop of your own"
            )
        num_examples = self._num_examples or len(kwargs["train_dataloader"].dataset)
        pair = (kwargs["model"], kwargs["optimizer"])
        _refuse_dense_best(args, read_config(self._config).schedule(state.max_steps))
        self.pruner = attach(pair, self._config, state.max_steps, num_examples)
        if state.global_step > 0:
            path = _folder(args, state) / _STATE_FILE
            if not path.is_file():
                raise ValueError(
                    f"{path} is missing: the checkpoint was written without this callback"
                )
            self.pruner.load_state_dict(torch.load(path, weights_only=True))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn if the model is not as sparse as its schedule says: `Pruner.finish`."""
        if self.pruner is not None:
            try:
                self.pruner.finish()
            except RuntimeError as error:
                warnings.warn(f"the model is not pruned as asked for: {error}", stacklevel=2)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the pruner's state beside the Trainer's."""
        if self.pruner is not None and state.is_world_process_zero:
            torch.save(self.pruner.state_dict(), _folder(args, state) / _STATE_FILE)


def _refuse_dense_best(args: TrainingArguments, schedule: PruningSchedule) -> None:
    """Refuse to end with a checkpoint of before the mask was fixed.

    Raises:
        ValueError: with what to set.
    """
    pruned_from = schedule.prune_end + 1
    late = str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "steps"
    if args.load_best_model_at_end and not (late and (args.eval_delay or 0) >= pruned_from):
        if schedule.is_fixed_mask:
            return
        raise ValueError(
            "load_best_model_at_end may hand back a model of before the last pruning, which is step "
            f"{pruned_from} of {schedule.num_steps}: leave it out, or evaluate only later models, by "
            f"eval_strategy='steps' and eval_delay={pruned_from}"
        )


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the checkpoint of this step, named as the Trainer names it."""
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
