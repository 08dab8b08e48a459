"""A rendered SLURM script run through bash, with stand-ins for Slurm's commands."""

import json
import os
import shlex
import sys
import tempfile
from pathlib import Path

import yaml

from tests.launch.conftest import mgpp
from tests.processes import run

# On as many tasks as asked, at once, with what Slurm says to each; options are words with "=".
SRUN = """#!/bin/bash
tasks=1
while [[ $1 == --* ]]; do
  [[ $1 == --ntasks=* ]] && tasks=${1#--ntasks=}
  shift
done
inside=(INSIDE)
pids=()
for ((i = 0; i < tasks; i++)); do SLURM_PROCID=$i ${inside[$i]} "$@" & pids+=($!); done
trap 'kill "${pids[@]}" 2> /dev/null' TERM
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit $code
"""
SCONTROL = "#!/bin/bash\necho first\necho second\n"


def render_for_two_nodes(project, folder, form, *overrides, cpus_per_node, **changes):
    """Render the script of a form, "classic" or "symmetric", for two workers; return its path."""
    values = yaml.safe_load((project / "run.yaml").read_text())
    values |= {"storage": str(folder / "runs"), **changes}
    values["cluster"] = {"num_workers": 2, "placement": "SPREAD"}
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    made = mgpp(
        project, "cluster", "render", "slurm", str(folder / "run.yaml"), *overrides, "--nodes", "2",
        "--cpus-per-node", str(cpus_per_node), "--output", str(folder), "--json",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    (script,) = (file for file in json.loads(made.stdout)["files"] if f".{form}." in file)
    return script


def write_stand_ins(folder, inside, head_ip="127.0.0.1", **more):
    """Write Slurm's commands, and more by name, to a folder's `bin`; return it.

    Each node's tasks are run `inside` another command.
    """
    binaries = folder / "bin"
    binaries.mkdir()
    texts = {
        "srun": SRUN.replace("INSIDE", shlex.join(inside)),
        "scontrol": SCONTROL,
        "hostname": f"#!/bin/bash\necho {head_ip}\n",
        **more,
    }
    for name, text in texts.items():
        (binaries / name).write_text(text)
        (binaries / name).chmod(0o755)
    return binaries


def run_script(script, folder, *, job_id, head_ip, inside=("", "")):
    """Run a script as sbatch would on its first node, each node's tasks `inside` another command."""
    binaries = write_stand_ins(folder, inside, head_ip)
    with tempfile.TemporaryDirectory(prefix="ray-") as sessions:  # sockets have short paths
        done = run(
            ["bash", script],
            timeout=400,
            env={
                "PATH": f"{binaries}:{Path(sys.executable).parent}:{os.environ['PATH']}",
                "SLURM_JOB_NODELIST": "first,second",
                "SLURM_JOB_ID": str(job_id),
                "HF_HUB_OFFLINE": "1",
                "RAY_TMPDIR": sessions,
                "RAY_AUTH_TOKEN": "a-token-of-this-test-0123456789abcdef",
            },
        )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return done
