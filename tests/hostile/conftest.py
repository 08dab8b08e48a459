"""A good configuration to spoil."""

import pytest

from tests.run_file import write_run


@pytest.fixture(scope="module")
def good(tmp_path_factory, tiny_bert, words_csv):
    """A valid configuration, and a folder that may be copied."""
    folder = tmp_path_factory.mktemp("good")
    return write_run(folder, tiny_bert, words_csv)
