"""Ray's share: the demo on a cluster that is up, over the same stages in a plain loop under torchrun.

python -m tests.bench.ray OUT
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from tests.launch.ray_head import ray_head
from tests.processes import MGPP, ROOT, run, torchrun

ROUNDS = 2
TWO_WORKERS = ("cluster.num_workers=2", "cluster.cpus_per_worker=1")


def main(out: str) -> None:
    """Measure both, in turn."""
    config = [str(ROOT / "configs" / "demo.yaml"), *TWO_WORKERS]
    walls: dict[str, list[float]] = {"ray": [], "plain": []}
    access = {"RAY_AUTH_MODE": "disabled"}
    with tempfile.TemporaryDirectory() as folder, ray_head(num_cpus=3, env=access) as head:
        for i in range(ROUNDS):
            since = time.monotonic()
            torchrun(
                "tests.bench.plain_run",
                *config,
                f"storage={folder}/plain-{i}",
                num_processes=2,
                timeout=1800,
            )
            walls["plain"].append(time.monotonic() - since)
            since = time.monotonic()
            done = run(
                [
                    MGPP,
                    "run",
                    *config,
                    f"storage={folder}/ray-{i}",
                    f"cluster.address={head.address}",
                ],
                timeout=1800,
                env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **access},
            )
            walls["ray"].append(time.monotonic() - since)
            if done.returncode:
                raise SystemExit(done.stderr)
    ratio = median(walls["ray"]) / median(walls["plain"])
    Path(out).write_text(json.dumps({"ray_share": ratio, "ray_walls_seconds": walls}))


if __name__ == "__main__":
    main(sys.argv[1])
