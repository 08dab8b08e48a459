"""An environment in which few packages can be imported: as on a machine that has no others."""

import os
import re
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement

# What `make gpu` needs, and what of these packages' needs it must do without.
NEEDED = ("torch", "deepspeed", "transformers", "accelerate", "pydantic", "safetensors")
NOT_NEEDED = ("datasets", "ray", "omegaconf", "pyarrow", "rich", "typer", "pytest", "sklearn")


def only(needed: Collection[str], without: Collection[str] = ()) -> dict[str, str]:
    """Return the environment of a process that finds some distributions and what they need.

    Args:
        needed: distributions.
        without: modules that it does not find even if one of these needs them.
    """
    found = _with_needs(needed)
    hidden = {
        module
        for module, distributions in packages_distributions().items()
        if module.isidentifier() and not found & set(map(_normal, distributions))
    }
    paths = [str(Path(__file__).parent / "without"), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "MGPP_WITHOUT": " ".join(sorted((hidden | set(without)) - {"mgpp", "pipeline", "launch"})),
    }


def _with_needs(distributions: Collection[str]) -> set[str]:
    found: set[str] = set()
    left = [_normal(name) for name in distributions]
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        try:
            needs = [Requirement(text) for text in requires(name) or ()]
        except PackageNotFoundError:  # of another platform
            continue
        left += [
            _normal(need.name)
            for need in needs
            if need.marker is None or need.marker.evaluate({"extra": ""})
        ]
    return found


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
