"""Keys of what comes from the hub: the same in any weather, and what is loaded is what they name."""

import shutil

import pytest

from pipeline.data.stage import data_identity, load_splits
from pipeline.errors import ConfigError
from pipeline.models.loading import load_tokenizer
from pipeline.models.settings import load_model_config
from pipeline.models.source import ModelConfig, model_identity
from pipeline.runs.config import parse_config
from pipeline.runs.flow import pinned, plan_stages
from pipeline.runs.hardware import NO_GPUS, settled
from pipeline.storage import hub as ours
from tests import tiny
from tests.hub_server import DROP, hub_server, online

pytestmark = pytest.mark.usefixtures("datasets_cache")

WEATHER = [429, 503, DROP]
MODEL, TEACHER, DATA = ("models", "org/model"), ("models", "org/teacher"), ("datasets", "org/days")


@pytest.fixture
def hub(tiny_bert, words_csv, tmp_path, monkeypatch, request):
    """A hub with a model, its teacher and rows, of names that no other test's cache has."""
    with hub_server() as hub:
        online(hub, tmp_path / "cache", monkeypatch)
        hub.rows = f"{DATA[1]}-{abs(hash(request.node.name))}"
        for kind, name in (MODEL, TEACHER):
            shutil.copytree(tiny_bert, tmp_path / name)
            hub.add(kind, name, tmp_path / name)
        (tmp_path / "days").mkdir()
        shutil.copy(words_csv, tmp_path / "days" / "train.csv")
        hub.add("datasets", hub.rows, tmp_path / "days")
        yield hub


@pytest.fixture
def config(hub):
    return run_of(hub)


def run_of(hub, **changes):
    values = {
        "name": "weather",
        "model": {"path": MODEL[1]},
        "task": {"type": "classification", "text": ["text"], "label": "label"},
        "data": {"source": "hub", "path": hub.rows, "validation_split": None},
        "train": {"length": 10},
        "prune": {"sparsity": 0.5},
        "distill": {"teacher": TEACHER[1]},
    }
    return settled(parse_config(values | changes), NO_GPUS)


def keys(config):
    return {stage.name: stage.key for stage in plan_stages(config)}


def forget():
    """Be another process, as far as the hub's answers go."""
    ours._answer.cache_clear()


def problems(call, *args):
    with pytest.raises(ConfigError) as caught:
        call(*args)
    return caught.value.problems


def test_keys_are_the_same_in_any_weather(hub, config):
    before = keys(config)
    params = {stage.name: stage.params for stage in plan_stages(config)}
    commits = {name: next(iter(folders)) for (_, name), folders in hub.commits.items()}
    assert params["data"]["data"]["revision"] == commits[hub.rows]
    assert params["data"]["model"]["revision"] == commits[MODEL[1]]
    assert params["dense"]["model"]["revision"] == commits[MODEL[1]]
    assert params["prune"]["distill"]["teacher"]["revision"] == commits[TEACHER[1]]
    assert sorted(hub.asked) == sorted(
        [("models", MODEL[1], None), ("models", TEACHER[1], None), ("datasets", hub.rows, None)]
    )
    forget()
    hub.answers = WEATHER * 2
    assert keys(config) == before
    assert len(hub.asked) == 3 + 3 + len(WEATHER) * 2


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("model", {"distill": None}),
        ("distill", {"model": "local"}),
        ("data", {"model": "local", "distill": None}),
        ("data.parts.1", {"model": "local", "distill": None, "data": "joined"}),
    ],
)
def test_a_hub_that_does_not_answer_gives_no_key(hub, tiny_bert, words_csv, section, changes):
    parts = [
        {"source": "files", "train": str(words_csv)},
        {"source": "hub", "path": hub.rows, "validation_split": None},
    ]
    given = {
        "local": {"path": str(tiny_bert)},
        "joined": {"source": "joined", "parts": parts},
    }
    changes = {name: given.get(value, value) for name, value in changes.items()}
    if section == "distill":  # rows of this machine: the teacher alone is asked for
        changes["data"] = parts[0]
    hub.answers = [503] * 100
    (problem,) = problems(plan_stages, run_of(hub, **changes))
    assert problem.key == ("distill.teacher" if section == "distill" else f"{section}.path")
    assert "503 Service Unavailable; gave up at try 7 of 7" in problem.why
    assert f"pin {section}.revision to a commit" in problem.hint


def test_a_pinned_run_has_the_same_keys_and_asks_for_no_revision(hub, config, tmp_path):
    before, fixed = keys(config), pinned(config)
    assert keys(fixed) == before
    assert fixed.distill.revision == next(iter(hub.commits[TEACHER]))
    num_asked = len(hub.asked)
    forget()
    shutil.copytree(tmp_path / MODEL[1], tmp_path / "newer")
    hub.add("datasets", hub.rows, tmp_path)  # the hub moves on
    hub.add(*MODEL, tmp_path / "newer")
    assert keys(parse_config(fixed.model_dump(mode="json"))) == before
    assert len(hub.asked) == num_asked
    assert keys(config) != before


def test_a_branch_is_named_by_its_commit(hub, config):
    (commit,) = hub.commits["datasets", hub.rows]
    hub.branches["datasets", hub.rows, "refs/convert/parquet"] = commit
    changed = config.data.model_copy(update={"revision": "refs/convert/parquet"})
    assert data_identity(changed) == data_identity(config.data)


def test_what_is_loaded_is_what_the_key_names(hub, config, tmp_path):
    data_identity(config.data)
    known = model_identity(config.model)["revision"]
    words = [*tiny.DAY_WORDS, "new"]
    tiny.write_bert(tmp_path / "newer", words, intermediate_size=32, max_position_embeddings=32)
    hub.add(*MODEL, tmp_path / "newer")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "train.csv").write_text("text,label\na new day,0\na new day,1\n")
    hub.add("datasets", hub.rows, tmp_path / "more")
    assert "new" not in load_tokenizer(config.model).get_vocab()
    assert (
        len(load_splits(config.data)["train"]) + len(load_splits(config.data)["validation"]) == 48
    )
    forget()
    assert model_identity(config.model)["revision"] != known
    assert "new" in load_tokenizer(config.model).get_vocab()
    assert len(load_splits(config.data)["train"]) == 1


def test_rows_of_another_commit_are_refused(hub, config, tmp_path):
    """`datasets` takes what it has where the hub fails, of whatever commit."""
    assert len(load_splits(config.data)["train"])
    forget()
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "train.csv").write_text("text,label\na new day,0\na new day,1\n")
    newer = hub.add("datasets", hub.rows, tmp_path / "more")
    data_identity(config.data)
    hub.everywhere, hub.answers = True, [404] * 1000
    (problem,) = problems(load_splits, config.data)
    assert problem.key == "data.path"
    assert problem.why.endswith(f"what this machine has is of another commit than {newer}")


def test_a_gated_repository_asks_for_a_token(hub, config, monkeypatch):
    hub.gated = {MODEL[1], hub.rows}
    for call, section in (
        (load_model_config, "model"),
        (load_tokenizer, "model"),
        (load_splits, "data"),
    ):
        (problem,) = problems(call, getattr(config, section))
        assert problem.key == f"{section}.path"
        assert "is gated: the hub at" in problem.why or "is a gated dataset" in problem.why
        assert "HF_TOKEN" in problem.hint
    monkeypatch.setenv("HF_TOKEN", "hf_a_token")
    assert load_model_config(config.model).model_type == "bert"


def test_offline_what_this_machine_has_names_the_model(hub, config, monkeypatch):
    before = model_identity(config.model)
    load_tokenizer(config.model)
    num_asked = len(hub.asked)
    forget()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert load_model_config(ModelConfig(path=MODEL[1])).model_type == "bert"
    assert model_identity(config.model) == before
    assert data_identity(config.data)["revision"] is None
    assert len(hub.asked) == num_asked
