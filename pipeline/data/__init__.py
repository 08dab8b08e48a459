"""The data stage and where rows come from."""
