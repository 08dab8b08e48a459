"""Defaults and keys: a default leaves a key as it is, and none changes without a stage's new version."""

import copy

import pytest

from pipeline.runs.config import parse_config
from pipeline.runs.flow import plan_stages
from pipeline.runs.hardware import NO_GPUS, settled
from pipeline.training.config import TrainConfig
from tests.pipeline.runs.stage_defaults import complaints, recorded_and_current


@pytest.fixture
def config(tiny_bert, words_csv):
    return parse_config(
        {
            "name": "keys",
            "model": {"path": str(tiny_bert)},
            "task": {"type": "classification", "text": ["text"], "label": "label"},
            "data": {"source": "files", "train": str(words_csv)},
            "train": {"length": 10},
            "prune": {"sparsity": 0.5},
            "distill": {},
        }
    )


def keys(config):
    return {stage.name: stage.key for stage in plan_stages(settled(config, NO_GPUS))}


def changed(before, after):
    return {name for name in before if before[name] != after[name]}


def test_a_changed_default_comes_with_a_new_version_and_every_default_is_recorded():
    assert complaints(*recorded_and_current()) == []


def test_what_is_said_of_a_changed_default():
    recorded, _ = recorded_and_current()
    current = copy.deepcopy(recorded)
    current["PruneStage"]["defaults"]["prune.interval"] = 20
    (complaint,) = complaints(recorded, current)
    assert complaint.startswith(
        "PruneStage: prune.interval was 10, is 20: raise the stage's version"
    )
    current["PruneStage"]["version"] += 1
    (complaint,) = complaints(recorded, current)
    assert "raise" not in complaint  # only to be recorded


def test_defaults_that_are_written_out_leave_keys_as_they_are(config):
    assert keys(parse_config(config.model_dump(mode="json"))) == keys(config)


def test_a_new_setting_at_its_default_leaves_keys_as_they_are(config):
    class MoreTrain(TrainConfig):
        by_length: bool = False

    class MorePrune(type(config.prune)):
        strength: float = 0.5

    class MoreDistill(type(config.distill)):
        layers: list[int] = [1, 2]

    def grown(train=(), prune=(), distill=()):
        return config.model_copy(
            update={
                "train": MoreTrain(**config.train.model_dump() | dict(train)),
                "prune": MorePrune(**config.prune.model_dump() | dict(prune)),
                "distill": MoreDistill(**config.distill.model_dump() | dict(distill)),
            }
        )

    before = keys(config)
    assert keys(grown()) == before
    after_prune = {"prune", "evaluate", "export", "report"}
    assert changed(before, keys(grown(train={"by_length": True}))) == {"dense", *after_prune}
    assert changed(before, keys(grown(prune={"strength": 0.6}))) == after_prune
    assert changed(before, keys(grown(distill={"layers": [1]}))) == after_prune


def test_a_kind_of_section_counts_although_all_its_settings_are_defaults(config):
    values = config.model_dump(mode="json")
    before = keys(config)
    other = values | {"prune": {"sparsity": 0.5, "method": {"name": "gmp"}}}
    assert "prune" in changed(before, keys(parse_config(other)))
    regression = values | {"task": {"type": "regression", "text": ["text"], "label": "label"}}
    assert "data" in changed(before, keys(parse_config(regression)))
    assert "prune" in changed(before, keys(config.model_copy(update={"distill": None})))


@pytest.mark.parametrize(
    "extra",
    [
        {"communication_data_type": "fp16"},
        {"prescale_gradients": True},
        {"zero_optimization": {"zero_quantized_gradients": True}},
        {"fp16": {"initial_scale_power": 8}},
        {"no_such_key_yet": 1},  # of a newer DeepSpeed
    ],
)
def test_what_deepspeed_computes_otherwise_is_in_the_keys(config, extra):
    values = config.model_dump(mode="json")
    after = keys(parse_config(values | {"zero": {"extra": extra}}))
    trained = {"dense", "prune", "evaluate", "export", "report"}
    assert changed(keys(config), after) == trained


def test_what_deepspeed_only_places_or_logs_is_in_no_key(config):
    values = config.model_dump(mode="json")
    extra = {
        "steps_per_print": 5,
        "wall_clock_breakdown": True,
        "zero_optimization": {"reduce_bucket_size": 7, "stage3_param_persistence_threshold": 0},
    }
    assert keys(parse_config(values | {"zero": {"extra": extra}})) == keys(config)


def test_params_are_recorded_with_their_defaults(config):
    params = {stage.name: stage.params for stage in plan_stages(settled(config, NO_GPUS))}
    assert params["prune"]["prune"]["scope"] == "global"
    assert params["prune"]["train"]["lr"] == config.train.lr
    assert "log_every" not in params["prune"]["train"]
    assert len(params["data"]["data"]["train"][0][1]) == 64  # a checksum, not a path
