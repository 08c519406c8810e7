"""What a release rests on: the pins that CI tries, the version wherever it stands, the workflow that uploads."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

import pixelss

ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()


def test_the_lowest_pins_are_those_of_the_project():
    (listed,) = re.findall(r"^dependencies = \[(.*)\]$", PROJECT, re.MULTILINE)
    wanted = dict(re.findall(r'"(\w+)>=([\d.]+)"', listed))
    pins = dict(re.findall(r"^(\w+)==([\d.]+)$", (ROOT / ".ci" / "lowest.txt").read_text(), re.MULTILINE))
    assert {name: version.removesuffix(".0") for name, version in pins.items()} == wanted


def test_the_citation_has_the_version():
    (cited,) = re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited == pixelss.__version__


def load_tagged():
    spec = importlib.util.spec_from_file_location("tagged", ROOT / ".ci" / "tagged.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RELEASED = {
    "src/pixelss/__init__.py": '"""Blocks."""\n\n__version__ = "1.2.3"\n',
    "CITATION.cff": "type: software\nversion: 1.2.3\ndate-released: 2026-01-31\n",
    "CHANGELOG.md": "# Changelog\n\n## [Unreleased]\n\n## [1.2.3] - 2026-01-31\n\n- All.\n",
    "README.md": "pip install pixelss\n",
    "docs/install.md": "pip install pixelss\n",
}


@pytest.mark.parametrize(
    ("tag", "name", "old", "new", "said"),
    [
        ("v1.2.3", "README.md", "", "", []),
        ("1.2.3", "README.md", "", "", ["must be vX.Y.Z"]),
        ("v1.2.3.dev0", "README.md", "", "", ["must be vX.Y.Z", "__init__.py has", "CITATION.cff has", "no heading"]),
        ("v1.2.4", "README.md", "", "", ["__init__.py has another", "CITATION.cff has another", "no heading"]),
        ("v1.2.3", "src/pixelss/__init__.py", "1.2.3", "1.2.3.dev0", ["__init__.py has another version than 1.2.3"]),
        ("v1.2.3", "CITATION.cff", "1.2.3", "1.2.2", ["CITATION.cff has another version than 1.2.3"]),
        ("v1.2.3", "CITATION.cff", "01-31", "02-01", ["another date-released than CHANGELOG.md, 2026-01-31"]),
        ("v1.2.3", "CHANGELOG.md", " - 2026-01-31", "", ["no heading '## [1.2.3] - YYYY-MM-DD'"]),
        ("v1.2.3", "CHANGELOG.md", "## [Unreleased]\n", "## [Unreleased]\n\n- New.\n", ["must begin with an empty"]),
        ("v1.2.3", "README.md", "pip", "not on PyPI yet: pip", ["README.md says that"]),
        ("v1.2.3", "docs/install.md", "pip", "not on PyPI yet: pip", ["docs/install.md says that"]),
    ],
)
def test_a_tag_is_refused_where_a_file_contradicts_it(tmp_path, tag, name, old, new, said):
    for path, text in {**RELEASED, name: RELEASED[name].replace(old, new)}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    found = load_tagged().problems(tag, tmp_path)
    assert len(found) == len(said)
    assert all(part in problem for part, problem in zip(said, found, strict=True))


def test_this_version_is_ready_for_its_tag_but_for_the_upload():
    if "dev" not in pixelss.__version__:
        found = load_tagged().problems(f"v{pixelss.__version__}", ROOT)
        assert not [problem for problem in found if "not on PyPI yet" not in problem]


@pytest.mark.skipif(not (ROOT / ".github").exists(), reason="an sdist has no workflows")
def test_only_a_checked_tag_is_published_and_no_secret_is_needed():
    text = (ROOT / ".github" / "workflows" / "publish.yml").read_text()
    workflow = yaml.safe_load(text)
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads `on` as true
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    commands = [step["run"] for step in build["steps"] if "run" in step]
    assert commands.index('python .ci/tagged.py "$GITHUB_REF_NAME"') < commands.index("python -m build")
    assert commands[-1] == "python -m twine check --strict dist/*"
    assert publish["needs"] == "build"
    assert publish["environment"]["name"] == "pypi"
    assert publish["permissions"] == {"id-token": "write"}
    assert "secrets" not in text
    assert "password" not in text.replace("no password", "")
