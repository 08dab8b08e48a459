"""Sparse transfer: a model that was pruned upstream is trained on another task, its zeros kept."""

from dataclasses import dataclass

from mgpp.methods.base import Method


@dataclass(kw_only=True, eq=False)
class SparseTransfer(Method):
    """Sparse transfer: what is zero as training begins stays zero, and nothing else is pruned.

    The second of two steps (arXiv 2411.00969; Kurtic et al., arXiv 2203.07259): the first prunes a model
    upstream, on its pretraining task. The zeros are the mask, whoever made them; a checkpoint of another
    provenance may hold some that no pruning meant, and those are kept too.
    """

    name = "sparse-transfer"
    title = "Sparse transfer (the mask of the model it began from)"
    keeps_zeros = True
