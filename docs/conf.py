"""The documentation site: Sphinx, furo, MyST; `make docs` builds it, warnings are errors."""

import sys
from pathlib import Path

import anyorder

sys.path.insert(0, str(Path(__file__).parent))

project = "anyorder"
author = "The anyorder founders"
copyright = "2026, the anyorder founders"
version = release = anyorder.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "mathml",  # docs/mathml.py: formulas without scripts
    "notebooks",  # docs/notebooks.py: tutorials as files for Jupyter
    "commands",  # docs/commands.py: the settings of every command
]
html_theme = "furo"
html_title = "anyorder"
html_theme_options = {"navigation_with_keys": True}
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_math_renderer = "mathml"
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath", "deflist", "colon_fence", "attrs_inline"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_preserve_defaults = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
nitpicky = False
