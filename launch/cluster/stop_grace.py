"""How long what runs on a cluster may take to save its steps once it is asked to stop."""

from collections.abc import Sequence

from pipeline.campaigns.grid import files_of_runs
from pipeline.runs.config import ClusterConfig, parse_sections, read_config


def stop_grace_of(config: str, overrides: Sequence[str], *, campaign: bool) -> int:
    """Return the longest `cluster.stop_grace_s` of what is run, seconds.

    Args:
        config: the YAML file of a run or campaign, which is right.
        overrides: `key=value` changes to it.
        campaign: whether it is a campaign.
    """
    files = files_of_runs(config, overrides, campaign=campaign)
    return max(_grace(path, changes) for path, changes in files)


def _grace(path: str, changes: Sequence[str]) -> int:
    values, _ = read_config(path, changes)
    sections, _ = parse_sections({"cluster": values.get("cluster", {})})
    cluster = sections.get("cluster", ClusterConfig())
    assert isinstance(cluster, ClusterConfig)
    return cluster.stop_grace_s
