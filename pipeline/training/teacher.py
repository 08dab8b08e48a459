"""The teacher of a distillation: checked against the model that learns, loaded, and run beside it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import ConfigError, Problem
from pipeline.models.checkpoint_check import check_weights
from pipeline.models.labels import label_order, names_of
from pipeline.models.loading import load_tokenizer
from pipeline.models.settings import build_empty, load_model_config
from pipeline.models.source import ModelConfig
from pipeline.tasks import Task
from pipeline.tasks.base import UNLABELLED, without_labels
from pipeline.training.batch_mean import WHOLE, Weights, weighted_loss
from pipeline.training.deepspeed import ZeroConfig
from pipeline.training.distill import DistillConfig, hidden_loss, output_loss, soft_target_loss
from pipeline.training.engine import make_inference_model
from pipeline.worker_group import WorkerGroup

_SHIFTS_LABELS = "AutoModelForSeq2SeqLM"


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """Which model teaches, and what its student learns from.

    Attributes:
        config: the weights of the losses.
        model: the teacher.
    """

    config: DistillConfig
    model: ModelConfig

    def begin(
        self,
        student: Any,
        task: Task,
        zero: ZeroConfig,
        batch_size: int,
        workers: WorkerGroup,
        *,
        own_loss: bool = True,
    ) -> "Distillation":
        """Load the teacher: whole on each worker, or sharded like its student under ZeRO 3.

        Args:
            student: the model that learns, which its engine holds.
            task: what it is trained on.
            zero: precision, and whether the teacher is sharded.
            batch_size: rows a worker takes in one forward pass.
            workers: all of them; all call this function.
            own_loss: whether the task's loss is what the student makes of labels.

        Raises:
            ConfigError: if it does not load, or does not fit the student.
        """
        with in_terms_of_teacher():
            settings = load_model_config(self.model)
            found = mismatches(student.config, settings, self.config, heads=_has_labels(student))
            if found:
                raise ConfigError(_of_teacher(self.model, found))
            teacher = make_inference_model(self.model, task, zero, batch_size, workers)
        return Distillation(config=self.config, task=task, teacher=teacher, own_loss=own_loss)


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """A teacher at work beside its student. It keeps no state and draws no random numbers.

    Attributes:
        config: the weights of the losses.
        task: says which outputs are held together.
        teacher: the model or its DeepSpeed engine, in evaluation mode.
        own_loss: whether the task's loss is what the student makes of labels.
    """

    config: DistillConfig
    task: Task
    teacher: Any
    own_loss: bool = True

    def losses(
        self, student: Any, batch: Mapping[str, Tensor], weights: Weights = WHOLE
    ) -> dict[str, Tensor]:
        """Run teacher and student on one micro-batch.

        Args:
            student: the model or its DeepSpeed engine.
            batch: the inputs of both.
            weights: what the micro-batch's means count for.

        Returns:
            `loss`, to be minimized: (1 - weight) `task_loss` + weight `distill_loss`, and hidden_weight
            `hidden_loss` where there is such a weight. Each is the weighted mean over the micro-batch.
        """
        config = self.config
        extra = {"output_hidden_states": True} if config.hidden_weight else {}
        with torch.no_grad():  # first, so that its activations are gone when the student's come
            # Given labels it would compute a loss that nothing uses; but a decoder beside an encoder
            # makes its inputs of them.
            given = batch if self.task.auto_model == _SHIFTS_LABELS else without_labels(batch)
            target = self.teacher(**given, **extra)
        learned = student(**(batch if self.own_loss else without_labels(batch)), **extra)
        task_loss = weighted_loss(learned, batch, self.task, weights.targets)
        distilled = self._distill_loss(learned, target, batch) * weights.targets
        loss = (1 - config.weight) * task_loss + config.weight * distilled
        losses = {"task_loss": task_loss, "distill_loss": distilled}
        if config.hidden_weight:
            losses["hidden_loss"] = _hidden_loss(learned, target, batch, weights)
            loss = loss + config.hidden_weight * losses["hidden_loss"]
        return {"loss": loss, **losses}

    def close(self) -> None:
        """Give back what the teacher's engine holds."""
        if hasattr(self.teacher, "destroy"):
            self.teacher.destroy()

    def _distill_loss(self, learned: Any, target: Any, batch: Mapping[str, Tensor]) -> Tensor:
        pairs = zip(
            self.task.distillation_outputs(learned, batch),
            self.task.distillation_outputs(target, batch),
            strict=True,
        )
        if self.task.predicts_numbers:
            parts = [output_loss(*pair) for pair in pairs]
        else:
            parts = [soft_target_loss(*p, temperature=self.config.temperature) for p in pairs]
        return torch.stack(parts).mean()


def teacher_problems(
    distill: DistillConfig, student: ModelConfig, auto_model: str
) -> list[Problem]:
    """Return what is wrong with a teacher that is not the run's own dense fine-tune.

    Args:
        distill: names the teacher.
        student: the model that learns.
        auto_model: the transformers auto class of the task.
    """
    model = distill.model(student)
    if model is None:
        return []
    try:
        with in_terms_of_teacher():
            tokenizer, settings = load_tokenizer(model), load_model_config(model)
            kind = type(build_empty(model, auto_model)).__name__
            check_weights(model, auto_model, new_head=True)
    except ConfigError as error:
        return error.problems
    found = mismatches(load_model_config(student), settings, distill, heads=False)
    trained_as = settings.architectures or [kind]
    if kind not in trained_as:
        found.append(
            f"is a {trained_as[0]}, not a {kind}: fine-tune it for the task, or distill from 'dense'"
        )
    of_student = load_tokenizer(student)
    if tokenizer.get_vocab() != of_student.get_vocab() or (
        tokenizer.model_input_names != of_student.model_input_names
    ):
        found.append(
            f"has another tokenizer than model.path, {student.path!r}; both models see the same tokens"
        )
    return _of_teacher(model, found)


def _of_teacher(model: ModelConfig, found: list[str]) -> list[Problem]:
    return [Problem("distill.teacher", f"{model.path!r} {what}") for what in found]


def mismatches(student: Any, teacher: Any, distill: DistillConfig, *, heads: bool) -> list[str]:
    """Return in what two models differ that must be the same.

    Args:
        student: the configuration of the model that learns.
        teacher: that of its teacher.
        distill: whether hidden states are distilled too.
        heads: whether the labels of their heads are known and count.
    """
    same = {"vocab_size": "tokens in its vocabulary"}
    if heads:
        same["num_labels"] = "labels"
    if distill.hidden_weight:
        same |= {"num_hidden_layers": "layers", "hidden_size": "units of width"}
        same |= {"decoder_layers": "decoder layers", "num_decoder_layers": "decoder layers"}
    problems = []
    for name, what in same.items():
        ours, theirs = (
            getattr(settings, name, getattr(settings.get_text_config(), name, None))
            for settings in (student, teacher)
        )
        if ours != theirs:
            problems.append(f"has {theirs} {what}, the model that learns {ours}")
    if heads and not problems:
        names = [names_of(settings.id2label) for settings in (student, teacher)]
        try:
            order = label_order(names[1], names[0])
        except ConfigError:
            order = []
        if order not in (None, list(range(len(names[0])))):
            problems.append(f"has the labels {names[1]}, the model that learns {names[0]}")
    return problems


@contextmanager
def in_terms_of_teacher() -> Iterator[None]:
    """Name the teacher's key in what loading a model raises, without the student's remedies."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(
            replace(
                problem,
                key=problem.key.replace("model.path", "distill.teacher").replace(
                    "model.revision", "distill.revision"
                ),
                hint=""
                if "model.random_init" in problem.hint
                else problem.hint.replace("model.revision", "distill.revision"),
            )
            for problem in error.problems
        ) from error


def _has_labels(model: Any) -> bool:
    """Whether a model predicts labels of its own, not tokens."""
    return model.get_output_embeddings() is None


def _hidden_loss(
    learned: Any, target: Any, batch: Mapping[str, Tensor], weights: Weights
) -> Tensor:
    """Return the distance of the layers' outputs, over encoder and decoder alike."""
    parts = [
        hidden_loss(ours, theirs, mask) * weight
        for (ours, mask, weight), (theirs, _, _) in zip(
            _stacks(learned, batch, weights), _stacks(target, batch, weights), strict=True
        )
    ]
    return torch.stack(parts).mean()


def _stacks(
    outputs: Any, batch: Mapping[str, Tensor], weights: Weights
) -> Iterator[tuple[tuple[Tensor, ...], Tensor, Tensor]]:
    """Yield the outputs of each stack of layers (not the embeddings), its tokens and their weight."""
    attended = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    if outputs.get("encoder_hidden_states") is not None:
        yield outputs.encoder_hidden_states[1:], attended, weights.tokens
        yield outputs.decoder_hidden_states[1:], batch["labels"] != UNLABELLED, weights.targets
    else:
        yield outputs.hidden_states[1:], attended, weights.tokens
