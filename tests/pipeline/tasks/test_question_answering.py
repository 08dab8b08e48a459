"""Question answering: windows, labels, the best span, and scores by SQuAD's own rules."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader
from transformers import BertForQuestionAnswering

from pipeline.errors import ConfigError
from pipeline.tasks import make_task
from pipeline.tasks.answer_spans import (
    answer_tokens,
    best_span,
    exact_match_and_f1,
    normalized_words,
)
from pipeline.tasks.question_answering import QuestionAnswering, QuestionAnsweringConfig
from tests import tiny

TEXT = """the old river runs past a mill of stone where millers ground wheat (and rye) until 1893;
its owner, Dr. Ödön O'Neill, sold it for £4,500 - less than half the price - to the city of Aix"""
WORDS = TEXT.split()


def make_bert():
    return tiny.wordpiece_tokenizer([TEXT], vocab_size=90)


def make_roberta():
    return tiny.roberta_tokenizer([TEXT], vocab_size=330)


def make_gpt2():
    return tiny.gpt2_tokenizer([TEXT], vocab_size=330)


@pytest.fixture(scope="module")
def bert():
    return make_bert()


@pytest.fixture(scope="module", params=[make_bert, make_roberta, make_gpt2])
def tokenizer(request):
    return request.param()


def make(**changes):
    values = {"max_length": 32, "stride": 8, "max_answer_length": 10, **changes}
    return QuestionAnswering(QuestionAnsweringConfig(type="question-answering", **values))


def make_wide(**changes):
    """Windows that share more than any answer has."""
    return make(max_length=96, stride=40, max_answer_length=60, **changes)


def make_rows(num_rows, seed=0, unanswerable=0.0):
    """Questions on contexts of 0 to 80 random words; answers are 1 to 4 of them."""
    draw = random.Random(seed)
    rows = []
    for i in range(num_rows):
        words = draw.choices(WORDS, k=draw.randint(1, 80))
        answers = {"text": [], "answer_start": []}
        if draw.random() >= unanswerable:
            first = draw.randrange(len(words))
            last = min(first + draw.randint(1, 4), len(words))
            start = sum(len(word) + 1 for word in words[:first])
            answers = {"text": [" ".join(words[first:last])], "answer_start": [start]}
        rows.append(
            {
                "id": f"q{i}",
                "question": " ".join(draw.choices(WORDS, k=draw.randint(1, 4))),
                "context": " ".join(words),
                "answers": answers,
            }
        )
    return rows


def tokenize(task, rows, tokenizer, validation=None):
    splits = DatasetDict(
        train=Dataset.from_list(rows), validation=Dataset.from_list(validation or rows)
    )
    return task.tokenize(splits, tokenizer)


# Settings.


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"max_length": 128, "stride": 128}, r"stride: must be below max_length \(128\), got 128"),
        ({"max_length": 64}, r"stride: must be below max_length \(64\), got 128"),
        (
            {"max_length": 8, "stride": 2},
            r"max_answer_length: must be below max_length \(8\), got 30",
        ),
        ({"stride": -1}, "greater than or equal to 0"),
        ({"num_best": 0}, "greater than or equal to 1"),
        ({"metric": "accuracy"}, "'f1' or 'exact_match'"),
    ],
)
def test_bad_settings_have_one_error(changes, why):
    with pytest.raises(ValidationError, match=why) as caught:
        QuestionAnsweringConfig(type="question-answering", **changes)
    assert caught.value.error_count() == 1


def test_defaults_and_registration():
    task = make_task(QuestionAnsweringConfig(type="question-answering"))
    assert isinstance(task, QuestionAnswering)
    assert task.columns() == {
        "task.question": "question",
        "task.context": "context",
        "task.answers": "answers",
    }
    assert (task.headline, task.higher_is_better, task.row_is_example) == ("f1", True, False)
    assert make(metric="exact_match").headline == "exact_match"


# Windows.


def test_windows_cover_every_context_token_and_overlap_by_the_stride(tokenizer):
    rows = make_rows(40)
    split = tokenize(make(), rows, tokenizer).splits["validation"]
    of_question = {}
    for window in split:
        of_question.setdefault(window["example"], []).append(window)
    assert list(of_question) == list(range(len(rows)))
    assert max(len(windows) for windows in of_question.values()) > 3
    for i, windows in of_question.items():
        expected = tokenizer(rows[i]["context"], add_special_tokens=False)["input_ids"]
        joined = []
        for number, window in enumerate(windows):
            assert len(window["input_ids"]) <= 32
            places = [k for k, pair in enumerate(window["offsets"]) if pair is not None]
            assert places == list(range(places[0], places[-1] + 1))
            ids = [window["input_ids"][k] for k in places]
            if number:
                assert joined[-8:] == ids[:8]
                ids = ids[8:]
                assert ids
            joined += ids
            assert window["context"] == rows[i]["context"]
            assert window["answers"] == rows[i]["answers"]["text"]
        assert joined == expected


def test_windows_are_what_the_tokenizer_makes_of_the_pair(tokenizer):
    rows = [
        {
            **make_rows(1)[0],
            "question": "who sold it",
            "context": "the city of Aix",
            "answers": {"text": ["Aix"], "answer_start": [12]},
        }
    ]
    tokenized = tokenize(make(), rows, tokenizer)
    expected = dict(tokenizer("who sold it", "the city of Aix"))
    for split in tokenized.splits.values():
        assert {name: split[0][name] for name in expected} == expected
    names = {*expected, "start_positions", "end_positions"}
    assert set(tokenized.splits["train"].column_names) == names
    assert tokenized.model_kwargs == {"num_labels": 2}


def num_answer_tokens(row, tokenizer):
    encoded = tokenizer(row["context"], add_special_tokens=False)
    begin = row["answers"]["answer_start"][0]
    end = begin + len(row["answers"]["text"][0])
    return encoded.char_to_token(end - 1) - encoded.char_to_token(begin) + 1


def test_labels_decode_to_the_answer_in_every_window_that_holds_it(tokenizer):
    rows = make_rows(60, seed=1)
    task = make()
    splits = tokenize(task, rows, tokenizer).splits
    found = set()
    for label, window in zip(splits["train"], splits["validation"], strict=True):
        row = rows[window["example"]]
        text, begin = row["answers"]["text"][0], row["answers"]["answer_start"][0]
        pairs = [pair for pair in window["offsets"] if pair is not None]
        held = pairs[0][0] <= begin and begin + len(text) <= pairs[-1][1]
        start, end = label["start_positions"], label["end_positions"]
        if not held:
            assert start == end == window["null_position"]
            continue
        found.add(window["example"])
        first, last = window["offsets"][start], window["offsets"][end]
        assert row["context"][first[0] : last[1]].strip() == text
    # Windows share 8 tokens, so that an answer of up to 9 is whole in one of them.
    short = {i for i, row in enumerate(rows) if num_answer_tokens(row, tokenizer) <= 9}
    assert len(short) > 30
    assert short <= found


def test_the_null_position_is_cls_or_the_first_token(tokenizer):
    rows = make_rows(5, unanswerable=1.1) + make_rows(1)
    splits = tokenize(make(), rows, tokenizer).splits
    for label, window in zip(splits["train"], splits["validation"], strict=True):
        if window["example"] == 5:
            continue
        assert label["start_positions"] == label["end_positions"] == window["null_position"] == 0
        assert window["answers"] == []
        if tokenizer.cls_token_id is not None:
            assert window["input_ids"][0] == tokenizer.cls_token_id


def test_the_null_position_follows_cls_to_the_end():
    """As XLNet's tokenizer, which puts it last."""
    last = make_bert()
    special = [(token, last.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
    last._tokenizer.post_processor = TemplateProcessing(
        single="$A [SEP] [CLS]", pair="$A [SEP] $B:1 [SEP]:1 [CLS]:2", special_tokens=special
    )
    windows = tokenize(make(), make_rows(5), last).splits["validation"]
    for window in windows:
        assert window["null_position"] == len(window["input_ids"]) - 1


def test_answers_with_blanks_around_and_without_text(bert):
    context = "the old river runs past a mill"
    rows = [
        {"question": "what", "context": context, "answers": {"text": t, "answer_start": s}}
        for t, s in [([" river "], [7]), (["", "old"], [0, 4]), ([" ", ""], [3, 0]), ([], [])]
    ]
    splits = tokenize(make(), rows, bert).splits
    held = []
    for label, window in zip(splits["train"], splits["validation"], strict=True):
        first, last = (window["offsets"][label[f"{end}_positions"]] for end in ("start", "end"))
        held.append(context[first[0] : last[1]] if first else None)
    assert held == ["river", "old", None, None]


def test_an_answer_in_the_midst_of_a_word_takes_the_whole_tokens(bert):
    context = "sold in 1893; its owner"
    row = {"question": "when", "context": context, "answers": {"text": ["89"], "answer_start": [9]}}
    splits = tokenize(make(), [row], bert).splits
    label, window = splits["train"][0], splits["validation"][0]
    first, last = (window["offsets"][label[f"{end}_positions"]] for end in ("start", "end"))
    assert "89" in context[first[0] : last[1]]
    assert context[first[0] : last[1]] in "1893"


def test_empty_and_missing_texts(tokenizer):
    empty = {"text": [], "answer_start": []}
    rows = [
        {
            "question": None,
            "context": "the city",
            "answers": {"text": ["city"], "answer_start": [4]},
        },
        {"question": "who", "context": "", "answers": empty},
        {"question": "who", "context": None, "answers": empty},
    ]
    splits = tokenize(make(), rows, tokenizer).splits
    assert [len(split) for split in splits.values()] == [3, 3]
    assert splits["train"][0]["input_ids"] == tokenizer("", "the city")["input_ids"]
    assert splits["validation"][2]["offsets"].count(None) == len(splits["train"][2]["input_ids"])


def test_a_question_too_long_is_cut_between_tokens(tokenizer):
    special = tokenizer.num_special_tokens_to_add(pair=True)
    question = " ".join(WORDS[:20])
    rows = [{**row, "question": question} for row in make_rows(6)]
    windows = tokenize(make(), rows, tokenizer).splits["validation"]
    ids = tokenizer(question, add_special_tokens=False)["input_ids"][: 32 - special - 8 - 1]
    for window in windows:
        text = window["input_ids"]
        assert any(text[k : k + len(ids)] == ids for k in range(3))
        assert sum(pair is None for pair in window["offsets"]) == len(ids) + special


def test_a_character_of_several_tokens_is_cut_whole(tokenizer):
    context = {"context": TEXT, "answers": {"text": [], "answer_start": []}}
    rows = [{**context, "question": "e" * i + " €" * 40} for i in range(6)]
    windows = tokenize(make(), rows, tokenizer).splits["validation"]
    assert all(len(window["input_ids"]) <= 32 for window in windows)
    one = tokenize(make(), [{**context, "question": "€" * 40}], tokenizer).splits["validation"][0]
    ids = tokenizer("€", add_special_tokens=False)["input_ids"]
    question = [i for i in one["input_ids"] if i in ids]
    assert question == (ids * 40)[: len(question)]


def test_windows_that_leave_no_room_for_a_question(bert):
    assert len(tokenize(make(stride=27), make_rows(1), bert).splits["train"]) > 0
    with pytest.raises(ConfigError, match=r"task\.stride: .* leave no room for a question"):
        tokenize(make(stride=28), make_rows(1), bert)


def test_examples_are_counted_as_windows(tokenizer):
    rows = make_rows(30)
    task = make()
    num_examples = task.num_examples(Dataset.from_list(rows), tokenizer)
    assert num_examples == len(tokenize(task, rows, tokenizer).splits["train"]) > 30


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(ConfigError, match=r"model\.path: .*use a fast one"):
        tokenize(make(), make_rows(1), SimpleNamespace(is_fast=False))


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        (["Aix"], "'answers' of train holds .*needs"),
        ([{"text": "Aix", "answer_start": 12}], "'answers' of train holds .*needs"),
        ({"text": ["Aix"]}, "'answers' of train holds .*needs"),
        (None, "'answers' of train holds .*needs"),
        ({"text": ["Aix"], "answer_start": [11]}, "1 rows .* not at its answer_start"),
        ({"text": ["Aix"], "answer_start": [99]}, "1 rows .* not at its answer_start"),
        ({"text": None, "answer_start": None}, "1 rows of the train data have no value"),
    ],
)
def test_answers_that_cannot_be_learned(bert, answers, why):
    good = {"text": ["Aix"], "answer_start": [12]}
    row = {"question": "where", "context": "the city of Aix", "answers": good}
    bad = [{**row, "answers": answers}]
    if why.startswith("1"):
        bad.append(row)
    with pytest.raises(ConfigError, match=rf"task\.answers: .*{why}"):
        tokenize(make(), bad, bert, validation=[row])


def test_places_of_validation_answers_do_not_matter(bert):
    row = make_rows(1)[0]
    other = {**row, "answers": {"text": ["elsewhere"], "answer_start": [0]}}
    windows = tokenize(make(), [row], bert, validation=[other]).splits["validation"]
    assert windows[0]["answers"] == ["elsewhere"]


# Batches and predictions.


def test_a_batch_has_tensors_for_the_model_and_no_more(tokenizer):
    splits = tokenize(make(), make_rows(10), tokenizer).splits
    collate = make().collator(tokenizer)
    names = set(tokenizer.model_input_names)
    train = collate([splits["train"][i] for i in range(4)])
    assert set(train) == names | {"start_positions", "end_positions"}
    assert all(isinstance(value, torch.Tensor) for value in train.values())
    assert set(collate([splits["validation"][0]])) == names


def test_a_batch_is_padded_on_the_right_so_that_positions_hold():
    left = make_bert()
    left.padding_side = "left"
    rows = sorted(
        tokenize(make(), make_rows(20), left).splits["train"], key=lambda r: len(r["input_ids"])
    )
    batch = make().collator(left)([rows[0], rows[-1]])
    length = len(rows[0]["input_ids"])
    assert length < len(rows[-1]["input_ids"])
    assert batch["input_ids"][0, :length].tolist() == rows[0]["input_ids"]
    assert batch["attention_mask"].sum(dim=1).tolist() == [length, len(rows[-1]["input_ids"])]
    for name in ("start_positions", "end_positions"):
        assert batch[name].tolist() == [rows[0][name], rows[-1][name]]


def test_logits_of_batches_of_any_width_concatenate():
    parts = []
    for width in (5, 32):
        logits = torch.arange(2 * width, dtype=torch.bfloat16).reshape(2, width)
        outputs = SimpleNamespace(start_logits=logits, end_logits=-logits)
        parts.append(make().predict(outputs, {}))
        assert torch.equal(parts[-1]["start_logits"][:, :width], logits.float())
        assert torch.equal(parts[-1]["end_logits"][:, :width], -logits.float())
        assert torch.isneginf(parts[-1]["start_logits"][:, width:]).all()
    for name in ("start_logits", "end_logits"):
        joined = torch.cat([part[name] for part in parts])
        assert joined.shape == (4, 32)
        assert joined.dtype == torch.float32


# The best span.


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), max_answer_length=st.integers(1, 6), num_best=st.integers(1, 12))
def test_the_best_span_is_that_of_a_full_search(seed, max_answer_length, num_best):
    generator = np.random.default_rng(seed)
    start, end = generator.normal(size=(2, 16)).astype(np.float32)
    offsets = [None] * 3 + [[i, i + 1] for i in range(9)] + [None] * 2
    kept = [sorted(range(3, 12), key=lambda i: -logits[i])[:num_best] for logits in (start, end)]
    spans = [
        (start[i] + end[j], i, j)
        for i in kept[0]
        for j in kept[1]
        if i <= j < i + max_answer_length
    ]
    found = best_span(start, end, offsets, num_best=num_best, max_answer_length=max_answer_length)
    assert found == (max(spans) if spans else None)


def test_answers_too_long_or_backwards_are_never_chosen():
    offsets = [None, *([i, i + 1] for i in range(6)), None]
    start = np.array([9, 0, 0, 5, 0, 0, 0, 9], dtype=np.float32)
    end = np.array([9, 5, 0, 0, 1, 0, 4, 9], dtype=np.float32)
    limits = {"num_best": 20, "max_answer_length": 4}
    assert best_span(start, end, offsets, **limits) == (9.0, 3, 6)
    assert best_span(start, end, offsets, **{**limits, "max_answer_length": 3}) == (6.0, 3, 4)
    assert best_span(start, end, [None] * 8, **limits) is None
    assert best_span(start, end, offsets, num_best=1, max_answer_length=4) is None  # 3 to 1


# Scores.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The  Cat's  hat.", "cats hat"),
        ("an apple a day", "apple day"),
        ("Theater and An-other", "theater and another"),
        ("A.", ""),
        ("u.s.a. (1990-1999)", "usa 19901999"),
        ("£4,500 – Ödön’s", "£4500 – ödön’s"),  # noqa: RUF001 - only ASCII punctuation goes
        ("the\tthe\nthe", ""),
        ("", ""),
    ],
)
def test_texts_are_normalized_as_by_the_official_script(text, words):
    assert normalized_words(text) == words.split()


@pytest.mark.parametrize(
    ("predicted", "answers", "exact_match", "f1"),
    [
        ("the Denver Broncos!", ["Denver Broncos"], 1, 1),
        ("Denver", ["Denver Broncos"], 0, 2 / 3),
        ("red red blue", ["red blue blue"], 0, 2 / 3),  # words are counted as often as they occur
        ("blue", ["red", "light blue", "blue sky here"], 0, 2 / 3),  # the best of several
        ("light", ["red", "light"], 1, 1),
        ("", ["red"], 0, 0),
        ("", [], 1, 1),
        ("red", [], 0, 0),
        ("the", [], 1, 1),  # nothing is left of it
        ("", ["the", "."], 1, 1),
        ("", ["the", "red"], 0, 0),
    ],
)
def test_scores_of_an_answer(predicted, answers, exact_match, f1):
    assert exact_match_and_f1(predicted, answers) == pytest.approx((exact_match, f1))


def perfect(rows, windows, width):
    """Logits that say where a window's question has its answer, or that it has none there."""
    start, end = (np.full((len(windows), width), -9.0, dtype=np.float32) for _ in range(2))
    for i, window in enumerate(windows):
        first = last = window["null_position"]
        score = 5
        for text, begin in zip(*rows[window["example"]]["answers"].values(), strict=True):
            span = answer_tokens(window["offsets"], (begin, begin + len(text)))
            if span is not None:
                (first, last), score = span, 9
        start[i, first] = end[i, last] = score
    return {"start_logits": start, "end_logits": end}


def test_perfect_predictions_score_a_hundred(tokenizer):
    task = make_wide()
    rows = make_rows(30)
    windows = tokenize(task, rows, tokenizer).splits["validation"]
    scores = task.score(perfect(rows, windows, 96), windows, tokenizer)
    assert scores == {"f1": 100, "exact_match": 100, "num_questions": 30}


def test_perfect_predictions_score_a_hundred_with_questions_without_answer(tokenizer):
    task = make_wide()
    rows = make_rows(30, unanswerable=0.4)
    windows = tokenize(task, rows, tokenizer).splits["validation"]
    scores = task.score(perfect(rows, windows, 96), windows, tokenizer)
    assert scores == {
        "f1": 100,
        "exact_match": 100,
        "has_answer_f1": 100,
        "has_answer_exact_match": 100,
        "no_answer_accuracy": 100,
        "num_questions": 30,
    }


def make_windows(*windows):
    """Validation windows of single letters: (example, context, answers)."""
    return Dataset.from_list(
        [
            {
                "example": example,
                "null_position": 0,
                "offsets": [None, *([i, i + 1] for i in range(len(context))), None],
                "context": context,
                "answers": answers,
            }
            for example, context, answers in windows
        ]
    )


def logits(*windows, width=12):
    """The logits named, as {position: (start, end)}; all others are -9."""
    start, end = (np.full((len(windows), width), -9.0, dtype=np.float32) for _ in range(2))
    for i, window in enumerate(windows):
        for place, (a, b) in window.items():
            start[i, place], end[i, place] = a, b
    return {"start_logits": start, "end_logits": end}


def test_the_best_of_all_windows_is_the_answer():
    windows = make_windows((0, "uvwxyz", ["v"]), (0, "uvwxyz", ["v"]), (1, "uvwxyz", ["xyz"]))
    predictions = logits({3: (4, 4)}, {2: (5, 5)}, {4: (1, 0), 6: (0, 1)})
    assert make().score(predictions, windows, None)["exact_match"] == 100
    predictions = logits({3: (6, 6)}, {2: (5, 5)}, {4: (1, 0), 6: (0, 1)})
    assert make().score(predictions, windows, None)["exact_match"] == 50


def test_no_answer_where_its_score_is_above_the_best_by_more_than_the_threshold():
    windows = make_windows(
        (0, "uvwxyz", ["v"]), (0, "uvwxyz", ["v"]), (1, "uvwxyz", []), (2, "uvwxyz", ["w"])
    )
    # Null minus best: 3 - 2 by the lower null score of the two windows, 6 - 2, 2 - 2.
    predictions = logits(
        {0: (3, 3), 2: (1, 1)}, {0: (2, 1)}, {0: (3, 3), 3: (1, 1)}, {0: (1, 1), 3: (1, 1)}
    )

    def score(threshold):
        scores = make(null_score_threshold=threshold).score(predictions, windows, None)
        return scores["has_answer_exact_match"], scores["no_answer_accuracy"]

    assert score(0) == (50, 100)
    assert score(-0.5) == (0, 100)
    assert score(1) == (100, 100)
    assert score(3.5) == (100, 100)
    assert score(4) == (100, 0)


def test_where_all_questions_have_answers_there_is_always_one():
    windows = make_windows((0, "uvwxyz", ["v"]))
    predictions = logits({0: (9, 9), 2: (1, 1)})
    assert make().score(predictions, windows, None) == {
        "f1": 100,
        "exact_match": 100,
        "num_questions": 1,
    }


def test_scores_are_means_over_questions_not_windows():
    windows = make_windows(*[(0, "u v w", ["u"])] * 3, (1, "u v w", ["v w"]), (2, "u v w", []))
    predictions = logits({1: (5, 5)}, {}, {}, {3: (5, 5)}, {1: (9, 9)})
    assert make().score(predictions, windows, None) == pytest.approx(
        {
            "f1": (100 + 200 / 3 + 0) / 3,
            "exact_match": 100 / 3,
            "has_answer_f1": (100 + 200 / 3) / 2,
            "has_answer_exact_match": 50,
            "no_answer_accuracy": 0,
            "num_questions": 3,
        }
    )


def test_only_questions_without_answer():
    windows = make_windows((0, "uvw", []), (1, "uvw", []))
    predictions = logits({0: (9, 9), 2: (1, 1)}, {0: (1, 1), 2: (9, 9)})
    assert make().score(predictions, windows, None) == {
        "f1": 50,
        "exact_match": 50,
        "no_answer_accuracy": 50,
        "num_questions": 2,
    }


def test_logits_that_are_no_numbers_are_no_answers():
    windows = make_windows((0, "uvw", ["u"]))
    nan = {name: values * np.nan for name, values in logits({}).items()}
    assert make().score(nan, windows, None)["f1"] == 0


# A model.


@pytest.fixture
def one_thread():
    """Threads that wait for one another take longer than so small a model."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def make_model(tokenizer, **changes):
    return tiny.model(
        BertForQuestionAnswering,
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        intermediate_size=32,
        max_position_embeddings=96,
        num_labels=2,
        **changes,
    )


def evaluate(task, model, windows, tokenizer, batch_size):
    loader = DataLoader(windows, batch_size=batch_size, collate_fn=task.collator(tokenizer))
    model.eval()
    with torch.inference_mode():
        parts = [task.infer(model, batch) for batch in loader]
    predictions = {name: torch.cat([p[name] for p in parts]).numpy() for name in parts[0]}
    return predictions, task.score(predictions, windows, tokenizer)


@pytest.mark.usefixtures("one_thread")
def test_a_models_scores_do_not_depend_on_the_batches(bert):
    task = make()
    windows = tokenize(task, make_rows(12, unanswerable=0.3), bert).splits["validation"]
    model = make_model(bert)
    one, scores_of_one = evaluate(task, model, windows, bert, batch_size=1)
    many, scores = evaluate(task, model, windows, bert, batch_size=7)
    assert scores == scores_of_one
    assert one["start_logits"].shape == (len(windows), 32)
    for i, window in enumerate(windows):
        length = len(window["input_ids"])
        np.testing.assert_allclose(
            one["end_logits"][i, :length], many["end_logits"][i, :length], atol=1e-5
        )


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_model_learns_a_few_answers(bert):
    task = make_wide()
    splits = tokenize(task, make_rows(6, unanswerable=0.4), bert).splits
    model = make_model(bert, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    batch = task.collator(bert)(list(splits["train"]))
    before = evaluate(task, model, splits["validation"], bert, 8)[1]["f1"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(150):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    after = evaluate(task, model, splits["validation"], bert, 8)[1]
    assert before < 100
    assert after["f1"] == after["exact_match"] == 100
