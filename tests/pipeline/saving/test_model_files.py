"""The trained model written by all workers holds the bits that `save_pretrained` writes of the whole."""

import json

import fsspec
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from pipeline.context import Context
from pipeline.models.loading import load_tokenizer
from pipeline.models.source import ModelConfig
from pipeline.models.weights import WEIGHTS_FILE, fingerprints, positive_zeros
from pipeline.saving.model_files import write_model
from pipeline.storage.checksums import describe
from pipeline.store.checkpoints import CheckpointStore
from pipeline.tasks import make_task
from pipeline.worker_group import WorkerGroup
from tests.cases import launch_cases
from tests.object_storage import s3_server
from tests.pipeline.architectures import ARCHITECTURES, config_of, write_inputs
from tests.pipeline.saving.models import JOINED, joined_config
from tests.pipeline.saving.saving_worker import CASES, FULL, GATHERED, HANGS, KILLED, S3, SECOND
from tests.processes import ranks_command, run

NOT_WEIGHTS = ("config.json", "generation_config.json")


def tensors_of(folder):
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def assert_same_files(folder, whole):
    """Compare two checkpoints: names, dtypes, bits, configuration."""
    ours, theirs = tensors_of(folder), tensors_of(whole)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert ours[name].shape == tensor.shape, name
        assert torch.equal(ours[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
    for name in NOT_WEIGHTS:
        assert (folder / name).exists() == (whole / name).exists()
        if (whole / name).exists():
            assert (folder / name).read_text() == (whole / name).read_text()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}


def auto_of(name):
    if name == JOINED:
        return transformers.AutoModelForMaskedLM
    return getattr(transformers, make_task(ARCHITECTURES[name].task).auto_model)


def assert_fingerprints_are_of_what_loads(folder, auto):
    found = json.loads((folder / WEIGHTS_FILE).read_text())
    model = auto.from_pretrained(folder / "model", dtype="auto")
    prunable = [name for name, entry in found.items() if "zeros" in entry]
    assert found == fingerprints(model.named_parameters(), prunable)
    assert list(found) == [name for name, _ in model.named_parameters()]


# One worker.


@pytest.mark.parametrize("name", [*ARCHITECTURES, JOINED])
def test_one_worker_writes_what_transformers_does(tmp_path, name):
    write_inputs(tmp_path)
    torch.manual_seed(0)
    config = joined_config() if name == JOINED else config_of(ARCHITECTURES[name])
    model = auto_of(name).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[::5] = -0.0
    workers = WorkerGroup.alone()
    context = Context(
        inputs={},
        model_kwargs={},
        output=tmp_path / "out",
        workers=workers,
        checkpoints=CheckpointStore(str(tmp_path / "checkpoints"), workers),
        progress=lambda record: None,
    )
    tokenizer = load_tokenizer(ModelConfig(path=str(tmp_path / "tokenizer")))
    matrices = [n for n, p in model.named_parameters() if p.dim() > 1]
    write_model(context, model, tokenizer=tokenizer, prunable=matrices, round_bytes=5000)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(positive_zeros(parameter))
    model.save_pretrained(tmp_path / "whole")
    assert [p.name for p in (tmp_path / "out/model").glob("*.safetensors")] == ["model.safetensors"]
    assert_same_files(tmp_path / "out" / "model", tmp_path / "whole")
    assert_fingerprints_are_of_what_loads(tmp_path / "out", auto_of(name))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "model").vocab_size


# Two workers.


def _params(item):
    return item.callspec.params if hasattr(item, "callspec") else {}


@pytest.fixture(scope="module")
def written(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saving")
    write_inputs(folder)
    asked = {
        item.callspec.params["case"]
        for item in request.session.items
        if item.path == request.path and "case" in _params(item)
    }
    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as bucket:
        patch.setenv("TEST_BUCKET", bucket)
        launched = launch_cases(
            "tests.pipeline.saving.saving_worker",
            str(folder),
            cases=[case for case in (*CASES, GATHERED, FULL, S3) if case in asked],
            folder=folder,
            num_processes=2,
            timeout=300,
            max_failures=20,
        )
        stored = fsspec.filesystem("s3").find(f"{bucket}/attempt")
        for path in stored:
            local = folder / S3 / "stored" / path.partition("/attempt/")[2]
            local.parent.mkdir(parents=True, exist_ok=True)
            fsspec.filesystem("s3").get_file(path, str(local))
    return launched


distributed = pytest.mark.distributed


@distributed
@pytest.mark.timeout(400)
@pytest.mark.parametrize("case", [*CASES, GATHERED])
def test_two_workers_write_what_transformers_does(written, case):
    folder = written.folder(case) / case
    assert_same_files(folder / "model", folder / "whole")
    index = json.loads((folder / "model" / "model.safetensors.index.json").read_text())
    names = ["model-00001-of-00002.safetensors", SECOND]
    assert sorted(set(index["weight_map"].values())) == names
    for name in names:
        held = load_file(folder / "model" / name)
        assert set(held) == {n for n, file in index["weight_map"].items() if file == name}
    sizes = [sum(t.nbytes for t in load_file(folder / "model" / n).values()) for n in names]
    assert index["metadata"]["total_size"] == sum(sizes)
    largest = max(t.nbytes for n in names for t in load_file(folder / "model" / n).values())
    assert abs(sizes[0] - sizes[1]) <= 8 * largest  # experts go together
    name = "llama-tied" if case == GATHERED else case.rpartition("-stage")[0]
    assert_fingerprints_are_of_what_loads(folder, auto_of(name))


@distributed
@pytest.mark.parametrize("case", [FULL])
def test_a_full_disk_of_one_worker_is_the_same_error_on_all(written, case):
    folder = written.folder(case) / case
    said = {(folder / f"said-{rank}").read_text() for rank in range(2)}
    assert len(said) == 1
    assert said.pop().startswith("worker 1 could not ")
    assert not (folder / "weights.json").exists()
    assert not (folder / "model" / "model.safetensors.index.json").exists()


@distributed
@pytest.mark.parametrize("case", [S3])
def test_files_go_straight_to_storage_with_their_checksums(written, case):
    folder = written.folder(case) / case
    ours = tensors_of(folder / "stored" / "model")
    whole = tensors_of(folder / "whole")
    assert ours.keys() == whole.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in whole.items())
    assert not list(folder.glob("rank-*/**/*.safetensors"))  # no copy here
    of_ranks = json.loads((folder / "written.json").read_text())
    assert [list(entries) for entries in of_ranks] == [
        ["model/model-00001-of-00002.safetensors"],
        [f"model/{SECOND}"],
    ]
    for entries in of_ranks:
        for name, entry in entries.items():
            assert entry == describe(folder / "stored" / name)


def alone(case, folder):
    write_inputs(folder)
    return launch_cases(
        "tests.pipeline.saving.saving_worker",
        str(folder),
        cases=[case],
        folder=folder,
        num_processes=2,
        timeout=100,
    )


@distributed
@pytest.mark.timeout(150)
def test_who_waits_for_hung_storage_shows_life_and_gives_up_in_time(tmp_path):
    alone(HANGS, tmp_path)
    waiting = json.loads((tmp_path / HANGS / "said-0").read_text())
    assert waiting["said"].startswith("TimeoutError: a worker did not begin its file of the model")
    assert "within cluster.timeout_seconds (2 s)" in waiting["said"]
    assert 2 <= waiting["waited"] < 20
    assert len(waiting["records"]) > 3
    assert {record["event"] for record in waiting["records"]} == {"write"}


@distributed
@pytest.mark.timeout(150)
def test_a_worker_killed_in_a_round_ends_the_others(tmp_path):
    alone(KILLED, tmp_path)
    folder = tmp_path / KILLED
    # Of a lost worker: worth a restart.
    assert (folder / "said-0").read_text() in ("RuntimeError", "DistBackendError")
    assert (folder / "model" / SECOND).stat().st_size > 0
    assert not (folder / "weights.json").exists()


@distributed
@pytest.mark.timeout(200)
def test_no_worker_holds_much_more_than_its_own_state(tmp_path):
    write_inputs(tmp_path)
    command = ranks_command("tests.pipeline.saving.memory_worker", str(tmp_path), num_processes=2)
    done = run(
        command, timeout=150, env={"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(2):
        found = json.loads((tmp_path / f"found-{rank}.json").read_text())
        assert found["size"] > 180e6
        # Of a round of 4 MiB: what is sent, received, and the values in hand.
        assert found["rise"] < 0.1 * found["size"]
    sizes = [path.stat().st_size for path in (tmp_path / "large/model").glob("*.safetensors")]
    assert sum(sizes) > found["size"]
    assert max(sizes) < 0.55 * found["size"]
