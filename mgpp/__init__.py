"""MGPP: prune large pretrained transformers under a mixture-Gaussian prior, sharded or not.

The method alone: torch and the standard library. `attach` prunes in a plain torch loop or under
DeepSpeed ZeRO.
"""

from mgpp.attaching import attach, grouped_parameters, parameter_groups
from mgpp.config import PruningConfig
from mgpp.coverage import Coverage, coverage_of
from mgpp.duration import Duration
from mgpp.masking.allocation import Allocation, Placement
from mgpp.methods import (
    GMP,
    METHODS,
    MGPP,
    ONE_SHOT,
    PINS,
    PLATON,
    Method,
    MGPPSaliency,
    Movement,
    OneShotMethod,
    SoftMovement,
    SparseGPT,
    SparseTransfer,
    Wanda,
    make_method,
    make_one_shot,
    setting,
    settings_of,
)
from mgpp.prior import MixtureGaussianPrior, add_prior_grad_, log_prior
from mgpp.prunable import select_prunable, towers_of, transposed_weights
from mgpp.pruner import Pruner, Pruning
from mgpp.schedule import PruningSchedule, SlabProbAnnealing
from mgpp.sharding.collectives import Collectives
from mgpp.sharding.shards import Shard
from mgpp.version import __version__

__all__ = [
    "GMP",
    "METHODS",
    "MGPP",
    "ONE_SHOT",
    "PINS",
    "PLATON",
    "Allocation",
    "Collectives",
    "Coverage",
    "Duration",
    "MGPPSaliency",
    "Method",
    "MixtureGaussianPrior",
    "Movement",
    "OneShotMethod",
    "Placement",
    "Pruner",
    "Pruning",
    "PruningConfig",
    "PruningSchedule",
    "Shard",
    "SlabProbAnnealing",
    "SoftMovement",
    "SparseGPT",
    "SparseTransfer",
    "Wanda",
    "__version__",
    "add_prior_grad_",
    "attach",
    "coverage_of",
    "grouped_parameters",
    "log_prior",
    "make_method",
    "make_one_shot",
    "parameter_groups",
    "select_prunable",
    "setting",
    "settings_of",
    "towers_of",
    "transposed_weights",
]
