"""The trained model written by all workers, each its own file, and what it is compared with later."""
