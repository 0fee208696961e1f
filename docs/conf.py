"""How the site is built: `make docs`."""

import sys
import tomllib
from pathlib import Path

import varprox

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "_ext"))

settings = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))
urls = settings["project"]["urls"]

project = "varprox"
author = copyright = settings["project"]["authors"][0]["name"]
version = release = varprox.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_design",
    "gallery",
    "names",
    "results",
]
exclude_patterns = ["_build"]
suppress_warnings = ["mystnb.unknown_mime_type"]  # of progress bars

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks come with their outputs
# One may be missing while others link to it; the tests see that none is in the end.
nitpick_ignore_regex = [("myst", r"\d\d_\w+\.ipynb")]

default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_custom_sections = [
    ("Arguments", "params_style"),
    ("Attributes", "params_style"),
    "Source",
]
napoleon_use_rtype = False
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = "varprox"
html_baseurl = urls["Documentation"]
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sphinx = False
html_copy_source = html_show_sourcelink = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0072b2", "color-brand-content": "#0072b2"},
    "dark_css_variables": {"color-brand-primary": "#56b4e9", "color-brand-content": "#56b4e9"},
    "footer_icons": [{"name": "Source", "url": urls["Source"], "html": "Source", "class": ""}],
}

linkcheck_ignore = [r"https://doi\.org/", urls["Documentation"]]
