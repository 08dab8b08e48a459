"""Parts of the run on a GPU that fail, each in its way."""

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.bench.gpu.figures import Figure


def measure(size: Mapping[str, Any], device: object, folder: Path) -> Iterator[Figure]:
    """Give figures of a name, then fail."""
    for text, value in size["values"].items():
        yield Figure(key=f"{size['name']}_{text}", text=text, value=value, limit="<= 12")
    sys.stderr.write(f"{size['name']} is about to end\n")
    sys.stderr.flush()
    if size["name"] == "raises":
        raise RuntimeError("as planned")
    if size["name"] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if size["name"] == "hangs":
        time.sleep(300)
