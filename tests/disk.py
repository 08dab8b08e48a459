"""A disk that takes no large file."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_large_files(num_bytes: int = 1 << 16) -> Iterator[None]:
    """Let no file that this process writes grow beyond so many bytes: the kernel refuses more (EFBIG)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
