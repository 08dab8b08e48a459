"""Losses whose logits are made a slice at a time, against the models' own; and what they take."""

import pytest
import torch
import transformers
from torch._subclasses import FakeTensorMode

from pipeline.evaluation import head
from pipeline.evaluation.evaluate import EvaluateConfig
from pipeline.evaluation.head import TokenScorer, find_layers_output, logits_by_slices
from pipeline.tasks import make_task
from pipeline.tasks.base import UNLABELLED
from pipeline.tasks.causal_lm import CausalLMConfig
from pipeline.tasks.instruction import InstructionConfig
from pipeline.tasks.masked_lm import MaskedLMConfig
from tests import tiny
from tests.memory import LiveBytes
from tests.pipeline.architectures import ARCHITECTURES, CAUSAL, MASKED, config_of

CPU = torch.device("cpu")
TASKS = {
    "AutoModelForCausalLM": make_task(
        InstructionConfig(type="instruction", prompt=["a"], response="b")
    ),
    "AutoModelForMaskedLM": make_task(MaskedLMConfig(type="masked-lm")),
}
_SMALL = {"intermediate_size": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
# What comes after the head: caps, scales, biases, a projection.
MORE = {
    "gemma2": {"num_key_value_heads": 1, "final_logit_softcapping": 0.5},
    "cohere": {"num_key_value_heads": 1, "logit_scale": 0.25},
    "granite": {"num_key_value_heads": 1, "logits_scaling": 3.0},
    "phi": {},
    "gpt_neox": {},
    "falcon": {"alibi": False},
    "bloom": {},
    "gptj": {"rotary_dim": 2},
    "mistral": tiny.DECODERS["mistral"],
    "qwen2": tiny.DECODERS["qwen2"],
    "mpt": {},
    "electra": {},
    "distilbert": {},
}
_OF_MASKS = ("electra", "distilbert")
TABLE = {name: a for name, a in ARCHITECTURES.items() if a.task in (CAUSAL, MASKED)}


def settings_of(name):
    """Return the configuration of a tiny model, and the class that builds it."""
    if name in TABLE:
        return config_of(TABLE[name]), make_task(TABLE[name].task).auto_model
    kind = "AutoModelForMaskedLM" if name in _OF_MASKS else "AutoModelForCausalLM"
    return tiny.config(name, **{"vocab_size": 32, **_SMALL, **MORE[name]}), kind


def make(name):
    settings, kind = settings_of(name)
    torch.manual_seed(0)
    model = getattr(transformers, kind).from_config(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # as drawn, all tokens are about as likely
    return model, settings, kind


def draw_batch(rows=3, length=12):
    ids = torch.randint(4, 32, (rows, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :5] = labels[-1, 3:] = UNLABELLED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("name", [*TABLE, *MORE])
def test_losses_by_slices_are_the_models_own(name, monkeypatch):
    monkeypatch.setattr(head, "SLICE_BYTES", 4 * 32 * 5)  # five predictions
    model, settings, kind = make(name)
    layers = find_layers_output(settings, kind, trust_remote_code=False)
    assert layers is not None
    calls, widths = [], []
    model.get_submodule(layers).register_forward_hook(lambda *_: calls.append(1))
    given = draw_batch()
    task = TASKS[kind]
    with torch.inference_mode():
        outputs = model(**given)
        calls.clear()
        scorer = TokenScorer(task=task, model=model, layers=layers)
        score_tokens = task.score_tokens
        monkeypatch.setattr(
            type(task),
            "score_tokens",
            lambda _, logits, targets: widths.append(len(logits)) or score_tokens(logits, targets),
        )
        found = scorer.infer(given, CPU)
    expected = int((task.targets(given) != UNLABELLED).sum())
    assert found["num_tokens"].sum() == expected == sum(widths)
    assert max(widths) <= 5
    assert len(calls) == len(widths) == -(-expected // 5)
    loss = found["loss"].sum() / expected
    assert float(loss) == pytest.approx(float(outputs.loss), rel=2e-6)
    whole = task.predict(outputs, given)
    assert found.keys() == whole.keys()
    for key, values in found.items():
        torch.testing.assert_close(values, whole[key], rtol=2e-6, atol=2e-6)
    assert "forward" not in vars(model) | vars(model.get_submodule(layers))


def test_a_model_whose_layers_are_not_apart_from_its_head_is_scored_whole(monkeypatch):
    monkeypatch.setattr(head, "SLICE_BYTES", 4 * 32 * 5)
    model, _, kind = make("llama")
    scores = [
        TokenScorer(task=TASKS[kind], model=model, layers=layers).infer(draw_batch(), CPU)
        for layers in (None, "model")
    ]
    for name, values in scores[0].items():
        torch.testing.assert_close(values, scores[1][name], rtol=2e-6, atol=2e-6)


def test_a_head_that_mixes_positions_is_not_sliced():
    class Mixing(transformers.LlamaForCausalLM):
        def forward(self, input_ids, **kwargs):
            outputs = super().forward(input_ids, **kwargs)
            outputs.logits = outputs.logits - outputs.logits.mean(dim=1, keepdim=True)
            return outputs

    model = Mixing(config_of(ARCHITECTURES["llama"])).eval()
    assert head._layers_of(model) is None
    assert head._layers_of(make("llama")[0]) == "model"


def test_workers_may_make_more_slices_than_they_have_predictions():
    model, _, kind = make("gpt2")
    given = draw_batch(rows=1)
    given["labels"][0] = given["input_ids"][0]
    given["labels"][0, :10] = UNLABELLED
    scorers = [
        TokenScorer(task=TASKS[kind], model=model, layers="transformer", least_slices=least)
        for least in (1, 7)
    ]
    one, seven = (scorer.infer(given, CPU) for scorer in scorers)
    assert one["num_tokens"].tolist() == seven["num_tokens"].tolist() == [2]
    torch.testing.assert_close(one["loss"], seven["loss"])
    given["labels"][:] = UNLABELLED
    none = scorers[1].infer(given, CPU)
    assert (none["num_tokens"].tolist(), none["loss"].tolist()) == ([0], [0.0])


def test_states_of_another_shape_are_refused(monkeypatch):
    model = make("llama")[0]
    run_layers = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda input_ids, **_: run_layers(input_ids[:, :4]))
    inputs, slices = {"input_ids": torch.arange(4, 12)[None]}, (torch.tensor([0]),)
    with pytest.raises(ValueError, match=r"^model returns \(1, 4, 16\) for inputs of \(1, 8\)$"):
        logits_by_slices(model, "model", inputs, slices, lambda logits: None)


def test_live_bytes_are_counted():
    before = torch.zeros(1, 70)
    with LiveBytes() as live:
        before.t().view(-1)
        kept = torch.zeros(1000, dtype=torch.uint8)
        more = torch.zeros(500, dtype=torch.uint8).view(5, 100)
        del more
        kept.add_(1)
        kept.clone()
    assert (live.now, live.peak) == (1000, 2000)


def test_evaluation_of_8b_takes_a_fraction_of_its_logits():
    """The forward pass of a default batch, in bf16; nothing is computed and nothing allocated."""
    rows, length, vocabulary = EvaluateConfig().rows_of(2048), 2048, 128_256
    settings = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        use_cache=False,
    )
    task = make_task(CausalLMConfig(type="causal-lm", max_length=length))
    with FakeTensorMode(), torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16).eval()
        ids = torch.zeros(rows, length, dtype=torch.int64)
        scorer = TokenScorer(task=task, model=model, layers="model")
        with LiveBytes() as sliced:
            scorer.scores({"input_ids": ids}, torch.arange(rows * length), ids.flatten())
        with LiveBytes() as whole:
            # As it was: with the loss that transformers computes, and a cache.
            model(input_ids=ids, labels=ids, use_cache=True)
    logits = rows * length * vocabulary * 4
    assert sliced.peak < 0.25 * logits < 2 * logits < whole.peak
