"""Instruction data: prompts and responses as one text, of which the response is learned and scored."""

import math

import pytest
import torch
from datasets import Dataset, DatasetDict
from torch.utils.data import DataLoader
from transformers import GPT2LMHeadModel

from pipeline.errors import ConfigError
from pipeline.tasks import make_task
from pipeline.tasks.instruction import InstructionConfig
from tests import tiny
from tests.tiny import NUMBER_WORDS as WORDS
from tests.tiny import number_tokenizer as make_tokenizer

END = WORDS.index("<end>")
PROMPTS, CONTEXTS = ["one two", "three", "five"], ["six", None, ""]
ANSWERS = ["four", "one two three", "seven six"]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} three {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def make(**settings):
    settings = {"prompt": "prompt", "response": "answer", "separator": " ", **settings}
    return make_task(InstructionConfig(type="instruction", **settings))


def make_rows(**changes):
    return Dataset.from_dict(
        {"prompt": PROMPTS, "context": CONTEXTS, "answer": ANSWERS, "other": [0, 1, 2], **changes}
    )


def tokenize(task, rows=None, tokenizer=None):
    rows = rows or make_rows()
    tokenizer = tokenizer or make_tokenizer(eos_token="<end>")
    return task.tokenize(DatasetDict(train=rows, validation=rows), tokenizer).splits


def ids(text):
    return [WORDS.index(word) if word in WORDS else 0 for word in text.split()]


def test_the_response_and_its_end_are_learned_and_the_prompt_is_not():
    for split in tokenize(make()).values():
        for row, prompt, answer in zip(split, PROMPTS, ANSWERS, strict=True):
            assert row["input_ids"] == [*ids(prompt), *ids(answer), END]
            assert row["labels"] == [-100] * len(ids(prompt)) + [*ids(answer), END]


def test_columns_of_a_prompt_are_joined_where_they_are_not_empty():
    rows = tokenize(make(prompt=["prompt", "context"], separator=" two "))["train"]
    learned = [[i for i in row["labels"] if i >= 0] for row in rows]
    prompts = [
        [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label < 0]
        for row in rows
    ]
    assert learned == [[*ids(answer), END] for answer in ANSWERS]
    assert prompts == [ids("one two two six two"), ids("three two"), ids("five two")]


def test_a_pair_too_long_loses_the_beginning_of_its_prompt_then_the_end_of_its_response():
    answers = ["one", "one two three four five six"]
    rows = Dataset.from_dict({"prompt": ["one two three four five six"] * 2, "answer": answers})
    short, long = tokenize(make(max_length=6), rows)["train"]
    assert short["input_ids"] == [*ids("three four five six one"), END]
    assert short["labels"] == [-100] * 4 + [*ids("one"), END]
    assert long["input_ids"] == ids("four five six one two three")
    assert long["labels"] == [-100] * 3 + ids("one two three")


def test_a_chat_template_writes_both_turns():
    tokenizer = make_tokenizer(eos_token="<end>")
    tokenizer.chat_template = TEMPLATE
    rows = tokenize(make(chat_template=True), tokenizer=tokenizer)["train"]
    for row, prompt, answer in zip(rows, PROMPTS, ANSWERS, strict=True):
        asked = ids(f"user {prompt} three assistant")
        assert row["input_ids"] == [*asked, *ids(f"{answer} three")]
        assert row["labels"] == [-100] * len(asked) + ids(f"{answer} three")


def test_a_chat_template_that_cannot_be_used_is_refused():
    with pytest.raises(ConfigError, match=r"task\.chat_template: the model's tokenizer has none"):
        tokenize(make(chat_template=True))
    tokenizer = make_tokenizer(eos_token="<end>")
    tokenizer.chat_template = TEMPLATE.replace("{% if", "five {% if")
    with pytest.raises(ConfigError, match=r"task\.chat_template: .* does not put the response"):
        tokenize(make(chat_template=True), tokenizer=tokenizer)


def test_a_row_without_a_response_is_refused():
    with pytest.raises(ConfigError, match=r"task\.response: 2 rows of the train data"):
        tokenize(make(), make_rows(answer=["one", None, " "]))


def make_model():
    return tiny.model(
        GPT2LMHeadModel,
        vocab_size=len(WORDS),
        max_position_embeddings=16,
        num_hidden_layers=1,
        initializer_range=0.5,
    ).eval()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_perplexity_is_that_of_the_response_tokens_each_row_alone(batch_size, side):
    task, model = make(), make_model()
    tokenizer = make_tokenizer(eos_token="<end>", pad_token="<end>", padding_side=side)
    rows = tokenize(task, tokenizer=tokenizer)["validation"]
    parts, losses = [], []
    with torch.inference_mode():
        for batch in DataLoader(rows, batch_size=batch_size, collate_fn=task.collator(tokenizer)):
            assert batch["attention_mask"].sum() == (batch["input_ids"] != END).sum() + len(
                batch["input_ids"]
            )
            parts.append(task.predict(model(**batch), batch))
        for row in rows:
            log_probs = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
            learned = [i for i, label in enumerate(row["labels"]) if label >= 0]
            losses += [-log_probs[i - 1, row["labels"][i]].item() for i in learned]
    predictions = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
    scores = task.score(predictions, rows, tokenizer)
    loss = sum(losses) / len(losses)
    assert scores == pytest.approx(
        {"loss": loss, "perplexity": math.exp(loss), "num_tokens": len(losses)}, rel=1e-5
    )


def test_a_start_token_is_put_where_the_tokenizer_has_one():
    tokenizer = tiny.sequence_tokenizer()  # <s> ... </s>
    rows = Dataset.from_dict({"prompt": ["red red"], "answer": ["blue"]})
    (row,) = tokenize(make(), rows, tokenizer)["train"]
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == [
        "<s>",
        "red",
        "red",
        "blue",
        "</s>",
    ]
    assert row["labels"][:3] == [-100] * 3


def test_the_settings_name_the_columns():
    task = make(prompt=["instruction", "input"], response="output")
    assert task.columns() == {
        "task.prompt.0": "instruction",
        "task.prompt.1": "input",
        "task.response": "output",
    }
    assert (task.headline, task.higher_is_better) == ("perplexity", False)
