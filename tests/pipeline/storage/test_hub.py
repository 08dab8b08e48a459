"""Which commit a revision stands for: the hub's answer or an error, whatever the hub's weather."""

import socket

import pytest

from pipeline.errors import ConfigError
from pipeline.storage import hub as ours
from pipeline.storage.hub import hub_commit, is_commit
from tests.hub_server import DROP, hub_server, online

KINDS = [("model", "models"), ("dataset", "datasets")]
NAME = "some/thing"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with a model and a dataset of one name."""
    with hub_server() as hub:
        online(hub, tmp_path / "cache", monkeypatch)
        for _, folder in KINDS:
            (tmp_path / folder).mkdir()
            hub.add(folder, NAME, tmp_path / folder)
        yield hub


@pytest.fixture
def waits(monkeypatch):
    """The seconds that are waited, at once."""
    waited = []
    monkeypatch.setattr(ours.time, "sleep", waited.append)
    monkeypatch.setattr(ours, "_WAITS", (1.0, 2.0, 4.0, 8.0, 16.0, 32.0))
    return waited


def problem(kind, revision=None, section="model"):
    with pytest.raises(ConfigError) as caught:
        hub_commit(kind, NAME, revision, section=section)
    (found,) = caught.value.problems
    return found


@pytest.mark.parametrize(("kind", "folder"), KINDS)
def test_a_busy_hub_is_asked_again_until_it_answers(hub, waits, caplog, kind, folder):
    hub.answers = [429, 503, DROP, 500]
    (commit,) = hub.commits[folder, NAME]
    assert hub_commit(kind, NAME, None, section="model") == commit
    assert len(hub.asked) == 5
    assert waits == [1.0, 2.0, 4.0, 8.0]
    said = [record.getMessage() for record in caplog.records if record.name == ours.__name__]
    assert [text.partition(f"commit of '{NAME}': ")[2] for text in said] == [
        "429 Too Many Requests; asking again in 1 s (1 of 6)",
        "503 Service Unavailable; asking again in 2 s (2 of 6)",
        said[2].partition(f"commit of '{NAME}': ")[2],
        "500 Internal Server Error; asking again in 8 s (4 of 6)",
    ]
    assert "no answer (RemoteProtocolError" in said[2]
    # Once a process: the hub may be as busy as it likes now.
    hub.answers = [503] * 20
    assert hub_commit(kind, NAME, None, section="model") == commit
    assert len(hub.asked) == 5


@pytest.mark.parametrize(("kind", "folder"), KINDS)
@pytest.mark.parametrize(
    ("answer", "came"),
    [(429, "429 Too Many Requests"), (503, "503 Service Unavailable"), (DROP, "no answer (Remote")],
)
def test_a_hub_that_stays_busy_is_an_error_and_no_revision(hub, waits, kind, folder, answer, came):
    hub.answers = [answer] * 7
    found = problem(kind, "main", section="data")
    assert found.key == "data.path"
    assert found.why.startswith(
        f"the hub at {hub.url} was asked for the commit of '{NAME}' at 'main'"
    )
    assert came in found.why
    assert found.why.endswith("gave up at try 7 of 7, after 63 s")
    assert "try again later, pin data.revision to a commit" in found.hint
    # An error is not kept.
    assert is_commit(hub_commit(kind, NAME, "main", section="data"))


def test_a_hub_that_cannot_be_reached_is_an_error(monkeypatch, waits, tmp_path):
    with hub_server() as hub:
        online(hub, tmp_path, monkeypatch)
    monkeypatch.setattr(ours, "_WAITS", (1.0, 2.0))
    assert "no answer (ConnectError" in problem("model").why
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, says nothing
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        monkeypatch.setattr(ours, "_TIMEOUT", 0.1)
        assert "no answer (ReadTimeout" in problem("model").why


@pytest.mark.parametrize(
    ("headers", "waited"),
    [
        ({"Retry-After": "7"}, 7.0),
        (
            {"RateLimit": '"api";r=0;t=55', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'},
            56.0,
        ),
        ({"RateLimit": '"api";r=3;t=55'}, 1.0),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 1.0),
    ],
)
def test_the_hub_says_how_long_to_wait(hub, waits, headers, waited):
    hub.answers = [(429, headers)]
    assert is_commit(hub_commit("model", NAME, None, section="model"))
    assert waits == [waited]


def test_nobody_waits_for_longer_than_five_minutes(hub, waits):
    hub.answers = [(429, {"Retry-After": "200"})] * 7
    assert "gave up at try 2 of 7, after 200 s" in problem("model").why


@pytest.mark.parametrize(("kind", "folder"), KINDS)
def test_what_the_hub_refuses_is_not_asked_again(hub, waits, kind, folder):
    found = problem(kind, "no-such-branch")
    assert (found.key, found.why) == (
        "model.revision",
        f"the hub at {hub.url} has no such revision of '{NAME}' (404)",
    )
    hub.answers = [403]
    assert problem(kind).why == f"the hub at {hub.url} gives no access to '{NAME}' (403)"
    hub.answers = [(401, {"X-Error-Code": "GatedRepo"})]
    found = problem(kind)
    assert "is gated" in found.why
    assert "HF_TOKEN" in found.hint
    del hub.commits[folder, NAME]
    found = problem(kind)
    assert found.why.startswith(f"the hub at {hub.url} has no '{NAME}', or shows it to nobody")
    assert "HF_TOKEN" in found.hint
    assert waits == []


def test_a_branch_is_asked_for_and_a_commit_is_not(hub):
    (commit,) = hub.commits["models", NAME]
    hub.branches["models", NAME, "refs/pr/1"] = commit
    assert hub_commit("model", NAME, "refs/pr/1", section="model") == commit
    assert hub.asked == [("models", NAME, "refs/pr/1")]
    assert hub_commit("model", NAME, "0" * 40, section="model") == "0" * 40
    assert hub_commit("model", "no/name/of/the/hub", None, section="model") is None
    assert len(hub.asked) == 1


def test_offline_a_revision_stays_as_it_is_given(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub_commit("model", NAME, None, section="model") is None
    assert hub_commit("dataset", NAME, "main", section="data") == "main"
    assert hub.asked == []
