"""Where functions that a configuration names are found: the working folder, after everything else."""

import os
import sys
from pathlib import Path

VARIABLE = "MGPP_CODE_FOLDER"


def allow_code_here() -> None:
    """Let modules of the working folder be imported, by this process and by workers that it starts."""
    os.environ[VARIABLE] = str(Path.cwd())
    use_code_folder()


def use_code_folder() -> None:
    """Look for modules in the folder of the command that started this process, if it allowed that.

    Last, so that none of them is taken for one of mgpp or of what it needs.
    """
    folder = os.environ.get(VARIABLE)
    if folder and folder not in sys.path:
        sys.path.append(folder)
