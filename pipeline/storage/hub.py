"""The Hugging Face hub: which commit a branch or tag stands for now.

A key names content, so it must not depend on whether the hub is busy: what it answers is asked for again,
kept for the process, or reported. Only offline mode leaves a revision as it is given.
"""

import logging
import re
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import ConfigError, Problem, error_text

Kind = Literal["model", "dataset"]

# Seconds before each further try. Where the hub says how long, it is that long.
_WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
_LONGEST = 300.0  # seconds waited in all: the hub counts requests by five minutes
_NEVER = float("inf")
_TIMEOUT = 20.0  # seconds of one request
_BUSY = (408, 425, 429)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_RESET = re.compile(r"\br=0\s*;\s*t=(\d+)")  # of the header RateLimit: "api";r=0;t=55
ACCESS = "accept its terms there, and give a token with access by HF_TOKEN or `hf auth login`"
# Configuration, tokenizer, code and the indices of weights.
_BESIDE_WEIGHTS = (".json", ".txt", ".model", ".py", ".jinja", ".tiktoken")
_logger = logging.getLogger(__name__)


def is_commit(revision: str | None) -> bool:
    """Return whether a revision is a commit's whole hash, which stands for the same content for ever."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def hub_commit(kind: Kind, repository: str, revision: str | None, *, section: str) -> str | None:
    """Return the commit that a revision of a repository stands for, asked once a process.

    Args:
        kind: of repository.
        repository: its name on the hub; one that cannot be a name is not asked for.
        revision: branch, tag or commit; None for the default branch.
        section: of the configuration that names it, by `path` and `revision`.

    Returns:
        The commit; in offline mode the revision as it was given.

    Raises:
        ConfigError: if the hub has no such repository or revision, gives no access to it, or does not
            answer after several tries.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError

    if constants.HF_HUB_OFFLINE or is_commit(revision):
        return revision
    try:
        return _answer(constants.ENDPOINT, kind, repository, revision, section)
    except HFValidationError:
        return revision


def cached_commit(kind: Kind, repository: str, revision: str | None) -> str | None:
    """Return the commit that a revision stands for in offline mode; None if none is cached."""
    if is_commit(revision):
        return revision
    try:
        return _cached(kind, repository, revision).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):  # not there, or no name that a file system takes
        return None


def fetch_model(repository: str, commit: str | None, gguf_file: str | None = None) -> None:
    """Download what a model is loaded from to this machine's cache, if it is not there.

    Of several processes of a machine that call it at once, each file is downloaded by one; the others
    wait. Nothing is done in offline mode.

    Args:
        repository: its name on the hub.
        commit: hash of the commit, or a branch or tag; None for the default branch.
        gguf_file: the one file of weights that is meant, where they are in GGUF.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        return
    files = HfApi().list_repo_files(repository, revision=commit)
    wanted = [file for file in files if "/" not in file and file.endswith(_BESIDE_WEIGHTS)]
    wanted += [gguf_file] if gguf_file else _weights(files)
    snapshot_download(repository, revision=commit, allow_patterns=wanted)


def _weights(files: Sequence[str]) -> list[str]:
    """Return the files that transformers loads: safetensors, or pickles where there are none."""
    for suffix in (".safetensors", ".bin"):
        found = [file for file in files if "/" not in file and file.endswith(suffix)]
        if found:
            return found
    return []


def refusal(section: str, repository: str, error: BaseException | None) -> Problem | None:
    """Return what the hub refused, if an error, or one that it came of, is such an answer.

    Args:
        section: of the configuration that names the repository, by `path` and `revision`.
        repository: its name on the hub.
        error: of a library that loads from the hub.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__ or error.__context__
    if error is None:
        return None
    status, hub = error.response.status_code, f"the hub at {constants.ENDPOINT}"
    if isinstance(error, RevisionNotFoundError):
        return Problem(
            f"{section}.revision", f"{hub} has no such revision of {repository!r} ({status})"
        )
    if isinstance(error, GatedRepoError):
        return Problem(
            f"{section}.path",
            f"{repository!r} is gated: {hub} gives no access to it ({status})",
            hint=ACCESS,
        )
    if isinstance(error, RepositoryNotFoundError):
        return Problem(
            f"{section}.path",
            f"{hub} has no {repository!r}, or shows it to nobody without access ({status})",
            hint=f"check the name; if it is private or gated, {ACCESS}",
        )
    if status in (401, 403):
        return Problem(
            f"{section}.path", f"{hub} gives no access to {repository!r} ({status})", hint=ACCESS
        )
    return None


@cache
def _answer(endpoint: str, kind: Kind, repository: str, revision: str | None, section: str) -> str:
    """Ask until there is an answer or patience is at its end; what is raised is not cached."""
    from huggingface_hub.errors import HFValidationError

    what = f"{repository!r}" if revision is None else f"{repository!r} at {revision!r}"
    asked = f"the hub at {endpoint} was asked for the commit of {what}"
    waited = 0.0
    for number, least in enumerate((*_WAITS, _NEVER), start=1):
        try:
            commit = _ask(kind, repository, revision)
        except HFValidationError:
            raise
        except Exception as error:  # of the library of requests, the hub library's own matter
            refused = refusal(section, repository, error)
            if refused is not None:
                raise ConfigError([refused]) from error
            came = _came(error)
            if came is None:
                raise
            wait = max(least, _asked_for(error))
            if waited + wait > _LONGEST:
                tries = f"try {number} of {len(_WAITS) + 1}, after {waited:.0f} s"
                why = f"{asked}: {came}; gave up at {tries}"
                hint = (
                    f"try again later, pin {section}.revision to a commit, or set HF_HUB_OFFLINE=1 to "
                    "use what this machine has"
                )
                raise ConfigError([Problem(f"{section}.path", why, hint=hint)]) from error
            text = "%s: %s; asking again in %.0f s (%d of %d)"
            _logger.warning(text, asked, came, wait, number, len(_WAITS))
            time.sleep(wait)
            waited += wait
        else:
            _remember(kind, repository, revision, commit)
            return commit
    raise AssertionError("the last try returns or raises")


def _ask(kind: Kind, repository: str, revision: str | None) -> str:
    from huggingface_hub import HfApi

    found = HfApi().repo_info(repository, repo_type=kind, revision=revision, timeout=_TIMEOUT)
    if not is_commit(found.sha):
        raise ValueError(f"no commit in the answer, but {found.sha!r}")
    return str(found.sha)


def _remember(kind: Kind, repository: str, revision: str | None, commit: str) -> None:
    """Leave the commit in the hub's cache: what is loaded by its commit is else not found offline."""
    path = _cached(kind, repository, revision)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit, encoding="utf-8")
    except OSError:
        _logger.debug("the cache of the hub cannot be written: %s", path)


def _cached(kind: Kind, repository: str, revision: str | None) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type=kind)
    return folder / "refs" / (revision or constants.DEFAULT_REVISION)


def _came(error: Exception) -> str | None:
    """Return what came instead of a commit, in words; None if asking again would not help."""
    response: Any = getattr(error, "response", None)
    if response is None:
        return (
            f"no answer ({error_text(error)})"  # the connection failed, or it was none of the hub's
        )
    if response.status_code in _BUSY or response.status_code >= 500:
        return f"{response.status_code} {response.reason_phrase}".strip()
    return None


def _asked_for(error: Exception) -> float:
    """Return how many seconds the hub asks to wait; 0 where it does not say."""
    response: Any = getattr(error, "response", None)
    if response is None:
        return 0.0
    after = response.headers.get("Retry-After", "")
    if after.isdecimal():
        return float(after)
    reset = _RESET.search(response.headers.get("RateLimit", ""))
    return float(reset[1]) + 1.0 if reset and response.status_code == 429 else 0.0
