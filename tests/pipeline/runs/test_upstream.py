"""`model.path: run:FILE`: what the run of another file exported, here and on remote storage."""

import json

import fsspec
import pytest
import yaml

from pipeline.errors import ConfigError
from pipeline.models.settings import load_model_config
from pipeline.models.source import model_identity
from pipeline.runs.config import parse_config, read_config
from pipeline.runs.flow import plan_stages
from pipeline.runs.hardware import NO_GPUS, Choices, settled
from pipeline.runs.upstream import resolve_upstream
from pipeline.storage.node_copies import release, remove_unused
from pipeline.store.artifacts import ArtifactStore, open_artifact


@pytest.fixture
def write(tiny_bert, words_csv, tmp_path):
    """Write a configuration; return its path."""

    def written(name, model=str(tiny_bert), **changes):
        values = {
            "name": name,
            "storage": str(tmp_path / "runs"),
            "model": {"path": model},
            "task": {"type": "classification", "text": ["text"], "label": "label"},
            "data": {"source": "files", "train": str(words_csv)},
            "prune": {"sparsity": 0.5},
            **changes,
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return written


def export(path, tiny_bert, overrides=()):
    """Put a model into the store as the run of a file would."""
    config = settled(
        parse_config(resolve_upstream(read_config(str(path), overrides)[0])[0]), NO_GPUS
    )
    stage = plan_stages(config)[-2]
    assert stage.name == "export"
    attempt = ArtifactStore(config.storage).begin(stage.name, stage.key, {}, {})
    (attempt.folder / "model").mkdir()
    for file in tiny_bert.iterdir():
        (attempt.folder / "model" / file.name).write_bytes(file.read_bytes())
    (attempt.folder / "model" / "made_by.json").write_text(json.dumps([str(path), *overrides]))
    return attempt.commit({}, 0.0)


def resolved(path, *overrides):
    values, problems = resolve_upstream(read_config(str(path), overrides)[0])
    return values["model"]["path"], [str(problem) for problem in problems]


def test_it_is_the_exported_model_of_that_file(write, tiny_bert):
    upstream = write("up")
    second = write("down", model=f"run:{upstream}")
    _, (problem,) = resolved(second)
    assert problem.startswith(f"model.path: 'run:{upstream}' was not run yet")
    assert problem.endswith(f"`mgpp run {upstream}` first")
    artifact = export(upstream, tiny_bert)
    assert resolved(second) == (f"{artifact.url}/model", [])
    # Changed settings are another run, of which nothing is there.
    changed = f"run:{upstream} prune.sparsity=0.6"
    assert (
        f"`mgpp run {upstream} prune.sparsity=0.6` first"
        in resolved(second, f"model.path={changed}")[1][0]
    )
    other = export(upstream, tiny_bert, ["prune.sparsity=0.6"])
    assert other.key != artifact.key
    assert resolved(second, f"model.path={changed}") == (f"{other.url}/model", [])
    # The key of what follows goes by the content.
    keys = [
        plan_stages(
            settled(parse_config(resolve_upstream(read_config(str(second), c)[0])[0]), NO_GPUS)
        )[1].key
        for c in ([], [f"model.path={changed}"])
    ]
    assert keys[0] != keys[1]


def test_a_third_step_goes_on_from_the_second(write, tiny_bert):
    upstream = write("up")
    second = write("down", model=f"run:{upstream}")
    third = write("third", model=f"run:{second}")
    assert "up.yaml` first" in resolved(third)[1][0]
    export(upstream, tiny_bert)
    assert "down.yaml` first" in resolved(third)[1][0]
    artifact = export(second, tiny_bert)
    assert resolved(third) == (f"{artifact.url}/model", [])


def test_on_remote_storage_it_is_fetched_where_it_is_read(write, tiny_bert, bucket):
    upstream = write("up", storage=f"{bucket}/runs")
    second = write("down", model=f"run:{upstream}")
    artifact = export(upstream, tiny_bert)
    path, problems = resolved(second)
    assert (path, problems) == (f"artifact:{artifact.url}/model", [])
    config = parse_config(resolve_upstream(read_config(str(second))[0])[0])
    assert load_model_config(config.model).model_type == "bert"
    here = config.model.model_copy(update={"path": str(open_artifact(artifact.url).path / "model")})
    assert model_identity(config.model) == model_identity(here)


def test_a_damaged_choice_of_that_run_is_named(write, tiny_bert, tmp_path):
    upstream = write("up")
    second = write("down", model=f"run:{upstream}")
    export(upstream, tiny_bert)
    choices = Choices(str(tmp_path / "runs"), lambda: NO_GPUS)
    choices.settle(parse_config(read_config(str(upstream))[0]))
    choices.record()
    (file,) = (tmp_path / "runs" / "auto").iterdir()
    assert resolved(second)[1] == []
    file.write_text("{}")
    (problem,) = resolved(second)[1]
    assert problem.startswith(f"model.path: 'run:{upstream}': {file} is damaged: ")


@pytest.mark.parametrize("is_remote", [False, True])
def test_one_that_is_not_what_was_committed_is_refused(write, tiny_bert, bucket, is_remote):
    upstream = write("up", **({"storage": f"{bucket}/wrong"} if is_remote else {}))
    second = write("down", model=f"run:{upstream}")
    artifact = export(upstream, tiny_bert)
    filesystem, root = fsspec.core.url_to_fs(f"{artifact.url}/model/config.json")
    filesystem.pipe_file(root, filesystem.cat_file(root).replace(b"32", b"64", 1))
    release()
    remove_unused()  # another machine has no copy
    values, problems = resolve_upstream(read_config(str(second))[0])
    if is_remote:  # it is read where it is loaded, by a machine that has no copy
        release()
        remove_unused()
        with pytest.raises(ConfigError) as raised:
            load_model_config(parse_config(values).model)
        problems = raised.value.problems
    said = str(*problems)
    assert said.startswith("model.path: ")
    assert f"{artifact.url}: model/config.json has another checksum" in said
    assert f"`mgpp store verify {artifact.url.rsplit('/', 2)[0]} --discard`" in said


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        ("run:", "'run:' names no file"),
        ("run:nowhere.yaml", "'run:nowhere.yaml': nowhere.yaml: no such file"),
        ("run:'", "No closing quotation"),
        ("run:SELF", "leads back to itself"),
        ("run:WRONG", "trian: unknown key"),
    ],
)
def test_what_is_wrong_with_a_reference_is_named(write, tmp_path, reference, problem):
    names = {"SELF": "down", "WRONG": "wrong"}
    for word, name in names.items():
        reference = reference.replace(word, str(tmp_path / f"{name}.yaml"))
    write("wrong", trian={})
    second = write("down", model=reference)
    path, problems = resolved(second)
    assert path == reference
    assert len(problems) == 1
    assert problems[0].startswith("model.path: ")
    assert problem in problems[0]
