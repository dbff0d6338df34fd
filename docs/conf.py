"""The site: `make docs` builds it, warnings are errors."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "modaldummy"
author = "The modaldummy developers"
version = release = version_of(project)
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "mathml",
    "public",
    "shelves",
    "signatures",
]
exclude_patterns = ["_*"]
source_suffix = {".md": "markdown", ".page": "markdown"}

# Anchors as GitHub makes them: pages are read there too.
myst_heading_anchors = 3
# In the order of a page's sources, not of the alphabet: a reader meets what is used first.
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
# What stands in single backticks in a docstring is code.
default_role = "code"

nitpicky = True
nitpick_ignore_regex = [
    # Neither a type variable nor the types behind the interface for extensions have a page.
    ("py:class", r"modaldummy\._core\..*"),
    # Nothing of other projects can be looked up: the build needs no network.
    ("py:.*", r"(collections|hypothesis|lightning|numpy|os|torch|transformers|typing)\..*"),
]

html_theme = "furo"
html_math_renderer = "mathml"
html_title = "modaldummy"
pygments_dark_style = "github-dark"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_use_index = False  # the search finds names, too
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
