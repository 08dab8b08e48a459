"""The plan against what two real workers hold, and against models whose sizes are known."""

import json

import pytest
import torch
from torch._subclasses import FakeTensorMode
from transformers import (
    AutoModelForCausalLM,
    BartForConditionalGeneration,
    BertForSequenceClassification,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
)

from mgpp import grouped_parameters
from pipeline.errors import ConfigError
from pipeline.evaluation.head import TokenScorer
from pipeline.planner.memory import (
    activation_bytes,
    checkpoint_bytes,
    copied_bytes,
    state_bytes,
)
from pipeline.planner.pinned import pinned_blocks
from pipeline.planner.plan import CHECKPOINT_COPY, plan_run
from pipeline.planner.speed import StepTime, step_time
from pipeline.pruning.config import PruneSection
from pipeline.runs.config import parse_config, read_config
from pipeline.runs.hardware import NO_GPUS, settled
from pipeline.tasks import make_task
from pipeline.tasks.causal_lm import CausalLMConfig
from pipeline.tasks.text_to_text import TextToTextConfig
from pipeline.training.deepspeed import ZeroConfig
from pipeline.training.zero_extra import merged
from tests import tiny
from tests.cases import launch_cases
from tests.memory import LiveBytes
from tests.pipeline.planner.plan_worker import ACCUMULATION, BUCKET, CASES, EXTRA, pins_of
from tests.processes import ROOT

# Vocabulary, width, feed-forward, layers, heads, key-value heads, parameters (the published counts).
LLAMAS = {
    "8B": (128256, 4096, 14336, 32, 32, 8, 8_030_261_248),
    "70B": (128256, 8192, 28672, 80, 64, 8, 70_553_706_496),
}


def make_config(folder, **changes):
    values = {
        "name": "plan",
        "model": {"path": str(folder)},
        "task": {"type": "causal-lm", "max_length": 2048},
        "data": {"source": "files", "train": "train.txt"},
        "train": {"batch_size": 64, "micro_batch_size": 1, "gradient_checkpointing": True},
        "prune": {"sparsity": 0.5},
        "zero": {"stage": 3, "precision": "bf16"},
        "cluster": {"num_workers": 64, "gpus_per_worker": 1},
    }
    for key, change in changes.items():
        values[key] = {**values.get(key, {}), **change} if isinstance(change, dict) else change
    return settled(parse_config(values), NO_GPUS)


@pytest.fixture
def llama(tmp_path):
    def make(size):
        vocabulary, width, feed_forward, layers, heads, shared, _ = LLAMAS[size]
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=feed_forward,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=shared,
            architectures=["LlamaForCausalLM"],
        ).save_pretrained(tmp_path / size)
        return tmp_path / size

    return make


@pytest.mark.parametrize("size", LLAMAS)
def test_large_models_are_counted_from_their_configuration(llama, size):
    plan = plan_run(make_config(llama(size)))
    parameters = LLAMAS[size][-1]
    assert plan.num_parameters == parameters
    # Every projection of every layer and nothing else.
    _, width, feed_forward, layers, heads, shared, _ = LLAMAS[size]
    attention = 2 * width * width + 2 * width * width * shared // heads
    assert plan.num_prunable == layers * (attention + 3 * width * feed_forward)
    # ZeRO 3 in bf16 over 64 workers: 2 + 4 bytes, 4 + 8 of the float32 side, masks, and the float32
    # gradients of a sub-group of a billion at a time.
    shard = parameters / 64
    expected = shard * 18 + 4 * min(shard, 1e9) + plan.num_prunable / 8 / 64
    states = sum(v for k, v in plan.device.items() if "activ" not in k and k != "buckets")
    assert states == pytest.approx(expected, rel=0.001)
    assert plan.checkpoint == pytest.approx(parameters * 12 + plan.num_prunable / 8, rel=0.001)
    # Gathered twice in 16 bits, reduced in 32.
    assert plan.sent_per_step == pytest.approx(8 * parameters * 63 / 64, rel=0.001)
    rounded = plan_run(make_config(llama(size), zero={"gradients": "bf16"}))
    assert rounded.sent_per_step == pytest.approx(6 * parameters * 63 / 64, rel=0.001)
    assert plan.device["gradients"] == 2 * rounded.device["gradients"]
    assert plan.device["buckets"] > rounded.device["buckets"]
    assert plan.sent_per_pruning <= 2**20


@pytest.mark.parametrize(
    ("recipe", "num_workers", "offloaded"),
    [
        ("llama-3.1-70b", 16, True),
        ("llama-3.1-70b", 64, True),
        ("llama-3.1-70b-8-nodes", 64, False),
    ],
)
def test_the_recipes_of_70b_fit_80_gib_and_divide_their_batch(
    llama, recipe, num_workers, offloaded
):
    def read(*overrides):
        path = ROOT / "configs" / "large" / f"{recipe}.yaml"
        model = f"model.path={llama('70B')}"
        values, problems = read_config(str(path), [model, *overrides])
        assert problems == []
        return parse_config(values)

    as_shipped = read()
    assert as_shipped.zero.offload_optimizer == offloaded
    fewest = as_shipped.cluster.min_workers
    for workers in {num_workers, as_shipped.cluster.num_workers, fewest}:
        config = read(f"cluster.num_workers={workers}", f"cluster.min_workers={fewest}")
        assert config.train.goes_with(workers)
        assert plan_run(config).device_total < 80 * 2**30
    here = f"cluster.num_workers={num_workers}"
    without = plan_run(read(here, "zero.offload_optimizer=false"))
    assert (without.device_total < 80 * 2**30) == (num_workers == 64)


def test_seconds_of_a_step_are_those_computed_by_hand(llama):
    plan = plan_run(make_config(llama("8B")))
    # One row of 2,048 tokens, recomputed: 8 x 8,030,261,248 x 2,048 of the matrices, and of attention
    # 16 x 32 layers x 4,096 wide x 2,048 x 2,048.
    assert plan.flops_per_step == 131_567_800_287_232 + 8_796_093_022_208
    # 8 bytes a parameter x 63/64, of 50e9 bytes a second.
    assert plan.sent_per_step == 63_238_307_328
    time = step_time(
        flops=plan.flops_per_step,
        sent=plan.sent_per_step,
        device_tflops=400,
        bandwidth_gbit=400,
    )
    assert time.compute == pytest.approx(0.350909733, rel=1e-8)
    assert time.communication == pytest.approx(1.264766147, rel=1e-8)
    assert time.shortest == time.communication
    assert time.longest == pytest.approx(1.61567588, rel=1e-8)


def test_operations_follow_what_a_step_does(llama):
    def flops(**changes):
        return plan_run(make_config(llama("8B"), **changes)).flops_per_step

    whole = flops()
    assert flops(train={"gradient_checkpointing": False}) == whole * 6 // 8
    assert flops(train={"batch_size": 128}) == 2 * whole
    taught = flops(train={"micro_batch_size": 1}, distill={"teacher": "dense"})
    assert taught - whole == 2 * LLAMAS["8B"][-1] * 2048


def test_without_a_rate_there_are_no_seconds():
    given = {"flops": 6e12, "sent": 1e9}
    assert step_time(**given, device_tflops=None, bandwidth_gbit=None) == StepTime(
        compute=None, communication=None
    )
    computed = step_time(**given, device_tflops=2, bandwidth_gbit=None)
    assert (computed.compute, computed.shortest, computed.longest) == (3, None, None)
    sent = step_time(**given, device_tflops=None, bandwidth_gbit=4)
    assert (sent.communication, sent.shortest, sent.longest) == (2, None, None)


def test_operations_of_an_encoder_and_decoder(tmp_path):
    changes = {"encoder_layers": 4, "decoder_layers": 2}
    architectures = ["BartForConditionalGeneration"]
    tiny.config("bart", **BART | changes, architectures=architectures).save_pretrained(tmp_path)
    task = {
        "type": "text-to-text",
        "source": "a",
        "target": "b",
        "max_length": 64,
        "max_target_length": 16,
    }
    config = make_config(tmp_path, cluster={"num_workers": 1}).model_copy(
        update={"task": TextToTextConfig(**task)}
    )
    plan = plan_run(config)  # 64 rows, 64 micro-batches, recomputed
    matrices = 8 * plan.num_parameters * 64 * (64 + 16) // 2
    pairs = 4 * 64 * 64 + 2 * (16 * 16 + 16 * 64)
    assert plan.flops_per_step == matrices + 16 * 128 * 64 * pairs


def test_settings_that_lie_nested_are_found(tmp_path):
    vision = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    text = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    widths = {"hidden_size": 16, "intermediate_size": 24}
    config = Gemma3Config(
        text_config={**text, **widths, "num_key_value_heads": 1},
        vision_config={**vision, **widths},
        mm_tokens_per_image=4,
    )
    config.save_pretrained(tmp_path)
    plan = plan_run(make_config(tmp_path))
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration(config)
    assert plan.num_parameters == sum(p.numel() for p in model.parameters())
    of_text = 2 * (16 * (2 * 16 + 2 * 8) + 3 * 16 * 24)
    assert plan.num_prunable == of_text  # images do not occur: their tower stays dense
    assert plan.device["activations (estimate)"] > 2 * 2048 * 50 * 4  # the logits alone


def test_offload_moves_the_optimizer_to_the_host(llama):
    folder = llama("8B")
    train = {"checkpoint_writing": "foreground"}
    near = plan_run(make_config(folder, train=train))
    far = plan_run(make_config(folder, train=train, zero={"offload_optimizer": True}))
    # 4 of the reduced gradients, 4 of the step's, 4 of the master weights and 8 of Adam's averages.
    moved = far.host_total - far.host["pinned blocks rounded up"]
    assert moved == pytest.approx(20 * near.num_parameters / 64 + far.host["masks"])
    assert near.device_total - far.device_total == pytest.approx(moved)


def test_zeros_that_are_kept_take_one_more_bit_a_weight(llama):
    prune = {"sparsity": 0.8}
    without = plan_run(make_config(llama("8B"), prune=prune))
    kept = plan_run(make_config(llama("8B"), prune={**prune, "keep_zeros": True}))
    share = kept.num_prunable / 64 / 8  # of one of 64 workers
    assert kept.device_total - without.device_total == pytest.approx(share, rel=1e-6)
    assert kept.checkpoint - without.checkpoint == kept.num_prunable // 8
    assert kept.host["copy of a checkpoint"] - without.host["copy of a checkpoint"] == (
        pytest.approx(share, rel=1e-6)
    )


def test_evaluation_is_planned_beside_training(llama):
    folder, parameters = llama("8B"), LLAMAS["8B"][-1]
    # 16 rows of 2,048 tokens; 523 predictions' logits are 256 MiB in float32.
    expected = {
        "activations (estimate)": 17 * 16 * 2048 * 4096 * 2,
        "logits": 523 * 128256 * (2 + 4 + 4),
    }
    whole = plan_run(make_config(folder, zero={"stage": 2}))
    assert whole.evaluation == {"parameters": 2 * parameters, **expected}
    sharded = plan_run(make_config(folder))
    assert sharded.evaluation == {
        "parameters": 2 * -(-parameters // 64),
        "buckets": 2 * 10 * 500_000_000,
        **expected,
    }
    assert sharded.evaluation_total < 16 * 2**30
    longer = plan_run(make_config(folder, evaluate={"batch_tokens": 65_536}))
    grown = longer.evaluation_total - sharded.evaluation_total
    assert grown == expected["activations (estimate)"]
    offloaded = {"offload_optimizer": True, "offload_parameters": True}
    assert "parameters" not in plan_run(make_config(folder, zero=offloaded)).evaluation


def test_an_evaluation_takes_what_is_planned(llama):
    """Of two of the layers, as many as are ever at work; nothing is computed."""
    settings = LlamaConfig.from_pretrained(llama("8B"), num_hidden_layers=2, use_cache=False)
    task = make_task(CausalLMConfig(type="causal-lm", max_length=2048))
    plan = plan_run(make_config(llama("8B"), zero={"stage": 2}))
    with FakeTensorMode(), torch.no_grad():
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16).eval()
        ids = torch.zeros(16, 2048, dtype=torch.int64)
        scorer = TokenScorer(task=task, model=model, layers="model")
        with LiveBytes() as live:
            scorer.scores({"input_ids": ids}, torch.arange(ids.numel()), ids.flatten())
    planned = plan.evaluation_total - plan.evaluation["parameters"]
    assert 0.6 * planned < live.peak < planned


def test_keys_and_values_of_generated_texts_are_planned(tmp_path):
    architectures = ["BartForConditionalGeneration"]
    tiny.config("bart", **BART, architectures=architectures).save_pretrained(tmp_path)
    task = TextToTextConfig(
        type="text-to-text", source="a", target="b", max_length=64, max_target_length=16
    )
    config = make_config(tmp_path, evaluate={"batch_size": 8}, zero={"stage": 2})
    plan = plan_run(config.model_copy(update={"task": task}))
    # Of 4 layers of the decoder, for 4 beams of 8 rows, of 64 tokens read and 16 written; in bf16.
    assert plan.evaluation["keys and values"] == 2 * 4 * 8 * 4 * (64 + 16) * 128 * 2


def test_host_memory_under_offload_is_what_torch_allocates_of_it(llama):
    """70B on two nodes of eight GPUs, counted by hand."""
    config = make_config(
        llama("70B"), zero={"offload_optimizer": True}, cluster={"num_workers": 16}
    )
    plan, gib = plan_run(config), 2**30
    shard = LLAMAS["70B"][-1] / 16
    assert 16.4 * gib < 4 * shard < 16.5 * gib  # all gradients: one block, of 32 GiB
    # Those of the step in float32, a block for every billion elements: of the prunable ones three of
    # 1,001,390,080 and one of 1,006,632,960, 4 GiB each, and one of the other 267,386,880, 1 GiB; of
    # the embeddings one of 131,334,144, half a GiB; of vectors next to nothing.
    blocks = 32 + 4 * 4 + 1 + 0.5
    unpinned = plan.host_total - plan.host["pinned blocks rounded up"] - 8 * shard
    assert plan.host_total == pytest.approx(blocks * gib + unpinned, rel=1e-3)
    # A node: eight workers, 6 GiB each besides, the export, and 8 GiB; a copy of a checkpoint only where
    # there is room.
    node = plan.node_bytes(8, has_gpus=True)
    each = plan.host_total - plan.host[CHECKPOINT_COPY]
    assert node == 8 * (each + 6 * gib) + plan.export + 8 * gib
    on_cpus = make_config(
        llama("70B"),
        zero={"offload_optimizer": True},
        cluster={"num_workers": 16, "gpus_per_worker": 0},
    )
    assert "pinned blocks rounded up" not in plan_run(on_cpus).host  # nothing is pinned there


def test_a_copy_of_a_workers_checkpoint_is_counted_where_one_is_made(llama):
    folder = llama("8B")

    def planned(zero=None, **train):
        return plan_run(make_config(folder, train=train, zero=zero or {}))

    plan = planned()
    # Master weights and both averages, and a bit of each prunable weight, over 64 workers.
    assert plan.host == {
        CHECKPOINT_COPY: pytest.approx(12 * plan.num_parameters / 64 + plan.num_prunable / 512)
    }
    assert planned(checkpoint_writing="background").host == plan.host
    assert planned(checkpoint_writing="foreground").host == {}
    assert planned(checkpoint_every=None).host == {}
    assert planned(zero={"stage": 0}).host[CHECKPOINT_COPY] == plan.checkpoint  # by one worker
    assert planned(checkpoints_kept=5).checkpoints == 6 * plan.checkpoint


def test_pruning_in_one_shot_holds_one_layer_on_the_device(llama):
    one_shot = {
        "prune": {"sparsity": 0.5, "method": {"name": "sparsegpt"}},
        "cluster": {"num_workers": 2, "gpus_per_worker": 1},
    }
    plan = plan_run(make_config(llama("8B"), **one_shot))
    attention, feed_forward = 2 * 4096 * (4096 + 1024), 3 * 4096 * 14336
    assert plan.num_prunable == 32 * (attention + feed_forward)
    assert plan.device["parameters of a layer"] == 2 * (attention + feed_forward + 2 * 4096)
    assert plan.device["statistics of a layer"] == 8 * (6 * 4096**2 + 14336**2)
    assert plan.host == {
        "parameters": 2 * LLAMAS["8B"][-1],
        "calibration": 64 * 2048 * 4096 * 2,
    }
    assert plan.sent_per_step == 0
    assert plan.checkpoint == 2 * plan.num_prunable
    assert plan.device_total < 10 * 2**30  # a small GPU will do
    one_shot["prune"] = {"sparsity": 0.6, "method": {"name": "wanda"}, "pattern": "2:5"}
    with pytest.raises(ConfigError, match=r"prune\.method: wanda: .*needs inputs in groups of 5"):
        plan_run(make_config(llama("8B"), **one_shot))


def test_what_a_method_keeps_is_counted(llama):
    folder = llama("8B")
    plain = plan_run(make_config(folder, prune={"sparsity": 0.5, "method": {"name": "gmp"}}))
    kept = plan_run(make_config(folder, prune={"sparsity": 0.5, "method": {"name": "platon"}}))
    each = kept.device["kept by the method"]
    assert each == pytest.approx(3 * 4 * kept.num_prunable / 64, rel=1e-6)
    assert kept.device_total - plain.device_total == each
    assert kept.checkpoint - plain.checkpoint == 3 * 4 * kept.num_prunable


def test_a_teacher_is_held_and_gathered_as_zero_says(llama):
    folder = llama("8B")
    parameters = LLAMAS["8B"][-1]

    def planned(**changes):
        return plan_run(make_config(folder, train={"micro_batch_size": 1}, **changes))

    plain, taught = planned(), planned(distill={"teacher": "dense"})
    assert taught.device["teacher"] == pytest.approx(2 * parameters / 64, rel=1e-6)
    forward = taught.sent_per_step - plain.sent_per_step
    assert forward == pytest.approx(2 * parameters * 63 / 64, rel=1e-6)
    assert taught.checkpoint == plain.checkpoint
    whole = planned(distill={"teacher": "dense"}, zero={"stage": 2})
    assert whole.device["teacher"] == 2 * parameters
    assert whole.sent_per_step == planned(zero={"stage": 2}).sent_per_step
    away = {"stage": 3, "offload_optimizer": True, "offload_parameters": True}
    assert planned(distill={"teacher": "dense"}, zero=away).host["teacher"] > 0
    larger = planned(distill={"teacher": str(llama("70B"))})
    assert larger.device["teacher"] == pytest.approx(2 * LLAMAS["70B"][-1] / 64, rel=1e-6)
    # Logits of 2,048 tokens: three times in bf16, twice in float32; hidden states besides.
    assert taught.device["distillation (estimate)"] == 2048 * 128256 * 14
    deep = planned(distill={"hidden_weight": 1.0})
    states = deep.device["distillation (estimate)"] - 2048 * 128256 * 14
    assert states == 2048 * 4096 * 32 * 14


def test_a_config_without_weights_is_enough_and_a_wrong_one_is_told(llama, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.path"):
        plan_run(make_config(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"^distill\.teacher: 'nowhere'"):
        plan_run(make_config(llama("8B"), distill={"teacher": "nowhere"}))


@pytest.mark.parametrize("recomputed", [False, True])
def test_activations_are_what_autograd_keeps(recomputed):
    """Autograd itself says what it saves; the estimate is of the order, fused kernels keep less."""
    model = tiny.model(
        BertForSequenceClassification,
        vocab_size=50,
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=512,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ).train()
    if recomputed:
        model.gradient_checkpointing_enable()
    tokens = torch.randint(50, (8, 64))
    saved = saved_bytes(model, input_ids=tokens, labels=torch.zeros(8, dtype=torch.long))
    sizes = {"rows": 8, "length": 64, "target_length": 0, "width": 4}
    estimate = activation_bytes(model, **sizes, recomputed=recomputed)
    if recomputed:
        estimate -= 17 * 4 * 512 * 128  # the one layer that lives only in the backward pass
    assert 0.6 < saved / estimate < 1.4


def saved_bytes(model, **batch):
    """What autograd says it keeps of a forward pass, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**batch)
    return sum(saved.values())


BART = {
    "vocab_size": 50,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "dropout": 0.0,
}


@pytest.mark.parametrize("layers", [(4, 4), (6, 2), (2, 6)])
@pytest.mark.parametrize("lengths", [(64, 16), (32, 48)])
def test_activations_of_an_encoder_and_decoder_are_what_autograd_keeps(layers, lengths):
    encoder, decoder = layers
    changes = {"encoder_layers": encoder, "decoder_layers": decoder}
    model = tiny.model(BartForConditionalGeneration, **BART, **changes).train()
    source, target = (torch.randint(4, 50, (8, length)) for length in lengths)
    saved = saved_bytes(model, input_ids=source, labels=target)
    sizes = {"rows": 8, "length": lengths[0], "target_length": lengths[1], "width": 4}
    estimate = activation_bytes(model, **sizes, recomputed=False)
    assert 0.6 < saved / estimate < 1.4


def test_a_longer_target_costs_activations_and_nothing_else(tmp_path):
    architectures = ["BartForConditionalGeneration"]
    tiny.config("bart", **BART, architectures=architectures).save_pretrained(tmp_path)

    def plan(**settings):
        task = {"type": "text-to-text", "source": "a", "target": "b", "max_length": 64, **settings}
        config = make_config(tmp_path).model_copy(update={"task": TextToTextConfig(**task)})
        return plan_run(config).device

    short, long = plan(max_target_length=16), plan(max_target_length=32)
    assert {name for name in short if short[name] != long[name]} == {"activations (estimate)"}
    assert long["activations (estimate)"] > short["activations (estimate)"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    model = tiny.model(
        BertForSequenceClassification,
        vocab_size=50,
        hidden_size=96,
        num_hidden_layers=3,
        intermediate_size=200,
        max_position_embeddings=16,
        num_labels=2,
    )
    model.save_pretrained(folder / "bert")
    launched = launch_cases(
        "tests.pipeline.planner.plan_worker",
        str(folder / "bert"),
        str(folder),
        cases=CASES,
        folder=folder,
        num_processes=2,
        timeout=560,
    )
    counts = [sum(p.numel() for p in model.parameters())] * 2
    names = (n for n, p in model.named_parameters() if ".layer." in n and p.dim() == 2)
    counts.append(sum(model.get_parameter(name).numel() for name in names))
    return launched, counts


# Planned for the end of the backward pass, where they hold whole gradients; at the step they do not.
WHOLE = ("stage1-bf16-offload", "stage1-fp16")


LARGEST = 96 * 200  # elements of a matrix of the feed-forward


def layout(case):
    return ZeroConfig(**{"precision": "fp32", **CASES[case]}, bucket_elements=BUCKET)


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_two_workers_hold_and_write_what_is_planned(measured, case):
    launched, (total, trained, prunable) = measured
    found = json.loads((launched.folder(case) / f"{case}.json").read_text())
    planned = state_bytes(
        layout(case),
        total,
        trained,
        prunable,
        world_size=2,
        accumulated=ACCUMULATION > 1,
        largest=LARGEST,
    )
    expected = sum(sum(part.values()) for part in planned)
    if case in WHOLE:
        assert found["held"] < expected
    else:
        assert found["held"] == pytest.approx(expected, rel=0.1)
    assert found["checkpoint"] == pytest.approx(checkpoint_bytes(trained, prunable), rel=0.1)
    copied = copied_bytes(layout(case), trained, prunable, world_size=2)
    assert found["copied"] == pytest.approx(copied, rel=0.1)


@pytest.mark.distributed
@pytest.mark.parametrize("case", [case for case in CASES if "offload" in case])
def test_two_workers_pin_the_blocks_that_are_planned(measured, case):
    launched, _ = measured
    found = json.loads((launched.folder(case) / f"{case}.json").read_text())
    model = BertForSequenceClassification.from_pretrained(launched.root / "bert")
    prunable = PruneSection(sparsity=0.5).settings.select(model)
    groups = grouped_parameters(model, prunable, weight_decay=0.0)
    planned = pinned_blocks(
        layout(case).model_copy(update={"extra": merged(EXTRA, pins_of(case))}),
        [[parameter.numel() for parameter in group["params"]] for group in groups],
        2,
        accumulated=ACCUMULATION > 1,
        on_gpu=False,
    )
    assert found["pinned"]
    # Parts of each parameter or group are padded a little.
    for ours, theirs in zip(sorted(planned), sorted(found["pinned"]), strict=True):
        assert theirs == pytest.approx(ours, rel=0.1, abs=256)


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_two_workers_send_what_is_planned(measured, case):
    launched, _ = measured
    found = json.loads((launched.folder(case) / f"{case}.json").read_text())
    config = make_config(
        launched.root / "bert",
        task={"type": "classification", "text": ["text"], "label": "label", "max_length": 16},
        train={"batch_size": 4 * ACCUMULATION, "micro_batch_size": 2},
        cluster={"num_workers": 2, "gpus_per_worker": 0},
    )
    planned = plan_run(config.model_copy(update={"zero": layout(case)}))
    assert found["sent"] == pytest.approx(planned.sent_per_step, rel=0.03)
