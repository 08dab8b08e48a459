"""`mgpp bench`: what it prints, the page it writes, what it refuses."""

import json
import sys

import pytest
import torch
from transformers import BertForSequenceClassification
from typer.testing import CliRunner

from launch.cli.bench import bench
from launch.cli.main import app
from pipeline.benchmarks.memory import peak_memory
from pipeline.benchmarks.variants import VARIANTS
from tests import tiny
from tests.html_page import Page


@pytest.fixture
def folder(tmp_path):
    model = tiny.model(BertForSequenceClassification, max_position_embeddings=32)
    model.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def invoke(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], catch_exceptions=False)


QUICK = ("--batch", "1,2", "--length", "4", "--rounds", "2", "--no-memory")


def test_tables_a_page_and_words(folder):
    page = folder.parent / "out.html"
    done = invoke(folder, *QUICK, "--figure", page)
    assert done.exit_code == 0, done.stderr
    for text in ("1 x 4", "2 x 4", "dense bf16", "int8 dynamic", f"figure  {page}"):
        assert text in done.stdout
    assert "Fastest (batch x length): " in done.stdout
    shown = Page(page.read_text(encoding="utf-8"))
    (figure,) = shown.figures
    assert [trace["name"] for trace in figure["data"]] == [
        "dense fp32",
        "dense bf16",
        "int8 dynamic",
    ]
    assert figure["data"][0]["x"] == [1, 1]
    assert "sparse fp32 is not measured: all layers stay dense: 0% zeros." in shown.text


@pytest.mark.distributed  # it starts a process for the memory
@pytest.mark.slow
def test_memory_is_that_of_a_process_that_loads_and_runs_it(tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 4}
    model = tiny.model(BertForSequenceClassification, **sizes)
    model.save_pretrained(tmp_path / "m")
    held = sum(p.nbytes for p in model.parameters())
    ballast = torch.ones(held // 2)  # of this process, which must not count: twice the model
    size = {"batch": 1, "length": 4}
    found = peak_memory(tmp_path / "m", "fp32", **size, tokens=[4], threads=1)
    assert found["idle"] <= found["load"]
    grown = max(found["load"], found["run"]) - found["idle"]
    assert 0.8 * held <= grown <= 2 * held < ballast.nbytes + (1 << 20)


@pytest.mark.distributed
def test_a_process_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(RuntimeError, match="exit status 1"):
        peak_memory(tmp_path, "fp32", batch=1, length=4, tokens=[4], threads=1)


def test_the_variants_of_the_option_are_those_there_are():
    assert bench.__defaults__[2] == ",".join(VARIANTS)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("nowhere", "MODEL: here is neither a checkpoint (config.json) nor a finished"),
        ("plain --batch 0", "--batch: got '0'; allowed are whole numbers from 1 to 1,048,576"),
        ("plain --batch 1,x", "--batch: got '1,x'; allowed are whole numbers"),
        ("plain --length -4", "--length: got '-4'; allowed are whole numbers"),
        ("plain --length 33", "--length: got 33; allowed are 1 to 32, the model's positions"),
        ("plain --variants fp8", "--variants: got 'fp8'; allowed are fp32, bf16, int8, sparse"),
        ("plain --threads 0", "--threads: got 0; allowed are whole numbers from 1"),
        ("plain --rounds 0", "--rounds: got 0; allowed are whole numbers from 1"),
        ("plain --new-tokens -1", "--new-tokens: got -1; allowed are whole numbers from 0"),
        ("plain --figure no/x.html", "--figure: got 'no/x.html'; allowed are a file in a folder"),
        ("mine", "MODEL: mine: config.json names no model class of transformers"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(folder, monkeypatch, arguments, line):
    monkeypatch.chdir(folder.parent)
    mine = json.loads((folder / "config.json").read_text()) | {"architectures": ["Mine"]}
    (folder.parent / "mine").mkdir()
    (folder.parent / "mine" / "config.json").write_text(json.dumps(mine))
    done = invoke(*arguments.split(), "--no-memory")
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {line}"), done.stderr
    assert done.stderr.count("\n") == 1
