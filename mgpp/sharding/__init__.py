"""A rank's shards of the weights, and what is counted over all ranks."""
