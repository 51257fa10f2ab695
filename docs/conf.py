"""The documentation's site: `tox run -e docs`. A reader's browser loads what is in the site, and nothing else."""

import sys
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config

sys.path.insert(0, str(Path(__file__).parent))

import reference
from qlora_lowmem import __version__

project = "qlora_lowmem"
author = "the authors of qlora_lowmem"
copyright = "the authors of qlora_lowmem, Apache-2.0"
release = __version__

extensions = ["myst_parser"]
myst_heading_anchors = 4
exclude_patterns = ["__pycache__"]
nitpicky = True

html_theme = "furo"
html_title = "qlora_lowmem"
html_copy_source = False
html_show_sourcelink = False


def setup(app: Sphinx) -> None:
    """The reference is written before the pages are read, and never committed."""
    app.connect("config-inited", _write_reference)


def _write_reference(app: Sphinx, _config: Config) -> None:
    reference.write(Path(app.srcdir) / "reference")
