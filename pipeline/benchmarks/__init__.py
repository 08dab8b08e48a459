"""How fast a checkpoint runs on this machine's CPU, dense, in fewer bits, and sparse."""
