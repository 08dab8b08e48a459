"""One-shot pruning of whole decoders, held against whole forward passes and one matrix at a time."""

import json
import re
import shutil

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from mgpp import ONE_SHOT, make_one_shot, select_prunable
from mgpp.methods.one_shot.base import portions
from pipeline.errors import ConfigError, RunStoppedError, StageError
from pipeline.models.decoder import find_layers, layer_inputs
from pipeline.pruning import layer as layer_pruning
from pipeline.pruning.layer import layer_statistics, matrix_owners
from pipeline.pruning.one_shot import calibration_rows, prunable_layers
from pipeline.store.checkpoint_manifest import newest_step, num_parts
from pipeline.store.checkpoints import CheckpointStore
from pipeline.tasks import make_task
from pipeline.tasks.sequence import ClassificationConfig
from pipeline.tracking.recorder import read_records
from pipeline.worker_group import WorkerGroup
from tests.cases import launch_cases
from tests.pipeline.models.word_chains import write_blocks
from tests.pipeline.pruning.one_shot_worker import CASES, TASK, prune_of, run
from tests.tiny import DECODER_LAYERS, decoder, write_decoder


@pytest.fixture(scope="module")
def workers():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield WorkerGroup.current()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one-shot")
    for kind in {case.partition("-")[0] for case in CASES}:
        write_decoder(kind, folder / kind)
    write_blocks(folder / "data")
    return folder


@pytest.fixture(scope="module")
def pruned(folder, workers, tmp_path_factory):
    """Every case on one rank: its folder and its figures."""
    output = tmp_path_factory.mktemp("alone")
    found = {}
    for case in CASES:
        store = CheckpointStore(str(output / f"{case}-checkpoints"), workers)
        found[case] = (output / case, run(case, folder, output / case, store))
    return found


class Multiplications(TorchDispatchMode):
    """Keeps what is multiplied by each matrix of a layer: [tokens, in], by name."""

    def __init__(self, matrices) -> None:
        super().__init__()
        self.names = {m.stored().data_ptr(): name for name, m in matrices.items()}
        self.inputs = {name: [] for name in matrices}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            inputs, weight = args[-2:]
            if weight.data_ptr() in self.names:
                self.inputs[self.names[weight.data_ptr()]].append(inputs)
        return func(*args, **(kwargs or {}))


def inputs_of(model, matrices, rows) -> dict[str, torch.Tensor]:
    """What whole forward passes multiply by each matrix; experts must run one after the other."""
    if hasattr(model.config, "num_local_experts"):
        model.config._experts_implementation = "eager"
    with torch.no_grad(), Multiplications(matrices) as seen:
        for row in rows:
            model(input_ids=row.unsqueeze(0))
    return {name: torch.cat(inputs) for name, inputs in seen.inputs.items()}


@pytest.mark.parametrize("case", CASES)
def test_each_matrix_is_pruned_on_what_the_pruned_layers_before_send_into_it(case, folder, pruned):
    path, figures = pruned[case]
    prune = prune_of(case)
    model = AutoModelForCausalLM.from_pretrained(folder / case.partition("-")[0]).eval()
    found = AutoModelForCausalLM.from_pretrained(path / "model").eval()
    rows = calibration_rows(folder / "data", prune.calibration_rows, seed=0)
    names = prune.settings.select(model)
    layers = find_layers(model, names)
    sizes = {n: m.stored().numel() for layer in layers for n, m in layer.matrices.items()}
    total = int(sum(sizes.values()) * prune.sparsity)
    counts = dict(zip(sizes, portions(total, list(sizes.values())), strict=True))
    assert figures["num_pruned"] == figures["num_zeros"] == total
    for layer in layers:
        # The inputs of all its matrices come before any of them is pruned.
        inputs = inputs_of(model, layer.matrices, rows)
        for name, matrix in layer.matrices.items():
            statistic = prune.one_shot.statistic(inputs[name]).double()
            expected = prune.one_shot.prune(matrix.rows(), statistic, counts[name])
            matrix.rows().copy_(expected.weight)
            written = found.get_parameter(matrix.weight)
            written = written if matrix.expert is None else written[matrix.expert]
            assert torch.equal(written == 0, matrix.stored() == 0), name
            torch.testing.assert_close(written, matrix.stored(), rtol=1e-4, atol=1e-5)
    untouched = {n: p for n, p in model.named_parameters() if n not in names}
    for name, parameter in untouched.items():
        assert torch.equal(found.get_parameter(name), parameter)


@pytest.mark.parametrize("case", CASES)
def test_figures_and_records_are_of_what_was_written(case, pruned):
    path, figures = pruned[case]
    weights = json.loads((path / "weights.json").read_text())
    zeros = {name: entry["zeros"] for name, entry in weights.items() if "zeros" in entry}
    assert sum(zeros.values()) == figures["num_zeros"]
    assert figures["sparsity"] == figures["num_pruned"] / figures["num_prunable"]
    assert (figures["num_steps"], figures["prune_start"], figures["prune_end"]) == (0, 0, 0)
    records = read_records(path / "metrics.jsonl")
    assert [record["step"] for record in records["prune"]] == list(range(DECODER_LAYERS))
    assert records["prune"][-1]["mask_hash"] == figures["mask_hash"]
    assert records["prune"][-1]["sparsity"] == figures["sparsity"]
    assert max(r["threshold"] for r in records["prune"]) == figures["threshold"]
    (last,) = records["layers"]
    sizes = {n: torch.Size(weights[n]["shape"]).numel() for n in zeros}
    assert last["sparsity"] == {name: zeros[name] / sizes[name] for name in zeros}
    assert figures["num_parameters"] == sum(
        torch.Size(entry["shape"]).numel() for entry in weights.values()
    )


@pytest.fixture(scope="module")
def on_two_ranks(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("two-ranks")
    return launch_cases(
        "tests.pipeline.pruning.one_shot_worker",
        str(folder),
        str(output),
        cases=CASES,
        folder=output,
        num_processes=2,
        timeout=200,
    )


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_prune_as_one_does(pruned, on_two_ranks, case):
    output, (path, alone) = on_two_ranks.folder(case), pruned[case]
    first, second = (json.loads((output / f"{case}-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    exact = {k: v for k, v in alone.items() if k != "threshold"}
    assert {k: first[k] for k in exact} == exact  # the hash of the masks among them
    assert first["threshold"] == pytest.approx(alone["threshold"], rel=1e-5)
    weights, expected = (
        load_file(p / "model" / "model.safetensors") for p in (output / case, path)
    )
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "gpt_oss"])
def test_statistics_are_those_of_the_inputs(folder, kind):
    model = decoder(kind)
    layers = find_layers(model, select_prunable(model))
    rows = calibration_rows(folder / "data", 5, seed=3)
    hidden, calls = layer_inputs(model, layers, rows)
    for name in ONE_SHOT:
        with torch.no_grad():
            found, num_tokens = layer_statistics(
                make_one_shot(name), layers[0], calls[0], hidden, torch.device("cpu")
            )
        multiplied = inputs_of(model, layers[0].matrices, rows)
        for weight in layers[0].matrices:
            inputs = multiplied[weight].double()
            assert num_tokens[weight] == len(inputs)
            expected = inputs.T @ inputs
            expected = expected if name == "sparsegpt" else expected.diagonal()
            assert found[weight].dtype == torch.float64
            torch.testing.assert_close(found[weight], expected, rtol=1e-5, atol=1e-5)
        assert not any(m.module._forward_pre_hooks for m in layers[0].matrices.values())


def test_rows_are_drawn_by_the_seed(folder):
    first, again, other = (calibration_rows(folder / "data", 6, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert len({tuple(row.tolist()) for row in first}) == 6
    with pytest.raises(ConfigError, match="calibration_rows: there are 12 training blocks, got 13"):
        calibration_rows(folder / "data", 13, seed=0)


class StoppedError(Exception):
    """Stands for the death of the run."""


@pytest.mark.parametrize("corrupt", [False, True])
def test_a_run_that_was_stopped_goes_on_after_the_last_layer(
    corrupt, folder, pruned, workers, tmp_path, monkeypatch
):
    path, figures = pruned["llama-sparsegpt"]
    notes = []
    store = CheckpointStore(str(tmp_path / "kept"), workers, notify=notes.append)

    def stop(record):
        if record["event"] == "layer" and record["step"] == 1:
            raise StoppedError

    with pytest.raises(StoppedError):
        run("llama-sparsegpt", folder, tmp_path / "stopped", store, progress=stop)
    if corrupt:
        (tensors,) = (tmp_path / "kept" / "layer-00001").rglob("*.safetensors")
        tensors.write_bytes(tensors.read_bytes()[:-1])
    layers = []
    prune = layer_pruning.LayerPruner.prune
    monkeypatch.setattr(
        layer_pruning.LayerPruner,
        "prune",
        lambda self, layer, *rest: layers.append(layer) or prune(self, layer, *rest),
    )
    assert run("llama-sparsegpt", folder, tmp_path / "out", store) == figures
    assert len(layers) == (2 if corrupt else 1)
    assert any("is corrupt and skipped" in note for note in notes) == corrupt
    for name in ("weights.json", "metrics.jsonl"):
        assert (tmp_path / "out" / name).read_text() == (path / name).read_text()
    store.discard()
    assert not (tmp_path / "kept").exists()


def test_a_run_that_is_asked_to_stop_ends_after_the_layer_under_way(
    folder, pruned, workers, tmp_path
):
    path, figures = pruned["llama-sparsegpt"]
    store = CheckpointStore(str(tmp_path / "kept"), workers)
    with pytest.raises(RunStoppedError, match=f"^saved 2 of {DECODER_LAYERS} layers$"):
        run("llama-sparsegpt", folder, tmp_path / "stopped", store, is_to_stop=stop_at(1))
    assert num_parts(str(tmp_path / "kept")) == 2
    assert newest_step(str(tmp_path / "kept")) is None
    # After the last layer there is nothing to stop.
    assert run("llama-sparsegpt", folder, tmp_path / "out", store, is_to_stop=stop_at(2)) == figures
    assert (tmp_path / "out" / "weights.json").read_text() == (path / "weights.json").read_text()


def stop_at(layer):
    answers = iter([False] * layer + [True])
    return lambda: next(answers)


def test_low_precision_holds_the_same_count(folder, workers, tmp_path):
    store = CheckpointStore(str(tmp_path / "kept"), workers)
    found = run("llama-sparsegpt", folder, tmp_path / "out", store, dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert found["num_pruned"] == int(found["num_prunable"] * 0.55)
    assert found["num_zeros"] >= found["num_pruned"]


def test_a_matrix_that_nothing_goes_into_is_named_on_every_rank(folder, workers, tmp_path):
    model = decoder("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.1.post_attention_layernorm.weight").zero_()
    shutil.copytree(folder / "data", tmp_path / "data")
    model.save_pretrained(tmp_path / "llama")
    store = CheckpointStore(str(tmp_path / "kept"), workers)
    with pytest.raises(
        StageError, match=r"nothing but zeros into model\.layers\.1\.mlp\.gate_proj"
    ):
        run("llama-wanda", tmp_path, tmp_path / "out", store)


def test_an_expert_without_tokens_is_named(folder, workers, tmp_path):
    config = decoder("mixtral").config
    config.num_local_experts = 256  # more than the 7 rows of 10 tokens choose, two each
    model = AutoModelForCausalLM.from_config(config)
    shutil.copytree(folder / "data", tmp_path / "data")
    model.save_pretrained(tmp_path / "mixtral")
    store = CheckpointStore(str(tmp_path / "kept"), workers)
    with pytest.raises(
        StageError, match=r"no token .* routed to model\.layers\.0\.mlp\.experts"
    ) as caught:
        run("mixtral-wanda", tmp_path, tmp_path / "out", store)
    (pattern,) = re.findall(
        r"leave all experts of that .*prune\.exclude: \['(.*)'\]", str(caught.value)
    )
    everything = select_prunable(model)
    assert set(everything) - set(select_prunable(model, exclude=[pattern])) == {pattern}


def test_matrices_are_dealt_out_by_what_they_cost():
    model = decoder("llama")
    layer = find_layers(model, select_prunable(model))[0]
    owners = matrix_owners(layer, 2)
    (down,) = (name for name in owners if name.endswith("down_proj.weight"))
    assert owners.keys() == layer.matrices.keys()
    assert set(owners.values()) == {0, 1}
    assert sum(owner == owners[down] for owner in owners.values()) <= 3
    assert set(matrix_owners(layer, 1).values()) == {0}


def test_what_does_not_go_together():
    model, method = decoder("llama"), make_one_shot("wanda")
    names = select_prunable(model)
    task = make_task(ClassificationConfig(type="classification", text=["text"], label="label"))
    with pytest.raises(ValueError, match="only causal language models"):
        prunable_layers(model, task, names, method)
    pattern = make_one_shot("wanda", pattern="2:5")
    with pytest.raises(
        ValueError, match=r"q_proj\.weight: pattern 2:5 needs inputs in groups of 5"
    ):
        prunable_layers(model, TASK, names, pattern)
