"""Prune in a DeepSpeed loop under ZeRO 2: each rank prunes its shard, the threshold is exact over all.

Run it with `torchrun --nproc-per-node 2 examples/deepspeed_loop.py [FILE]`; rank R saves the pruner's
state to FILE-R. On CPUs it communicates by gloo. The optimizer's first parameter group must hold the
prunable weights: `mgpp.parameter_groups` sees to it.
"""

import os
import sys

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops import __compatible_ops__
from transformers import BertConfig, BertForSequenceClassification

import mgpp

path, rank = sys.argv[1] if len(sys.argv) > 1 else "pruner.pt", int(os.environ["RANK"])
get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
device = get_accelerator().current_device_name()
__compatible_ops__["deepspeed_shm_comm"] = False  # spare CPUs a minute of compiling an operator
backend = "gloo" if device == "cpu" else None  # None: the accelerator's own
deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False)
deepspeed_config = {
    "train_micro_batch_size_per_gpu": 8,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {"stage": 2},
}
torch.manual_seed(0)
shape = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
model = BertForSequenceClassification(BertConfig(vocab_size=30, num_hidden_layers=2, **shape))
num_steps, num_examples = 20, 320
tokens = torch.randint(30, (num_examples, 6), device=device)
dataset = [{"input_ids": row, "labels": (row[0] > 14).long()} for row in tokens]
sampler = torch.utils.data.DistributedSampler(dataset)
batches = torch.utils.data.DataLoader(dataset, batch_size=8, sampler=sampler)

config = mgpp.PruningConfig(sparsity=0.9, initial_sparsity=0.3)
optimizer = torch.optim.AdamW(mgpp.parameter_groups(model, config), lr=1e-3)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config)
pruner = mgpp.attach(engine, config, num_steps, num_examples)
for batch in batches:
    engine.backward(engine(**batch).loss)
    engine.step()
sparsity = pruner.finish()  # counted over all ranks, so all call it
torch.save(pruner.state_dict(), f"{path}-{rank}")  # every rank its own

if rank == 0:
    print(f"{sparsity:.2%} of {pruner.num_prunable:,} prunable weights are zero")
