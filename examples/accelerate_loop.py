"""Prune in a loop under Accelerate: attach to what `prepare` returned.

Run it with `python examples/accelerate_loop.py [FILE]` or `accelerate launch`; the pruner's state is
saved to FILE.
"""

import sys

import torch
from accelerate import Accelerator
from transformers import BertConfig, BertForSequenceClassification

import mgpp

path = sys.argv[1] if len(sys.argv) > 1 else "pruner.pt"
torch.manual_seed(0)
shape = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
model = BertForSequenceClassification(BertConfig(vocab_size=30, num_hidden_layers=2, **shape))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
num_steps, num_examples = 20, 160
tokens = torch.randint(30, (num_examples, 6))
dataset = [{"input_ids": row, "labels": (row[0] > 14).long()} for row in tokens]
accelerator = Accelerator()
batches = accelerator.prepare(torch.utils.data.DataLoader(dataset, batch_size=8))

model, optimizer = accelerator.prepare(model, optimizer)
config = {"sparsity": 0.9, "initial_sparsity": 0.3}
pruner = mgpp.attach((model, optimizer), config, num_steps, num_examples)
for batch in batches:
    accelerator.backward(model(**batch).loss)
    optimizer.step()
    optimizer.zero_grad()
sparsity = pruner.finish()
torch.save(pruner.state_dict(), path)

print(f"{sparsity:.2%} of {pruner.num_prunable:,} prunable weights are zero")
