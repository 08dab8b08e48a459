"""What transformers would save of a model is read off it without values."""

import pytest
import torch
import transformers

from pipeline.errors import ConfigError
from pipeline.saving.contents import EXPORT_BYTES, contents_of, converted, export_bytes
from tests import tiny
from tests.pipeline.saving.models import joined_config


def on_meta(auto, config):
    with torch.device("meta"):
        return auto.from_config(config)


def mixtral():
    return tiny.config("mixtral", num_local_experts=4, head_dim=4, pad_token_id=0)


def test_experts_are_ranges_of_the_parameter_that_holds_them():
    model = on_meta(transformers.AutoModelForCausalLM, mixtral())
    units = {unit.keys[0]: unit for unit in contents_of(model)}
    both = units["model.layers.1.mlp.experts.gate_up_proj"]
    assert both.direct
    assert both.reshapes
    prefix = "model.layers.1.block_sparse_moe.experts"
    # Of each expert the gate and then what goes up, which is how they lie in the parameter.
    assert list(both.outputs) == [
        f"{prefix}.{i}.{w}.weight" for i in range(4) for w in ("w1", "w3")
    ]
    assert {spec.shape for spec in both.outputs.values()} == {(64, 16)}
    real = transformers.AutoModelForCausalLM.from_config(mixtral())
    value = real.get_parameter(both.keys[0]).detach()
    made = converted(real, {both.keys[0]: value})
    assert torch.equal(torch.cat([made[n].reshape(-1) for n in both.outputs]), value.reshape(-1))
    assert export_bytes(list(units.values())) == EXPORT_BYTES


def test_weights_that_become_one_are_together_by_layer():
    model = on_meta(transformers.AutoModelForMaskedLM, joined_config())
    units = contents_of(model)
    joined = [unit for unit in units if not unit.direct]
    assert [unit.keys[0].split(".")[2] for unit in joined] == ["0", "1"]
    assert all(len(unit.keys) == 3 and len(unit.outputs) == 1 for unit in joined)
    size = sum(p.numel() for p in model.parameters()) * 4
    assert export_bytes(units) >= EXPORT_BYTES + size  # it is loaded whole


def test_a_tied_weight_is_there_once_and_tables_that_are_computed_are_not():
    config = tiny.config("marian", vocab_size=32, pad_token_id=0, decoder_vocab_size=32)
    model = on_meta(transformers.AutoModelForSeq2SeqLM, config)
    names = [name for unit in contents_of(model) for name in unit.sources]
    assert len(names) == len(set(names))
    tables = {f"model.{stack}.embed_positions.weight" for stack in ("encoder", "decoder")}
    parameters = {name for name, _ in model.named_parameters()}
    assert tables <= parameters
    assert parameters - set(names) == tables


def test_a_trained_weight_that_is_not_saved_is_refused():
    config = tiny.config("marian", vocab_size=32, pad_token_id=0, decoder_vocab_size=32)
    model = on_meta(transformers.AutoModelForSeq2SeqLM, config)
    model.model.encoder.embed_positions.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"train\.freeze: .*encoder\.embed_positions\.weight"):
        contents_of(model)
