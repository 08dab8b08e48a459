"""Models with zeros: checkpoints that leave them out, and linear layers that pass them over."""

from mgpp.sparse.loading import load
from mgpp.sparse.sparsify import Sparsified, sparsify_

__all__ = ["Sparsified", "load", "sparsify_"]
