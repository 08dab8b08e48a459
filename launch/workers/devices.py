"""What a process computes on: set from what the run asked for, before DeepSpeed or CUDA look around.

Ray shows all GPUs of a node to a process that asked for none; DeepSpeed takes a GPU wherever it sees one.
"""

import os

_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


def use_devices(gpus: int) -> None:
    """Let this process compute on the GPU that Ray gave it, or on the CPU alone.

    Args:
        gpus: of the worker that this process is; 0 hides those of the node.
    """
    os.environ["DS_ACCELERATOR"] = "cuda" if gpus else "cpu"
    if not gpus:
        for name in _VISIBLE:
            os.environ[name] = ""
