"""Where artifacts and checkpoints are kept."""
