"""Train a model that is pruned already on a task, under `transformers.Trainer`, with its zeros kept.

Run it with `python examples/sparse_transfer.py [FOLDER]`. The model here is small and pruned on the spot;
give `from_pretrained` a pruned checkpoint instead. Without the callback every zero would be trained away.
"""

import sys

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import mgpp
from mgpp.integrations.transformers import PruningCallback

torch.manual_seed(0)
shape = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
model = BertForSequenceClassification(BertConfig(vocab_size=30, num_hidden_layers=2, **shape))
weights = [model.get_parameter(name).detach() for name in mgpp.select_prunable(model)]
magnitudes = torch.cat([weight.abs().view(-1) for weight in weights])
cut = magnitudes.kthvalue(int(0.9 * len(magnitudes))).values
for weight in weights:
    weight[weight.abs() <= cut] = 0.0
zeros = [weight == 0 for weight in weights]

tokens = torch.randint(30, (160, 6))
dataset = [{"input_ids": row, "labels": (row[0] > 14).long()} for row in tokens]
arguments = TrainingArguments(
    sys.argv[1] if len(sys.argv) > 1 else "trainer",
    max_steps=20,
    per_device_train_batch_size=8,
    report_to=[],
)

callback = PruningCallback({"method": "sparse-transfer"})
trainer = Trainer(model=model, args=arguments, train_dataset=dataset, callbacks=[callback])
trainer.train()

assert all(torch.equal(w == 0, zero) for w, zero in zip(weights, zeros, strict=True))
pruner = callback.pruner
print(f"{pruner.num_zeros():,} prunable weights are zero, as before: {pruner.sparsity():.2%}")
