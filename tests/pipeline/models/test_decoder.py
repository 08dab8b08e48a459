"""A decoder layer by layer does what the model does whole, whatever its family."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from mgpp import select_prunable
from pipeline.models.decoder import find_layers, layer_inputs, run_layer
from tests.tiny import DECODER_LAYERS, DECODER_WORDS, DECODERS, decoder
from tests.tiny import config as tiny_config


def rows_of_tokens(num_rows=3, length=10):
    generator = torch.Generator().manual_seed(1)
    return list(torch.randint(2, len(DECODER_WORDS), (num_rows, length), generator=generator))


@pytest.mark.parametrize("kind", DECODERS)
def test_layer_after_layer_is_the_model(kind):
    model = decoder(kind)
    layers = find_layers(model, select_prunable(model))
    assert len(layers) == DECODER_LAYERS
    rows = rows_of_tokens()
    hidden, calls = layer_inputs(model, layers, rows)
    outputs = []
    hook = layers[-1].module.register_forward_hook(lambda _, args, output: outputs.append(output))
    with torch.no_grad():
        for row, states in zip(rows, hidden, strict=True):
            for layer, call in zip(layers, calls, strict=True):
                states = run_layer(layer.module, call, states)  # noqa: PLW2901
            outputs.clear()
            model(input_ids=row.unsqueeze(0))
            whole = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
            torch.testing.assert_close(states, whole, rtol=0, atol=0)
    hook.remove()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_projections_are_those_selected_by_layer(kind):
    model = decoder(kind)
    names = select_prunable(model)
    layers = find_layers(model, names)
    assert [name for layer in layers for name in layer.matrices] == names
    weights = dict(model.named_parameters())
    for index, layer in enumerate(layers):
        for name, matrix in layer.matrices.items():
            projection = matrix.module
            assert f".{index}." in name
            assert projection.weight is weights[name]
            inputs = torch.randn(5, matrix.rows().shape[1])
            expected = projection(inputs) - (projection.bias if projection.bias is not None else 0)
            torch.testing.assert_close(inputs @ matrix.rows().T, expected)
            matrix.rows().zero_()  # a view
            assert not projection.weight.any()


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_each_expert_has_matrices_of_its_own(kind):
    model = decoder(kind)
    width, inner = model.config.hidden_size, model.config.intermediate_size
    layer = find_layers(model, select_prunable(model))[1]
    for attribute, shape in (("gate_up_proj", (2 * inner, width)), ("down_proj", (width, inner))):
        weight = f"model.layers.1.mlp.experts.{attribute}"
        found = {n: m for n, m in layer.matrices.items() if m.weight == weight}
        assert list(found) == [f"{weight}[{expert}]" for expert in range(4)]
        assert {tuple(matrix.rows().shape) for matrix in found.values()} == {shape}
        found[f"{weight}[2]"].rows().zero_()  # a view
        emptied = [not bool(expert.any()) for expert in model.get_parameter(weight)]
        assert emptied == [False, False, True, False]


def test_experts_whose_inputs_are_not_known_are_refused_with_what_to_exclude():
    config = tiny_config("llama4_text", num_local_experts=2, interleave_moe_layer_step=1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"exclude: \['.*experts\.gate_up_proj'\]"):
        find_layers(model, select_prunable(model))


def test_weights_that_are_not_those_of_the_layers_projections():
    model = decoder("llama")
    with pytest.raises(ValueError, match="has no list of decoder layers that holds all prunable"):
        find_layers(model, [*select_prunable(model), "lm_head.weight"])
    with pytest.raises(
        ValueError, match=r"embed_tokens\.weight is not the weight of a linear projec"
    ):
        find_layers(model, ["model.embed_tokens.weight"])


class Chain(nn.Module):
    """Two layers run as `order` says, on hidden states scaled by `scale` in between."""

    def __init__(self, order, scale=1.0, extra=False):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
        self.order, self.scale, self.extra = order, scale, extra

    @property
    def base_model(self):
        return self

    def forward(self, input_ids, use_cache):
        hidden = self.embed(input_ids)
        for index in self.order:
            extra = {"ids": input_ids} if self.extra else {}
            hidden = self.layers[index](hidden, **extra)
            hidden = hidden * self.scale if self.scale != 1 else hidden
        return hidden


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Chain([1, 0]), "does not run its 2 layers one after the other"),
        (Chain([0, 1, 1]), "does not run its 2 layers one after the other"),
        (Chain([]), "does not run its 2 layers one after the other"),
        (Chain([0, 1], scale=2.0), "does not run its 2 layers one after the other"),
        (Chain([0, 1], extra=True), "are given more of a row than its hidden states"),
    ],
)
def test_layers_that_are_no_chain(model, message):
    layers = find_layers(model, ["layers.0.0.weight", "layers.1.0.weight"])
    rows = [torch.tensor([1, 2]), torch.tensor([3, 4])]
    with pytest.raises(ValueError, match=message):
        layer_inputs(model, layers, rows)
    assert all("forward" not in vars(layer.module) for layer in layers)
