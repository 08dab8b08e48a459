"""The families of tasks: an explicit registry, one file a family."""

from typing import Annotated, Any

from pydantic import Field

from pipeline.tasks.base import Task, TaskConfig, TokenizedData
from pipeline.tasks.causal_lm import CausalLM, CausalLMConfig
from pipeline.tasks.instruction import Instruction, InstructionConfig
from pipeline.tasks.masked_lm import MaskedLM, MaskedLMConfig
from pipeline.tasks.question_answering import QuestionAnswering, QuestionAnsweringConfig
from pipeline.tasks.sequence import (
    Classification,
    ClassificationConfig,
    Regression,
    RegressionConfig,
)
from pipeline.tasks.text_to_text import TextToText, TextToTextConfig

AnyTaskConfig = Annotated[
    ClassificationConfig
    | RegressionConfig
    | CausalLMConfig
    | InstructionConfig
    | MaskedLMConfig
    | QuestionAnsweringConfig
    | TextToTextConfig,
    Field(discriminator="type"),
]

TASKS: dict[str, Any] = {
    "classification": Classification,
    "regression": Regression,
    "causal-lm": CausalLM,
    "instruction": Instruction,
    "masked-lm": MaskedLM,
    "question-answering": QuestionAnswering,
    "text-to-text": TextToText,
}


def make_task(config: Any) -> Task:
    """Build the task its settings name."""
    task: Task = TASKS[config.type](config)
    return task


__all__ = ["TASKS", "AnyTaskConfig", "Task", "TaskConfig", "TokenizedData", "make_task"]
