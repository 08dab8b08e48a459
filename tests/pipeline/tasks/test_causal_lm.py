"""Causal language modelling: the stream of tokens, its blocks, and perplexity over all of them."""

import math
from itertools import chain

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import GPT2LMHeadModel

from pipeline.errors import ConfigError
from pipeline.tasks import make_task
from pipeline.tasks.causal_lm import CausalLM, CausalLMConfig
from pipeline.tasks.row_mapper import IN_MEMORY, RowMapper
from tests import tiny
from tests.tiny import NUMBER_WORDS as WORDS
from tests.tiny import number_tokenizer as make_tokenizer

TEXTS = ["one two three", "", "four", "  ", "five six seven one two", "unknown two", "three"]
END = WORDS.index("<end>")


def make_task_of(length):
    return CausalLM(CausalLMConfig(type="causal-lm", max_length=length))


def make_splits(texts, validation=None):
    return DatasetDict(
        train=Dataset.from_dict({"text": texts, "other": [0] * len(texts)}),
        validation=Dataset.from_dict({"text": validation or texts}),
    )


def joined(texts, end):
    """The stream of tokens of all documents, written out without the tokenizer."""
    ids = [[WORDS.index(w) if w in WORDS else 0 for w in text.split()] for text in texts]
    return [*chain.from_iterable([*document, *end] for document in ids if document)]


@pytest.mark.parametrize("length", [2, 4, 5, 17])
@pytest.mark.parametrize("with_end", [True, False])
def test_blocks_are_the_joined_documents_cut(length, with_end):
    tokenizer = make_tokenizer(eos_token="<end>") if with_end else make_tokenizer()
    stream = joined(TEXTS, [END] if with_end else [])
    length = min(length, len(stream))
    tokenized = make_task_of(length).tokenize(make_splits(TEXTS), tokenizer)
    expected = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
    for split in tokenized.splits.values():
        assert split["input_ids"][:] == expected
    assert tokenized.splits["train"].column_names == ["input_ids"]
    num_words = sum(len(text.split()) for text in TEXTS)
    ratios = tokenized.splits["validation"]["tokens_per_word"][:]
    assert set(ratios) == {len(stream) / num_words}
    assert tokenized.model_kwargs == {}


def test_rows_that_are_lines_are_joined_without_the_end_token():
    config = CausalLMConfig(type="causal-lm", max_length=3, end_of_text=False)
    tokenized = CausalLM(config).tokenize(make_splits(TEXTS), make_tokenizer(eos_token="<end>"))
    stream = joined(TEXTS, [])
    expected = [stream[i : i + 3] for i in range(0, len(stream) - 2, 3)]
    assert tokenized.splits["train"]["input_ids"][:] == expected


def test_special_tokens_of_single_texts_are_not_in_the_stream(tiny_bert):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokenized = make_task_of(3).tokenize(make_splits(["a good day"]), tokenizer)
    expected = [tokenizer.convert_tokens_to_ids(["a", "good", "day"])]
    assert tokenized.splits["train"]["input_ids"][:] == expected


def test_a_row_that_is_missing_is_no_document():
    tokenizer = make_tokenizer(eos_token="<end>")
    tokenized = make_task_of(2).tokenize(make_splits(["one", None, "two"]), tokenizer)
    assert tokenized.splits["train"]["input_ids"][:] == [[3, END], [4, END]]


def test_blocks_do_not_depend_on_the_number_of_processes():
    # The number of processes is no part of what names the data.
    tokenizer = make_tokenizer(eos_token="<end>")
    one, two = (
        make_task_of(5).tokenize(make_splits(TEXTS), tokenizer, mapper).splits["train"]
        for mapper in (IN_MEMORY, RowMapper(num_proc=2, part_bytes=20))
    )
    assert two["input_ids"][:] == one["input_ids"][:]


@pytest.mark.parametrize(
    ("train", "validation", "short"),
    [(["one"], ["one two three four"], "train"), (["one two three four"], ["one"], "validation")],
)
def test_too_little_text_for_one_block(train, validation, short):
    tokenizer = make_tokenizer(eos_token="<end>")
    with pytest.raises(ConfigError, match=f"{short} holds fewer than 4 tokens, not one block"):
        make_task_of(4).tokenize(make_splits(train, validation), tokenizer)


def test_no_text_at_all():
    tokenizer = make_tokenizer(eos_token="<end>")
    with pytest.raises(ConfigError, match="train holds fewer than 4 tokens"):
        make_task_of(4).tokenize(make_splits([" ", ""]), tokenizer)


def test_a_batch_is_its_own_label():
    collate = make_task_of(3).collator(make_tokenizer())
    batch = collate([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert torch.equal(batch["labels"], batch["input_ids"])


def make_model():
    return tiny.model(
        GPT2LMHeadModel,
        vocab_size=len(WORDS),
        max_position_embeddings=8,
        num_hidden_layers=1,
        initializer_range=0.5,
        bos_token_id=END,
        eos_token_id=END,
    ).eval()


ROWS = Dataset.from_dict({"tokens_per_word": [1.5]})


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_perplexity_is_the_exponential_of_the_mean_cross_entropy(batch_size):
    task, model = make_task_of(6), make_model()
    blocks = torch.randint(0, len(WORDS), (7, 6), generator=torch.Generator().manual_seed(1))
    collate = task.collator(make_tokenizer())
    parts = []
    with torch.inference_mode():
        for rows in blocks.split(batch_size):
            batch = collate([{"input_ids": row.tolist()} for row in rows])
            parts.append(task.predict(model(**batch), batch))
        # One pass over all blocks, the log-probability of each next token picked out in float64.
        log_probs = model(input_ids=blocks).logits.double().log_softmax(dim=-1)[:, :-1]
    picked = log_probs.gather(2, blocks[:, 1:, None])
    predictions = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
    assert {len(values) for values in predictions.values()} == {7}  # a row an example
    scores = task.score(predictions, ROWS, None)
    assert scores["loss"] == pytest.approx(-picked.mean().item(), rel=1e-6)
    assert scores["perplexity"] == pytest.approx(math.exp(-picked.mean().item()), rel=1e-6)
    assert scores["num_tokens"] == 7 * 5


def test_perplexity_is_what_the_model_says_of_itself():
    task, model = make_task_of(6), make_model()
    blocks = torch.randint(0, len(WORDS), (4, 6), generator=torch.Generator().manual_seed(2))
    batch = {"input_ids": blocks, "labels": blocks}
    with torch.inference_mode():
        outputs = model(**batch)
        predicted = {k: v.numpy() for k, v in task.predict(outputs, batch).items()}
    assert task.score(predicted, ROWS, None)["loss"] == pytest.approx(outputs.loss.item(), rel=1e-5)


def test_tokens_weigh_alike_whatever_example_they_are_in():
    predictions = {"loss": np.array([2.0, 9.0]), "num_tokens": np.array([1, 3])}
    scores = make_task_of(6).score(predictions, ROWS, None)
    assert scores == {
        "loss": 2.75,
        "perplexity": math.exp(2.75),
        "word_perplexity": math.exp(2.75 * 1.5),
        "num_tokens": 4.0,
    }


def test_perplexity_per_word_is_that_of_the_whole_text_where_all_its_tokens_are_predicted():
    """As lm-evaluation-harness has it: exp of the text's negative log-likelihood over its words."""
    model, tokenizer = make_model(), make_tokenizer()
    task = make_task_of(6)
    splits = make_splits(["one two three four five six"], ["one two three", "unknown", "five two"])
    rows = task.tokenize(splits, tokenizer).splits["validation"]
    assert len(rows) == 1
    batch = task.collator(tokenizer)([rows[0]])
    with torch.inference_mode():
        outputs = model(**batch)
        predictions = {k: v.numpy() for k, v in task.predict(outputs, batch).items()}
        log_probs = outputs.logits.double().log_softmax(dim=-1)[0, :-1]
    picked = log_probs.gather(1, batch["input_ids"][0, 1:, None]).sum().item()
    # Five of six tokens are predicted; the sixth costs what they do on average. A token a word here.
    expected = math.exp(-picked * 6 / 5 / 6)
    found = task.score(predictions, rows, tokenizer)
    assert found["word_perplexity"] == pytest.approx(expected, rel=1e-6)


def test_a_hopeless_loss_stays_finite():
    predictions = {"loss": np.array([1e6]), "num_tokens": np.array([1])}
    assert math.isfinite(make_task_of(6).score(predictions, ROWS, None)["perplexity"])


def test_lower_perplexity_is_better():
    config = CausalLMConfig(type="causal-lm", text="body")
    task = make_task(config)
    assert isinstance(task, CausalLM)
    assert (task.headline, task.higher_is_better) == ("perplexity", False)
    by_word = make_task(CausalLMConfig(type="causal-lm", metric="word_perplexity"))
    assert by_word.headline == "word_perplexity"
    assert task.columns() == {"task.text": "body"}
