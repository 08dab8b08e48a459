"""MGPP: prune large pretrained transformers under a mixture-Gaussian prior, sharded or not.

The method alone: torch and the standard library. `mgpp.backends.torch.attach` prunes in a plain torch
loop, `mgpp.backends.deepspeed.attach` under ZeRO.
"""

from mgpp.collectives import Collectives
from mgpp.methods import GMP, METHODS, MGPP, Method
from mgpp.prior import MixtureGaussianPrior, add_prior_grad_, log_prior
from mgpp.pruner import Pruner, Pruning
from mgpp.schedule import PruningSchedule, SlabProbAnnealing
from mgpp.selection import select_prunable
from mgpp.shards import Shard
from mgpp.version import __version__

__all__ = [
    "GMP",
    "METHODS",
    "MGPP",
    "Collectives",
    "Method",
    "MixtureGaussianPrior",
    "Pruner",
    "Pruning",
    "PruningSchedule",
    "Shard",
    "SlabProbAnnealing",
    "__version__",
    "add_prior_grad_",
    "log_prior",
    "select_prunable",
]
