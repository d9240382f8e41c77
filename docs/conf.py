"""The site: `python -m sphinx -W --keep-going -b html docs build/docs`."""

import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # the package of this checkout, not one that is installed

from lightning_prune import __version__  # noqa: E402

project = "lightning_prune"
author = "The lightning_prune authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["pictures"]

# Pages are Markdown that GitHub shows as well; headings can be linked to by their words, as there.
myst_heading_anchors = 3

html_theme = "furo"
pygments_dark_style = "monokai"
html_title = f"lightning_prune {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}

# Docstrings are Google's. Single backticks in them are code, and a link where the word is documented.
default_role = "py:obj"
add_module_names = False
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # hooks of Lightning that say nothing of their own are left out
autodoc_preserve_defaults = True
toc_object_entries_show_parents = "hide"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes of dataclasses stand where they are told, and not once more


def formulas(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Show indented formulas as they stand, and take |x| and * for what they are in a sentence."""
    shown: list[str] = []
    formula = False
    for number, line in enumerate(lines):
        before = lines[number - 1] if number else ""
        if not line.startswith(" ") and line:
            formula = False
        elif line.startswith("    ") and not before and shown and not _indented(shown):
            formula = True
            shown += ["::", ""]
        prose = not formula and not line.lstrip().startswith((">>>", "..."))
        shown.append(_escaped(line) if prose else line)
    lines[:] = shown


def _indented(shown: list[str]) -> bool:
    return next((line for line in reversed(shown) if line), "").startswith(" ")


def _escaped(line: str) -> str:
    parts = re.split(r"(``.*?``|`[^`]*`|^\s*\*+\w+:)", line)  # code and arguments such as *args stay
    return "".join(part if at % 2 else re.sub(r"([|*])", r"\\\1", part) for at, part in enumerate(parts))


def setup(app: Any) -> None:
    """Come before napoleon, which makes fields of the sections."""
    app.connect("autodoc-process-docstring", formulas, priority=100)
