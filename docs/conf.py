"""How Sphinx builds the site from these pages; CONTRIBUTING.md has the command."""

import os

import jaxmp

project = "jaxmp"
author = "The jaxmp authors"
copyright = f"2026, {author}"
version = release = jaxmp.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

# Pages

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4

# Tutorials

# A tutorial runs again when its cells change, and not when its prose does.
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True

# Theme: the one of JAX, Flax and Optax

html_theme = "sphinx_book_theme"
html_title = f"jaxmp {version}"
html_static_path = ["_static"]
