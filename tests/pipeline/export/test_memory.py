"""How much memory and disk the export of half a billion weights takes, to a folder and to S3."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from mgpp import select_prunable
from pipeline.models.weights import fingerprints
from tests import tiny
from tests.pipeline.export.test_checkpoint import CARD
from tests.processes import run

GIB = 2**30
HALF_A_BILLION = {
    "vocab_size": 32_000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}


def write(folder, **sizes):
    """Write a random Llama in bfloat16, nine in ten of its prunable weights zero; return its bytes."""
    torch.manual_seed(0)
    config = tiny.config("llama", **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    names = select_prunable(model)
    with torch.no_grad():
        for name in names:
            weight = model.get_parameter(name)
            weight[torch.rand(weight.shape) < 0.9] = 0
    model.save_pretrained(folder)
    tiny.decoder_tokenizer().save_pretrained(folder)
    found = fingerprints(model.named_parameters(), names)
    (folder / "fingerprints.json").write_text(json.dumps(found))
    (folder / "card.json").write_text(json.dumps(CARD))
    return sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.torture
@pytest.mark.timeout(2400)
def test_half_a_billion_weights_take_less_than_a_gigabyte(tmp_path, bucket):
    size = write(tmp_path / "trained", **HALF_A_BILLION)
    write(tmp_path / "small")
    assert size > 0.9e9
    found = {}
    for name, url in (("local", str(tmp_path / "local")), ("s3", f"{bucket}/{tmp_path.name}")):
        folders = [str(tmp_path / "trained"), str(tmp_path / "small"), url, str(tmp_path / name)]
        program = [sys.executable, "-m", "tests.pipeline.export.memory_program", *folders]
        done = run(program, timeout=1100, env={"MALLOC_MMAP_THRESHOLD_": "65536"})
        assert done.returncode == 0, done.stderr[-4000:]
        found[name] = json.loads(done.stdout.splitlines()[-1])
        sys.stdout.write(f"{name}: {found[name]['rise']:,} {found[name]['total']:,}\n")
    assert found["s3"]["files"] == found["local"]["files"]
    assert sum(entry["bytes"] for entry in found["s3"]["files"].values()) > size
    for each in found.values():
        assert each["rise"] < each["total"] < GIB
    assert not list((tmp_path / "s3").rglob("*.safetensors"))
