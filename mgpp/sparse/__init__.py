"""Models with zeros: checkpoints that leave them out, and linear layers that pass them over."""
