"""The rules of the layout: who imports whom, the size of a folder, what an `__init__` holds, an equation's room."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

import pixelss
from tests.blocks import PACKAGE, TESTS, modules, path_of_tests

ROOT = TESTS.parent
FILES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}
EQUATION = r"\b[A-Z]\w+ Eq\. \d+"  # of which paper
PAGES = ROOT / "docs" / "blocks"


def relative(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def imports(path: Path) -> set[str]:
    """Return the modules of pixelss that a file imports, wherever in it."""
    nodes = list(ast.walk(TREES[path]))
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {f"{'.' * node.level}{node.module or ''}" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name for name in found if name.startswith((".", "pixelss"))}


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "__init__.py"], ids=relative)
def test_a_file_imports_leaves_and_its_own_folder_only(path):
    folder = () if path.parent == PACKAGE else (f"pixelss.{path.parent.name}.",)
    strangers = {name for name in imports(path) if not name.startswith(("pixelss._", *folder))}
    assert not strangers


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_has_two_modules_or_more(folder):
    assert len(list((PACKAGE / folder).glob("*.py"))) >= 3


@pytest.mark.parametrize("path", [path for path in FILES if path.name == "__init__.py"], ids=relative)
def test_an_init_is_a_sentence_sorted_imports_and_all(path):
    docstring, *statements, names = TREES[path].body
    text = docstring.value.value
    if path.parent == PACKAGE:
        version = statements.pop()
        assert ast.unparse(version.targets[0]) == "__version__"
        text, *folders = text.split("\n\n")
        assert set(FOLDERS) <= set(re.findall(r"`(\w+)`", "".join(folders)))
    assert re.fullmatch(r"[^.\n]+(\.\w+[^.\n]*)*\.", text), "one sentence"
    assert all(isinstance(node, ast.ImportFrom) for node in statements)
    assert [node.module for node in statements] == sorted(node.module for node in statements)
    assert ast.unparse(names.targets[0]) == "__all__"
    exported = ast.literal_eval(names.value)
    assert exported == sorted(alias.name for node in statements for alias in node.names)


@pytest.mark.parametrize("module", modules())
def test_every_module_has_a_test_file(module):
    assert path_of_tests(module).exists()


def test_tests_and_pages_have_the_folders_of_the_package():
    assert {path.parent.name for path in TESTS.glob("*/test_*.py")} - {"voc"} == set(FOLDERS)
    assert {path.parent.name for path in PAGES.glob("*/*.md")} == set(FOLDERS)


def test_no_test_file_is_longer_than_600_lines():
    assert not [path.name for path in TESTS.rglob("*.py") if len(path.read_text().splitlines()) > 600]


def test_equations_are_spelled_out_and_stand_in_one_room():
    rooms = {}
    for path, tree in TREES.items():
        text = ast.get_docstring(tree) or ""
        assert len(re.findall(EQUATION, text)) == text.count("Eq."), f"{path.name}: write 'Yoon Eq. 5', each by itself"
        assert not re.search(r"Eq\. \d+ ?[-,&] ?\d|Eq\. \d+ and \d", text), path.name
        for equation in re.findall(EQUATION, text):
            assert rooms.setdefault(equation, path.parent.name) == path.parent.name, equation


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_is_public_comes_from_pixelss_and_from_its_folder(folder):
    room = importlib.import_module(f"pixelss.{folder}")
    for name in room.__all__:
        assert getattr(room, name) is not None
        assert folder == "viz" or getattr(pixelss, name) is getattr(room, name)


def test_every_public_name_comes_from_one_room():
    rooms = [*(importlib.import_module(f"pixelss.{folder}") for folder in FOLDERS if folder != "viz")]
    own = [name for room in rooms for name in room.__all__]
    for node in TREES[PACKAGE / "__init__.py"].body:
        if isinstance(node, ast.ImportFrom) and node.module in ("pixelss.metrics", "pixelss.segmentation"):
            own += [alias.name for alias in node.names]
    assert sorted(own) == pixelss.__all__
