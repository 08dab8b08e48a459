"""Manifests: what was written is read, and nothing that was changed since."""

import copy
import hashlib
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.store.artifacts import parse_manifest
from pipeline.store.manifest import DamagedManifestError, sealed

URL = "/runs/prune-0123abcd/_DONE.json"
DIGEST = hashlib.sha256(b"x").hexdigest()
VALUES = {
    "stage": "prune",
    "key": "0123abcd",
    "url": "a-1",
    "seconds": 1.5,
    "files": {"model/w": {"bytes": 1, "blocks": [DIGEST]}, "empty": {"bytes": 0, "blocks": []}},
    "metrics": {"accuracy": 0.5, "labels": {0: "no", 10: "yes", 2: "é"}, "nan": None},
    "params": {"lr": 1e-4, "steps": (1, 2)},
    "inputs": {"data": "ffff"},
}
# As mgpp 0.1 wrote it.
OLD = {
    **json.loads(json.dumps(VALUES)),
    "files": {"model/w": {"bytes": 1, "sha256": DIGEST}},
}


def raw(values):
    return json.dumps(values, indent=1).encode()


def reason(data):
    with pytest.raises(DamagedManifestError) as raised:
        parse_manifest(data, URL)
    assert str(raised.value).startswith(f"{URL} is damaged: ")
    return raised.value.reason


def test_what_was_written_is_read():
    found = parse_manifest(raw(sealed(VALUES)), URL)
    assert (found.stage, found.key, found.url) == ("prune", "0123abcd", "/runs/prune-0123abcd/a-1")
    assert found.metrics["labels"] == {"0": "no", "10": "yes", "2": "é"}
    assert found.files == VALUES["files"]
    # Computed by hand: the checksum is part of the format.
    rest = {n: v for n, v in sealed(VALUES).items() if n != "checksum"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    assert found.checksum == hashlib.sha256(text.encode()).hexdigest()


def test_an_earlier_version_s_manifest_is_read():
    found = parse_manifest(raw(OLD), URL)
    assert found.checksum is None
    assert found.files == OLD["files"]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no JSON"),
        (b'{"stage": "pru', "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "a JSON list"),
        (b"5", "a JSON int"),
        (b"null", "a JSON NoneType"),
        (b'{"foo": 1}', "stage: Field required"),
        (raw({**sealed(VALUES), "format": 3}), "a newer mgpp wrote it"),
        (raw({**OLD, "url": "../../etc"}), "no path below a folder"),
        (raw({**OLD, "url": "a/b"}), "more than a name"),
        (raw({**OLD, "files": {"/etc/passwd": OLD["files"]["model/w"]}}), "below a folder"),
        (raw({**OLD, "files": {"a": {"bytes": 1}}}), "not one of blocks and sha256"),
        (raw({**OLD, "seconds": float("nan")}), "not a finite number|greater than or equal"),
        (
            raw(sealed({**VALUES, "files": {"a": {"bytes": 1, "blocks": []}}})),
            "0 blocks do not make 1 bytes",
        ),
    ],
)
def test_what_is_no_manifest_is_named(data, why):
    assert re.search(why, reason(data))


def test_an_edited_metric_is_seen():
    values = sealed(VALUES)
    values["metrics"]["accuracy"] = 0.99
    assert "changed after it was written" in reason(raw(values))


def places(value, path=()):
    """Every place in a JSON value, outer ones first."""
    yield path
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value if isinstance(value, list) else [])
    )
    for key, part in inner:
        yield from places(part, (*path, key))


@settings(max_examples=300)
@given(data=st.data())
def test_no_change_of_one_place_is_taken_for_what_was_written(data):
    values = sealed(VALUES)
    *above, last = data.draw(st.sampled_from([p for p in places(values) if p]))
    changed = copy.deepcopy(values)
    holder = changed
    for key in above:
        holder = holder[key]
    if data.draw(st.booleans(), "drop"):
        del holder[last]
    else:
        other = (
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats()
            | st.text()
            | st.just([])
            | st.just({})
        )
        holder[last] = data.draw(other)
    if raw(changed) != raw(values):
        reason(raw(changed))


@settings(max_examples=100)
@given(data=st.data())
def test_no_cut_or_changed_byte_is_taken_for_what_was_written(data):
    whole = raw(sealed(VALUES))
    place = data.draw(st.integers(0, len(whole) - 1))
    reason(whole[:place])
    changed = bytearray(whole)
    changed[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        same = json.loads(bytes(changed)) == json.loads(whole)  # white space
    except ValueError:
        same = False
    if not same:
        reason(bytes(changed))
