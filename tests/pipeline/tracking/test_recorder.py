"""Records of a run: what is written is what is read, also after the run was taken up again."""

import json
import math
import sys

import pytest
import torch

from pipeline.tracking.recorder import METRICS_FILE, Recorder, parse_records, read_records


def record_all(folder, records, history=""):
    """Write the records; return what people were shown."""
    shown = []
    recorder = Recorder(folder, shown.append, history)
    for event, step, values in records:
        recorder.write(event, step, values)
    recorder.close()
    return shown


def test_records_are_read_back_by_event(tmp_path):
    record_all(
        tmp_path,
        [
            ("step", 0, {"loss": 0.5, "phase": "warm-up"}),
            ("prune", 0, {"threshold": 1e-3}),
            ("step", 10, {"loss": 0.25, "phase": "gradual"}),
            ("layers", 10, {"sparsity": {"a.0.weight": 0.1}}),
        ],
    )
    assert read_records(tmp_path / METRICS_FILE) == {
        "step": [
            {"step": 0, "loss": 0.5, "phase": "warm-up"},
            {"step": 10, "loss": 0.25, "phase": "gradual"},
        ],
        "prune": [{"step": 0, "threshold": 1e-3}],
        "layers": [{"step": 10, "sparsity": {"a.0.weight": 0.1}}],
    }


def test_a_record_is_on_disk_before_the_run_ends(tmp_path):
    recorder = Recorder(tmp_path, lambda record: None)
    recorder.write("step", 3, {"loss": 0.5})
    assert json.loads(recorder.path.read_text()) == {"event": "step", "step": 3, "loss": 0.5}
    recorder.close()


def test_what_is_not_a_number_is_null(tmp_path):
    values = {"loss": math.nan, "grad_norm": math.inf, "threshold": None}
    shown = record_all(tmp_path, [("step", 0, values)])
    assert shown == [{"event": "step", "step": 0, **dict.fromkeys(values)}]
    written = (tmp_path / METRICS_FILE).read_text()
    assert written == (
        '{"event": "step", "step": 0, "loss": null, "grad_norm": null, "threshold": null}\n'
    )


def test_tensors_are_written_as_numbers(tmp_path):
    values = {"loss": torch.tensor(0.5), "grad_norm": torch.tensor(math.nan)}
    record_all(tmp_path, [("step", 0, values)])
    assert read_records(tmp_path / METRICS_FILE) == {
        "step": [{"step": 0, "loss": 0.5, "grad_norm": None}]
    }


def test_people_are_shown_steps_only(tmp_path):
    shown = record_all(tmp_path, [("step", 0, {"loss": 0.5}), ("prune", 0, {"threshold": 0.1})])
    assert shown == [{"event": "step", "step": 0, "loss": 0.5}]


def test_a_resumed_run_writes_its_history_again(tmp_path):
    whole = [("step", step, {"loss": 1 / (step + 1)}) for step in range(6)]
    whole.insert(3, ("prune", 2, {"threshold": math.nan}))
    record_all(tmp_path / "whole", whole)
    record_all(tmp_path / "first", whole[:4])
    history = (tmp_path / "first" / METRICS_FILE).read_text()
    record_all(tmp_path / "second", whole[4:], history)
    uninterrupted = (tmp_path / "whole" / METRICS_FILE).read_text()
    assert (tmp_path / "second" / METRICS_FILE).read_text() == uninterrupted


def test_history_in_the_same_folder_is_not_doubled(tmp_path):
    records = [("step", 0, {"loss": 0.5})]
    record_all(tmp_path, records)
    history = (tmp_path / METRICS_FILE).read_text()
    record_all(tmp_path, [("step", 1, {"loss": 0.25})], history)
    assert read_records(tmp_path / METRICS_FILE)["step"] == [
        {"step": 0, "loss": 0.5},
        {"step": 1, "loss": 0.25},
    ]


def test_each_step_is_read_once_and_in_order(tmp_path):
    path = tmp_path / METRICS_FILE
    lines = [("step", 0, 1.0), ("step", 10, 2.0), ("prune", 10, 2.5), ("step", 20, 3.0)]
    lines += [("step", 10, 4.0), ("prune", 10, 4.5)]  # a later attempt repeats these
    path.write_text(
        "".join(json.dumps({"event": e, "step": s, "loss": v}) + "\n" for e, s, v in lines)
    )
    assert read_records(path) == {
        "step": [{"step": 0, "loss": 1.0}, {"step": 10, "loss": 4.0}, {"step": 20, "loss": 3.0}],
        "prune": [{"step": 10, "loss": 4.5}],
    }


def test_the_sparsity_of_masks_is_read_by_its_name_of_before_too():
    lines = [
        {"event": "step", "step": 0, "sparsity": 0.5},
        {"event": "step", "step": 1, "mask_sparsity": 0.6},
        {"event": "prune", "step": 1, "sparsity": 0.6},
    ]
    assert parse_records("\n".join(map(json.dumps, lines))) == {
        "step": [{"step": 0, "mask_sparsity": 0.5}, {"step": 1, "mask_sparsity": 0.6}],
        "prune": [{"step": 1, "sparsity": 0.6}],
    }


def test_an_empty_file_holds_no_records(tmp_path):
    record_all(tmp_path, [])
    assert read_records(tmp_path / METRICS_FILE) == {}


def test_tensorboard_gets_the_finite_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = {"loss": 0.5, "norm": math.nan, "phase": "gradual", "num": 3, "threshold": None}
    record_all(tmp_path, [("step", 7, values), ("layers", 7, {"sparsity": {"a": 0.5}})])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    assert found == {"step/loss": [(7, 0.5)], "step/num": [(7, 3.0)]}


def test_missing_records_are_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_records(tmp_path / METRICS_FILE)


def test_without_tensorboard_records_are_kept_and_a_note_says_so(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    shown = []
    recorder = Recorder(tmp_path, shown.append)
    recorder.write("step", 0, {"loss": 1.5})
    recorder.close()
    assert [record["event"] for record in shown] == ["note", "step"]
    assert "tensorboard is not installed" in shown[0]["text"]
    assert read_records(recorder.path)["step"][0]["loss"] == 1.5
    assert not (tmp_path / "tensorboard").exists()
