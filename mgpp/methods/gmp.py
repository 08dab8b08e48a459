"""GMP, gradual magnitude pruning (Zhu & Gupta, arXiv 1710.01878): MGPP's schedule, no prior."""

from dataclasses import dataclass

from mgpp.methods.base import Method


@dataclass(kw_only=True, eq=False)
class GMP(Method):
    """Gradual magnitude pruning, no prior."""

    name = "gmp"
    title = "Gradual magnitude pruning (GMP)"
