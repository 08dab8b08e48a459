"""Training under DeepSpeed: the loop, the engine, batches, checkpoints, distillation."""
