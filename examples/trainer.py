"""Prune under `transformers.Trainer` with one callback.

Run it with `python examples/trainer.py [FOLDER]`; checkpoints in FOLDER hold the pruner's state, and
`trainer.train(resume_from_checkpoint=True)` resumes pruning with the training.
"""

import sys

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from mgpp.integrations.transformers import PruningCallback

torch.manual_seed(0)
shape = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
model = BertForSequenceClassification(BertConfig(vocab_size=30, num_hidden_layers=2, **shape))
tokens = torch.randint(30, (160, 6))
dataset = [{"input_ids": row, "labels": (row[0] > 14).long()} for row in tokens]
arguments = TrainingArguments(
    sys.argv[1] if len(sys.argv) > 1 else "trainer",
    max_steps=20,
    per_device_train_batch_size=8,
    report_to=[],
)

callback = PruningCallback({"sparsity": 0.9, "initial_sparsity": 0.3})
trainer = Trainer(model=model, args=arguments, train_dataset=dataset, callbacks=[callback])
trainer.train()

pruner = callback.pruner
print(f"{pruner.num_zeros():,} prunable weights are zero: {pruner.sparsity():.2%}")
