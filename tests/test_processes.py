"""What ran too long is ended with all that it started."""

import os
import subprocess
import time

import pytest

from tests.processes import MGPP, ranks_command, run, torchrun_command

RANK = """
import os, sys, time

def main(folder):
    open(os.path.join(folder, os.environ["RANK"]), "w").write(str(os.getpid()))
    time.sleep(300)

if __name__ == "__main__":
    main(sys.argv[1])
"""


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.distributed
@pytest.mark.parametrize("launcher", [torchrun_command, ranks_command])
def test_ranks_end_with_a_launcher_that_ran_too_long(tmp_path, launcher, monkeypatch):
    (tmp_path / "rank.py").write_text(RANK)
    command = launcher("rank", str(tmp_path), num_processes=2)
    files, wait = [tmp_path / rank for rank in "01"], subprocess.Popen.communicate

    def run_out_of_time_once_the_ranks_are_there(self, *_, timeout):
        monkeypatch.setattr(subprocess.Popen, "communicate", wait)
        ends = time.monotonic() + timeout
        while not all(path.exists() and path.read_text() for path in files):
            assert time.monotonic() < ends, "no ranks"
            time.sleep(0.1)
        raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(subprocess.Popen, "communicate", run_out_of_time_once_the_ranks_are_there)
    with pytest.raises(AssertionError, match="ran past 60 s"):
        run(command, timeout=60, env={"PYTHONPATH": str(tmp_path)})
    pids = [int(path.read_text()) for path in files]
    ends = time.monotonic() + 10
    while any(map(is_alive, pids)) and time.monotonic() < ends:
        time.sleep(0.1)
    assert not any(map(is_alive, pids))


@pytest.mark.parametrize(
    "command",
    [
        torchrun_command("rank", num_processes=2),
        ranks_command("rank", num_processes=2),
        [MGPP, "run"],
    ],
)
def test_a_test_that_is_not_marked_starts_no_ranks(command):
    with pytest.raises(AssertionError, match="mark the test as distributed"):
        run(command, timeout=5)


def test_a_test_that_is_not_marked_starts_no_ray():
    import ray

    with pytest.raises(AssertionError, match="mark the test as distributed"):
        ray.init(num_cpus=1, include_dashboard=False)
    ray.shutdown()
