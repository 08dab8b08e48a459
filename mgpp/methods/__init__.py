"""The pruning methods. To add one: one file with a subclass of `Method`, one line here."""

from mgpp.methods.base import Method
from mgpp.methods.gmp import GMP
from mgpp.methods.mgpp import MGPP

METHODS: dict[str, type[Method]] = {"mgpp": MGPP, "gmp": GMP}

__all__ = ["GMP", "METHODS", "MGPP", "Method"]
