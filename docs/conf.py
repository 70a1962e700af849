"""Sphinx configuration: `make docs` builds the site, with warnings as errors."""

import os
from importlib.metadata import version as installed

project = "bayestune"
copyright = "the bayestune authors"
version = release = installed("bayestune")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"bayestune {version}"
html_extra_path = ["tables/table1.html", "tables/table2.html"]

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
myst_url_schemes = ["http", "https", "mailto"]
nb_execution_mode = os.environ.get("BAYESTUNE_DOCS_EXECUTE", "force")
nb_execution_timeout = 900
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_use_ivar = True
nitpicky = False
