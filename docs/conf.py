"""Sphinx: `python -m sphinx -W -n docs OUT`, offline; pictures are drawn and notebooks run on the way."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT / "src"))

import pixelss  # noqa: E402
import pixelss.viz  # noqa: E402

project, author, copyright = "pixelss", "the pixelss authors", "the pixelss authors"  # noqa: A001
version = release = pixelss.__version__
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # MathJax itself, copied into the site: no page asks another host for anything
    "sphinx_copybutton",
    "myst_nb",
]
exclude_patterns = ["_build", "_pictures"]
nitpicky = True

html_theme = "furo"
html_title = "pixelss"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_cache_path = str(DOCS / "_build" / "notebooks")
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_execution_show_tb = True
nb_merge_streams = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_exclude = ".linenos, .gp, .go"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
autodoc_type_aliases = {"ArrayLike": "ArrayLike", "Pixels": "ndarray", "NDArray": "NDArray", "Offsets": "Offsets"}
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Shape", "Reference"]
# Types of other packages: their inventories are not fetched, so that the build works offline.
_FOREIGN = "ArrayLike|Pixels|ndarray|NDArray|Tensor|ModuleT|Sequence|Mapping|Callable|Any|Offsets"
nitpick_ignore_regex = [
    ("py:.*", r"(torch|numpy|np|nn|os|collections|typing|matplotlib|timm)(\..*)?"),
    ("py:.*", rf"(.*\.)?({_FOREIGN})"),
]

NAMES = {name: f"pixelss.{name}" for name in pixelss.__all__}
NAMES |= {name: f"pixelss.viz.{name}" for name in pixelss.viz.__all__}
_SIZE = r"(?:[A-Z][a-z]?(?:_i)?|[a-z]|\*|\d+|[A-Z] [+*-] \d)"
_SHAPE = re.compile(rf"\({_SIZE}(?:, {_SIZE})+\)|\({_SIZE},\)")


def to_rest(app: Any, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """Turn a docstring's `name` into a link or code, its shapes into code, and escape what reST would read."""
    example = False
    for i, line in enumerate(lines):
        example = example or line.strip() == "Example:"
        if example or re.match(r" *\*{1,2}\w+: ", line):
            continue
        parts = re.split(r"(`[^`]+`)", line)
        lines[i] = "".join(_code(part) if part.startswith("`") else _prose(part) for part in parts)


def _code(part: str) -> str:
    name = part.strip("`")
    return f":py:obj:`{name} <{NAMES[name]}>`" if name in NAMES else f"``{name}``"


def _prose(part: str) -> str:
    pieces = re.split(f"({_SHAPE.pattern})", part)
    escaped = [re.sub(r"([*|]|_(?!\w))", r"\\\1", piece).replace(" -> ", " → ") for piece in pieces[::2]]
    for i, piece in enumerate(pieces[1::2]):
        unbroken = piece.replace(" ", "\N{NO-BREAK SPACE}")
        escaped[i] += f"\\ ``{unbroken}``\\ " if piece else ""
    return "".join(escaped)


def name_aliases(
    app: Any, what: str, name: str, obj: object, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, ...]:
    """Write an alias inside a larger type by its name alone."""
    return tuple(text and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text) for text in (signature, returns))


def append_voc(app: Any, docname: str, source: list[str]) -> None:
    """Append examples/voc/README.md to the page on VOC, a heading level down, links into the repository as text."""
    path = ROOT / "examples" / "voc" / "README.md"
    if docname != "voc":
        return
    app.env.note_dependency(str(path))
    if not path.exists():
        return
    lines, code = [], False
    for line in path.read_text().splitlines():
        code ^= line.lstrip().startswith("```")
        if not code:
            line = re.sub(r"!\[[^]]*\]\((?!https?:)[^)]*\)", "", line)
            line = re.sub(r"\[([^]]*)\]\((?!https?:)[^)]*\)", r"\1", line)
            line = re.sub(r"^(?=#+ )", "#", line)
        lines.append(line)
    source[0] += "\n" + "\n".join(lines) + "\n"


def setup(app: Any) -> None:
    """Draw the pictures, take the notebooks in, and hook the docstrings' conversion up before napoleon's."""
    app.connect("autodoc-process-docstring", to_rest, priority=400)
    app.connect("autodoc-process-signature", name_aliases)
    app.connect("source-read", append_voc)
    subprocess.run([sys.executable, str(DOCS / "pictures.py")], check=True)
    notebooks = DOCS / "notebooks"
    notebooks.mkdir(exist_ok=True)
    for path in (ROOT / "examples" / "notebooks").glob("*.ipynb"):
        if not (notebooks / path.name).exists() or (notebooks / path.name).read_bytes() != path.read_bytes():
            shutil.copy(path, notebooks / path.name)
