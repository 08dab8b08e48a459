"""A made-up corpus through the data stage on two cores: its rate, its memory, a kill and a resume.

The rate is that of processor time, the first process's and half of the other two's: so that neighbours
on a shared machine count little. The one by the clock is beside it.

python -m tests.bench.corpora OUT [MEGABYTES]
"""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

CORES = 2
MEGABYTES = 1000
RESUMED_SHARE = 0.2  # of the corpus that is used to kill and resume
_SUFFIXES, _SUFFIX_SHARES = np.array(["", ",", ".", ".\n"]), (0.88, 0.05, 0.06, 0.01)
_WORDS_OF_DOCUMENT = 400
_RECIPE = "configs/smollm2-wikitext2.yaml"


def write_corpus(path: Path, num_bytes: int) -> None:
    """Write JSONL documents of words of SmolLM2's vocabulary, as often as by Zipf's law, some joined.

    The lengths of documents are log-normal, from a few words to tens of thousands.
    """
    generator = np.random.default_rng(0)
    words = _words()
    joined = np.char.add(generator.choice(words, 20_000), generator.choice(words, 20_000))
    words = np.concatenate([words, joined])  # rare ones, of several tokens each
    shares = 1 / (np.arange(len(words)) + 2.7)
    edges = np.cumsum(shares / shares.sum())
    left = num_bytes
    with path.open("w", encoding="utf-8") as file:
        while left > 0:
            length = int(generator.lognormal(np.log(_WORDS_OF_DOCUMENT), 1.0)) + 1
            places = np.searchsorted(edges[:-1], generator.random(length))
            ends = generator.choice(_SUFFIXES, length, p=_SUFFIX_SHARES)
            text = " ".join(np.char.add(words[places], ends).tolist())
            left -= file.write(json.dumps({"text": text}) + "\n")


def _words() -> np.ndarray:
    """Return the words of the vocabulary, the most frequent first: that is how tokens are numbered."""
    from pipeline.models.loading import load_tokenizer
    from pipeline.runs.config import parse_config, read_config

    values, _ = read_config(_RECIPE, [])
    tokenizer = load_tokenizer(parse_config(values).model)
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return np.array([t[1:] for t, _ in tokens if t.startswith("Ġ") and t[1:].isalpha()])


def run_data(corpus: str, storage: str, out: str) -> None:
    """Run the data stage in this process and its own, and write what it took."""
    from pipeline.runs.config import parse_config, read_config
    from pipeline.runs.flow import plan_stages, run_stage
    from pipeline.runs.hardware import NO_GPUS, settled
    from pipeline.store.artifacts import ArtifactStore

    values, _ = read_config(_RECIPE, ["task.end_of_text=true"])
    values["data"] = {"source": "files", "train": corpus, "validation_share": 0.01}
    config = settled(parse_config(values), NO_GPUS)
    stage = plan_stages(config)[0]
    imported = memory(os.getpid())
    shown: list[str] = []

    def progress(record: dict[str, Any]) -> None:
        shown.append(json.dumps(record))

    before, begin = processor_seconds(), time.perf_counter()
    artifact = run_stage(
        stage,
        config,
        ArtifactStore(storage),
        {},
        workers=None,
        progress=progress,
        cores=CORES,
    )
    seconds = time.perf_counter() - begin
    assert artifact is not None
    figures = {
        "seconds": seconds,
        "processor_seconds": [b - a for a, b in zip(before, processor_seconds(), strict=True)],
        "imported": imported,
        "files": {name: dict(entry) for name, entry in artifact.files.items()},
        "num_tokens": artifact.metrics["num_tokens"],
        "shown": shown[-3:],
    }
    Path(out).write_text(json.dumps(figures))


def processor_seconds() -> list[float]:
    """Return the processor time of this process, and that of those it has started and waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return [usage.ru_utime + usage.ru_stime for usage in used]


def memory(pid: int) -> dict[str, int]:
    """Return the proportional set size of a process and its own in MiB, mapped files apart."""
    sizes = {"Pss:": 0, "Pss_Anon:": 0, "Pss_Shmem:": 0}
    for process in _family(pid):
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
        except (FileNotFoundError, ProcessLookupError):
            continue
        for name, size, _ in map(str.split, lines):
            if name in sizes:
                sizes[name] += int(size)
    with_files = sizes.pop("Pss:")
    return {"held": sum(sizes.values()) // 1024, "with_mapped_files": with_files // 1024}


def _family(pid: int) -> Iterator[psutil.Process]:
    try:
        process = psutil.Process(pid)
        yield process
        yield from process.children(recursive=True)
    except psutil.NoSuchProcess:
        return


def watched(command: list[str], env: dict[str, str]) -> dict[str, int]:
    """Run a command; return the largest of what its processes held together, looked at twice a second."""
    peak = {"held": 0, "with_mapped_files": 0}
    process = subprocess.Popen(command, env=env)
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.5):
            for name, size in memory(process.pid).items():
                peak[name] = max(peak[name], size)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        code = process.wait(timeout=3000)
    finally:
        stop.set()
        thread.join()
        process.kill()
    if code:
        raise SystemExit(f"{command} ended with {code}")
    return peak


def killed_half_way(command: list[str], env: dict[str, str], storage: Path, parts: int) -> float:
    """Run a command and kill it when so many parts are finished; return the seconds it ran."""
    begin = time.monotonic()
    process = subprocess.Popen(command, env=env)
    try:
        while len(list(storage.glob("data-*/parts/*/train/*-*.arrow"))) < parts:
            assert process.poll() is None, "it ended before it was killed"
            assert time.monotonic() < begin + 3000
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return time.monotonic() - begin


def main(out: str, megabytes: int = MEGABYTES) -> None:
    """Measure, in processes of their own, and write the figures."""
    with tempfile.TemporaryDirectory(prefix="mgpp-corpora-") as folder:
        root = Path(folder)
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

        def command(name: str, corpus: Path) -> list[str]:
            own = ["-m", "tests.bench.corpora", "data", str(corpus)]
            return [sys.executable, *own, str(root / name), str(root / f"{name}.json")]

        def cached(name: str) -> dict[str, str]:
            return {**env, "HF_HOME": str(root / f"cache-{name}")}

        corpus = root / "corpus.jsonl"
        write_corpus(corpus, megabytes * 1_000_000)
        peak = watched(command("whole", corpus), cached("whole"))
        whole = json.loads((root / "whole.json").read_text())
        imported, size = whole["imported"], corpus.stat().st_size / 1e6
        small = root / "small.jsonl"
        write_corpus(small, int(megabytes * RESUMED_SHARE * 1e6))
        watched(command("undisturbed", small), cached("undisturbed"))
        parts = max(int(megabytes * RESUMED_SHARE / 2), 1)  # a part is a megabyte, or two
        before = killed_half_way(
            command("killed", small), cached("killed"), root / "killed", min(parts, 200)
        )
        watched(command("killed", small), cached("killed"))
        undisturbed, resumed = (
            json.loads((root / f"{name}.json").read_text()) for name in ("undisturbed", "killed")
        )
        alone, in_parallel = whole["processor_seconds"]
        figures = {
            "corpus_mb_per_minute": 60 * size / (alone + in_parallel / CORES),
            "corpus_memory_mib": peak["held"] - imported["held"],
            "corpus_same_files": float(undisturbed["files"] == resumed["files"]),
            "corpus": {
                "megabytes": size,
                "tokens": whole["num_tokens"],
                "seconds": whole["seconds"],
                "mb_per_minute_by_the_clock": 60 * size / whole["seconds"],
                "processor_seconds": {"alone": alone, "in_parallel": in_parallel},
                "imported_mib": imported,
                "peak_mib": peak,
                "shown": whole["shown"],
                "resumed": {
                    "undisturbed_seconds": undisturbed["seconds"],
                    "before_the_kill": before,
                    "seconds": resumed["seconds"],
                },
            },
        }
        Path(out).write_text(json.dumps(figures))


if __name__ == "__main__":
    if sys.argv[1] == "data":
        run_data(*sys.argv[2:])
    else:
        main(sys.argv[1], *map(int, sys.argv[2:]))
