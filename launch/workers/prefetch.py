"""Models of the hub, and artifacts, on every node before its workers start together.

In the group, whoever is ready first would wait for the others' downloads in a collective, and that has
a time limit. A download that fails is left to the load, which says why.
"""

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

_CLEARING_SECONDS = 30.0
_logger = logging.getLogger(__name__)


def prefetch(models: Sequence[dict[str, Any]], artifacts: Sequence[dict[str, Any]] = ()) -> None:
    """Download to this node, and check; of its workers one does it, the others wait for it.

    Args:
        models: settings of `pipeline.models.source.ModelConfig`, as plain values.
        artifacts: of `pipeline.store.artifacts.Artifact`, as plain values.
    """
    from pipeline.models.source import ModelConfig, fetch
    from pipeline.store.artifacts import Artifact

    for settings in models:
        try:
            fetch(ModelConfig.model_validate(settings))
        except Exception as error:  # noqa: BLE001  # the load meets it again, and tells it well
            _logger.warning("%s was not fetched: %s", settings["path"], error)
    for values in artifacts:
        artifact = Artifact(**values)
        try:
            _logger.info("%s: %s is here", artifact.stage, artifact.path)
        except Exception as error:  # noqa: BLE001  # the stage meets it again, and tells it well
            _logger.warning("%s was not fetched: %s", artifact.url, error)


def clear_nodes() -> None:
    """Delete what stages fetched to the nodes of the cluster, or were to upload, and no process uses.

    What cannot be deleted now is when room is needed or an hour has passed.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from pipeline.storage.node_copies import release, remove_unused

    release()
    task = ray.remote(num_cpus=0, max_retries=0)(remove_unused)
    with contextlib.suppress(Exception):  # a node or a cluster that is lost
        places = [
            NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
            for node in ray.nodes()
            if node["Alive"]
        ]
        started = [task.options(scheduling_strategy=place).remote() for place in places]
        ray.wait(started, num_returns=len(started), timeout=_CLEARING_SECONDS)
