"""The command line and a busy hub: what is said while it waits, and how it gives up."""

import json
import shutil

import pytest
import yaml

from tests.hub_server import DROP, hub_server
from tests.processes import MGPP, run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


def test_a_busy_hub_is_waited_for_and_reported(tiny_bert, words_csv, tmp_path):
    shutil.copytree(tiny_bert, tmp_path / "model")
    (tmp_path / "days").mkdir()
    shutil.copy(words_csv, tmp_path / "days" / "train.csv")
    values = {
        "name": "weather",
        "storage": str(tmp_path / "runs"),
        "model": {"path": "org/model"},
        "task": {"type": "classification", "text": ["text"], "label": "label", "max_length": 16},
        "data": {"source": "hub", "path": "org/days", "validation_split": None},
        "train": {"length": 10, "batch_size": 8, "micro_batch_size": 8},
        "prune": {"sparsity": 0.5, "start_after": 2, "finetune": 2, "interval": 2},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    with hub_server() as hub:
        hub.add("models", "org/model", tmp_path / "model")
        hub.add("datasets", "org/days", tmp_path / "days")

        def validate():
            return run(
                [MGPP, "validate", str(tmp_path / "run.yaml"), "--json"],
                timeout=120,
                env={
                    "HF_ENDPOINT": hub.url,
                    "HF_HOME": str(tmp_path / "home"),
                    "HF_HUB_OFFLINE": "0",
                    "HF_HUB_DISABLE_TELEMETRY": "1",
                    "NO_PROXY": "127.0.0.1",
                },
            )

        quiet = validate()
        assert quiet.returncode == 0, quiet.stderr[-4000:]
        hub.answers = [429, DROP]
        busy = validate()
        assert busy.returncode == 0, busy.stderr[-4000:]
        assert json.loads(busy.stdout) == json.loads(quiet.stdout)
        assert "429 Too Many Requests; asking again in 1 s (1 of 6)" in busy.stderr
        asked = f"the hub at {hub.url} was asked for the commit of 'org/model': "

        hub.answers = [(503, {"Retry-After": "600"})] * 9
        ended = validate()
    assert ended.returncode == 2, ended.stderr[-4000:]
    given_up = json.loads(ended.stdout)
    assert [problem["key"] for problem in given_up["problems"]] == ["model.path", "data.path"]
    assert (
        f"error: model.path: {asked}503 Service Unavailable; gave up at try 1 of 7" in ended.stderr
    )
