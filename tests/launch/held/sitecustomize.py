"""On PYTHONPATH: `mgpp` that stands still in a phase, for tests that end it there.

MGPP_TEST_PHASE names the phase. As a process comes to it, it makes a file of its id in MGPP_TEST_HELD,
and waits; where a stop awaits the phase's end, only for seconds. MGPP_TEST_DISK names how a disk fails
there instead.
"""

import errno
import importlib.abc
import importlib.machinery
import os
import sys
import time
from pathlib import Path

DISK = {"full": errno.ENOSPC, "read-only": errno.EROFS}.get(os.environ.get("MGPP_TEST_DISK", ""))
PHASE = os.environ.get("MGPP_TEST_PHASE", "")
# The module and the function, or the class's method, that a phase is held in; none: as it is imported.
PLACES = {
    "start": ("pipeline.runs.validate", ""),
    "connect": ("launch.cluster.raylet", "_pid_of_raylet"),
    "data": ("pipeline.data.stage", "prepare_data"),
    "checkpoint": ("pipeline.training.checkpoint", "Snapshot.write"),
    "evaluation": ("pipeline.evaluation.evaluate", "evaluate"),
    "export": ("pipeline.export.checkpoint", "export_model"),
    "report": ("pipeline.reports.run", "render_report"),
}
MODULE, NAME = PLACES.get(PHASE, ("", ""))
_SECONDS = 3.0 if PHASE == "checkpoint" else 300.0


def _hold():
    folder = Path(os.environ["MGPP_TEST_HELD"])
    folder.mkdir(exist_ok=True)
    (folder / str(os.getpid())).touch()
    if DISK:
        raise OSError(DISK, os.strerror(DISK))
    until = time.monotonic() + _SECONDS
    while time.monotonic() < until:
        time.sleep(0.05)


def _held(work):
    def held(*arguments, **settings):
        _hold()
        return work(*arguments, **settings)

    return held


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            if not NAME:
                _hold()
                return
            *owner, function = NAME.split(".")
            holder = getattr(module, owner[0]) if owner else module
            setattr(holder, function, _held(getattr(holder, function)))

        spec.loader.exec_module = exec_module
        return spec


if MODULE:
    sys.meta_path.insert(0, _Finder())
