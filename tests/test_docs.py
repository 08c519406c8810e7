"""The pages, recipes and notebooks: what they show exists and runs. CI builds the site, warnings as errors."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pixelss
import pixelss.viz

ROOT = Path(__file__).parent.parent
DOCS, EXAMPLES = ROOT / "docs", ROOT / "examples"
PAGES = sorted([*DOCS.glob("*.md"), *(DOCS / "blocks").glob("*.md")])
TEXTS = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *(EXAMPLES / "voc" / name for name in ("README.md", "RESULTS.md")),
    *PAGES,
]
NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))
RECIPES = sorted((EXAMPLES / "recipes").glob("*.py"))
NAMES = sorted([*pixelss.__all__, *(f"viz.{name}" for name in pixelss.viz.__all__)])


def relative(path):
    return str(path.relative_to(ROOT))


def test_every_public_name_is_described_on_one_page():
    directives = [
        name
        for page in PAGES
        for name in re.findall(r"^\.\. auto(?:function|class):: pixelss\.(\S+)$", page.read_text(), re.MULTILINE)
    ]
    assert sorted(directives) == NAMES


def test_the_api_page_lists_every_public_name_once():
    assert sorted(re.findall(r"\{py:obj\}`~pixelss\.(\S+?)`", (DOCS / "api.md").read_text())) == NAMES


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_code_blocks_run(page):
    torch.manual_seed(0)
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(block, str(page), "exec"), {})


def test_the_landing_example_has_twelve_lines_at_most():
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "index.md").read_text(), re.DOTALL)
    assert len(block.splitlines()) <= 12


def test_every_block_page_has_its_sections():
    for page in (DOCS / "blocks").glob("*.md"):
        text = page.read_text()
        equation = page.stem in ("viz", "backbones") or "$$" in text
        picture = page.stem == "backbones" or f"/_pictures/{page.stem}.png" in text
        pitfalls = page.stem == "viz" or "## Pitfalls" in text
        assert (equation, picture, pitfalls, "## API" in text) == (True, True, True, True), page


@pytest.mark.parametrize("page", TEXTS, ids=relative)
def test_what_a_page_includes_and_links_to_exists(page):
    text = page.read_text()
    for kind, target, options in re.findall(
        r"^[:`]{3}\{(figure|literalinclude|include)\} (\S+)\n((?::.*\n)*)", text, re.MULTILINE
    ):
        if target.startswith("/_pictures/"):  # drawn at build time
            assert f"def {Path(target).stem}_picture(" in (DOCS / "pictures.py").read_text()
            continue
        content = (page.parent / target).read_bytes()
        for option, value in re.findall(r"^:(pyobject|start-at|start-after|end-before): (.*)$", options, re.MULTILINE):
            value = value.strip('"')
            wanted = rf"^(def|class) {value}\b" if option == "pyobject" else re.escape(value)
            assert re.search(wanted, content.decode(), re.MULTILINE), (target, option, value)
        assert kind != "figure" or ":alt:" in options
    for link in re.findall(r"\]\((?!https?://)([^)#\s]+)", text):
        target = page.parent / link
        assert target.exists() or EXAMPLES / "notebooks" / target.name in NOTEBOOKS, link


def test_texts_and_examples_name_only_what_exists():
    for path in (*TEXTS, *RECIPES, *NOTEBOOKS, DOCS / "pictures.py"):
        text = path.read_text()
        used = set(re.findall(r"\bpixelss\.(?!png|git)([A-Za-z_]\w+)", text))
        assert not [name for name in used if not hasattr(pixelss, name)], path
        used = set(re.findall(r"(?<!\.)\bviz\.([a-z_]\w+)", text)) - {"md", "py", "png", "Pixels"}
        assert not [name for name in used if name not in pixelss.viz.__all__], path


@pytest.mark.parametrize("path", NOTEBOOKS, ids=relative)
def test_notebooks_hold_no_outputs(path):
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert cells[0]["source"][0].startswith("# ")
    assert not [cell for cell in code if cell["outputs"] or cell["execution_count"]]


def test_there_are_four_notebooks_and_the_site_shows_them():
    assert len(NOTEBOOKS) == 4
    index = (DOCS / "index.md").read_text()
    assert not [path for path in NOTEBOOKS if f"\nnotebooks/{path.stem}\n" not in index]


@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_recipes_run(path):
    if path.stem == "lightning_module":
        pytest.importorskip("lightning", exc_type=ImportError)
    command = [sys.executable, str(path)]
    if path.stem == "several_gpus":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_every_recipe_is_on_the_page():
    text = (DOCS / "recipes.md").read_text()
    assert len(RECIPES) >= 6
    assert not [path for path in RECIPES if f"../examples/recipes/{path.name}" not in text]


def test_one_command_builds_the_site():
    command = "python -m sphinx -W -n docs"
    assert command in (ROOT / "CONTRIBUTING.md").read_text()
    assert command in (ROOT / ".ci" / "run").read_text()
