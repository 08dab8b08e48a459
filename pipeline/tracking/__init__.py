"""Records of a training."""
