"""A planted sparse transformer: a teacher of known structure, its samples, and how much is found.

The student is told everything but three kinds of matrices, which it begins with under dense Gaussian
noise as large as the smallest true weight. That makes the structure well-defined:

- Hidden units may be permuted without changing the function, but no other permutation is near the start.
- A change of basis between query and key, or value and output, would make any number of sparse structures
  of one function, and so would a factor between the two inputs of a gated unit: queries, keys, values and
  up-projections are known and fixed.
- LayerNorm hides shifts along the ones; this model's RMSNorm does not.
- Every hidden unit is alive: none has all its weights in, or all its weights out, at zero.
"""

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from torch import Tensor
from transformers import AutoModelForTokenClassification

from mgpp import select_prunable
from tests import tiny

KNOWN = ("*.q_proj.weight", "*.k_proj.weight", "*.v_proj.weight", "*.up_proj.weight")
VOCABULARY, LENGTH, WIDTH, FEED_FORWARD = 24, 6, 16, 32
SMALLEST, LARGEST = 0.3, 1.2  # of the true weights' magnitudes
NOISE = 0.1  # standard deviation of what is added to the teacher's outputs, which have about 1


def plant_teacher(seed: int, sparsity: float = 0.9) -> tuple[Any, list[str]]:
    """Return a one-layer Llama for token classification with a planted mask.

    Args:
        seed: of its weights and mask.
        sparsity: exactly int(N * sparsity) of the N weights of the planted matrices are zero; the others
            have magnitudes from SMALLEST to LARGEST.

    Returns:
        The model, and the names of the planted matrices: attention's output, gate and down-projection.

    Raises:
        ValueError: if so few weights are left that hidden units would be dead.
    """
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForTokenClassification.from_config(
        tiny.config(
            "llama",
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=1,
            intermediate_size=FEED_FORWARD,
            max_position_embeddings=LENGTH,
            num_labels=WIDTH,
            classifier_dropout=0.0,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    names = select_prunable(model, exclude=KNOWN)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        weights["model.embed_tokens.weight"].normal_(generator=generator)
        weights["score.bias"].zero_()
        for name, weight in weights.items():
            if name == "score.weight" or "proj" in name:
                weight.normal_(0, WIDTH**-0.5, generator=generator)
        keep = _plant_mask(
            {name: tuple(weights[name].shape) for name in names}, sparsity, generator
        )
        for name in names:
            sizes = torch.rand(weights[name].shape, generator=generator)
            signs = torch.randint(2, weights[name].shape, generator=generator) * 2 - 1
            weights[name].copy_((SMALLEST + (LARGEST - SMALLEST) * sizes) * signs * keep[name])
        tokens = torch.randint(VOCABULARY, (1024, LENGTH), generator=generator)
        weights["score.weight"].div_(predict(model, tokens).std())
    return model.eval(), names


def _plant_mask(
    shapes: Mapping[str, tuple[int, ...]], sparsity: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Draw the true weights' places: in each row of a gate and column of a down-projection, then any."""
    order = {}
    for name, shape in shapes.items():
        rank = torch.rand(shape, generator=generator)
        if "gate" in name:
            rank.scatter_(1, rank.argmax(dim=1, keepdim=True), 2.0)
        if "down" in name:
            rank.scatter_(0, rank.argmax(dim=0, keepdim=True), 2.0)
        order[name] = rank
    flat = torch.cat([rank.reshape(-1) for rank in order.values()])
    num_zeros = int(flat.numel() * sparsity)
    if flat.numel() - num_zeros < int((flat == 2).sum()):
        raise ValueError(f"sparsity {sparsity} leaves hidden units without weights; give less")
    keep = torch.ones_like(flat, dtype=torch.bool)
    keep[flat.argsort(stable=True)[:num_zeros]] = False
    parts = keep.split([rank.numel() for rank in order.values()])
    return {n: part.view(shapes[n]) for n, part in zip(order, parts, strict=True)}


@torch.no_grad()
def predict(model: Any, tokens: Tensor) -> Tensor:
    """Return the model's outputs, (rows, LENGTH, WIDTH), for tokens (rows, LENGTH)."""
    return torch.cat([model(input_ids=part).logits for part in tokens.split(1024)])


def draw_samples(teacher: Any, n: int, seed: int, noise: float = NOISE) -> tuple[Tensor, Tensor]:
    """Return n rows of random tokens and the teacher's outputs for them with Gaussian noise."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (n, LENGTH), generator=generator)
    outputs = predict(teacher, tokens)
    return tokens, outputs + noise * torch.randn(outputs.shape, generator=generator)


def load_samples(*, n: int, seed: int = 0, sparsity: float = 0.9, fresh: int = 1024) -> DatasetDict:
    """Return samples of a planted teacher as `input_ids` and `labels` (a vector for each token).

    Args:
        n: training rows, with noise.
        seed: of the teacher and the rows.
        sparsity: of the teacher.
        fresh: validation rows, without noise.
    """
    teacher, _ = plant_teacher(seed, sparsity)
    parts = {
        "train": draw_samples(teacher, n, seed + 1),
        "validation": draw_samples(teacher, fresh, seed + 2, noise=0.0),
    }
    return DatasetDict(
        {
            name: Dataset.from_dict({"input_ids": tokens.tolist(), "labels": outputs.tolist()})
            for name, (tokens, outputs) in parts.items()
        }
    )


def make_student(teacher: Any, names: list[str], seed: int, noise: float = SMALLEST) -> Any:
    """Return a copy of the teacher with noise on its planted matrices; only these are trained."""
    generator = torch.Generator().manual_seed(seed)
    student = AutoModelForTokenClassification.from_config(teacher.config)
    student.load_state_dict(teacher.state_dict())
    student.requires_grad_(False)
    for name in names:
        weight = student.get_parameter(name)
        weight.data.add_(noise * torch.randn(weight.shape, generator=generator))
        weight.requires_grad_(True)
    return student


def support_metrics(found: Tensor, true: Tensor) -> dict[str, float]:
    """Compare supports, two bool tensors of one shape: precision, recall, F1 and Jaccard index."""
    hits = int((found & true).sum())
    num_found, num_true = int(found.sum()), int(true.sum())
    union = num_found + num_true - hits
    return {
        "precision": hits / num_found if num_found else 0.0,
        "recall": hits / num_true if num_true else 0.0,
        "f1": 2 * hits / (num_found + num_true) if num_found + num_true else 0.0,
        "jaccard": hits / union if union else 0.0,
    }
