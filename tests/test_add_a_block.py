"""The page that shows how a block is added: its example, put into a copy of the package, keeps every promise."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.blocks import PACKAGE, TESTS
from tests.processes import run_script

ROOT = TESTS.parent
PAGE = ROOT / "docs" / "add-a-block.md"
FILES = dict(re.findall(r"^:::\{code-block\} python\n:caption: (\S+)\n\n(.*?)^:::$", PAGE.read_text(), re.S | re.M))


def export(init: Path, module: str, name: str) -> None:
    """Add the name to a folder's `__init__`, as the page's second section says."""
    line = f"from {module} import {name}\n"
    text = re.sub(r"__all__ = \[", f'__all__ = [\n    "{name}",', init.read_text())
    before, names, after = re.split(r"(__all__ = \[.*?\])", text, flags=re.S)
    body = ",\n    ".join(sorted(re.findall(r'"\w+"', names)))
    imports = re.findall(r"^from .*? import (?:\(.*?\)|[^(\n]*)\n", before, flags=re.S | re.M)
    rest = before.split(imports[-1], 1)[1]
    head = before[: before.index(imports[0])]
    init.write_text(head + "".join(sorted([*imports, line])) + rest + f"__all__ = [\n    {body},\n]" + after)


def copy_with(files: dict[str, str], root: Path) -> None:
    """Copy the package and what tests share, and add the files."""
    shutil.copytree(PACKAGE, root / "src" / "pixelss", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "tests" / "losses").mkdir(parents=True)
    helpers = [path for path in TESTS.glob("*.py") if not re.search(r"test_(?!promises|layout)", path.name)]
    for path in (ROOT / "pyproject.toml", TESTS / "losses" / "__init__.py", *helpers):
        shutil.copy(path, root / path.relative_to(ROOT))
    for path, content in files.items():
        (root / path).write_text(content)
    for name in re.findall(r"^src/pixelss/losses/(\w+)\.py$", "\n".join(files), re.M):
        export(root / "src/pixelss/losses/__init__.py", f"pixelss.losses.{name}", f"{name}_loss")
        export(root / "src/pixelss/__init__.py", "pixelss.losses", f"{name}_loss")


def run_tests(root: Path, which: str) -> tuple[int, str]:
    """Run tests in the copy, the doctest of the module among them."""
    script = root / "run.py"
    script.write_text(
        "import os, sys\n"
        f"os.chdir({str(root)!r})\n"
        "for name in [name for name in sys.modules if name.split('.')[0] in ('pixelss', 'tests')]:\n"
        "    del sys.modules[name]  # a fork knows ours\n"
        "sys.path[:0] = ['src', '.']\n"
        "import pytest, pixelss\n"
        f"assert pixelss.__file__.startswith({str(root)!r})\n"
        "sys.exit(pytest.main(sys.argv[1:]))\n"
    )
    command = ["-q", "-p", "no:cacheprovider", "-rf", "-k", which, "src/pixelss/losses", "tests"]
    done = run_script(script, *command, environment={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""})
    return done.returncode, done.stdout + done.stderr


def test_the_example_is_of_the_files_that_the_page_names():
    assert list(FILES) == ["src/pixelss/losses/quiet.py", "tests/losses/test_quiet.py"]
    assert len(PAGE.read_text().splitlines()) <= 120


@pytest.mark.processes
def test_the_example_keeps_every_promise_and_a_block_without_an_entry_is_seen(tmp_path):
    """In one process, a fork: torch and pytest take seconds to start."""
    twin = {path.replace("quiet", "second"): content.replace("quiet", "second") for path, content in FILES.items()}
    path = "tests/losses/test_second.py"
    twin[path] = re.sub(r"^BLOCKS = .*$", "BLOCKS = {}", twin[path], flags=re.M)
    copy_with(FILES | twin, tmp_path)
    code, output = run_tests(tmp_path, "quiet or an_init or (second and entry)")
    assert code == 1, output
    failed = [line.split(" - ")[0].split("::")[1] for line in output.splitlines() if line.startswith("FAILED ")]
    assert failed == ["test_every_public_name_has_an_entry_in_its_test_file[second_loss]"], output
    assert int(re.search(r"(\d+) passed", output)[1]) > 30
