"""The table of architectures: each pruned to 80% of all matrices of its layers, however it holds them."""

import re

import pytest
import torch
import transformers
from safetensors.torch import load_file

from pipeline.tasks import make_task
from tests.cases import launch_cases
from tests.pipeline.architectures import (
    ARCHITECTURES,
    CASES,
    DAMAGED,
    LR,
    SHARDED,
    SPARSITY,
    STEPS,
    config_of,
    write_inputs,
)

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(700)]
IN_LAYERS = re.compile(r"\.\d+\.")


@pytest.fixture(scope="module")
def pruned(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("architectures")
    write_inputs(folder)
    asked = {
        item.callspec.params["case"]
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    }
    return launch_cases(
        "tests.pipeline.architectures",
        str(folder),
        cases=[DAMAGED, *(case for case in CASES if case in asked)],
        folder=folder,
        num_processes=2,
        timeout=600,
        max_failures=len(CASES),
    )


@pytest.mark.parametrize("case", CASES)
def test_an_architecture_is_pruned_exported_and_loads(pruned, case):
    folder = pruned.folder(case)
    name = case.rpartition("-stage")[0]
    architecture = ARCHITECTURES[name]
    before = load_file(folder / name / "model.safetensors")
    after = load_file(folder / case / "export" / "model" / "model.safetensors")
    # As the file has it, in which an expert may be a tensor of its own.
    zeros = {key: (tensor == 0) for key, tensor in after.items() if _is_matrix(key, tensor)}
    count = architecture.count(config_of(architecture))
    assert sum(int(mask.sum()) for mask in zeros.values()) == int(SPARSITY * count)
    # Nothing was lost or drawn anew on the way: what is not pruned is near where it was.
    assert before.keys() == after.keys()
    for key, tensor in after.items():
        mask = zeros.get(key, torch.zeros_like(tensor, dtype=torch.bool))
        assert bool(((tensor - before[key]).abs()[~mask] < 3 * STEPS * LR).all()), key
    auto = getattr(transformers, make_task(architecture.task).auto_model)
    model = auto.from_pretrained(folder / case / "export" / "model")
    tied = config_of(architecture).tie_word_embeddings
    embeddings = model.get_input_embeddings().weight
    assert (model.get_output_embeddings().weight is embeddings) == tied
    if architecture.kind == "t5":
        assert model.encoder.embed_tokens.weight is embeddings
        assert model.decoder.embed_tokens.weight is embeddings
    if case.endswith("-stage3"):
        sharded = torch.load(folder / case / SHARDED, weights_only=True)
        assert sharded.keys() == model.state_dict().keys()
        for key, tensor in model.state_dict().items():
            assert torch.equal(sharded[key], tensor), key


def test_a_file_damaged_on_one_worker_is_refused_by_all(pruned):
    folder = pruned.folder(DAMAGED)
    said = [(folder / f"{DAMAGED}-{rank}" / "said.txt").read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    assert said[0].endswith(f"{DAMAGED}-1' does not load: model.safetensors is empty")


def _is_matrix(key: str, tensor: torch.Tensor) -> bool:
    return bool(IN_LAYERS.search(key)) and tensor.dim() > 1 and not key.endswith("bias")
