"""The site: these pages and the README as they are, and a reference from the docstrings. `make docs` builds it."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fastloss import __version__  # noqa: E402

project = "fastloss"
author = "the fastloss authors"
copyright = author
release = version = __version__

# The source folder is the root of the checkout: the pages' links to each other are then the same here as on a forge.
root_doc = "docs/index"
include_patterns = [
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "docs/index.rst", "docs/integrations/*.md", "docs/api/*.rst",
    "benchmarks/results/README.md", "benchmarks/results/*/results.md", "tests/peers/golden/README.md",
]  # fmt: skip
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
]
myst_heading_anchors = 4
nitpicky = True  # a name in a docstring that leads nowhere is a warning; these are other projects', and ours that are not public
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|collections|contextlib|fastloss\.(integrations|lazy_rules))\..*|Tensor")
]

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
# `preference_loss` in a docstring is the function of that name.
default_role = "code"
add_module_names = False
maximum_signature_line_length = 100

html_theme = "furo"
html_title = f"fastloss {release}"
html_theme_options = {"source_directory": "docs/"}
html_copy_source = False
html_show_sphinx = False
pygments_style = "default"


def _front_page(app, error) -> None:  # type: ignore[no-untyped-def]
    """The address of the site itself shows docs/index."""
    if error is None and app.builder.name == "html":
        page = '<!doctype html><meta charset="utf-8"><title>fastloss</title><meta http-equiv="refresh" content="0; url=docs/index.html">'
        (Path(app.outdir) / "index.html").write_text(page + '<a href="docs/index.html">fastloss</a>\n')


def setup(app) -> None:  # type: ignore[no-untyped-def]
    app.connect("build-finished", _front_page)
