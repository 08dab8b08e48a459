"""What zeros save on a CPU: BERT-base's shape, dense over sparse, in turn.

python -m tests.bench.sparse OUT
"""

import copy
import json
import sys
import time
from pathlib import Path
from statistics import median

import torch
from transformers import BertConfig, BertModel

from mgpp.sparse.sparsify import sparsify_

ROUNDS = 20
SIZES = ((1, 128), (8, 128))


def pruned(sparsity: float) -> torch.nn.Module:
    """Return a random BERT-base of whose encoder's matrices so much is zero."""
    torch.manual_seed(0)
    model = BertModel(BertConfig()).eval()
    for parameter in model.encoder.parameters():
        if parameter.dim() == 2:
            parameter.data[torch.rand(parameter.shape) < sparsity] = 0
    return model


def seconds(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Return how long a forward pass takes."""
    since = time.perf_counter()
    model(tokens)
    return time.perf_counter() - since


def main(out: str) -> None:
    """Measure and write the ratios."""
    found: dict[str, float] = {"sparse_num_threads": torch.get_num_threads()}
    for sparsity in (0.9, 0.95):
        dense = pruned(sparsity)
        sparse = copy.deepcopy(dense)
        sparsify_(sparse)
        for rows, length in SIZES:
            tokens = torch.randint(30_000, (rows, length))
            with torch.inference_mode():
                far = (sparse(tokens)[0] - dense(tokens)[0]).abs().max() / dense(tokens)[
                    0
                ].abs().max()
                assert far <= 1e-5, far
                rounds = [(seconds(dense, tokens), seconds(sparse, tokens)) for _ in range(ROUNDS)]
            before, after = (median(times) for times in zip(*rounds, strict=True))
            found[f"sparse_speedup_{sparsity:.0%}_{rows}x{length}"] = before / after
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
