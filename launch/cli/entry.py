"""The console script `mgpp`: the command line, or what to install where the pipeline is not there."""

import os
import re
import sys
from importlib.metadata import PackageNotFoundError, distribution, requires

from launch.garbage import collect_rarely

EXTRA = "pipeline"
_REQUIREMENT = re.compile(rf"""([\w.-]+).*;\s*extra\s*==\s*["']{EXTRA}["']""")


def missing_packages() -> list[str]:
    """Return the distributions of the extra `pipeline` that are not installed."""
    return [name for name in _required() if not _installed(name)]


def main() -> None:
    """Run the command line; exit with 2 and one line of advice where packages are missing."""
    missing = missing_packages()
    if missing:
        names = missing[:3] + ([f"{len(missing) - 3} more"] if len(missing) > 3 else [])
        print(  # noqa: T201  # rich and typer may be among what is missing
            f"error: the command line needs {', '.join(names)}: pip install 'mgpp[{EXTRA}]'",
            file=sys.stderr,
        )
        raise SystemExit(2)
    collect_rarely()
    # The bars of `datasets`, several a run, come between its lines; its own progress is shown.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from launch.cli.ends import tell_before_it_begins

    tell_before_it_begins(sys.argv)
    from launch.cli.main import main as run

    run()


def _required() -> list[str]:
    found = (_REQUIREMENT.match(entry) for entry in requires("mgpp") or [])
    return [match[1] for match in found if match]


def _installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True
