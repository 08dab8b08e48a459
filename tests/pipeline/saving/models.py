"""A tiny model whose queries, keys and values transformers saves as one tensor."""

from typing import Any

from tests import tiny

JOINED = "nomic_bert"


def joined_config() -> Any:
    """Return its configuration."""
    return tiny.config(JOINED, pad_token_id=0)
