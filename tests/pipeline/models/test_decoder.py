"""A decoder layer by layer does what the model does whole, whatever its family."""

import pytest
import torch
from torch import nn

from mgpp import select_prunable
from pipeline.models.decoder import find_layers, layer_inputs, run_layer, weight_rows
from tests.tiny import DECODER_LAYERS, DECODER_WORDS, DECODERS, decoder


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
    assert [name for layer in layers for name in layer.projections] == names
    weights = dict(model.named_parameters())
    for index, layer in enumerate(layers):
        for name, projection in layer.projections.items():
            assert f".{index}." in name
            assert projection.weight is weights[name]
            inputs = torch.randn(5, weight_rows(projection).shape[1])
            expected = projection(inputs) - (projection.bias if projection.bias is not None else 0)
            torch.testing.assert_close(inputs @ weight_rows(projection).T, expected)
            weight_rows(projection).zero_()  # a view
            assert not projection.weight.any()


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
