"""A rank's pieces of the weights, and what is counted over all ranks."""
