"""Masked language modelling: blocks, masks drawn in training and fixed in evaluation, and scores."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from pydantic import ValidationError
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, BertForMaskedLM

from pipeline.errors import ConfigError
from pipeline.tasks import make_task
from pipeline.tasks.masked_lm import MaskedLMConfig
from pipeline.tasks.row_mapper import IN_MEMORY, RowMapper
from tests import tiny
from tests.tiny import BAD, GOOD

TEXTS = [f"a {word} day not {other}" for word, other in zip(GOOD, BAD, strict=True)]


@pytest.fixture(scope="module")
def tokenizer(tiny_bert):
    return AutoTokenizer.from_pretrained(tiny_bert)


def make(**settings):
    return make_task(MaskedLMConfig(type="masked-lm", **{"max_length": 10, **settings}))


def tokenize(task, tokenizer, texts=TEXTS, mapper=IN_MEMORY):
    rows = Dataset.from_dict({"text": texts})
    return task.tokenize(DatasetDict(train=rows, validation=rows), tokenizer, mapper).splits


@pytest.mark.parametrize("separator", [True, False])
def test_blocks_are_the_stream_between_the_special_tokens(tokenizer, separator):
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    stream = []
    for text in TEXTS:
        stream += tokenizer.convert_tokens_to_ids(text.split()) + [sep] * separator
    expected = [[cls, *stream[i : i + 8], sep] for i in range(0, len(stream) - 7, 8)]
    task = make(separator=separator)
    blocks = tokenize(task, tokenizer)["train"]
    assert blocks.column_names == ["input_ids"]
    assert blocks["input_ids"][:] == expected
    rows = Dataset.from_dict({"text": TEXTS})
    assert task.num_examples(rows, tokenizer) == len(expected)


def test_validation_masks_are_the_row_s_own(tokenizer):
    """Whatever the batch, the workers, the processes and the state of torch's generator."""
    task = make()
    splits = tokenize(task, tokenizer)
    rows = splits["validation"]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    for mapper in (IN_MEMORY, RowMapper(num_proc=2, part_bytes=50)):
        again = tokenize(make(), tokenizer, mapper=mapper)["validation"]
        assert again["labels"][:] == rows["labels"][:]
        assert again["input_ids"][:] == rows["input_ids"][:]
    assert torch.equal(torch.get_rng_state(), state)  # masks are drawn beside it
    for size in (1, 3):
        batches = list(DataLoader(rows, batch_size=size, collate_fn=task.collator(tokenizer)))
        for name in ("input_ids", "labels"):
            joined = torch.cat([batch[name] for batch in batches]).tolist()
            assert joined == rows[name][:]
    assert (
        tokenize(make(validation_seed=1), tokenizer)["validation"]["labels"][:] != rows["labels"][:]
    )
    for row, block in zip(rows, splits["train"], strict=True):
        given = zip(row["input_ids"], row["labels"], block["input_ids"], strict=True)
        assert all(label in (-100, whole) for _, label, whole in given)
        assert any(label >= 0 for label in row["labels"])


def test_training_masks_are_those_of_each_row_s_seed(tokenizer):
    """Whatever rows are beside it, and whatever torch's generator has drawn."""
    task = make()
    rows = tokenize(task, tokenizer)["train"]
    collate = task.collator(tokenizer)

    def draw(*seeds):
        return collate([{**row, "draw_seed": seed} for row, seed in zip(rows, seeds, strict=False)])

    together = draw(5, 6)
    torch.rand(1)
    for name, values in together.items():
        assert torch.equal(draw(5)[name][0], values[0])
        assert torch.equal(draw(7, 6)[name][1], values[1])
    assert not torch.equal(draw(7, 6)["labels"][0], together["labels"][0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("share", "replaced", "random"), [(0.15, 0.8, 0.1), (0.5, 0.0, 1), (0.3, 0.5, 0.5), (0.4, 1, 0)]
)
def test_tokens_are_masked_in_the_shares_asked_for(tokenizer, share, replaced, random):
    task = make(mask_share=share, replace_share=replaced, random_share=random)
    cls, sep, mask = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id
    day = tokenizer.convert_tokens_to_ids("day")
    block = {"input_ids": [cls, day, day, sep, day, day, day, sep]}
    batch = task.collator(tokenizer)([{**block, "draw_seed": seed} for seed in range(20_000)])
    before = torch.tensor(block["input_ids"]).expand_as(batch["labels"])
    chosen = batch["labels"] != -100
    assert not chosen[(before == cls) | (before == sep)].any()
    assert torch.equal(batch["input_ids"][~chosen], before[~chosen])
    assert torch.equal(batch["labels"][chosen], before[chosen])
    assert chosen[before == day].float().mean() == pytest.approx(share, abs=0.01)
    inputs = batch["input_ids"][chosen]
    # A random token may be [MASK] or the word itself: one in as many as there are.
    by_chance = random / len(tokenizer)
    assert (inputs == mask).float().mean() == pytest.approx(replaced + by_chance, abs=0.015)
    kept = 1 - replaced - random
    assert (inputs == day).float().mean() == pytest.approx(kept + by_chance, abs=0.015)


def test_scores_are_those_of_the_masked_tokens(tokenizer):
    model = tiny.model(
        BertForMaskedLM,
        vocab_size=len(tokenizer),
        num_hidden_layers=1,
        intermediate_size=32,
        initializer_range=0.5,
    ).eval()
    task = make(mask_share=0.4)
    rows = tokenize(task, tokenizer)["validation"]
    batches = DataLoader(rows, batch_size=2, collate_fn=task.collator(tokenizer))
    with torch.inference_mode():
        parts = [task.predict(model(**batch), batch) for batch in batches]
        whole = task.collator(tokenizer)(list(rows))
        outputs = model(**whole)
    predictions = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
    chosen = whole["labels"] >= 0
    found = outputs.logits.argmax(-1)[chosen] == whole["labels"][chosen]
    scores = task.score(predictions, rows, tokenizer)
    assert scores == pytest.approx(
        {
            "loss": outputs.loss.item(),
            "perplexity": math.exp(outputs.loss.item()),
            "accuracy": found.float().mean().item(),
            "num_tokens": chosen.sum().item(),
        },
        rel=1e-5,
    )


def test_the_headline_is_the_chosen_metric():
    tasks = [make(), make(metric="accuracy")]
    assert [(task.headline, task.higher_is_better) for task in tasks] == [
        ("perplexity", False),
        ("accuracy", True),
    ]
    hopeless = {"loss": np.array([1e6]), "num_tokens": np.array([1]), "num_correct": np.array([0])}
    assert math.isfinite(make().score(hopeless, None, None)["perplexity"])


def test_a_tokenizer_without_a_mask_token_is_refused():
    with pytest.raises(ConfigError, match=r"model\.path: .*no mask token"):
        tokenize(make(), tiny.number_tokenizer())


@pytest.mark.parametrize(
    "settings",
    [
        {"replace_share": 0.9, "random_share": 0.2},
        {"mask_share": 0},
        {"mask_share": 1.5},
        {"max_length": 3},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValidationError):
        make(**settings)


def test_too_little_text(tokenizer):
    with pytest.raises(ConfigError, match="train holds fewer than 8 tokens, not one block"):
        tokenize(make(), tokenizer, texts=["a day"])


def test_outputs_of_low_precision_are_scored_in_float32():
    logits = torch.tensor([[[0.5, 2.0], [1.0, -1.0]]], dtype=torch.bfloat16)
    predicted = make().predict(
        SimpleNamespace(logits=logits), {"labels": torch.tensor([[1, -100]])}
    )
    assert predicted["loss"].dtype == torch.float64
    assert predicted["loss"].item() == pytest.approx(math.log(1 + math.exp(-1.5)), rel=1e-6)
    assert predicted["num_correct"].tolist() == predicted["num_tokens"].tolist() == [1]
