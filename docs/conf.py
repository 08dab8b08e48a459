"""Sphinx: the pages of this folder, with the reference pages generated from the code."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

from mgpp.version import __version__  # noqa: E402

project = "mgpp"
author = "The mgpp authors"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "reference"]
exclude_patterns = ["_ext"]
nitpicky = True
# Types of other packages, and type variables: there is no page to link them to.
nitpick_ignore_regex = [("py:.*", r"(?!mgpp\.|pipeline\.).*")]
# Internal types in the signatures of public ones.
nitpick_ignore = [
    ("py:class", "mgpp.pattern.Blocks"),
    ("py:class", "mgpp.pattern.NofM"),
    ("py:class", "mgpp.masking.threshold.Group"),
    ("py:class", "mgpp.methods.one_shot.base.PrunedMatrix"),
]

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "deflist"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"mgpp {release}"
