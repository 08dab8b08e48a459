"""Prune in a plain torch loop: 90% of a small transformer's matrices, with torch alone installed.

Run it with `python examples/own_loop.py [FILE]`; the pruner's state is saved to FILE, whence
`pruner.load_state_dict` resumes. It takes seconds on a CPU and works under DistributedDataParallel too.
"""

import sys
from types import SimpleNamespace

import torch
from torch import nn

import mgpp

torch.manual_seed(0)
path = sys.argv[1] if len(sys.argv) > 1 else "pruner.pt"


class Classifier(nn.Module):
    """A transformer of two layers that tells sequences of tokens apart; gives its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 16)
        layer = nn.TransformerEncoderLayer(16, nhead=2, dim_feedforward=32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.head = nn.Linear(16, 2)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        logits = self.head(self.encoder(self.embedding(input_ids)).mean(dim=1))
        return SimpleNamespace(logits=logits, loss=nn.functional.cross_entropy(logits, labels))


num_steps, num_examples = 20, 160
tokens = torch.randint(30, (num_examples, 6))
dataset = [{"input_ids": row, "labels": (row[0] > 14).long()} for row in tokens]
batches = torch.utils.data.DataLoader(dataset, batch_size=8)
model = Classifier()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

config = mgpp.PruningConfig(sparsity=0.9, initial_sparsity=0.3)
pruner = mgpp.attach((model, optimizer), config, num_steps, num_examples)
for batch in batches:
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
sparsity = pruner.finish()
torch.save(pruner.state_dict(), path)

weights = [dict(model.named_parameters())[name] for name in mgpp.select_prunable(model)]
zeros, total = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
assert sparsity == zeros / total
print(f"{zeros:,} of {total:,} prunable weights are zero: {sparsity:.2%}")
