"""Cores and memory that a node must have, by what the runs on it are planned to take."""

import json
import math
from collections.abc import Sequence

from pipeline.campaigns.grid import files_of_runs
from pipeline.errors import ConfigError, Problem
from pipeline.planner.plan import plan_run
from pipeline.runs.config import RunConfig, parse_config, read_config
from pipeline.runs.hardware import NO_GPUS, WITH_GPUS, settled
from pipeline.runs.upstream import resolve_upstream

GIB = 2**30


def runs_of(
    config: str, overrides: Sequence[str], *, campaign: bool, allow_code: bool = False
) -> list[RunConfig]:
    """Return the configurations of what is run: one, or those of a campaign.

    Args:
        config: the YAML file.
        overrides: `key=value` changes to it.
        campaign: whether it is a campaign.
        allow_code: whether they may name code from outside of mgpp.

    Raises:
        ConfigError: with what is wrong with one of them.
    """
    found = []
    for path, changes in files_of_runs(config, overrides, campaign=campaign):
        values, problems = read_config(path, changes)
        if not problems:
            values, problems = resolve_upstream(values, allow_code=allow_code)
        if problems:
            raise ConfigError(problems)
        found.append(parse_config(values, allow_code=allow_code))
    return found


def planned_cores(runs: Sequence[RunConfig], nodes: int) -> int:
    """Return the cores of each of so many nodes: of the workers that it holds."""
    return max(workers_of_a_node(run, nodes) * run.cluster.cpus_per_worker for run in runs)


def planned_memory_gib(runs: Sequence[RunConfig], nodes: int, *, has_gpus: bool) -> int:
    """Return the memory of each of so many nodes, in GiB, that its workers need.

    That is `Plan.node_bytes` of the largest run.

    Args:
        runs: that are run there, one at a time.
        nodes: that share the workers.
        has_gpus: whether devices have memory of their own.

    Raises:
        ConfigError: saying what to give, if a run cannot be planned here.
    """
    return max(_memory_gib(run, nodes, has_gpus) for run in _apart_in_size(runs))


def _memory_gib(run: RunConfig, nodes: int, has_gpus: bool) -> int:
    try:
        plan = plan_run(settled(run, WITH_GPUS if has_gpus else NO_GPUS))
    except ConfigError as error:
        reason = "; ".join(map(str, error.problems))
        raise ConfigError(
            [
                Problem(
                    "--memory-gib",
                    f"missing, and the run cannot be planned here: {reason}",
                    hint="give it",
                )
            ]
        ) from error
    return math.ceil(plan.node_bytes(workers_of_a_node(run, nodes), has_gpus=has_gpus) / GIB)


def workers_of_a_node(run: RunConfig, nodes: int) -> int:
    """Return how many workers of a run the fullest of so many nodes has."""
    return -(-run.cluster.num_workers // nodes)


def _apart_in_size(runs: Sequence[RunConfig]) -> list[RunConfig]:
    """Return one run of each size: a campaign's many differ in seeds and sparsities alone."""
    kinds: dict[str, RunConfig] = {}
    for run in runs:
        sections = {"model", "task", "zero", "cluster", "distill", "evaluate"}
        sizes = run.model_dump(mode="json", include=sections)
        sizes_of_train = {
            "batch_size",
            "micro_batch_size",
            "checkpoint_every",
            "checkpoint_writing",
        }
        train = run.train.model_dump(mode="json", include=sizes_of_train)
        method = run.prune.method.name
        kinds.setdefault(json.dumps([sizes, train, method], sort_keys=True), run)
    return list(kinds.values())
