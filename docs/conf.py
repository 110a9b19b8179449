"""Sphinx: the guide in Markdown (MyST), the pydata theme, one reference page a package.

Build with ``python -m sphinx -W --keep-going docs docs/_build``.
"""

from importlib.metadata import version as installed

project = "mmhooks"
author = "The mmhooks founders"
version = release = installed("mmhooks")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# Members in the order of the file, which reads from top to bottom; shapes stay as they are written.
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Shape", "params_style"), "Source"]
default_role = "code"
# Names of several classes, such as ``fvu``, stand in types that napoleon would link: any of them is as good as none.
suppress_warnings = ["ref.python"]

html_theme = "pydata_sphinx_theme"
html_title = "mmhooks"
html_show_sourcelink = False
html_theme_options = {
    "navigation_with_keys": False,
    "show_nav_level": 2,
    "secondary_sidebar_items": ["page-toc"],
}
