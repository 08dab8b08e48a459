"""Pruning inside other libraries' training loops."""
