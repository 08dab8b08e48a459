"""Changes to a model's own configuration: nested ones, and what contradicts them."""

import pytest
from transformers import Gemma3Config

from pipeline.models.overrides import apply_overrides

LAYERS = ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"num_hidden_layers": 2},
            "layer_types: a list of 4 does not go with 2 layers; give model",
        ),
        ({"layer_types": LAYERS}, "layer_types: a list of 2 does not go with 4 layers; give model"),
        ({"num_layers_hidden": 2}, "num_layers_hidden: gemma3_text has no such setting"),
        ({"num_hidden_layers": 2, "layer_types": LAYERS}, None),
        ({"hidden_size": 8}, None),
    ],
)
def test_nested_changes(changes, line):
    config = Gemma3Config(text_config={"num_hidden_layers": 4})
    problems = [str(p) for p in apply_overrides(config, {"text_config": changes})]
    if line is None:
        assert problems == []
        assert {name: getattr(config.text_config, name) for name in changes} == changes
    else:
        (problem,) = problems
        assert problem.startswith(f"model.overrides.text_config.{line}")
