"""Sphinx: `python -m sphinx -W -n docs OUT`, offline; pictures are drawn and notebooks run on the way.

Five things are done here that Sphinx does not do: docstrings are turned from plain text to reST, texts that live
elsewhere in the repository are taken in with their links, names of the library become links wherever they are written
as code, every picture gets a twin for dark pages, and an equation is one word, to the search and to line breaks.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT / "src"), str(DOCS)]

import generate  # noqa: E402
import numpy as np  # noqa: E402
from docutils import nodes  # noqa: E402
from PIL import Image  # noqa: E402
from skimage.measure import label, regionprops  # noqa: E402
from sphinx import addnodes, search  # noqa: E402
from sphinx.search.en import SearchEnglish  # noqa: E402

import pixelss  # noqa: E402
import pixelss.viz  # noqa: E402

project, author, copyright = "pixelss", "the pixelss authors", "the pixelss authors"  # noqa: A001
version = release = pixelss.__version__
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
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
_FOREIGN += "|ClassifierCAM|TimmBackbone"  # types that calls return, and nobody makes
nitpick_ignore_regex = [
    ("py:.*", r"(torch|numpy|np|nn|os|collections|typing|matplotlib|timm)(\..*)?"),
    ("py:.*", rf"(.*\.)?({_FOREIGN})"),
]

NAMES = {name.split(".")[-1]: f"pixelss.{name}" for name in generate.public_names()}
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
    return generate.KEY.sub(lambda key: f":ref:`{key[0]} <{generate.label(key[0])}>`", "".join(escaped))


def name_aliases(
    app: Any, what: str, name: str, obj: object, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, ...]:
    """Write an alias inside a larger type by its name alone."""
    return tuple(text and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text) for text in (signature, returns))


class SearchEquations(SearchEnglish):
    """Search that takes "Eq. 5" for one word: numbers are dropped otherwise, and any equation finds them all."""

    js_splitter_code = r"""
var splitQuery = (query) =>
  query
    .replace(/\beq\.?\s*(\d+)/gi, "eq$1")
    .split(/[^\p{Letter}\p{Number}_]+/gu)
    .filter((term) => term);
"""

    def split(self, input: str) -> list[str]:  # noqa: A002
        """Return the words of a text, as the function above does with a query."""
        return super().split(re.sub(r"\bEq\.\s(\d+)", r"eq\1", input))


search.languages["en"] = SearchEquations


# Page -> the text of the repository that follows what the page says itself, all of it or between two markers.
TAKEN_IN = {
    "voc": ("examples/voc/README.md", ""),
    "voc-results": ("examples/voc/RESULTS.md", ""),
    "status": ("README.md", "status"),
}
LINK = re.compile(r"(?<=\]\()(?!#|mailto:)([^)#\s]*)(#[^)\s]*)?(?=\))")


def take_in(app: Any, docname: str, source: list[str]) -> None:
    """Append the text that belongs to a page, without its first heading, its links and pictures still working."""
    name, marker = TAKEN_IN.get(docname, ("", ""))
    path = ROOT / name
    if not path.is_file():
        return
    app.env.note_dependency(str(path))
    text = path.read_text()
    if marker:
        text = text.split(f"<!-- {marker} -->")[1].split(f"<!-- /{marker} -->")[0]
    parts = re.split(r"(^ *```.*?^ *```)", text, flags=re.MULTILINE | re.DOTALL)  # odd ones are code
    parts[::2] = [LINK.sub(lambda link: _from_docs(path, link[1], link[2] or ""), part) for part in parts[::2]]
    text = re.sub(r"\A\s*#+ .*\n", "", "".join(parts))
    source[0] += f"\n{text}\n"


def _from_docs(path: Path, target: str, anchor: str) -> str:
    """Return a link's target as seen from docs/: a page of the site, else a file of the repository."""
    if target.startswith(("https:", "http:")) and not target.startswith(f"{generate.URL}/blob/main/"):
        return target + anchor
    inside = target.removeprefix(f"{generate.URL}/blob/main/")
    found = (path.parent / target if inside == target else ROOT / inside).resolve()
    for page, (name, marker) in TAKEN_IN.items():
        if found == ROOT / name and marker in ("", anchor.removeprefix("#")):
            return f"{page}.md{'' if marker else anchor}"
    if DOCS in found.parents:
        return f"{found.relative_to(DOCS)}{anchor}"
    if found.is_file():
        return f"../{found.relative_to(ROOT)}"
    return f"{generate.URL}/tree/main/{found.relative_to(ROOT)}"


def bind_equations(app: Any, doctree: nodes.document) -> None:
    """Keep "Yoon Eq. 5" on one line in headings, and so in the sidebar and in lists of pages."""
    for title in doctree.findall(nodes.title):
        for text in list(title.findall(nodes.Text)):
            bound = re.sub(r" ?Eq\. (?=\d)", lambda found: found[0].replace(" ", "\N{NO-BREAK SPACE}"), text)
            text.parent.replace(text, nodes.Text(bound))


def link_names(app: Any, doctree: nodes.document) -> None:
    """Make a link of every public name that a text writes as code, alone or as a call; a page links to others only."""
    own = {node["ids"][0] for node in doctree.findall(addnodes.desc_signature) if node["ids"]}
    for code in list(doctree.findall(nodes.literal)):
        name = re.match(r"(?:pixelss\.)?(?:viz\.|io\.)?(\w+)(?:\(.*\))?\Z", code.astext())
        target = NAMES.get(name[1]) if name else None
        if (
            target is None
            or target in own
            or isinstance(code.parent, (nodes.reference, nodes.title, addnodes.pending_xref))
        ):
            continue
        link = addnodes.pending_xref(
            "", code.deepcopy(), refdomain="py", reftype="obj", reftarget=target, refdoc=app.env.docname, refwarn=True
        )
        code.parent.replace(code, link)


NIGHT = DOCS / "_pictures" / "night"


def twin_pictures(app: Any, doctree: nodes.document) -> None:
    """Give every picture on white paper a twin for dark pages; the theme shows one of the two."""
    for node in list(doctree.findall(nodes.image)):
        _, path = app.env.relfn2path(node["uri"], app.env.docname)
        if "://" in node["uri"] or Path(path).suffix != ".png":
            continue
        content = Path(path).read_bytes()
        twin = NIGHT / f"{Path(path).stem}-{hashlib.sha256(content).hexdigest()[:8]}.png"
        if not twin.exists():
            twin.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(at_night(np.asarray(Image.open(path).convert("RGB")))).save(twin, optimize=True)
        dark = node.deepcopy()
        dark["uri"] = f"/{twin.relative_to(DOCS)}"
        node["classes"].append("only-light")
        dark["classes"].append("only-dark")
        node.parent.insert(node.parent.index(node) + 1, dark)


def at_night(picture: pixelss.viz.Pixels) -> pixelss.viz.Pixels:
    """Return a picture with the lightness of paper, writing and curves turned round; images stay as they are."""
    x = picture / 255
    turned = x + 1 - x.max(-1, keepdims=True) - x.min(-1, keepdims=True)  # the same hue, lightness 1 - L
    night = (255 * (0.078 + 0.75 * turned)).astype(np.uint8)  # from furo's dark paper to its writing
    for region in regionprops(label((picture < 250).any(-1))):
        top, left, bottom, right = region.bbox
        filled = region.area_filled / ((bottom - top) * (right - left))
        if min(bottom - top, right - left) >= 12 and filled > 0.95:  # no letter fills its box
            night[top:bottom, left:right] = picture[top:bottom, left:right]
    return night


def setup(app: Any) -> None:
    """Draw the pictures, take the notebooks in, and hook the docstrings' conversion up before napoleon's."""
    app.connect("autodoc-process-docstring", to_rest, priority=400)
    app.connect("autodoc-process-signature", name_aliases)
    app.connect("source-read", take_in)
    for change in (twin_pictures, bind_equations, link_names):
        app.connect("doctree-read", change, priority=400)  # before Sphinx collects images and titles
    subprocess.run([sys.executable, str(DOCS / "pictures.py")], check=True)
    notebooks = DOCS / "notebooks"
    notebooks.mkdir(exist_ok=True)
    for path in (ROOT / "examples" / "notebooks").glob("*.ipynb"):
        if not (notebooks / path.name).exists() or (notebooks / path.name).read_bytes() != path.read_bytes():
            shutil.copy(path, notebooks / path.name)
