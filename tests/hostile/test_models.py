"""Models that must not be trained: damaged, of other weights, or not fit for the task; one line each."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import BartForConditionalGeneration, BertConfig, BertForSequenceClassification

from pipeline.errors import ConfigError
from pipeline.models.labels import follow_labels
from pipeline.models.loading import load_model
from pipeline.models.source import ModelConfig
from pipeline.runs.validate import validate
from tests import tiny
from tests.hostile.folders import (
    CLASSIFIER,
    WEIGHTS,
    Code,
    as_pickle,
    changed,
    cut,
    settings,
    without,
    written,
)

pytestmark = pytest.mark.usefixtures("datasets_cache")
# What is done to a good folder, and what `validate` says of it; FOLDER is its path.
FILES = {
    "renamed": (
        changed(lambda t: {f"x.{name}": tensor for name, tensor in t.items()}),
        "model.path: 'FOLDER' lacks 37 weights, the first bert.embeddings.LayerNorm.bias, of the model",
    ),
    "a-layer-missing": (
        changed(lambda t: {n: x for n, x in t.items() if ".layer.1." not in n}),
        "model.path: 'FOLDER' lacks 16 weights, the first bert.encoder.layer.1.",
    ),
    "a-layer-too-many": (
        changed(lambda t: {**t, "encoder.layer.2.output.dense.bias": torch.zeros(16)}),
        "model.path: 'FOLDER' holds the tensor encoder.layer.2.output.dense.bias that the model has no",
    ),
    "an-inner-shape": (
        changed(lambda t: {**t, "encoder.layer.0.output.dense.weight": torch.zeros(3, 3)}),
        "model.path: 'FOLDER' holds bert.encoder.layer.0.output.dense.weight of shape (3, 3), the",
    ),
    "whole-numbers": (
        changed(
            lambda t: {
                n: x.to(torch.int8) if n.endswith("0.output.dense.weight") else x
                for n, x in t.items()
            }
        ),
        "model.path: 'FOLDER' holds the weight encoder.layer.0.output.dense.weight in whole numbers",
    ),
    "cut-off": (
        cut(WEIGHTS, 10),
        "model.path: 'FOLDER' does not load: model.safetensors is damaged or cut off",
    ),
    "empty": (
        written(WEIGHTS, b""),
        "model.path: 'FOLDER' does not load: model.safetensors is empty",
    ),
    "garbage": (
        written(WEIGHTS, b"no tensors at all" * 9),
        "model.path: 'FOLDER' does not load: model.safetensors is damaged or cut off",
    ),
    "code-in-a-pickle": (
        as_pickle({"embeddings.LayerNorm.bias": Code()}),
        "model.path: 'FOLDER' does not load: pytorch_model.bin is no plain file of tensors",
    ),
    "gptq": (
        settings(quantization_config={"quant_method": "gptq", "bits": 4}),
        "model.path: 'FOLDER' is quantized (gptq): its weights can be neither trained nor pruned",
    ),
    "awq": (
        settings(quantization_config={"quant_method": "awq", "bits": 4}),
        "model.path: 'FOLDER' is quantized (awq): its weights can be neither trained nor pruned",
    ),
    "packed": (
        settings(quantization_config={"quant_method": "mgpp-packed", "version": 1, "tensors": {}}),
        "model.path: 'FOLDER' is packed: a run starts from the plain checkpoint; `mgpp unpack FOLDER",
    ),
    "tokenizer-cut-off": (
        cut("tokenizer.json", 10),
        "model.path: no tokenizer in 'FOLDER': tokenizer.json is damaged",
    ),
    "tokenizer-empty": (
        written("tokenizer.json", b""),
        "model.path: no tokenizer in 'FOLDER': tokenizer.json is empty",
    ),
    "no-tokenizer": (
        without("tokenizer.json", "tokenizer_config.json"),
        "model.path: no tokenizer in 'FOLDER': its files hold no token but special ones",
    ),
}
# Overrides of a good configuration, and what is said of them.
SETTINGS = {
    "a-row-too-long": (
        "task.max_length=33",
        "task.max_length: the model has positions for 32 tokens",
    ),
    "a-row-of-one-token": (
        "task.max_length=1",
        "task.max_length: 2 special tokens and one of each",
    ),
    "attention": ("model.attention=bogus", "model.attention: "),
    "all-frozen": ("train.freeze=['*']", "train.freeze: leaves nothing to train"),
    "some-that-are-pruned-frozen": (
        "train.freeze=['*layer.0*']",
        "train.freeze: 6 of the 12 weights that are pruned are not trained, the first "
        "bert.encoder.layer.0.attention.self.query.weight; add the same patterns to prune.exclude, or "
        "freeze other weights",
    ),
    "all-that-are-pruned-frozen": (
        "train.freeze=['*encoder*']",
        "train.freeze: 12 of the 12 weights that are pruned are not trained, the first ",
    ),
    "shard-size": ("export.max_shard_size=banana", "export.max_shard_size: not a size"),
    "shard-of-nothing": ("export.max_shard_size=0GB", "export.max_shard_size: not a size"),
    "warm-up": ("train.lr_warmup_length=21", "train.lr_warmup_length: is longer than the run"),
    "warm-up-share": ("train.lr_warmup_length='120%'", "train.lr_warmup_length: is longer than"),
    "seed": ("train.seed=99999999999", "train.seed: input should be less than 4294967296"),
    "unknown-key": (
        "zero.extra={zero_optimisation: {}}",
        "zero.extra.zero_optimisation: DeepSpeed",
    ),
    "unknown-inner-key": (
        "zero.extra={zero_optimization: {overlap_com: true}}",
        "zero.extra.zero_optimization.overlap_com: DeepSpeed has no such key",
    ),
    "optimizer": (
        "zero.extra={optimizer: {type: SGD}}",
        "zero.extra.optimizer: the pruned training (AdamW) sets it; leave it out",
    ),
    "stage": (
        "zero.extra={zero_optimization: {stage: 1}}",
        "zero.extra.zero_optimization.stage: zero.stage sets it; leave it out",
    ),
    "removed-from-deepspeed": (
        "zero.extra={amp: {enabled: false}}",
        "zero.extra.amp: DeepSpeed refuses it: ",
    ),
    "precision-by-another-name": (
        "zero.extra={bfloat16: {enabled: true}}",
        "zero.extra.bfloat16: zero.precision sets it; leave it out",
    ),
    "bucket-of-words": (
        "zero.extra={zero_optimization: {reduce_bucket_size: banana}}",
        "zero.extra.zero_optimization.reduce_bucket_size: DeepSpeed refuses it: ",
    ),
    "bidirectional": (
        "task={type: causal-lm, text: text, max_length: 8}",
        "task.type: BertLMHeadModel sees the tokens after the one it predicts",
    ),
}


def only_line(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(str(path), overrides, None)
    (problem,) = caught.value.problems
    assert "\n" not in str(problem)
    return str(problem)


@pytest.mark.parametrize("name", FILES)
def test_a_folder_that_must_not_be_trained(good, tiny_bert, tmp_path, name):
    change, line = FILES[name]
    folder = tmp_path / "model"
    shutil.copytree(tiny_bert, folder)
    change(folder)
    said = only_line(good, f"model.path={folder}")
    assert said.startswith(line.replace("FOLDER", str(folder)))


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_do_not_fit(good, name):
    override, line = SETTINGS[name]
    assert only_line(good, override).startswith(line)


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.freeze=['*layer.0*']", "prune.exclude=['*layer.0*']"],
        ["train.freeze=['*embeddings*', '*LayerNorm*', '*.bias']"],
    ],
)
def test_weights_that_are_not_pruned_may_be_frozen(good, overrides):
    validate(str(good), overrides, None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_as_they_load(tiny_bert, tmp_path, value):
    folder = tmp_path / "model"
    shutil.copytree(tiny_bert, folder)
    changed(lambda t: {**t, "encoder.layer.1.output.dense.bias": torch.full((16,), value)})(folder)
    with pytest.raises(
        ConfigError, match=r"bert\.encoder\.layer\.1\.output\.dense\.bias with values"
    ):
        load(folder)


def test_a_head_follows_the_order_of_the_labels_by_name(tiny_bert, tmp_path):
    before = load(Path(tiny_bert), id2label={0: "NEGATIVE", 1: "POSITIVE"})
    before.save_pretrained(tmp_path)
    after = load(tmp_path, id2label={0: "positive", 1: "negative"})
    assert torch.equal(after.classifier.weight, before.classifier.weight[[1, 0]])
    assert torch.equal(after.classifier.bias, before.classifier.bias[[1, 0]])
    assert after.config.id2label == {0: "POSITIVE", 1: "NEGATIVE"}
    same = load(tmp_path, id2label={0: "0", 1: "1"})
    assert torch.equal(same.classifier.weight, before.classifier.weight)
    assert same.config.id2label == {0: "NEGATIVE", 1: "POSITIVE"}


NLI = ("contradiction", "neutral", "entailment")
# The model's labels, the data's, and the model's row of each of the data's; None: refused.
ORDERS = {
    "numbers-as-names": (("1", "0"), ("0", "1"), [1, 0]),
    "numbers": (NLI, ("0", "1", "2"), [0, 1, 2]),
    "by-name": (NLI, ("entailment", "neutral", "contradiction"), [2, 1, 0]),
    "by-name-as-written": (("a", "A"), ("A", "a"), [1, 0]),
    "spaces-around": (NLI, ("entailment", "neutral", " contradiction  "), [2, 1, 0]),
    "no-name-the-same": (("bad", "good"), ("neg", "pos"), [0, 1]),
    "names-not-known": (("LABEL_0", "LABEL_1"), ("pos", "neg"), [0, 1]),
    "one-name-differs": (NLI, ("entailed", "neutral", "contradiction"), None),
    "numbers-from-one": (("0", "1", "2"), ("1", "2", "3"), None),
    "twice-but-for-the-case": (("a", "b"), ("a", "A"), None),
}


@pytest.mark.parametrize("name", ORDERS)
def test_rows_of_a_head_by_the_names_of_labels(name):
    known, wanted, rows = ORDERS[name]
    config = BertConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        id2label=dict(enumerate(known)),
    )
    model, notes = BertForSequenceClassification(config), []
    before = model.classifier.weight.detach().clone()
    labels = dict(enumerate(wanted))
    model.config.id2label = dict(labels)
    if rows is None:
        with pytest.raises(
            ConfigError, match=r"^task.label: the model's head has .* all others are"
        ):
            follow_labels(model, config_of(known), labels, notes.append)
        return
    follow_labels(model, config_of(known), labels, notes.append)
    assert torch.equal(model.classifier.weight, before[rows])
    if name in ("numbers", "no-name-the-same", "names-not-known"):
        (note,) = notes
        pairs = [f"{ours!r} for {theirs!r}" for ours, theirs in zip(wanted, known, strict=True)]
        assert note == f"labels of the data are taken for the model's by number: {', '.join(pairs)}"
    else:
        assert notes == []
    kept = wanted if name in ("no-name-the-same", "names-not-known") else [known[i] for i in rows]
    assert list(model.config.id2label.values()) == list(kept)


def config_of(labels):
    return SimpleNamespace(id2label=dict(enumerate(labels)))


def test_labels_of_which_some_are_the_model_s_are_refused_by_validate(good, tiny_bert, tmp_path):
    head = load(Path(tiny_bert), id2label={0: "0", 1: "no"})
    head.save_pretrained(tmp_path)
    for file in tiny_bert.glob("*token*"):
        shutil.copy(file, tmp_path)
    assert only_line(good, f"model.path={tmp_path}") == (
        "task.label: the model's head has the labels ['no'] where the data has ['1']; all others are the "
        "same; give the data's labels the model's names, or start from a model without this head"
    )
    head.bert.save_pretrained(tmp_path)  # no head, so its names mean nothing
    settings(id2label={0: "0", 1: "no"})(tmp_path)
    validate(str(good), [f"model.path={tmp_path}"], None)


def test_a_decoder_that_classifies_is_told_what_padding_is(tmp_path):
    tiny.write_decoder("llama", tmp_path)
    settings(pad_token_id=None)(tmp_path)
    model = load(tmp_path, id2label={0: "a", 1: "b"})
    assert model.config.pad_token_id == 1
    ids = torch.tensor([[4, 5, 6, 1], [4, 5, 1, 1]])
    logits = model(input_ids=ids, attention_mask=(ids != 1).long()).logits
    alone = model(input_ids=ids[1:, :2]).logits
    assert torch.allclose(logits[1], alone[0], atol=1e-5)


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    """A folder a family, written as it is asked for."""
    root = tmp_path_factory.mktemp("decoders")

    def folder(kind: str) -> Path:
        if not (root / kind).exists():
            tiny.write_decoder(kind, root / kind)
        return root / kind

    return folder


def test_a_tokenizer_that_does_not_know_the_text(good, tiny_bert, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_bert, folder)
    tiny.sequence_tokenizer().save_pretrained(folder)
    assert only_line(good, f"model.path={folder}").startswith(
        "model.path: its tokenizer does not know 100% of the training text's tokens (<unk>)"
    )


def test_tokens_beyond_the_embedding(good, tiny_bert, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_bert, folder)
    words = [*tiny.DAY_WORDS, "more"]
    tiny.word_tokenizer(
        words, unknown="[UNK]", unk_token="[UNK]", pad_token="[PAD]"
    ).save_pretrained(folder)
    number = len(tiny.DAY_WORDS)
    assert only_line(good, f"model.path={folder}").startswith(
        f"model.path: its tokenizer has token {number} ('more'), but the model embeds only {number}"
    )


def test_texts_longer_than_the_decoder_has_positions_for(good, tmp_path):
    tokenizer = tiny.word_tokenizer(
        tiny.DAY_WORDS, unknown="[UNK]", unk_token="[UNK]", pad_token="[PAD]"
    )
    tokenizer.save_pretrained(tmp_path)
    tiny.model(
        BartForConditionalGeneration,
        vocab_size=len(tiny.DAY_WORDS),
        max_position_embeddings=16,
        pad_token_id=0,
    ).save_pretrained(tmp_path)
    task = "task={type: text-to-text, source: text, target: text, max_length: 16}"
    assert only_line(good, f"model.path={tmp_path}", task) == (
        "task.max_target_length: the model has positions for 16 tokens, got 128"
    )


def test_padding_that_the_model_takes_for_another_token(good, decoders, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(decoders("llama"), folder)
    settings(pad_token_id=5)(folder)
    said = only_line(good, f"model.path={folder}")
    assert said.startswith("model.path: its tokenizer pads with token 1, the model takes 5 for")
    assert said.endswith("set model.overrides.pad_token_id: 1")


def test_a_tokenizer_with_nothing_to_pad_with(good, decoders, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(decoders("gpt2"), folder)
    tiny.word_tokenizer(tiny.DECODER_WORDS, unknown="[UNK]", unk_token="[UNK]").save_pretrained(
        folder
    )
    assert only_line(good, f"model.path={folder}").startswith(
        "model.path: its tokenizer has neither a padding nor an end-of-text token to pad rows with"
    )


def test_fewer_layers_than_another_setting_lists(good, decoders):
    folder = decoders("qwen2")
    said = only_line(good, f"model.path={folder}", "model.overrides.num_hidden_layers=2")
    assert said.startswith("model.overrides.layer_types: a list of 3 does not go with 2 layers")


def test_weights_of_a_teacher_are_checked_too(good, tiny_bert, tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_bert, folder)
    changed(lambda t: {n: x for n, x in t.items() if ".layer.1." not in n})(folder)
    assert only_line(good, f"distill.teacher={folder}").startswith(
        f"distill.teacher: '{folder}' lacks 16 weights, the first bert.encoder.layer.1."
    )


def test_a_model_that_was_trained_must_have_its_head(tiny_bert):
    with pytest.raises(ConfigError, match=r"lacks .* of the model; none may be new"):
        load(Path(tiny_bert), new_head=False)


def load(folder: Path, id2label: dict[int, str] | None = None, *, new_head: bool = True):
    return load_model(
        ModelConfig(path=str(folder)),
        CLASSIFIER,
        model_kwargs={"num_labels": 2, "id2label": id2label or {0: "a", 1: "b"}},
        dtype=torch.float32,
        seed=0,
        new_head=new_head,
    ).eval()
