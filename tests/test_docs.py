"""The pages, recipes and notebooks: what they show exists and runs. CI builds the site, warnings as errors."""

import importlib.util
import json
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import pixelss
import pixelss.examples
import pixelss.io
import pixelss.viz
from tests.processes import free_port, run_script

ROOT = Path(__file__).parent.parent
DOCS, EXAMPLES = ROOT / "docs", ROOT / "examples"
BLOCKS = sorted((DOCS / "blocks").rglob("*.md"))
PAGES = sorted([*DOCS.glob("*.md"), *BLOCKS])
TEXTS = sorted({*ROOT.glob("*.md"), *(ROOT / ".github").rglob("*.md"), *EXAMPLES.rglob("*.md"), *PAGES})
NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))
RECIPES = sorted((EXAMPLES / "recipes").glob("*.py"))
TAKEN_IN = {"voc.md": "README.md", "voc-results.md": "RESULTS.md"}  # by docs/conf.py, from examples/voc
NO_EQUATION = {"backbones", "viz", "io"}  # rooms whose pages may go without


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = load(DOCS / "generate.py")
NAMES = sorted(generate.public_names())


def relative(path):
    return str(path.relative_to(ROOT))


def described(page):
    return re.findall(r"^\.\. auto(?:function|class):: pixelss\.(\S+)$", page.read_text(), re.MULTILINE)


def test_every_public_name_is_described_on_one_page():
    assert sorted(name for page in PAGES for name in described(page)) == NAMES


@pytest.mark.parametrize("page", BLOCKS, ids=relative)
def test_a_page_lies_where_its_module_lies_and_its_names_come_from(page):
    module = page.relative_to(DOCS / "blocks").with_suffix("")
    assert (ROOT / "src" / "pixelss" / module).with_suffix(".py").is_file()
    room = importlib.import_module(".".join(["pixelss", *(module.parent.parts or module.parts)]))
    names = described(page)
    assert names
    assert not [name for name in names if not hasattr(room, name.split(".")[-1])]


def test_the_sidebar_shows_every_page_of_a_block_once():
    assert sorted(page.path for page in generate.pages()) == [str(page.relative_to(DOCS)) for page in BLOCKS]


@pytest.mark.parametrize("text", ["docs/api.md", "docs/papers.md", "README.md"])
def test_generated_texts_are_as_committed(text):
    assert (ROOT / text).read_text() == generate.generated()[ROOT / text], "run `python docs/generate.py`"


def test_every_source_of_a_docstring_is_in_the_bibliography_and_no_other():
    cited = {key: name for name in NAMES for key in generate.references(name)}
    assert {key: cited[key] for key in cited.keys() - generate.BIBLIOGRAPHY.keys()} == {}
    assert sorted(generate.BIBLIOGRAPHY) == sorted(cited)


def test_what_a_row_of_the_readme_says_is_short():
    assert not [page for page in generate.pages() if not 1 <= len(page.does.split()) <= 10]


def test_an_equation_is_in_the_heading_of_one_page():
    headings = [line for page in PAGES for line in re.findall(r"^#+ .*Eq\..*$", page.read_text(), re.MULTILINE)]
    equations = [equation for heading in headings for equation in re.findall(r"\w+ Eq\. \d+", heading)]
    assert len(equations) == len(set(equations)) >= 8
    assert not [heading for heading in headings if re.search(r"\d-\d|\d, \d|(?<!\w )Eq", heading)]


def test_every_equation_of_a_page_is_in_the_references_of_its_names():
    for page in generate.pages():
        stated = re.findall(r"(\w+) (Eq\. \d+)", page.title)
        cited = {(key.split()[0], e) for key, where in generate.sources(page.names).items() for e in where}
        assert set(stated) <= cited, page.path


@pytest.mark.usefixtures("few_draws")
@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_code_blocks_run(page):
    torch.manual_seed(0)
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(block, str(page), "exec"), {})


def test_the_landing_example_has_twelve_lines_at_most():
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "index.md").read_text(), re.DOTALL)
    assert len(block.splitlines()) <= 12


@pytest.mark.parametrize("page", BLOCKS, ids=relative)
def test_a_block_page_has_its_parts_in_order(page):
    text = page.read_text()
    call, picture = text.index("```python\n"), text.find(f"/_pictures/{page.stem}.png")
    why_not = re.search(r"^There is no picture on this page[:;] .{10,}\.$", text, re.MULTILINE)
    assert (picture > call) is not bool(why_not), "a picture, or one line that says why there is none"
    assert text.count("literalinclude") == 0 if picture < 0 else text.index("<details>") > picture
    assert "$$" in text or {page.parent.name, page.stem} & NO_EQUATION
    assert call < text.index("## Pitfalls") < text.index("## API")


@pytest.mark.parametrize("page", BLOCKS, ids=relative)
def test_a_block_page_begins_with_a_short_call_of_the_block(page):
    code = re.search(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)[1]
    assert 3 <= len([line for line in code.splitlines() if line]) <= 6
    assert [name for name in described(page) if re.search(rf"\b{name}\(", code)]


@pytest.mark.parametrize("page", TEXTS, ids=relative)
def test_code_is_at_most_92_columns_wide(page):
    blocks = re.findall(r"^ *([`:]{3})(?:\{code-block\} )?\w+\n(.*?)^ *\1", page.read_text(), re.DOTALL | re.MULTILINE)
    assert not [line for _, block in blocks for line in block.splitlines() if len(line) > 92]


def prose(text):
    """The lines of a text that are prose, by paragraph or item; code, formulas, addresses and tables are out."""
    text = re.sub(r"\A---\n.*?^---$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^ *([`:]{3}).*?^ *\1$|^\$\$.*?\$\$$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`\n]*`|\$[^$\n]+\$", "x", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    text = re.sub(r"^(?:\||#|<|\(\S+\)=).*$", "", text, flags=re.MULTILINE)
    paragraphs = re.split(r"\n\s*\n|^ *(?:[-*]|\d+\.) ", text, flags=re.MULTILINE)
    return [paragraph.strip().splitlines() for paragraph in paragraphs if paragraph.strip()]


# A sentence's end, and the next one's beginning; a bold heading on the line of its text is no sentence.
TWO_SENTENCES = re.compile(r"(?<!\bEq)(?<!\bExp)(?<!\bal)[a-z0-9x%)\]\"*][.!?][\")*]* +[*(\"\[]*[A-Zx]")
HEADING = re.compile(r"^\*\*[^*]+\*\* ")


def unlike_a_sentence(text):
    """The lines that hold more than one sentence, and those that begin in the middle of one."""
    found = []
    for lines in prose(text):
        found += [line for line in lines if TWO_SENTENCES.search(HEADING.sub("", line))]
        found += [b for a, b in pairwise(lines) if not re.search(r"[.!?:][\")*]*$", a.rstrip())]
    return found


@pytest.mark.parametrize("page", [page for page in TEXTS if page.name not in ("api.md", "papers.md")], ids=relative)
def test_a_line_of_prose_is_one_sentence(page):
    assert not unlike_a_sentence(page.read_text())


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One. Two.", 1),
        ("- One of `f(x)`. *Two*, a few.\n- Three.", 1),
        ("One that\ngoes on.", 1),
        ("**Heading.** One (Eq. 2, Exp. 1), x0.5 ... x2.\nTwo:\n\n| a. B | c |\n", 0),
        ("1. One.\n   Two.\n\n```sh\na. B\nc\n```\n$$a. B$$", 0),
    ],
)
def test_two_sentences_on_a_line_are_seen(text, count):
    assert len(unlike_a_sentence(text)) == count


def test_equations_of_texts_and_examples_are_spelled_out():
    generated = {"README.md", "api.md", "papers.md"}
    files = [path for folder in (EXAMPLES, ROOT / "benchmarks") for path in folder.rglob("*.*")]
    files = [path for path in files if path.suffix in {".py", ".yaml", ".ipynb"}]
    for path in (*files, *(page for page in TEXTS if page.name not in generated or page.parent == EXAMPLES / "voc")):
        text = path.read_text()
        assert len(re.findall(r"\b[A-Z]\w+ Eq\. \d+(?! ?[-&] ?\d)", text)) == len(re.findall(r"\bEq\. \d", text)), path


def anchors(text):
    """The headings of a Markdown text as GitHub and the site name them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


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
    site = f"{generate.URL}/blob/main/"
    links = [(ROOT, *link) for link in re.findall(rf"\]\({site}([^)#\s]+)#?([^)\s]*)\)", text)]
    links += [(page.parent, *link) for link in re.findall(r"\]\((?!https?://)([^)#\s]+)#?([^)\s]*)\)", text)]
    links += [(page.parent, page.name, anchor) for anchor in re.findall(r"\]\(#([^)\s]+)\)", text)]
    for folder, link, anchor in links:
        target = folder / link
        assert target.exists() or EXAMPLES / "notebooks" / target.name in NOTEBOOKS, link
        whole = [target, *(EXAMPLES / "voc" / name for page, name in TAKEN_IN.items() if page == target.name)]
        assert not anchor or anchor in anchors("".join(path.read_text() for path in whole)), f"{link}#{anchor}"


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


def run_in_two_processes(path):
    """As torchrun does, whose own start takes seconds."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    places = [place | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda place: run_script(path, environment=place), places))


@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_recipes_run(path):
    results = run_in_two_processes(path) if path.stem == "several_gpus" else [run_script(path)]
    for result in results:
        *_, last = result.stderr.splitlines() or [""]
        if "\n    import lightning\n" in result.stderr and re.match("(Import|ModuleNotFound)Error", last):
            pytest.skip(last)  # it need not be there; to import it here, and not in the fork alone, takes seconds
        assert result.returncode == 0, result.stderr
    assert "".join(result.stdout for result in results).strip()


def test_every_recipe_is_on_the_page():
    text = (DOCS / "recipes.md").read_text()
    assert len(RECIPES) >= 6
    assert not [path for path in RECIPES if f"../examples/recipes/{path.name}" not in text]


def test_one_command_builds_the_site():
    command = "python -m sphinx -W -n docs"
    assert command in (ROOT / "CONTRIBUTING.md").read_text()
    assert command in (ROOT / ".ci" / "run").read_text()
