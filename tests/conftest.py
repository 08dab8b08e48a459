"""For all tests: a tiny BERT, storage as users have it, and ranks only where a test is marked."""

import csv
import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Two files are tested at a time: threads that wait for each other on cores that are taken spin.
os.environ["OMP_NUM_THREADS"] = "1"
if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = (
        "1"  # before anything imports Triton: it then runs without a GPU
    )
# Ray runs its workers at nice 15: beside a busy test on two cores they get next to nothing.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112

from pathlib import Path

import hypothesis
import pytest

from tests.object_storage import s3_server
from tests.processes import forbid_ranks
from tests.tiny import BAD, GOOD

hypothesis.settings.register_profile("any machine", deadline=None)  # a busy one pauses anything
hypothesis.settings.load_profile("any machine")


def pytest_collection_modifyitems(config, items):
    """Deselect what needs a device where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not has_gpu():
        items[:] = [item for item in items if item not in marked]
        config.hook.pytest_deselected(items=marked)


def has_gpu():
    """Return whether torch sees a CUDA device; torch is not imported where there is no driver."""
    if shutil.which("nvidia-smi") is None:
        return False
    import torch

    return torch.cuda.is_available()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Run a test, its fixtures and their ends."""
    with pytest.MonkeyPatch.context() as patch:
        if item.get_closest_marker("distributed") is None:
            forbid_ranks(patch)
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory):
    """Keep copies and checksums of these tests to themselves."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("mgpp-cache")
        patch.setenv("MGPP_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer BERT and a WordPiece tokenizer."""
    from tests import tiny

    folder = tmp_path_factory.mktemp("tiny-bert")
    tiny.write_bert(folder, tiny.DAY_WORDS, intermediate_size=32, max_position_embeddings=32)
    return folder


@pytest.fixture(scope="session")
def words_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV with the columns `text` and `label`: 48 rows, as many of each label."""
    path = tmp_path_factory.mktemp("words") / "words.csv"
    pairs = [(f"a {word} day", label) for label, words in enumerate((BAD, GOOD)) for word in words]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(pairs * 3)
    return path


@pytest.fixture(scope="session")
def datasets_cache(tmp_path_factory: pytest.TempPathFactory):
    """Send what `datasets` keeps of read files to a temporary folder."""
    import datasets

    folder = str(tmp_path_factory.mktemp("datasets-cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        datasets.disable_progress_bars()
        yield Path(folder)
        datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def bucket():
    """The URL of an empty bucket."""
    with pytest.MonkeyPatch.context() as monkeypatch, s3_server(monkeypatch) as url:
        yield url


@pytest.fixture(params=["local", "s3"])
def url(request, tmp_path):
    """The URL of a place where nothing is yet: a folder, or in a bucket."""
    if request.param == "local":
        return str(tmp_path / "storage")
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
