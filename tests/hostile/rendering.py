"""Descriptions of clusters that cannot be meant, as `mgpp cluster render --set` gives them."""

from typing import Any

from launch.cluster.render import describe_cluster
from tests.hostile.case import Case

BASE = ""


def read(case: Case) -> Any:
    """Describe a cluster of one node."""
    return describe_cluster({"name": "small", "nodes": 1}, case.overrides)


LINES = [
    ("open-list", "partition=[", "?"),
    ("open-mapping", "partition={", "?"),
    ("open-quote", "partition='a", "?"),
    ("list-for-text", "partition=[]", "?"),
    ("number-for-text", "partition=7", "?"),
    ("boolean-for-text", "partition=on", "?"),
    ("null-byte", "partition=a\x00", "?"),
    ("two-documents", "partition=a\n---\nb", "?"),
    ("alias", "partition=*a", "?"),
    ("object", "setup=!!python/object/apply:os.system ['true']", "?"),
    ("base-60-time", "time_limit=24:00:00", "?"),
    ("words-for-time", "time_limit=a day", "?"),
    ("octal-port", "port=06379", "?"),
    ("boolean-port", "port=true", "?"),
    ("quoted-port", "port='6379'", "?"),
    ("full-width-port", "port=６３７９", "?"),
    ("huge-port", "port=1e300", "?"),
    ("no-port", "port=65536", "?"),
    ("no-nodes", "nodes=0", "?"),
    ("fraction-of-a-node", "nodes=1.5", "?"),
    ("negative-retries", "retries=-1", "?"),
    ("huge-memory", "memory_gib=100000000000000000000", "?"),
    ("more-shared-memory", "shared_memory_gib=65", "?"),
    ("quoted-gpus", "gpus_per_node='8'", "?"),
    ("word-for-boolean", "elastic=maybe", "?"),
    ("number-for-boolean", "elastic=1", "?"),
    ("text-for-list", "worker_ips=10.0.0.1", "?"),
    ("number-in-list", "worker_ips=[1]", "?"),
    ("mapping-for-text", "image={a: b}", "?"),
    ("null-name", "name=", "?"),
    ("capital-name", "name=Small", "?"),
    ("long-name", "name=" + "a" * 100, "?"),
    ("other-provider", "provider=azure", "?"),
    ("deep-list", "worker_ips=" + "[" * 500 + "]" * 500, "?"),
    ("very-deep-list", "worker_ips=" + "[" * 20000 + "]" * 20000, "?"),
    ("unknown-key", "partion=gpu", "?"),
    ("no-value", "partition", "?"),
    ("no-key", "=gpu", "?"),
    ("nothing", "", "?"),
]
CASES = [Case(name=name, overrides=(override,), line=line) for name, override, line in LINES]
