"""How `make docs` builds the site: Sphinx reads the Markdown of this folder with MyST; every warning is an error."""

import re
from typing import Any

project = "dpo-lightning"
author = "the authors of dpo-lightning"
copyright = "2026, " + author

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3  # links to headings, as GitHub resolves them
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = project
html_copy_source = False
html_show_sourcelink = False

autoclass_content = "both"  # of the class and of its arguments
autodoc_typehints = "none"  # the docstrings say in words what is expected
default_role = "code"  # docstrings write names as in Markdown
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True  # as written in the source, without memory addresses
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes as a list
napoleon_attr_annotations = False
python_maximum_signature_line_length = 100


def keep_bars(app: Any, what: str, name: str, target: object, options: object, lines: list[str]) -> None:
    """Keep |y|, the length of an answer in formulas, which would be a substitution in reStructuredText."""
    lines[:] = [re.sub(r"\|(\w+)\|", r"\\|\1\\|", line) for line in lines]


def setup(app: Any) -> None:
    """Connect what this configuration adds to Sphinx."""
    app.connect("autodoc-process-docstring", keep_bars)
