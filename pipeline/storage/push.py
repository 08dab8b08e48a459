"""Uploads of a checkpoint's folder to the Hugging Face hub: nothing there is overwritten unasked."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, Problem, error_text

_OF_THE_HUB = ".gitattributes"  # is in every repository
# With an update, those that are not in the folder go: a loader would read them instead of its own.
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json"]
_TOKEN_HINT = "give one with write access by HF_TOKEN or `hf auth login`"  # noqa: S105  # words


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What an upload came to.

    Attributes:
        url: of the repository.
        commit: the newest of the upload; None where all was there already.
        num_files: of the folder.
        num_bytes: of these.
    """

    url: str
    commit: str | None
    num_files: int
    num_bytes: int


def push_folder(
    folder: Path, repository: str, *, private: bool, update: bool, message: str
) -> Pushed:
    """Upload a folder to a repository of models, which is made unless it is there.

    An upload that was interrupted is resumed by the same call: the hub keeps what it received whole.

    Args:
        folder: all of its files.
        repository: OWNER/NAME.
        private: make it visible to its owner alone.
        update: replace what the repository holds; its other weight files are deleted.
        message: of the commit.

    Raises:
        ConfigError: if there is no token, or it may not do this; if the repository holds other files and
            is not to be updated; if the hub cannot be reached.
    """
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise _refused("HF_HUB_OFFLINE", "is set: nothing is sent to the hub", hint="unset it")
    _check_name(repository)
    _check_card(folder)
    token = get_token()
    if not token:
        raise _refused("HF_TOKEN", "there is no token for the hub", hint=_TOKEN_HINT)
    files = {p.relative_to(folder).as_posix(): p for p in _files(folder)}
    sizes = sum(path.stat().st_size for path in files.values())
    api = HfApi(token=token)
    with _answers(repository, token):
        held = _held(api, repository, private=private)
        if held is None:
            api.create_repo(repository, private=private or None)
            held = {}
        differ = [name for name in held if name not in files or not _same(files[name], held[name])]
        if differ and not update:
            why = f"{repository!r} exists and holds other files, such as {differ[0]}"
            hint = "choose another name, or replace them with --update"
            raise _refused("REPO", why, hint=hint)
        commit = None
        if differ or files.keys() - held.keys():
            commit = api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message=message,
                delete_patterns=list(_WEIGHTS) if update else None,
            ).oid
    url = f"{api.endpoint}/{repository}"
    return Pushed(url=url, commit=commit, num_files=len(files), num_bytes=sizes)


def _check_name(repository: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repository)
        wrong = "" if repository.count("/") == 1 else "names no owner"
    except HFValidationError:
        wrong = "is no name of a repository"
    if wrong:
        allowed = "OWNER/NAME, of letters, digits, '-', '_' and '.'"
        raise ConfigError([Problem("REPO", wrong, got=repository, allowed=[allowed])])


def _check_card(folder: Path) -> None:
    """Refuse a model card that the hub would, only after all else was sent."""
    from huggingface_hub import ModelCard

    path = folder / "README.md"
    if path.is_file():
        try:
            ModelCard.load(path, ignore_metadata_errors=False)
        except Exception as error:  # of whichever library reads YAML
            raise _refused(
                str(path), f"its metadata cannot be read: {error_text(error)}"
            ) from error


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part in (".git", ".cache") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden:
            yield path


def _held(api: Any, repository: str, *, private: bool) -> Mapping[str, Any] | None:
    """Return the files of a repository, as the hub describes them; None if there is none."""
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    try:
        info = api.repo_info(repository)
    except RepositoryNotFoundError as error:
        if error.response.status_code == 401:
            raise
        return None
    if private and not info.private:
        why, hint = f"{repository!r} exists and is public", "make it private in its settings"
        raise _refused("--private", why, hint=hint)
    tree = api.list_repo_tree(repository, recursive=True)
    return {f.path: f for f in tree if isinstance(f, RepoFile) and f.path != _OF_THE_HUB}


def _same(path: Path, held: Any) -> bool:
    """Return whether a file has the content that the hub holds."""
    size = path.stat().st_size
    if size != held.size:
        return False
    if held.lfs is not None:
        digest, want = hashlib.sha256(), held.lfs.sha256
    else:  # as git names a file
        digest, want = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False), held.blob_id
    with path.open("rb") as file:
        return bool(hashlib.file_digest(file, lambda: digest).hexdigest() == want)


@contextmanager
def _answers(repository: str, token: str) -> Iterator[None]:
    """Report what the hub refuses, and that it is not there, in one line without the token."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    hub = f"the hub at {constants.ENDPOINT}"
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001  # libraries of requests have no base in common
        chain: BaseException | None = error
        while chain is not None and not isinstance(chain, HfHubHTTPError):
            chain = chain.__cause__ or chain.__context__
        if chain is None:
            why = f"{hub} was not reached: {error_text(error)}".replace(token, "***")
            raise _refused("REPO", why, hint="the same command resumes the upload") from None
        status = chain.response.status_code
        said = f"{hub} answered {status}"
        problems = {
            401: ("HF_TOKEN", f"{said}: the token is not valid", _TOKEN_HINT),
            403: ("HF_TOKEN", f"{said}: the token may not write to {repository!r}", _TOKEN_HINT),
            404: ("REPO", f"{said}: there is no {repository!r} for this token", _TOKEN_HINT),
            409: ("REPO", f"{said}: {repository!r} exists already", "choose another name"),
        }
        why = f"{said}: {chain.server_message or error_text(chain)}".replace(token, "***")
        key, why, hint = problems.get(status, ("REPO", why, "the same command resumes the upload"))
        raise _refused(key, why, hint=hint) from None


def _refused(key: str, why: str, *, hint: str = "") -> ConfigError:
    return ConfigError([Problem(key, why, hint=hint)])
