"""How much memory packing takes of a model of 0.5 billion weights, in a process of its own."""

import sys

import pytest
import torch
from safetensors import safe_open

from mgpp.tensor_file import TensorFile
from tests.processes import run

HIDDEN, INNER, LAYERS, WORDS = 1024, 4096, 24, 32000
SHAPES = {
    "model.embed_tokens.weight": (WORDS, HIDDEN),
    "lm_head.weight": (WORDS, HIDDEN),
    **{
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(LAYERS)
        for name, shape in {
            **dict.fromkeys((f"self_attn.{n}_proj" for n in "qkvo"), (HIDDEN, HIDDEN)),
            **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (INNER, HIDDEN)),
            "mlp.down_proj": (HIDDEN, INNER),
        }.items()
    },
}
PROGRAM = """
import sys, time
from pathlib import Path
from mgpp.sparse.checkpoint import pack_checkpoint, unpack_checkpoint
status = Path("/proc/self/status")
peak = lambda: 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
before, start = peak(), time.process_time()
found = {"pack": pack_checkpoint, "unpack": unpack_checkpoint}[sys.argv[1]](
    Path(sys.argv[2]), Path(sys.argv[3])
)
print(peak() - before, found.plain_bytes, found.packed_bytes, time.process_time() - start)
"""


def write(folder):
    """Write a Llama's weights, nine in ten of the layers' zero, a tensor at a time."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    generator = torch.Generator().manual_seed(0)
    with (folder / "model.safetensors").open("wb") as stream:
        tensors = {name: (torch.bfloat16, shape) for name, shape in SHAPES.items()}
        file = TensorFile(stream, tensors, {"format": "pt"})
        for name in file.order:
            values = torch.randn(SHAPES[name], generator=generator)
            if "layers" in name:
                values[torch.rand(SHAPES[name], generator=generator) < 0.9] = 0
            file.write(name, values.bfloat16())
        file.finish()


@pytest.mark.torture
def test_a_model_of_half_a_billion_weights_takes_less_than_a_gigabyte(tmp_path):
    write(tmp_path / "plain")
    for command, source, target in (("pack", "plain", "packed"), ("unpack", "packed", "again")):
        arguments = [command, str(tmp_path / source), str(tmp_path / target)]
        done = run([sys.executable, "-c", PROGRAM, *arguments], timeout=1800)
        assert done.returncode == 0, done.stderr
        memory, plain_bytes, packed_bytes, _ = map(float, done.stdout.split())
        assert 0 < memory < 2**30, done.stdout
        assert packed_bytes < 0.35 * plain_bytes
    files = [tmp_path / name / "model.safetensors" for name in ("plain", "again")]
    with safe_open(files[0], "pt") as plain, safe_open(files[1], "pt") as again:
        assert set(plain.keys()) == set(again.keys()) == set(SHAPES)
        for name in SHAPES:
            values = [file.get_tensor(name).view(torch.int16) for file in (plain, again)]
            assert torch.equal(*values), name
