"""Our settings as DeepSpeed's dictionary, and the combinations that are refused."""

import copy
import json

import pytest
import torch

from pipeline.errors import StageError
from pipeline.training.deepspeed import (
    ZeroConfig,
    check_capabilities,
    deepspeed_config,
    load_operators,
    problems_of,
    use_precision,
    widen_gradients,
)


def make_config(on_gpu=False, gradient_clipping=None, **settings):
    return deepspeed_config(
        ZeroConfig(**{"precision": "fp32", **settings}),
        micro_batch_size=4,
        accumulation=2,
        gradient_clipping=gradient_clipping,
        on_gpu=on_gpu,
    )


def test_the_whole_dictionary_on_cpus():
    assert make_config() == {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "zero_optimization": {
            "stage": 2,
            "allgather_bucket_size": 5_000_000,
            "reduce_bucket_size": 5_000_000,
            "overlap_comm": False,
        },
    }


@pytest.mark.parametrize(
    ("on_gpu", "given", "expected"),
    [
        (False, None, 5_000_000),
        (True, None, 500_000_000),
        (False, 1_000, 1_000),
        (True, 1_000, 1_000),
    ],
)
def test_buckets_fit_the_device(on_gpu, given, expected):
    sharding = make_config(on_gpu, stage=3, bucket_elements=given)["zero_optimization"]
    assert sharding["allgather_bucket_size"] == sharding["reduce_bucket_size"] == expected
    assert sharding["stage3_prefetch_bucket_size"] == expected // 10
    assert sharding["stage3_max_live_parameters"] == expected * 10
    assert sharding["overlap_comm"] is on_gpu


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_only_stage_3_has_stage_3_settings(stage):
    sharding = make_config(stage=stage)["zero_optimization"]
    assert sharding["stage"] == stage
    assert any(name.startswith("stage3_") for name in sharding) == (stage == 3)


@pytest.mark.parametrize(
    ("precision", "sections"),
    [
        ("fp32", {}),
        ("bf16", {"bf16": {"enabled": True}}),
        ("fp16", {"fp16": {"enabled": True}}),
    ],
)
def test_a_precision_is_a_section(precision, sections):
    values = make_config(precision=precision, stage=1)
    assert {name: values[name] for name in ("bf16", "fp16") if name in values} == sections


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_gradients_are_float32_unless_asked_for_otherwise(precision, stage):
    """What these keys do is measured in test_gradients."""
    values = make_config(precision=precision, stage=stage)
    assert values == make_config(precision=precision, stage=stage, gradients="fp32")
    widened = precision != "fp32"
    assert values.get("communication_data_type") == ("fp32" if widened else None)
    accumulated = {"grad_accum_dtype": "fp32"} if widened and stage else None
    assert values.get("data_types") == accumulated
    assert ("reduce_scatter" in values["zero_optimization"]) == (widened and stage == 2)
    rounded = make_config(precision=precision, stage=stage, gradients=precision)
    assert not {"communication_data_type", "data_types"} & set(rounded)
    assert "reduce_scatter" not in rounded["zero_optimization"]


def test_more_of_the_data_types_is_merged():
    extra = {"data_types": {"buffer_dtype": "fp32"}, "bf16": {"check_grad_overflow": False}}
    values = make_config(precision="bf16", extra=extra)
    assert values["data_types"] == {"grad_accum_dtype": "fp32", "buffer_dtype": "fp32"}
    assert values["bf16"] == {"enabled": True, "check_grad_overflow": False}


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("gradients", ["fp32", "bf16"])
def test_autograd_widens_gradients_at_stage_0(stage, gradients):
    model = torch.nn.Linear(2, 3).to(torch.bfloat16)
    model.bias.requires_grad_(False)
    widen_gradients(ZeroConfig(stage=stage, precision="bf16", gradients=gradients), model)
    model(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
    wide = stage == 0 and gradients == "fp32"
    assert model.weight.grad.dtype == (torch.float32 if wide else torch.bfloat16)


def test_stage_0_widens_no_gradients_on_an_older_torch(monkeypatch):
    monkeypatch.setattr("pipeline.training.deepspeed._FLOAT32_AT_STAGE_0", False)
    (problem,) = map(str, problems_of(ZeroConfig(stage=0, precision="bf16")))
    assert problem.startswith("zero.gradients: fp32 at zero.stage: 0 needs torch 2.10 or later")
    assert "use zero.stage: 1, or zero.gradients: bf16" in problem
    assert problems_of(ZeroConfig(stage=0, precision="bf16", gradients="bf16")) == []
    assert problems_of(ZeroConfig(stage=0)) == []


@pytest.mark.parametrize(
    ("extra", "key"),
    [
        ({"zero_optimization": {"zero_quantized_gradients": True}}, "zero_quantized_gradients"),
        ({"zero_optimization": {"reduce_scatter": True}}, "zero_optimization.reduce_scatter"),
    ],
)
def test_what_would_round_gradients_is_refused(extra, key):
    (problem,) = map(str, problems_of(ZeroConfig(precision="bf16", extra=extra)))
    assert problem.startswith("zero.extra.")
    assert f"{key}: rounds gradients" in problem
    assert "zero.gradients: bf16" in problem
    assert problems_of(ZeroConfig(precision="bf16", gradients="bf16", extra=extra)) == []


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"communication_data_type": "bf16"}, "communication_data_type: zero.gradients sets it"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "zero.gradients sets it"),
    ],
)
def test_keys_of_deepspeed_for_what_zero_gradients_sets_are_refused(extra, expected):
    (problem,) = map(str, problems_of(ZeroConfig(precision="bf16", extra=extra)))
    assert expected in problem


@pytest.mark.parametrize("on_gpu", [False, True])
def test_what_is_offloaded_is_pinned_for_gpus(on_gpu):
    place = {"device": "cpu", "pin_memory": on_gpu}
    sharding = make_config(on_gpu, stage=3, offload_optimizer=True)["zero_optimization"]
    assert sharding["offload_optimizer"] == place
    assert "offload_param" not in sharding
    sharding = make_config(on_gpu, stage=3, offload_parameters=True)["zero_optimization"]
    assert sharding["offload_param"] == place
    assert "offload_optimizer" not in sharding


def test_parameters_go_to_nvme():
    offload = {"stage": 3, "offload_optimizer": True, "offload_parameters": True}
    sharding = make_config(nvme_path="/nvme", **offload)["zero_optimization"]
    expected = {"device": "nvme", "nvme_path": "/nvme", "pin_memory": False}
    assert sharding["offload_param"] == expected
    assert sharding["offload_optimizer"]["device"] == "cpu"


def test_a_node_without_asynchronous_io_is_told_what_to_install(monkeypatch):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    zero = ZeroConfig(stage=3, offload_optimizer=True, offload_parameters=True, nvme_path="/nvme")
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: True)
    check_capabilities(zero)
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: False)
    check_capabilities(zero.model_copy(update={"nvme_path": None}))
    with pytest.raises(StageError, match="install libaio"):
        check_capabilities(zero)


def test_what_will_be_compiled_is_told_before_it_is(monkeypatch):
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    told = []
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: True)
    for builder in (AsyncIOBuilder, ShareMemCommBuilder):
        monkeypatch.setattr(builder, "load", lambda self, verbose: told.append(self.NAME))
    offloaded = ZeroConfig(
        stage=3, offload_optimizer=True, offload_parameters=True, nvme_path="/nvme"
    )
    monkeypatch.delenv("MGPP_DEEPSPEED_SHM", raising=False)
    load_operators(ZeroConfig(), told.append)
    assert told == []
    monkeypatch.setenv("MGPP_DEEPSPEED_SHM", "1")
    load_operators(offloaded, told.append)
    assert told[1::2] == ["async_io", "deepspeed_shm_comm"]
    assert all(name in note for note, name in zip(told[::2], told[1::2], strict=True))


def test_gradient_clipping_is_passed_on():
    assert make_config(gradient_clipping=1.5)["gradient_clipping"] == 1.5


def test_extra_keys_are_merged_last():
    extra = {
        "zero_optimization": {"reduce_bucket_size": 7, "round_robin_gradients": True},
        "steps_per_print": 5,
        "bf16": {"enabled": True, "immediate_grad_update": True},
    }
    before = copy.deepcopy(extra)
    values = make_config(precision="bf16", extra=extra)
    assert values["zero_optimization"] == {
        **make_config(precision="bf16")["zero_optimization"],
        "reduce_bucket_size": 7,
        "round_robin_gradients": True,
    }
    assert values["steps_per_print"] == 5
    assert values["bf16"] == {"enabled": True, "immediate_grad_update": True}
    assert values["gradient_accumulation_steps"] == 2
    assert extra == before


def test_settings_of_the_loss_scale_leave_the_precision_on():
    values = make_config(precision="fp16", extra={"fp16": {"initial_scale_power": 8}})
    assert values["fp16"] == {"enabled": True, "initial_scale_power": 8}


def test_the_same_settings_give_the_same_dictionary_twice():
    zero = ZeroConfig(precision="fp32", extra={"zero_optimization": {"a": 1}})
    sizes = {"micro_batch_size": 1, "accumulation": 1, "gradient_clipping": None, "on_gpu": False}
    assert deepspeed_config(zero, **sizes) == deepspeed_config(zero, **sizes)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_itself_takes_the_dictionary(stage):
    from deepspeed.runtime.config import DeepSpeedConfig

    values = make_config(stage=stage, precision="bf16", gradient_clipping=1.0)
    parsed = DeepSpeedConfig(json.loads(json.dumps(values)))
    assert parsed.zero_config.stage == stage
    assert parsed.zero_config.reduce_bucket_size == 5_000_000
    assert parsed.gradient_accumulation_steps == 2
    assert parsed.train_micro_batch_size_per_gpu == 4
    assert parsed.gradient_clipping == 1.0


@pytest.mark.parametrize(
    ("settings", "key", "fix"),
    [
        ({"precision": "fp16", "stage": 0}, "zero.precision", "use zero.stage: 1, or bf16"),
        ({"offload_parameters": True, "stage": 2}, "zero.offload_parameters", "stage: 3, got 2"),
        ({"offload_optimizer": True, "stage": 0}, "zero.offload_optimizer", "1, 2 or 3, got 0"),
        (
            {"nvme_path": "/nvme", "stage": 3, "offload_parameters": True},
            "zero.nvme_path",
            "needs zero.offload_parameters and zero.offload_optimizer",
        ),
        (
            {"precision": "fp32", "gradients": "bf16"},
            "zero.gradients",
            "must be fp32 or zero.precision, fp32, got 'bf16'",
        ),
        ({"gradients": "fp16", "precision": "bf16"}, "zero.gradients", "zero.precision, bf16"),
    ],
)
def test_a_combination_that_is_refused(settings, key, fix):
    (problem,) = map(str, problems_of(ZeroConfig(**settings)))
    assert problem.startswith(f"{key}: ")
    assert fix in problem


@pytest.mark.parametrize("name", ["bfloat16", "torch_autocast", "data_types"])
@pytest.mark.parametrize("section", [{"enabled": True}, {"enabled": False}, {}])
def test_the_precision_under_another_name(name, section):
    (problem,) = map(str, problems_of(ZeroConfig(precision="bf16", extra={name: section})))
    assert problem.startswith(f"zero.extra.{name}: zero.precision")
    assert problem.endswith("sets it; leave it out")


@pytest.mark.parametrize(
    ("precision", "extra", "line"),
    [
        ("fp32", {"bf16": {"enabled": True}}, "bf16: zero.precision is fp32; leave it out"),
        ("fp32", {"bf16": {"enabled": False}}, "bf16: zero.precision is fp32; leave it out"),
        ("bf16", {"fp16": {"enabled": False}}, "fp16: zero.precision is bf16; leave it out"),
        (
            "bf16",
            {"bf16": {"enabled": False}},
            "bf16.enabled: zero.precision sets it, got False; leave it out",
        ),
        (
            "fp16",
            {"fp16": {"enabled": "no"}},
            "fp16.enabled: zero.precision sets it, got 'no'; leave it out",
        ),
        ("fp16", {"fp16": "banana"}, "fp16: must be a mapping, got 'banana'"),
        ("fp32", {"fp16": None}, "fp16: must be a mapping, got None"),
        (
            "bf16",
            {"bf16": {"bf16_master_weights_and_grads": True}},
            "bf16.bf16_master_weights_and_grads: master weights and the optimizer's states are "
            "float32; leave it out",
        ),
    ],
)
def test_a_section_of_a_precision_that_another_setting_decides(precision, extra, line):
    problems = problems_of(ZeroConfig(stage=1, precision=precision, extra=extra))
    assert list(map(str, problems)) == [f"zero.extra.{line}"]


@pytest.mark.parametrize(
    ("extra", "line"),
    [
        ({"amp": {"enabled": True}}, "amp: DeepSpeed refuses it: "),
        ({"elasticity": {}}, "elasticity: DeepSpeed refuses it: "),
        ({"compression_training": {}}, "compression_training: DeepSpeed refuses it: "),
        ({"progressive_layer_drop": {}}, "progressive_layer_drop: DeepSpeed refuses it: "),
        ({"zero_optimization": {"mics_shard_size": 2}}, "zero_optimization.mics_shard_size: Deep"),
        (
            {"zero_optimization": {"reduce_bucket_size": "banana"}},
            "zero_optimization.reduce_bucket_size: DeepSpeed refuses it: reduce_bucket_size: Input",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"devic": "cpu"}}},
            "zero_optimization.offload_optimizer: DeepSpeed refuses it: offload_optimizer.devic: ",
        ),
        (
            {"zero_optimization": {"zenflow": {}}},
            "zero_optimization.zenflow: cannot be pruned under: ZenFlow: ",
        ),
        (
            {"zero_optimization": {"round_robin_gradients": True}},
            "zero_optimization.round_robin_gradients: cannot be pruned under: ",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            "zero_optimization.offload_optimizer: cannot be pruned under: optimizer offload to NVMe",
        ),
        ({"prescale_gradients": "banana"}, "prescale_gradients: must be true or false, got 'ban"),
        ({"prescale_gradients": 1}, "prescale_gradients: must be true or false, got 1"),
        ({"steps_per_print": "x"}, "steps_per_print: must be a number, got 'x'"),
        ({"steps_per_print": True}, "steps_per_print: must be a number, got True"),
        ({"aio": 5}, "aio: DeepSpeed refuses it: a value of another type is needed"),
        ({"compile": 5}, "compile: DeepSpeed refuses it: a value of another type is needed"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op: the mean over the whole batch"),
        (
            {"vocabulary_size": "x"},
            "vocabulary_size: DeepSpeed refuses it: a value of another type",
        ),
        ({1: 2}, "1: DeepSpeed has no such key"),
    ],
)
def test_a_value_that_deepspeed_or_pruning_cannot_go_with(extra, line):
    (problem,) = map(str, problems_of(ZeroConfig.model_construct(extra=extra)))
    assert problem.startswith(f"zero.extra.{line}")
    assert "\n" not in problem


def test_all_problems_at_once():
    zero = ZeroConfig(
        stage=0,
        precision="fp16",
        offload_parameters=True,
        offload_optimizer=True,
        gradients="bf16",
    )
    assert [problem.key for problem in problems_of(zero)] == [
        "zero.precision",
        "zero.offload_parameters",
        "zero.offload_optimizer",
        "zero.gradients",
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stage": 0},
        {"stage": 0, "precision": "bf16"},
        {"stage": 1, "precision": "fp16"},
        {"stage": 1, "precision": "bf16", "gradients": "bf16"},
        {"stage": 3, "precision": "fp16", "gradients": "fp16"},
        {"stage": 1, "offload_optimizer": True},
        {"precision": "fp16", "extra": {"fp16": {"enabled": True, "hysteresis": 1}}},
        {"extra": {"steps_per_print": 5}},
        {"stage": 3, "extra": {"zero_optimization": {"sub_group_size": 700}}},
        {"extra": {"zero_optimization": {"reduce_bucket_size": 7}, "tensorboard": {}}},
        {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
        {
            "stage": 3,
            "offload_optimizer": True,
            "offload_parameters": True,
            "nvme_path": "/nvme",
        },
    ],
)
def test_what_works_is_not_refused(settings):
    assert problems_of(ZeroConfig(**settings)) == []


@pytest.fixture
def products():
    """Put back what torch does with products of float32."""
    yield torch.backends
    use_precision(ZeroConfig(precision="fp32"))


@pytest.mark.parametrize("precision", ["tf32", "fp32", "bf16"])
def test_float32_stays_float32_unless_tf32_is_asked_for(products, precision):
    use_precision(ZeroConfig(precision="tf32"))
    use_precision(ZeroConfig(precision=precision))
    found = {products.cuda.matmul.allow_tf32, products.cudnn.allow_tf32}
    assert found == {precision == "tf32"}
    wanted = "tf32" if precision == "tf32" else "ieee"
    for operations in (products.cuda.matmul, products.cudnn.conv, products.cudnn.rnn):
        assert operations.fp32_precision == wanted


def test_a_model_is_exported_in_a_process_that_trained(products):
    use_precision(ZeroConfig(precision="fp32"))
    layer, row = torch.nn.Linear(3, 2), torch.ones(1, 3)
    exported = torch.export.export(layer, (row,))
    assert torch.equal(exported.module()(row), layer(row))
