"""Extractive question answering as in SQuAD 1.1 and 2.0: the answer is a span of a context."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor
from torch.nn import functional

from pipeline import metric
from pipeline.errors import ConfigError, Problem, SettingError
from pipeline.section import NotNegative, Positive
from pipeline.tasks.answer_spans import Offsets, answer_tokens, best_span, exact_match_and_f1
from pipeline.tasks.base import Metrics, Predictions, Task, TaskConfig, TokenizedData
from pipeline.tasks.row_mapper import IN_MEMORY, RowMapper

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_COLUMNS = ("question", "context", "answers")
_POSITIONS = ("start_positions", "end_positions")
# What scoring needs of a validation window besides the model's inputs.
_SCORED = ("example", "null_position", "offsets", "context", "answers")


class QuestionAnsweringConfig(TaskConfig):
    """Extractive question answering over windows of `max_length` tokens."""

    only_scoring = frozenset({"metric", "max_answer_length", "num_best", "null_score_threshold"})

    type: Literal["question-answering"]
    question: str = "question"
    """The column of the question."""
    context: str = "context"
    """The column of the context that holds the answer."""
    answers: str = "answers"
    """The column of the answers: `{"text": [...], "answer_start": [...]}`, empty where there is none."""
    max_length: Positive = 384
    """Length of a window in tokens: the question, its share of the context and special tokens."""
    stride: NotNegative = 128
    """Tokens of the context that two windows share; a question that leaves less room is cut."""
    max_answer_length: Positive = 30
    """Longest answer predicted, in tokens."""
    num_best: Positive = 20
    """Start and end tokens of a window that an answer is sought among."""
    null_score_threshold: float = 0.0
    """No answer is predicted where its score is above the best answer's by more than this (only where
    the validation rows have questions without an answer)."""
    metric: Literal["f1", "exact_match"] = "f1"
    """The metric shown first; both are computed."""

    @model_validator(mode="after")
    def _check(self) -> QuestionAnsweringConfig:
        for name in ("stride", "max_answer_length"):
            if getattr(self, name) >= self.max_length:
                raise SettingError(
                    Problem(
                        name,
                        f"must be below max_length ({self.max_length})",
                        got=getattr(self, name),
                    )
                )
        return self


class QuestionAnswering(Task):
    """A row is a window of a context; the best span over a question's windows is its answer.

    Training windows that do not hold the whole answer are labelled with the null position, [CLS].
    """

    auto_model = "AutoModelForQuestionAnswering"
    metrics = (
        metric.percentage("f1"),
        metric.percentage("exact_match"),
        metric.percentage("has_answer_f1"),
        metric.percentage("has_answer_exact_match"),
        metric.percentage("no_answer_accuracy"),
        metric.count("num_questions"),
    )
    row_is_example = False

    def __init__(self, config: QuestionAnsweringConfig) -> None:
        self.config = config
        self.headline = config.metric

    def columns(self) -> dict[str, str]:
        return {f"task.{name}": getattr(self.config, name) for name in _COLUMNS}

    def text_columns(self) -> dict[str, str]:
        return {key: column for key, column in self.columns().items() if key != "task.answers"}

    def check(self, splits: DatasetDict) -> None:
        for name, split in splits.items():
            _refuse_answers(name, split, self.config.context, self.config.answers)

    def tokenize(
        self, splits: DatasetDict, tokenizer: Any, mapper: RowMapper = IN_MEMORY
    ) -> TokenizedData:
        from datasets import DatasetDict

        windows = DatasetDict(
            {name: self._windows(name, split, tokenizer, mapper) for name, split in splits.items()}
        )
        return TokenizedData(splits=windows, model_kwargs={"num_labels": 2})  # start and end

    def num_examples(self, rows: Dataset, tokenizer: Any, mapper: RowMapper = IN_MEMORY) -> int:
        return len(self._windows("train", rows, tokenizer, mapper))

    def _windows(self, name: str, split: Dataset, tokenizer: Any, mapper: RowMapper) -> Dataset:
        """Return a split's windows."""
        from datasets import Features

        config = self.config
        question_length = _question_length(config, tokenizer)
        columns = [getattr(config, column) for column in _COLUMNS]
        _refuse_answers(name, split, *columns[1:])
        training = name == "train"
        encode = partial(
            _encode,
            tokenizer=tokenizer,
            columns=columns,
            max_length=config.max_length,
            stride=config.stride,
            question_length=question_length,
            training=training,
        )
        features = Features(_features(tokenizer.model_input_names, training=training))
        return mapper.map("tokenize", name, split.select_columns(columns), encode, features)

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
            inputs = {name: [row[name] for row in rows] for name in tokenizer.model_input_names}
            # On the right whatever the tokenizer's side: positions count from the left.
            batch = dict(tokenizer.pad(inputs, padding_side="right", return_tensors="pt"))
            for name in _POSITIONS:
                if name in rows[0]:
                    batch[name] = torch.tensor([row[name] for row in rows])
            return batch

        return collate

    def distillation_outputs(self, outputs: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return outputs.start_logits, outputs.end_logits

    def num_targets(self, batch: Mapping[str, Tensor]) -> int:
        return len(batch["input_ids"])

    def predict(self, outputs: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return `start_logits` and `end_logits`, float32 [rows, max_length]; -inf where padded."""

        def widened(logits: Tensor) -> Tensor:
            missing = self.config.max_length - logits.shape[1]
            return functional.pad(logits.float(), (0, missing), value=-torch.inf)

        return {
            "start_logits": widened(outputs.start_logits),
            "end_logits": widened(outputs.end_logits),
        }

    def score(self, predictions: Predictions, rows: Dataset, tokenizer: Any) -> Metrics:
        """Compute exact match and F1 in percent; with unanswerable questions, also those of each kind.

        A question counts with those of its windows that are among `rows`.
        """
        questions = self._best_answers(predictions, rows)
        answerable = [question for question in questions if question.answers]
        unanswerable = [question for question in questions if not question.answers]
        if unanswerable:
            for question in questions:
                if question.null_score - question.best_score > self.config.null_score_threshold:
                    question.predicted = ""
        metrics = _mean_scores(questions)
        if answerable and unanswerable:
            metrics |= {f"has_answer_{k}": v for k, v in _mean_scores(answerable).items()}
        if unanswerable:
            metrics["no_answer_accuracy"] = _mean_scores(unanswerable)["exact_match"]
        return {**metrics, "num_questions": float(len(questions))}

    def _best_answers(self, predictions: Predictions, rows: Dataset) -> list[_Question]:
        """Return the questions with the best answer of all their windows."""
        questions: dict[int, _Question] = {}
        logits = zip(predictions["start_logits"], predictions["end_logits"], strict=True)
        for row, (start, end) in zip(rows.select_columns(list(_SCORED)), logits, strict=True):
            question = questions.setdefault(row["example"], _Question(answers=row["answers"]))
            null_score = float(start[row["null_position"]] + end[row["null_position"]])
            question.null_score = min(question.null_score, null_score)
            found = best_span(
                start,
                end,
                row["offsets"],
                num_best=self.config.num_best,
                max_answer_length=self.config.max_answer_length,
            )
            if found is not None and found[0] > question.best_score:
                question.best_score, first, last = found
                begin, finish = row["offsets"][first][0], row["offsets"][last][1]
                question.predicted = row["context"][begin:finish]
        return list(questions.values())


@dataclass
class _Question:
    """A question's gold answers, and the best answer found so far.

    The null score is the lowest of all windows: an answer in one of them is an answer.
    """

    answers: list[str]
    predicted: str = ""
    best_score: float = -np.inf
    null_score: float = np.inf


def _mean_scores(questions: list[_Question]) -> Metrics:
    """Return the mean exact match and F1 of questions, in percent."""
    scores = [exact_match_and_f1(question.predicted, question.answers) for question in questions]
    exact_match, f1 = np.mean(scores, axis=0) * 100
    return {"f1": float(f1), "exact_match": float(exact_match)}


# Windows.


def _question_length(config: QuestionAnsweringConfig, tokenizer: Any) -> int:
    """Return the most tokens of a question that leave room for windows."""
    if not tokenizer.is_fast:
        raise ConfigError(
            [
                Problem(
                    "model.path",
                    "its tokenizer does not tell where tokens stand in a text",
                    hint="use a fast one",
                )
            ]
        )
    special = tokenizer.num_special_tokens_to_add(pair=True)
    length: int = config.max_length - special - config.stride - 1  # each window brings a new token
    if length < 1:
        raise ConfigError(
            [
                Problem(
                    "task.stride",
                    f"windows of {config.max_length} tokens that share {config.stride}, with {special} "
                    "special ones, leave no room for a question",
                    hint="share fewer or raise task.max_length",
                )
            ]
        )
    return length


def _features(inputs: list[str], *, training: bool) -> dict[str, Any]:
    """Return the types of a window's columns: the model's inputs, and labels or what scoring needs."""
    from datasets import List, Value

    tokens = {name: List(Value("int32")) for name in inputs}
    if training:
        return tokens | {name: Value("int32") for name in _POSITIONS}
    types = (Value("int64"), Value("int32"), List(List(Value("int32"))), Value("string"))
    return tokens | dict(zip(_SCORED, (*types, List(Value("string"))), strict=True))


def _refuse_answers(name: str, split: Dataset, context: str, answers: str) -> None:
    """Refuse answers that are not as in SQuAD, or that do not stand where they are said to."""
    feature = split.features[answers]
    if not (
        isinstance(feature, dict)
        and _is_list_of("string", feature.get("text"))
        and _is_list_of("int", feature.get("answer_start"))
    ):
        raise ConfigError(
            [
                Problem(
                    "task.answers",
                    f"column {answers!r} of {name} holds {feature}",
                    hint='question answering needs {"text": [...], "answer_start": [...]}',
                )
            ]
        )
    missing = unpaired = misplaced = 0
    for row in split.select_columns([context, answers]):
        given = row[answers]
        if given is None or given["text"] is None or given["answer_start"] is None:
            missing += 1
            continue
        texts, starts = given["text"], given["answer_start"]
        if len(texts) != len(starts) or None in texts or any(s is None or s < 0 for s in starts):
            unpaired += 1
        elif name == "train":
            pairs = zip(texts, starts, strict=True)
            misplaced += not all(_text(row[context]).startswith(*pair) for pair in pairs)
    problems = {
        "no value": missing,
        "answers without a text or an answer_start of their own": unpaired,
        "an answer that is not at its answer_start": misplaced,
    }
    found = [
        f"{count} rows of the {name} data have {what}" for what, count in problems.items() if count
    ]
    if found:
        raise ConfigError(
            [Problem("task.answers", f"{found_} in column {answers!r}") for found_ in found]
        )


def _is_list_of(dtype: str, feature: Any) -> bool:
    """Return whether values are lists of a type; empty ones are of none."""
    from datasets import Value

    inner = getattr(feature, "feature", None)
    return isinstance(inner, Value) and (dtype in inner.dtype or inner.dtype == "null")


def _encode(
    rows: dict[str, list[Any]],
    indices: range,
    *,
    tokenizer: Any,
    columns: list[str],
    max_length: int,
    stride: int,
    question_length: int,
    training: bool,
) -> dict[str, list[Any]]:
    """Return the windows of a batch of questions."""
    questions, contexts = ([_text(text) for text in rows[column]] for column in columns[:2])
    encoded = tokenizer(
        _cut(questions, tokenizer, question_length),
        contexts,
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    row_of_window = encoded["overflow_to_sample_mapping"]
    windows = {name: encoded[name] for name in tokenizer.model_input_names}
    nulls = [_null_position(ids, tokenizer.cls_token_id) for ids in encoded["input_ids"]]
    offsets = [_context_offsets(encoded, i) for i in range(len(row_of_window))]
    answers = rows[columns[2]]
    if training:
        spans = [_first_answer(given) for given in answers]
        labels = [
            answer_tokens(offsets[i], spans[row]) or (nulls[i], nulls[i])
            for i, row in enumerate(row_of_window)
        ]
        positions = zip(*labels, strict=True)
        return {**windows, **dict(zip(_POSITIONS, map(list, positions), strict=True))}
    return {
        **windows,
        "example": [indices[row] for row in row_of_window],
        "null_position": nulls,
        "offsets": offsets,
        "context": [contexts[row] for row in row_of_window],
        "answers": [answers[row]["text"] for row in row_of_window],
    }


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _cut(texts: list[str], tokenizer: Any, length: int) -> list[str]:
    """Return the texts without what is beyond `length` tokens."""
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    pairs = zip(texts, encoded["offset_mapping"], strict=True)
    return [text[: _end_of(offsets, length)] for text, offsets in pairs]


def _end_of(offsets: list[tuple[int, int]], length: int) -> int | None:
    """Return where the first `length` tokens end; a character of several tokens goes whole."""
    if len(offsets) <= length:
        return None
    while length and offsets[length - 1][1] > offsets[length][0]:
        length -= 1
    return offsets[length - 1][1] if length else 0


def _null_position(ids: list[int], cls_token_id: int | None) -> int:
    """Return the position that stands for no answer: [CLS], or the first token where there is none."""
    return ids.index(cls_token_id) if cls_token_id in ids else 0


def _context_offsets(encoded: Any, window: int) -> Offsets:
    pairs = zip(encoded.sequence_ids(window), encoded["offset_mapping"][window], strict=True)
    return [list(pair) if sequence == 1 else None for sequence, pair in pairs]


def _first_answer(answers: dict[str, list[Any]]) -> tuple[int, int] | None:
    """Return the characters [begin, end) of the first answer, without white space around it."""
    for text, start in zip(answers["text"], answers["answer_start"], strict=True):
        if text.strip():
            begin = start + len(text) - len(text.lstrip())
            return begin, begin + len(text.strip())
    return None
