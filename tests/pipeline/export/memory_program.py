"""Exports a model to a URL, with its output in a folder, and says how far memory rose (bytes)."""

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from pipeline.export.checkpoint import ExportConfig, export_model
from pipeline.storage.outputs import OutputFiles
from tests.disk import no_large_files
from tests.pipeline.saving.memory_worker import forget_peak, held


def export(trained: Path, url: str, output: Path) -> OutputFiles:
    files = OutputFiles(url)
    local = url == str(output)
    with nullcontext() if local else no_large_files(2 << 20):
        export_model(
            trained=trained,
            weights=json.loads((trained / "fingerprints.json").read_text()),
            auto_model="AutoModelForCausalLM",
            pruning={},
            card=json.loads((trained / "card.json").read_text()),
            config=ExportConfig(format=("plain", "packed"), max_shard_size="50MB"),
            trust_remote_code=False,
            output=output,
            files=files,
        )
    return files


def main(trained: str, small: str, url: str, output: str) -> None:
    export(Path(small), f"{url}-small", Path(f"{output}-small"))  # what the first export imports
    forget_peak()
    before = held()
    files = export(Path(trained), url, Path(output))
    found = {"rise": held("VmHWM") - before, "total": held("VmHWM"), "files": files.written}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
