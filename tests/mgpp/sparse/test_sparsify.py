"""Which layers are replaced, by speeds that are given; and that models then compute the same."""

import json

import pytest
import torch
from torch import nn
from transformers import (
    BartForConditionalGeneration,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    T5ForConditionalGeneration,
)

from mgpp.sparse import speed
from mgpp.sparse.linear import SparseLinear
from mgpp.sparse.sparsify import sparsify_
from mgpp.sparse.speed import SpeedTable
from tests import tiny

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch has no MKL")

SHORT = {"max_new_tokens": 5, "do_sample": False, "decoder_start_token_id": 2}


class Table:
    """Speeds that are given."""

    def __init__(self, *speedups):
        self.given = speedups

    def speedups(self, weight, tokens):
        assert weight.is_contiguous()
        return 32, list(self.given)


def pruned(head, sparsity=0.9, **changes):
    model = tiny.model(head, **changes).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data[torch.rand(parameter.shape) < sparsity] = 0
    return model


@pytest.mark.parametrize(
    ("head", "changes"),
    [
        (BertForSequenceClassification, {}),
        (GPT2LMHeadModel, {}),
        (LlamaForCausalLM, {"num_key_value_heads": 2}),
        (BartForConditionalGeneration, {}),
        (T5ForConditionalGeneration, {}),
    ],
)
def test_a_model_computes_the_same(head, changes):
    model = pruned(head, **changes)
    inputs = {"input_ids": torch.randint(4, 30, (2, 11))}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(4, 30, (2, 5))
    with torch.inference_mode():
        expected = model(**inputs).logits
        words = None
        if model.can_generate():
            words = model.generate(inputs["input_ids"], **SHORT)
    state = model.state_dict()
    found = sparsify_(model, table=Table(2.0, 2.0, 2.0))
    assert found.replaced
    layers = {n for n, m in model.named_modules() if isinstance(m, SparseLinear)}
    assert layers == found.replaced.keys()
    with torch.inference_mode():
        logits = model(**inputs).logits
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        if words is not None:
            again = model.generate(inputs["input_ids"], **SHORT)
            assert torch.equal(again, words)
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], state[name]) for name in state)
    model.load_state_dict(state)


def test_why_layers_stay_dense():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.sparse = nn.Linear(8, 8)
            self.dense = nn.Linear(8, 8)
            self.brief = nn.Linear(8, 8).bfloat16()
            self.tied = nn.Linear(8, 8)
            self.also = nn.Embedding(8, 8)
            self.also.weight = self.tied.weight
            self.attention = nn.MultiheadAttention(8, 2)
            for parameter in self.parameters():
                parameter.data.zero_()
            self.dense.weight.data.fill_(1.0)

    model = Net()
    found = sparsify_(model, table=Table(1.5, 0.96))
    assert found.replaced == {"sparse": pytest.approx((1.5 * 0.96) ** 0.5)}
    assert found.kept == {
        "dense": "0% zeros",
        "brief": "in bfloat16; sparse layers compute in float32",
        "tied": "shared with another layer",
    }
    assert not isinstance(model.attention.out_proj, SparseLinear)


@pytest.mark.parametrize("speedups", [(3.0, 0.9), (0.99, 0.99)])
def test_what_is_slower_stays_dense(speedups):
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight.data.zero_()
    found = sparsify_(model, table=Table(*speedups))
    assert found.kept == {"0": f"not faster: {min(speedups):.2f} times at worst"}
    assert type(model[0]) is nn.Linear


def test_without_mkl_all_stay_dense(monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight.data.zero_()
    assert sparsify_(model).kept == {"0": "this torch has no MKL"}


def test_speeds_are_measured_once_and_remembered(tmp_path, monkeypatch):
    measured = []

    def interleaved(works, rounds):
        measured.append(len(works))
        for work in works:
            work()
        return (
            [float(3 - i) for i in range(len(works))] if len(works) == 2 else [4.0, 2.0, 3.0, 5.0]
        )

    monkeypatch.setattr(speed, "_interleaved", interleaved)
    weight = torch.zeros(16, 8)
    weight[0] = 1
    file = tmp_path / "new" / "speeds.json"
    assert SpeedTable(file).speedups(weight, (1, 4)) == (32, [1.5, 1.5])
    assert measured == [4, 2, 2]
    assert SpeedTable(file).speedups(weight.flip(0), (1, 4)) == (32, [1.5, 1.5])
    assert len(measured) == 3  # of its shape and sparsity there is one already
    SpeedTable(file).speedups(weight[:8], (1, 4))
    SpeedTable(file).speedups(weight, (1, 4, 8))
    assert len(measured) == 3 + 3 + 4
    (machine,) = json.loads(file.read_text())
    assert machine.endswith(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    file.write_text("damaged")
    assert SpeedTable(file).speedups(weight, (1,)) == (32, [1.5])


def test_a_real_measurement():
    weight = torch.zeros(256, 256)
    weight[::16, ::16] = 1
    block, found = speed._measured(weight, (1, 64))
    assert block in speed.BLOCKS
    assert list(found) == [1, 64]
    assert all(ratio > 0 for ratio in found.values())
