"""The `prune` section, and pruning in one shot."""
