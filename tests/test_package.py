"""What a user meets first: the public names, their docstrings, the README's code, the import time."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pixelss
import pixelss.io
import pixelss.viz
from tests.processes import run_script

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BASES = ("https://github.com/pixelss/pixelss/blob/main/", "https://raw.githubusercontent.com/pixelss/pixelss/main/")
NEVER_RAISE = {"ResNet38", "freeze_norm", "viz.voc_palette"}
NO_TENSORS = {"freeze_norm", "load_resnet38", "pair_offsets"}
DOCUMENTED = {name: getattr(pixelss, name) for name in pixelss.__all__}
DOCUMENTED |= {f"viz.{name}": getattr(pixelss.viz, name) for name in pixelss.viz.__all__}
DOCUMENTED |= {f"io.{name}": value for name, value in vars(pixelss.io).items() if name.startswith(("read_", "write_"))}
RESULTS = {"CAMOutput", "LoadReport", "SegmentationScores", "SweepScores"}  # NamedTuples: no example of their own


def test_names_are_sorted_and_exist():
    assert pixelss.__all__ == sorted(set(pixelss.__all__))
    assert pixelss.viz.__all__ == sorted(set(pixelss.viz.__all__))
    assert all(hasattr(pixelss, name) for name in pixelss.__all__)


def test_viz_lists_all_that_it_defines():
    own = {name for name, value in vars(pixelss.viz).items() if callable(value)}
    assert own == set(pixelss.viz.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="class_region_masks"):
        pixelss.class_region_masks  # noqa: B018


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_public_name_is_documented(name):
    doc = inspect.getdoc(DOCUMENTED[name]) or ""
    sections = ["Attributes:" if name != "LoadReport" else "load_resnet38"]
    if doc.startswith("`"):  # a Module that wraps a function: the rest is said there
        sections = ["Args:", "Example:", ">>> "]
    elif name not in RESULTS:
        sections = ["Reference:", "Example:", ">>> "]
        sections += ["Raises:"] * (name not in NEVER_RAISE) + ["Shape:"] * (name not in NO_TENSORS)
    assert not [section for section in sections if section not in doc]


def test_every_argument_is_documented():
    for name in DOCUMENTED.keys() - RESULTS:
        doc = inspect.getdoc(DOCUMENTED[name]) or ""
        arguments = set(inspect.signature(DOCUMENTED[name]).parameters)
        assert not [argument for argument in arguments if not re.search(rf"^ +\**{argument}: ", doc, re.MULTILINE)], (
            name
        )


@pytest.mark.processes
def test_import_is_light_and_timm_backbone_knows_resnet38_without_another(tmp_path):
    """The second in a fork, whose server has imported timm and not our part of it."""
    heavy = ("timm", "torchvision", "matplotlib", "PIL", "torch._dynamo")
    code = (
        "import sys, torch, pixelss.backbones.checkpoints, pixelss.cam.classifier, pixelss.io, pixelss.viz\n"
        f"print([name for name in {heavy} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch, pixelss\n"
        "known = 'pixelss.backbones.timm_resnet38' in sys.modules\n"
        "torch.set_default_device('meta'); print(known, pixelss.timm_backbone('resnet38').stride)\n"
    )
    done = run_script(script)
    assert done.stdout == "False 8\n", done.stderr


@pytest.mark.usefixtures("few_draws")
def test_readme_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    torch.manual_seed(0)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_readme_names_exist():
    assert not [name for name in re.findall(r"`pixelss\.(\w+)`", README) if not hasattr(pixelss, name)]


def test_readme_fits_a_first_screen():
    code = [line for block in re.findall(r"```\w+\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
    assert max(map(len, code)) <= 92  # a package index cuts what is wider
    rows = [line for line in README.splitlines() if line.startswith("| [")]  # of the table, a line a page
    assert len(README.splitlines()) - len(rows) <= 142


def test_readme_links_work_on_a_package_index_too():
    targets = re.findall(r"\]\(([^)\s]+)\)", README)
    assert not [target for target in targets if not target.startswith("https://")]
    for base in BASES:
        here = [target.removeprefix(base) for target in targets if target.startswith(base)]
        assert here
        assert not [target for target in here if not (ROOT / target.partition("#")[0]).exists()]


def test_readme_marks_what_others_fill_and_take():
    for start, end in (("<!-- status -->", "<!-- /status -->"), ("<!-- blocks:", "<!-- /blocks -->")):
        assert (README.count(start), README.count(end)) == (1, 1)
        assert README.index(start) < README.index(end)


def test_ci_runs_the_slow_tests_of_machine_code():
    assert 'python -m pytest -n auto -m "slow and inductor"' in (ROOT / ".ci" / "run").read_text()


def test_readme_and_ci_share_the_test_command():
    command = 'python -m pip install -e ".[dev]" && python -m pytest -n auto\n'
    for text in (README, (ROOT / "CONTRIBUTING.md").read_text(), (ROOT / ".ci" / "run").read_text()):
        assert command in text
