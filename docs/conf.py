"""How Sphinx builds the site from these pages; CONTRIBUTING.md has the command."""

import sys
from pathlib import Path

import jaxmp

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "jaxmp"
author = "The jaxmp authors"
copyright = f"2026, {author}"
version = release = jaxmp.__version__

extensions = [
    "myst_nb",
    "reference",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

# Pages

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4

# Reference: docstrings are Google's, with code as in Markdown

napoleon_use_ivar = True
python_maximum_signature_line_length = 88
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autosummary_generate = False
add_module_names = False

# Tutorials

# A tutorial runs again when its cells change, and not when its prose does.
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True

# Links into other libraries need a network: `sphinx-build -t online`

if tags.has("online"):  # noqa: F821 (Sphinx gives this file its tags)
    intersphinx_mapping = {
        "flax": ("https://flax.readthedocs.io/en/latest/", None),
        "jax": ("https://docs.jax.dev/en/latest/", None),
        "numpy": ("https://numpy.org/doc/stable/", None),
        "optax": ("https://optax.readthedocs.io/en/latest/", None),
        "python": ("https://docs.python.org/3/", None),
    }

# Theme: the one of JAX, Flax and Optax

html_theme = "sphinx_book_theme"
html_title = f"jaxmp {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "navbar_persistent": [],  # the side bar has the search
    "navigation_with_keys": False,
    "pygments_light_style": "default",
    "pygments_dark_style": "github-dark",
    "repository_url": "https://github.com/jaxmp/jaxmp",
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_issues_button": True,
    "use_download_button": False,
    "show_toc_level": 2,
}
