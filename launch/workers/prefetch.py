"""Models of the hub on every node before its workers start together.

In the group, whoever is ready first would wait for the others' downloads in a collective, and that has
a time limit. A download that fails is left to the load, which says why.
"""

import logging
from collections.abc import Sequence
from typing import Any

_logger = logging.getLogger(__name__)


def prefetch(models: Sequence[dict[str, Any]]) -> None:
    """Download models to this node; of its workers one downloads a file, the others wait for it.

    Args:
        models: settings of `pipeline.models.source.ModelConfig`, as plain values.
    """
    from pipeline.models.source import ModelConfig, fetch

    for settings in models:
        try:
            fetch(ModelConfig.model_validate(settings))
        except Exception as error:  # noqa: BLE001  # the load meets it again, and tells it well
            _logger.warning("%s was not fetched: %s", settings["path"], error)
