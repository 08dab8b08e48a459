"""The benchmark of the data stage, on a corpus that takes a moment."""

import json

import pytest

from tests.bench.corpora import main

pytestmark = [pytest.mark.distributed, pytest.mark.torture, pytest.mark.timeout(600)]


def test_it_kills_resumes_and_measures(tmp_path):
    main(str(tmp_path / "figures.json"), 20)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["corpus_same_files"] == 1
    assert figures["corpus_mb_per_minute"] > 0
    assert figures["corpus_memory_mib"] > 0
    assert figures["corpus"]["tokens"]["train"] > 1_000_000
