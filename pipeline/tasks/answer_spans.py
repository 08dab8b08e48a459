"""Answers that are spans of a context: their tokens, the best by a model's logits, their scores."""

import re
import string
from collections import Counter

import numpy as np

Offsets = list[list[int] | None]
"""The characters [begin, end) of the context that each token of a window stands for; None for the
tokens of the question and the special ones."""


def answer_tokens(offsets: Offsets, answer: tuple[int, int] | None) -> tuple[int, int] | None:
    """Return the first and the last token of an answer.

    Args:
        offsets: of the window.
        answer: its characters [begin, end) in the context; None if there is no answer.

    Returns:
        None where the window does not hold the whole answer.
    """
    context = [(i, *pair) for i, pair in enumerate(offsets) if pair is not None]
    if answer is None or not context or answer[0] < context[0][1] or answer[1] > context[-1][2]:
        return None
    tokens = [i for i, begin, end in context if end > answer[0] and begin < answer[1]]
    return (tokens[0], tokens[-1]) if tokens else None


def best_span(
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    offsets: Offsets,
    *,
    num_best: int,
    max_answer_length: int,
) -> tuple[float, int, int] | None:
    """Return the score of a window's best answer, its first and its last token.

    The score is start_logits[first] + end_logits[last], with both tokens among the context's.

    Args:
        start_logits: float32 [at least as many as offsets].
        end_logits: the same.
        offsets: of the window.
        num_best: how many of the best start tokens and of the best end tokens are paired.
        max_answer_length: in tokens.

    Returns:
        None where there is none of an allowed length.
    """
    tokens = np.array([i for i, pair in enumerate(offsets) if pair is not None], dtype=np.int64)
    first = tokens[np.argsort(-start_logits[tokens], kind="stable")[:num_best], None]
    last = tokens[np.argsort(-end_logits[tokens], kind="stable")[:num_best]]
    length = last - first + 1
    allowed = (length >= 1) & (length <= max_answer_length)
    if not allowed.any():
        return None
    scores = np.where(allowed, start_logits[first] + end_logits[last], -np.inf)
    i, j = np.unravel_index(scores.argmax(), scores.shape)
    return float(scores[i, j]), int(first[i, 0]), int(last[j])


# Scores by the rules of SQuAD's own script: https://rajpurkar.github.io/SQuAD-explorer (2.0; it differs
# from that of 1.1 only for answers of nothing but articles and punctuation).

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalized_words(text: str) -> list[str]:
    """Return a text's words in lower case, without ASCII punctuation and articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def exact_match_and_f1(predicted: str, answers: list[str]) -> tuple[float, float]:
    """Return exact match and F1 of the words, 0 to 1, each with the gold answer that suits it best.

    Args:
        predicted: a text, "" for no answer.
        answers: the gold answers; none for an unanswerable question, which asks for no answer.
    """
    words = normalized_words(predicted)
    golds = [gold for gold in map(normalized_words, answers) if gold] or [[]]
    return max(float(words == gold) for gold in golds), max(_f1(words, gold) for gold in golds)


def _f1(predicted: list[str], gold: list[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    return 2 * (Counter(predicted) & Counter(gold)).total() / (len(predicted) + len(gold))
