"""GMP, gradual magnitude pruning (Zhu & Gupta, arXiv 1710.01878): MGPP's schedule, no prior."""

from mgpp.methods.base import Method


class GMP(Method):
    """Gradual magnitude pruning."""

    name = "gmp"
