"""Which weights are pruned: how many where, in what groups, and the search for them over all ranks."""
