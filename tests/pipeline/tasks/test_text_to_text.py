"""Text to text: what is tokenized, padded and generated, and ROUGE against figures worked out by hand."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from pydantic import TypeAdapter, ValidationError
from torch.utils.data import DataLoader
from transformers import BartForConditionalGeneration

from pipeline.errors import ConfigError
from pipeline.tasks import AnyTaskConfig, make_task
from pipeline.tasks.text_to_text import TextToText, rouge, split_sentences
from tests import tiny
from tests.cases import launch_cases
from tests.pipeline.tasks.generate_worker import STAGES, make_task_of, save_inputs
from tests.tiny import SEQUENCE_WORDS as WORDS
from tests.tiny import sequence_tokenizer as make_tokenizer

E2E = Path(__file__).parents[4] / "shared" / "data" / "e2e" / "devset.csv"
PAD, START, END, UNKNOWN = range(4)
TEXTS = ["red", "one blue", "blue one", "two green one", "red red two", "one two red blue"]


def ids_of(text):
    """A text's tokens, written out without the tokenizer."""
    words = [WORDS.index(w) if w in WORDS else UNKNOWN for w in text.split()]
    return [START, *words, END]


def make_splits(sources, targets):
    rows = {"article": sources, "summary": targets, "other": [0] * len(sources)}
    return DatasetDict(train=Dataset.from_dict(rows), validation=Dataset.from_dict(rows))


def make_bart(seed=0, **changes):
    settings = {
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "max_position_embeddings": 32,
        "dropout": 0.0,
        "pad_token_id": PAD,
        "bos_token_id": START,
        "eos_token_id": END,
        "decoder_start_token_id": END,
        "forced_eos_token_id": END,
    }
    return tiny.model(BartForConditionalGeneration, seed=seed, **{**settings, **changes}).eval()


def predict(task, model, rows, batch_size):
    """Infer in batches and join them, as the evaluation stage does."""
    batches = DataLoader(rows, batch_size=batch_size, collate_fn=task.collator(make_tokenizer()))
    with torch.inference_mode():
        parts = [task.infer(model, batch) for batch in batches]
    return {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}


def test_sources_and_targets_are_tokenized():
    sources, targets = ["one two", "red mystery"], ["two", "blue red one"]
    tokenized = make_task_of().tokenize(make_splits(sources, targets), make_tokenizer())
    train, validation = tokenized.splits["train"], tokenized.splits["validation"]
    assert sorted(train.column_names) == ["attention_mask", "input_ids", "labels"]
    assert train["input_ids"][:] == [ids_of(text) for text in sources]
    assert train["attention_mask"][:] == [[1] * 4, [1] * 4]
    assert train["labels"][:] == [ids_of(text) for text in targets]
    assert sorted(validation.column_names) == [
        "attention_mask",
        "input_ids",
        "labels",
        "references",
    ]
    assert validation["references"][:] == [[target] for target in targets]
    assert tokenized.model_kwargs == {}
    assert make_task_of().num_examples(train, None, None) == 2


def test_tokens_decode_to_the_texts():
    tokenizer = make_tokenizer()
    rows = make_task_of().tokenize(make_splits(TEXTS, TEXTS[::-1]), tokenizer).splits["train"]
    assert tokenizer.batch_decode(rows["input_ids"][:], skip_special_tokens=True) == TEXTS
    assert tokenizer.batch_decode(rows["labels"][:], skip_special_tokens=True) == TEXTS[::-1]


def test_the_prefix_goes_before_each_source_alone():
    task = make_task_of(prefix="green two ")
    rows = task.tokenize(make_splits(["one", ""], ["red", "red"]), make_tokenizer()).splits
    assert rows["train"]["input_ids"][:] == [ids_of("green two one"), ids_of("green two")]
    assert rows["train"]["labels"][:] == [ids_of("red")] * 2


def test_long_texts_are_cut_each_at_its_length_but_not_the_reference():
    task = make_task_of(max_length=5, max_target_length=4)
    text = "one two red blue green"
    row = task.tokenize(make_splits([text], [text]), make_tokenizer()).splits["validation"][0]
    assert row["input_ids"] == ids_of("one two red")
    assert row["labels"] == ids_of("one two")
    assert row["references"] == [text]


def test_a_row_without_a_target_is_refused():
    splits = make_splits(["one", "two"], ["one", None])
    with pytest.raises(ConfigError, match=r"task.target: 1 rows of the train data .*'summary'"):
        make_task_of().tokenize(splits, make_tokenizer())


def test_inputs_are_padded_and_labels_filled_up_with_minus_100():
    tokenizer, task = make_tokenizer(), make_task_of()
    splits = make_splits(["one two", "red"], ["two", "blue red one"])
    rows = task.tokenize(splits, tokenizer).splits["validation"]
    batch = task.collator(tokenizer)(list(rows))
    assert sorted(batch) == ["attention_mask", "input_ids", "labels"]
    assert batch["input_ids"].tolist() == [ids_of("one two"), [*ids_of("red"), PAD]]
    assert batch["attention_mask"].tolist() == [[1] * 4, [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[*ids_of("two"), -100, -100], ids_of("blue red one")]


def test_padding_does_not_change_the_loss():
    tokenizer, task, model = make_tokenizer(), make_task_of(), make_bart()
    rows = list(task.tokenize(make_splits(TEXTS, TEXTS), tokenizer).splits["train"])
    collate = task.collator(tokenizer)
    with torch.inference_mode():
        together = model(**collate(rows)).loss
        alone = torch.stack([model(**collate([row])).loss for row in rows])
    weights = torch.tensor([float(len(row["labels"])) for row in rows])
    torch.testing.assert_close(together, (alone * weights).sum() / weights.sum())


@pytest.mark.slow
def test_a_model_that_learned_to_copy_scores_100_and_one_that_did_not_does_not():
    tokenizer, task, model = make_tokenizer(), make_task_of(max_target_length=8), make_bart()
    splits = task.tokenize(make_splits(TEXTS, TEXTS), tokenizer).splits
    rows = splits["validation"]
    untrained = task.score(predict(task, model, rows, 4), rows, tokenizer)
    batch = task.collator(tokenizer)(list(splits["train"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    predictions = predict(task, model, rows, 4)
    scores = task.score(predictions, rows, tokenizer)
    assert sorted(scores) == ["generated_length", "rouge1", "rouge2", "rougeL", "rougeLsum"]
    filled = np.where(predictions["generated"] < 0, PAD, predictions["generated"])
    assert tokenizer.batch_decode(filled, skip_special_tokens=True) == TEXTS
    assert scores["rouge1"] == scores["rougeL"] == scores["rougeLsum"] == pytest.approx(100.0)
    assert scores["rouge2"] == pytest.approx(100 * 5 / 6)  # "red" alone has no pair of words
    assert scores["generated_length"] == np.mean([len(text.split()) for text in TEXTS])
    assert untrained["rouge1"] < 50


SETTINGS = [
    {"num_beams": 1},
    {"num_beams": 4},
    {"num_beams": 4, "length_penalty": -2.0},
    {"num_beams": 4, "no_repeat_ngram_size": 1},
]


def random_model():
    return make_bart(seed=3, init_std=0.4, forced_eos_token_id=None)


def generated_with(settings):
    task = make_task_of(max_target_length=9, **settings)
    rows = task.tokenize(make_splits(TEXTS, TEXTS), make_tokenizer()).splits["validation"]
    return predict(task, random_model(), rows, len(TEXTS))["generated"]


@pytest.mark.parametrize("settings", SETTINGS)
def test_texts_are_those_of_a_direct_call_with_the_same_settings(settings):
    found = generated_with(settings)
    inputs = make_tokenizer()(TEXTS, padding=True, return_tensors="pt")
    expected = random_model().generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=9,
        **settings,
    )[:, 1:]
    assert found.shape == (len(TEXTS), 9)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found[:, : expected.shape[1]], expected)
    assert (found[:, expected.shape[1] :] == -100).all()


def test_every_setting_matters():
    found = [generated_with(settings).tolist() for settings in SETTINGS]
    assert all(found[i] != found[j] for i in range(4) for j in range(i))


@pytest.mark.parametrize("length", ["max_length", "max_new_tokens"])
def test_the_checkpoint_s_own_length_does_not_count(length):
    task = make_task_of(max_target_length=9)
    batch = {
        "input_ids": torch.tensor([ids_of("one two")]),
        "attention_mask": torch.ones(1, 4).long(),
    }
    model = random_model()
    expected = task.infer(model, batch)["generated"]
    assert (expected >= 0).sum() > 3
    setattr(model.generation_config, length, 3)
    assert torch.equal(task.infer(model, batch)["generated"], expected)


def test_an_engine_generates_with_the_model_it_wraps():
    task = make_task_of(max_target_length=9)
    batch = {"input_ids": torch.tensor([ids_of("one")]), "attention_mask": torch.ones(1, 3).long()}
    model = random_model()
    wrapped = task.infer(SimpleNamespace(module=model), batch)
    assert torch.equal(wrapped["generated"], task.infer(model, batch)["generated"])


def test_batches_of_different_widths_are_joined():
    task = make_task_of(max_target_length=4)
    narrow = task.predict(torch.tensor([[END, START, END]]), {})["generated"]
    wide = task.predict(torch.tensor([[END, START, 5, 6, END]]), {})["generated"]
    joined = torch.cat([narrow, wide])
    assert joined.tolist() == [[START, END, -100, -100], [START, 5, 6, END]]
    assert joined.dtype == torch.int64


def test_special_tokens_are_no_part_of_a_text():
    tokenizer = make_tokenizer()
    red, blue = WORDS.index("red"), WORDS.index("blue")
    generated = np.array(
        [[START, red, blue, END, -100], [START, blue, END, PAD, PAD], [UNKNOWN] * 5]
    )
    rows = Dataset.from_dict({"references": [["red blue"], ["red"], ["red"]]})
    scores = make_task_of(max_target_length=5).score({"generated": generated}, rows, tokenizer)
    assert scores["generated_length"] == (2 + 1 + 5) / 3
    assert scores["rouge1"] == pytest.approx(100 / 3)


def test_rouge_by_hand():
    # the cat _ on the mat: 5 of 6 words; "the cat", "on the", "the mat": 3 of 5 pairs.
    scores = rouge(["the cat lay on the mat"], [["the cat sat on the mat"]])
    by_hand = {"rouge1": 5 / 6, "rouge2": 3 / 5, "rougeL": 5 / 6, "rougeLsum": 5 / 6}
    assert scores == pytest.approx({name: 100 * value for name, value in by_hand.items()})


def test_precision_and_recall_both_count():
    # 2 words of 2 written and of 6 wanted: F = 2 * 1 * (1/3) / (4/3); 1 pair of 1 and of 5.
    scores = rouge(["the cat"], [["the cat sat on the mat"]])
    assert scores["rouge1"] == pytest.approx(100 * 1 / 2)
    assert scores["rouge2"] == pytest.approx(100 * 1 / 3)


@pytest.mark.parametrize(
    ("reference", "text", "published"),
    [
        # The README of rouge-score.
        (
            "The quick brown fox jumps over the lazy dog",
            "The quick brown dog jumps on the log.",
            {"rouge1": 0.705882, "rougeL": 0.588235},
        ),
        # Its rouge_scorer_test.py.
        ("testing one two", "testing", {"rouge1": 1 / 2}),
        ("testing one two", "testing one", {"rouge1": 4 / 5, "rouge2": 2 / 3, "rougeL": 4 / 5}),
        ("testing one two", "testing two", {"rougeL": 4 / 5}),
        ("testing one two", "", dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum"), 0.0)),
        # Lin 2004, section 3.2: recall 4/5, precision 4/10.
        ("w1 w2 w3 w4 w5", "w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5", {"rougeLsum": 8 / 15}),
        ("w1 w2 w3 w4 w5", "w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", {"rougeLsum": 8 / 15}),
    ],
)
def test_rouge_against_published_values(reference, text, published):
    scores = rouge([text], [[reference]])
    assert {name: scores[name] / 100 for name in published} == pytest.approx(published, abs=1e-6)


def test_rougelsum_compares_sentence_with_sentence():
    reference = "The cat sat on the mat. The dog barked."
    text = "The dog barked. The cat lay on the mat."
    scores = rouge([text], [[reference]])
    # As one sequence only "the cat on the mat" is in order, 5 of 9 words; by sentences all but
    # "sat" and "lay".
    assert scores["rougeL"] == pytest.approx(100 * 5 / 9)
    assert scores["rougeLsum"] == pytest.approx(100 * 8 / 9)


def test_words_are_compared_by_their_stems():
    assert rouge(["the runner jumps"], [["The runners jumped!"]])["rouge2"] == pytest.approx(100.0)


def test_rouge_is_the_mean_over_the_texts():
    scores = rouge(["the cat lay on the mat", "yes"], [["the cat sat on the mat"], ["yes"]])
    assert scores["rouge1"] == pytest.approx(100 * (5 / 6 + 1) / 2)


# Several references.


def test_the_rules_for_several_references_against_the_library_s_own():
    from rouge_score.rouge_scorer import RougeScorer

    texts = ["the cat lay on the mat", "a dog. It barked", "yes"]
    references = [
        ["the cat sat on the mat", "on the mat lay the cat"],
        ["a dog barked", "It barked. A dog it was", "no"],
        ["no"],
    ]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
    by_lines = [[split_sentences(target) for target in targets] for targets in references]
    multi = [
        scorer.score_multi(targets, split_sentences(text))
        for targets, text in zip(by_lines, texts, strict=True)
    ]
    best = rouge(texts, references, "best")
    assert best == pytest.approx(
        {name: 100 * sum(score[name].fmeasure for score in multi) / 3 for name in best}
    )
    each = [rouge([texts[1]], [[target]]) for target in references[1]]
    mean = rouge([texts[1]], [references[1]], "mean")
    assert mean == pytest.approx({name: sum(s[name] for s in each) / 3 for name in mean})
    assert mean["rouge1"] < rouge([texts[1]], [references[1]], "best")["rouge1"]


def test_rows_of_one_source_are_written_once_and_keep_all_their_references():
    sources, targets = ["red", "blue", "red", "one"], ["one", "two", "green", "red"]
    splits = make_splits(sources, targets)
    splits["other"] = splits["validation"].select(range(2))
    tokenized = make_task_of(group_references=True).tokenize(splits, make_tokenizer()).splits
    assert len(tokenized["train"]) == 4
    assert tokenized["validation"]["references"][:] == [["one", "green"], ["two"], ["red"]]
    assert tokenized["validation"]["input_ids"][:] == [ids_of(t) for t in ("red", "blue", "one")]
    assert tokenized["other"]["references"][:] == [["one"], ["two"]]
    apart = make_task_of().tokenize(splits, make_tokenizer()).splits["validation"]
    assert apart["references"][:] == [["one"], ["two"], ["green"], ["red"]]
    generated = np.array([[WORDS.index(w), END] for w in ("green", "two", "red")])
    score = make_task_of(group_references=True, max_target_length=2).score
    assert score({"generated": generated}, tokenized["validation"], make_tokenizer())[
        "rouge1"
    ] == pytest.approx(100.0)


@pytest.mark.skipif(not E2E.exists(), reason="needs ../shared/data/e2e, E2E NLG's dev set")
def test_e2e_has_547_sources_of_several_references(datasets_cache):
    from pipeline.data.files import FilesConfig
    from pipeline.data.stage import load_splits

    config = FilesConfig(source="files", train=str(E2E), validation=str(E2E))
    task = make_task_of(source="mr", target="ref", group_references=True)
    rows = task.tokenize(load_splits(config), make_tokenizer()).splits
    assert (len(rows["train"]), len(rows["validation"])) == (4672, 547)
    assert sum(len(references) for references in rows["validation"]["references"]) == 4672


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("One. Two!  Three? Four", ["One.", "Two!", "Three?", "Four"]),
        (
            'He said "no." Then (so he did.) he left.',
            ['He said "no."', "Then (so he did.)", "he left."],
        ),
        ("It cost 3.5 dollars at example.com.", ["It cost 3.5 dollars at example.com."]),
        ("one line\nanother . and more .\n", ["one line", "another .", "and more ."]),
        ("", [""]),
    ],
)
def test_sentences(text, lines):
    assert split_sentences(text).split("\n") == lines


def test_the_settings_name_the_task():
    config = TypeAdapter(AnyTaskConfig).validate_python(
        {"type": "text-to-text", "source": "article", "target": "summary", "metric": "rougeL"}
    )
    task = make_task(config)
    assert isinstance(task, TextToText)
    assert (task.headline, task.higher_is_better) == ("rougeL", True)
    assert task.columns() == {"task.source": "article", "task.target": "summary"}
    assert (config.max_length, config.max_target_length, config.num_beams) == (512, 128, 4)


def test_how_texts_are_generated_changes_neither_rows_nor_training():
    settings = {
        "num_beams": 1,
        "length_penalty": 2.0,
        "no_repeat_ngram_size": 3,
        "metric": "rouge1",
        "references": "mean",
    }
    given, changed = make_task_of().config, make_task_of(**settings).config
    different = {name for name in settings if getattr(given, name) != getattr(changed, name)}
    assert different == given.only_scoring


@pytest.mark.parametrize(
    "changes", [{"metric": "bleu"}, {"num_beams": 0}, {"no_repeat_ngram_size": -1}]
)
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(ValidationError):
        make_task_of(**changes)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What two workers wrote that share a model, and what one alone writes."""
    folder = tmp_path_factory.mktemp("generate")
    task, model, rows = save_inputs(folder)
    launched = launch_cases(
        "tests.pipeline.tasks.generate_worker",
        str(folder),
        cases=[f"stage{stage}" for stage in STAGES],
        folder=folder,
        num_processes=2,
        timeout=400,
    )
    predictions = predict(task, model, rows, batch_size=1)
    lengths = (predictions["generated"] != -100).sum(axis=1)
    assert (lengths[0:-1:2] != lengths[1::2]).any()  # the workers' texts end at different steps
    expected = task.score(predictions, rows, make_tokenizer())
    other = rows.select(range(2, 5))  # a second validation set, of which one worker has a row less
    scores = task.score({"generated": predictions["generated"][2:5]}, other, make_tokenizer())
    return launched, expected | {f"other/{name}": value for name, value in scores.items()}


@pytest.mark.distributed
@pytest.mark.parametrize("stage", STAGES)
def test_two_workers_that_share_a_model_write_what_one_alone_does(shared, stage):
    launched, expected = shared
    folder = launched.folder(f"stage{stage}")
    found = json.loads((folder / f"metrics-{stage}.json").read_text())
    assert found == {"model": pytest.approx(expected)}
