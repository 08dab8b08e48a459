"""README and docs: their examples run, their commands parse, their files, links and errors exist."""

import ast
import importlib
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml

import mgpp
from launch.cli.main import app
from mgpp import PruningSchedule
from mgpp.backends.torch import attach
from pipeline.campaigns.config import CampaignConfig
from pipeline.runs.config import parse_config, parse_sections, read_config
from tests.processes import ROOT
from tests.sources import strings_of, tracked
from tests.test_layers import FLOORS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
every_page = pytest.mark.parametrize("page", PAGES, ids=IDS)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """Return a page's code blocks of a language; "" for those that name none."""
    found = re.findall(r"^```(\S*)\n(.*?)^```$", text_of(page), re.DOTALL | re.MULTILINE)
    return [code for name, code in found if name == language]


def test_the_readme_s_loop_is_the_first_of_the_page_on_loops():
    first, *_ = blocks(ROOT / "docs" / "own-loop.md", "python")
    assert blocks(ROOT / "README.md", "python") == [first]


def test_the_example_of_a_method_prunes_by_its_score():
    (code,) = (c for c in blocks(ROOT / "docs" / "methods.md", "python") if "RootMean" in c)
    module: dict[str, Any] = {"__name__": "example"}
    exec(code, module)
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(40, generator=generator))
    before, mean_square = weight.detach().clone(), torch.zeros(40)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    schedule = PruningSchedule(
        num_steps=4, warmup_steps=2, finetune_steps=0, interval=1, final_sparsity=0.6
    )
    method = module["RootMeanSquare"](decay=0.5)
    pruner = attach(optimizer, {"w": weight}, method=method, schedule=schedule)
    for _ in range(4):
        weight.grad = torch.randn(40, generator=generator)
        mean_square = 0.5 * mean_square + 0.5 * weight.grad**2
        optimizer.step()
    expected = (before.abs() * mean_square.sqrt()).argsort()[:24]
    assert pruner.last_pruning.num_pruned == 24
    assert set((weight == 0).nonzero().squeeze(1).tolist()) == set(expected.tolist())
    with pytest.raises(ValueError, match="decay must be less than 1"):
        module["RootMeanSquare"](decay=1.0)


@every_page
def test_python_names_what_there_is(page):
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
            elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "mgpp":
                assert hasattr(mgpp, node.attr), f"mgpp has no {node.attr}"


def commands(page: Path) -> list[list[str]]:
    """Return the commands of a page's code blocks, as a shell splits them."""
    lines = [line for code in blocks(page, "") for line in code.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@every_page
def test_commands_are_those_of_the_command_line(page):
    for words in commands(page):
        if "mgpp" not in words:
            continue
        given = words[words.index("mgpp") + 1 :]
        values = parse(given[: given.index(">")] if ">" in given else given)
        if str(values.get("config", "")).startswith("configs/"):
            check_values(values["config"], values.get("overrides") or [])


def parse(given: list[str]) -> dict[str, Any]:
    """Return what the command line understands of a command, without running it.

    Raises:
        an exception of the parser, for a command or option that there is not.
    """
    command, name, rest = typer.main.get_command(app), "mgpp", given
    while hasattr(command, "commands"):
        name, command, rest = command.resolve_command(typer.Context(command), rest)
    values: dict[str, Any] = command.make_context(name, list(rest)).params
    return values


def test_a_command_that_there_is_not_is_found():
    with pytest.raises(Exception, match="No such command"):
        parse(["prune", "configs/demo.yaml"])
    with pytest.raises(Exception, match="No such option"):
        parse(["run", "configs/demo.yaml", "--sparsity", "0.9"])
    with pytest.raises(AssertionError, match="unknown key"):
        check_values("configs/demo.yaml", ["prune.sparsty=0.9"])


def check_values(config: str, overrides: list[str]) -> None:
    values, problems = read_config(str(ROOT / config), overrides)
    assert problems == []
    if "methods" in values:
        CampaignConfig.model_validate(values)
    else:
        _, problems = parse_sections(values)
        assert problems == []


@every_page
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"(?:^|`)make ([a-z-]+)", text_of(page), re.MULTILINE)
    assert set(named) <= targets


@every_page
def test_yaml_is_valid(page):
    base = yaml.safe_load(
        next(c for c in blocks(ROOT / "docs" / "recipes.md", "yaml") if "name: bert-sst2" in c)
    )
    for code in blocks(page, "yaml"):
        values = yaml.safe_load(code)
        values.pop("extends", None)
        if "name" in values and "methods" in values:
            CampaignConfig.model_validate(values)
        else:
            sections = {**base, "prune": {**base["prune"], **values.pop("prune", {})}, **values}
            if sections["prune"]["method"]["name"] in ("wanda", "sparsegpt", "sparse-transfer"):
                sections["prune"] = yaml.safe_load(code)["prune"]  # takes no schedule
            parse_config(sections, allow_code=True)


@every_page
def test_links_and_paths_lead_somewhere(page):
    text = text_of(page)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in link and not link.startswith("#"):
            assert (page.parent / link.partition("#")[0]).exists(), link
    files = tracked()
    folders = {str(parent) for file in files for parent in Path(file).parents}
    for path in re.findall(
        r"`((?:configs|docs|mgpp|pipeline|launch|tests|examples)/[\w./-]*)`", text
    ):
        assert path.rstrip("/") in files | folders, path


def test_the_readme_is_two_screens():
    assert len(text_of(ROOT / "README.md").splitlines()) <= 130


def test_the_readme_s_table_and_picture_are_those_of_the_benchmarks():
    benchmarks = text_of(ROOT / "docs" / "benchmarks.md")
    rows = [line for line in text_of(ROOT / "README.md").splitlines() if "±" in line]
    assert rows
    assert [line for line in benchmarks.splitlines() if "±" in line] == rows
    drawing = runpy.run_path(str(ROOT / "docs" / "images" / "accuracy.py"))
    picture = (ROOT / "docs" / "images" / "accuracy.svg").read_text(encoding="utf-8")
    found = drawing["table"](benchmarks)
    assert set(found) == {"dense", "GMP", "PLATON", "movement", "MGPP", "MGPP-saliency"}
    for name, values in found.items():
        if name != "movement":
            assert all(f"{mean:.2f}" in picture for mean, _ in values), name


def test_errors_are_those_of_the_code():
    """Each heading of the troubleshooting page that quotes an error quotes one there is."""
    spoken = " ".join(
        text
        for package in ("mgpp", "pipeline", "launch")
        for path in (ROOT / package).rglob("*.py")
        for text in strings_of(path)
    )
    headings = re.findall(
        r"^### `([^`]+)`$", text_of(ROOT / "docs" / "troubleshooting.md"), re.MULTILINE
    )
    assert len(headings) > 20
    for heading in headings:
        assert heading in spoken, heading


def test_the_page_of_the_architecture_shows_the_floors_of_the_imports():
    shown = blocks(ROOT / "docs" / "architecture.md", "text")[1]
    floors = [floor for floor in FLOORS if floor.startswith("pipeline.")]
    assert [line.split() for line in shown.splitlines()] == [
        [name.removeprefix("pipeline.") for name in floor.split()] for floor in floors
    ]


def test_generated_pages_name_every_setting_and_command():
    from pipeline.runs.config import json_schema

    reference = runpy.run_path(str(ROOT / "docs" / "_ext" / "reference.py"))
    configuration = reference["configuration"]()
    for kind in json_schema()["$defs"].values():
        for key, value in kind["properties"].items():
            assert "const" in value or f"| `{key}` |" in configuration, key
    pages = reference["commands"]()
    for name in ("run", "validate", "campaign status", "cluster render", "store gc", "submit"):
        assert re.search(rf"^##+ mgpp {name}$", pages, re.MULTILINE), name
    named = re.findall(r":: mgpp\.(\w+)", reference["api"]())
    plain = {"METHODS", "ONE_SHOT", "__version__"}
    assert set(named) == set(mgpp.__all__) - plain
