"""SQuAD's own JSON files (https://rajpurkar.github.io/SQuAD-explorer) as rows, one a question.

They are read with `data.options: {field: data}`, which gives a row an article.
"""

from collections.abc import Iterator
from typing import Any

from datasets import Features, List, Value

_FEATURES = Features(
    id=Value("string"),
    title=Value("string"),
    context=Value("string"),
    question=Value("string"),
    answers={"text": List(Value("string")), "answer_start": List(Value("int32"))},
)


def has_articles(split: Any) -> bool:
    """Return whether the rows are articles in SQuAD's form: paragraphs of a context and questions."""
    paragraphs = split.features.get("paragraphs")
    inner = paragraphs.feature if isinstance(paragraphs, List) else None
    return isinstance(inner, dict) and {"context", "qas"} <= set(inner)


def flatten_articles(split: Any) -> Any:
    """Return a row for each question, with the columns `squad` and `squad_v2` have on the hub.

    Args:
        split: articles, a Dataset or an IterableDataset; their order is kept.

    Raises:
        ValueError: if a question has no answers and is not said to be impossible.
    """
    return split.map(
        _flatten, batched=True, remove_columns=list(split.column_names), features=_FEATURES
    )


def _flatten(articles: dict[str, list[Any]]) -> dict[str, list[Any]]:
    titles = articles.get("title") or [None] * len(articles["paragraphs"])
    rows = [
        row
        for title, paragraphs in zip(titles, articles["paragraphs"], strict=True)
        for row in _questions(title, paragraphs)
    ]
    return {name: [row[name] for row in rows] for name in _FEATURES}


def _questions(title: Any, paragraphs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for paragraph in paragraphs:
        for question in paragraph["qas"]:
            impossible = question.get("is_impossible")
            answers = [] if impossible else question.get("answers")
            if answers is None:
                raise ValueError(f"question {question['id']} has no answers")
            yield {
                "id": str(question["id"]),
                "title": "" if title is None else str(title),
                "context": paragraph["context"],
                "question": question["question"],
                "answers": {
                    key: [answer[key] for answer in answers] for key in ("text", "answer_start")
                },
            }
