"""The examples, run as a user runs them, in a tiny setting."""

import ast
import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
VOC_MINI = Path(os.environ.get("PIXELSS_VOC_MINI", Path(__file__).parent.parent.parent / "shared/data/voc12-mini"))
ROWS = ["baseline", "control", "+RCM", "+MAM", "+RCM+MAM"]
sys.path.insert(0, str(EXAMPLES))

from shapes import CLASSES, VOID, write_shapes  # noqa: E402

from pixelss.examples import _EXTRA, _SUFFIXES, copy_examples, main  # noqa: E402
from pixelss.viz import voc_palette  # noqa: E402
from tests.lazily import Lazily  # noqa: E402
from tests.processes import run_script  # noqa: E402

quickstart: Any = Lazily("quickstart")


def run_quickstart(out: Path, *arguments: str) -> str:
    tiny = ["--warmup", "3", "--iterations", "2", "--batch", "2", "--score-images", "3", "--out", str(out)]
    done = run_script(EXAMPLES / "quickstart.py", *tiny, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_outputs(out: Path, table: str, seeds: int) -> None:
    results = json.loads((out / "results.json").read_text())["results"]
    assert list(results) == ROWS
    assert all(
        len(runs) == seeds and np.isfinite(runs).all() and np.shape(runs) == (seeds, 8) for runs in results.values()
    )
    lines = table.splitlines()
    assert "in per cent" in lines[0]
    assert [line.split()[0] for line in lines[3:8]] == ROWS
    assert "control" in lines[8]
    assert lines[-2].startswith("Rows: 2 iterations")
    assert max(map(len, lines[:-1])) <= 80  # but for the picture's path
    with Image.open(out / "quickstart.png") as picture:
        assert picture.size[0] > 500


def test_quickstart_on_generated_images(tmp_path):
    small = write_shapes(tmp_path / "set", train=6, val=1, size=40)
    out = tmp_path / "out"
    table = run_quickstart(out, "--data", str(small), "--crop", "32", "--seeds", "0", "1")
    check_outputs(out, table, seeds=2)


@pytest.mark.skipif(not VOC_MINI.is_dir(), reason="no VOC photographs: set PIXELSS_VOC_MINI to a folder in VOC layout")
def test_quickstart_on_photographs(tmp_path):
    table = run_quickstart(
        tmp_path, "--data", str(VOC_MINI), "--crop", "64", "--rescale", "0.2", "0.4", "--score-images", "1"
    )
    check_outputs(tmp_path, table, seeds=1)


def results_of(**gains: list[float]) -> dict[str, list[list[float]]]:
    """Results of rows so many points above a control of 60, twice as many at scale 1.0; `_` stands for `+`."""
    seeds = len(next(iter(gains.values())))
    rows = {"baseline": [0.0] * seeds, "control": [0.0] * seeds}
    rows |= {name.replace("_", "+"): values for name, values in gains.items()}
    return {row: [[60 + gain, 70, 80, 0.4, 50, 51 + 2 * gain, 52, 53] for gain in gains] for row, gains in rows.items()}


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        ({"_RCM": [-0.1], "_MAM": [1.1]}, ["+MAM is 1.1 points above control, the best row; one seed.", "+2.2"]),
        ({"_RCM": [-0.3], "_MAM": [-2]}, ["No row beats control: +RCM, the best, is 0.3 below; one seed."]),
        ({"_RCM": [-0.04], "_MAM": [-2]}, ["No row beats control: +RCM, the best, is level with it; one seed."]),
        (
            {"_MAM": [0.5, 1.1]},
            ["+MAM is 0.8 points above control, the best row; seeds +0.5 to +1.1.", "+1.6±0.6"],
        ),
        (
            {"_RCM_MAM": [-0.04, 1]},
            ["+RCM+MAM is 0.5 points above control, but not in every seed: +0.0 to +1.0.", "+1.0±1.0"],
        ),
        (
            {"_RCM_MAM": [-14.4, -11]},
            ["No row beats control: +RCM+MAM, the best, is 12.7 below; seeds -14.4 to -11.0."],
        ),
    ],
)
def test_the_last_lines_say_what_the_table_says(gains, words, capsys):
    results = results_of(**gains)
    expected = [words[0], *(f"Its best single scale against control is x1.0: {most}." for most in words[1:])]
    assert quickstart.in_words(results).splitlines() == expected
    quickstart.print_table(results, 120)
    lines = capsys.readouterr().out.splitlines()
    assert lines[3 + len(results) :] == expected  # after three lines of heading
    assert max(map(len, lines)) <= 80


def settings(monkeypatch, *arguments: str) -> Namespace:
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *arguments])
    return quickstart.parse_args()


def test_the_teacher_lags_as_the_paper_s_whatever_the_rate(monkeypatch):
    default = settings(monkeypatch)
    assert default.alpha == pytest.approx(1 - default.lr / (1 - default.momentum) / 3.3)
    slow = settings(monkeypatch, "--lr", "0.01", "--momentum", "0", "--iterations", "1", "--precision", "float32")
    assert slow.alpha == pytest.approx(0.997, abs=1e-4)  # the paper's
    assert quickstart.pace(slow) == "Rows: 1 iterations, distance 0.0, lag 3.3 (in the paper 68 and 3.3); float32."
    own = settings(monkeypatch, "--lr", "0.03", "--alpha", "0.98", "--iterations", "100")
    assert own.alpha == 0.98
    assert "distance 15.9, lag 15.0" in quickstart.pace(own)
    assert "lag inf" in quickstart.pace(settings(monkeypatch, "--alpha", "1"))


def test_precision_follows_the_processor(monkeypatch, tmp_path):
    for flags, precision in (("fpu amx_bf16 amx_tile", "bf16"), ("fpu avx512_bf16", "float32")):
        (tmp_path / "cpuinfo").write_text(f"flags : {flags}")
        monkeypatch.setattr("quickstart.CPUINFO", tmp_path / "cpuinfo")
        assert settings(monkeypatch).precision == precision
    monkeypatch.setattr("quickstart.CPUINFO", tmp_path / "none")  # as on a Mac
    assert settings(monkeypatch).precision == "float32"
    assert settings(monkeypatch, "--precision", "bf16").precision == "bf16"


def test_published_weights_are_trained_gently(monkeypatch):
    weighted = ["--backbone", "resnet18", "--weights", "resnet18.pth"]
    assert [getattr(settings(monkeypatch, *weighted), name) for name in ("lr", "warmup_lr")] == [0.005, 0.005]
    assert settings(monkeypatch, *weighted, "--lr", "0.01").lr == 0.01
    assert [getattr(settings(monkeypatch), name) for name in ("lr", "warmup_lr")] == [0.01, 0.02]
    with pytest.raises(SystemExit):
        settings(monkeypatch, "--momentum", "1")


def test_the_table_shows_differences_and_spreads(capsys):
    quickstart.print_table(results_of(_MAM=[0.5, 1.1]), 120)
    assert [line.split()[1:3] for line in capsys.readouterr().out.splitlines()[3:6]] == [
        ["60.0±0.0", "+0.0±0.0"],
        ["60.0±0.0", "70.0±0.0"],  # control against itself says nothing
        ["60.8±0.3", "+0.8±0.3"],
    ]


@pytest.mark.parametrize("listed", [True, False], ids=["classes.txt", "annotations"])
def test_classes_and_tags_of_a_folder(listed, tmp_path):
    root = write_shapes(tmp_path / "set", train=12, val=1, size=40)
    if not listed:
        (root / "classes.txt").unlink()
    data = quickstart.read_data(Namespace(data=root, backbone="small", score_images=3))
    assert data.folder.classes == list(CLASSES)  # sorted, and all of them are seen
    assert len(data.trained) == len(data.tags) == 12
    assert data.scored == data.trained[:3]
    present = [CLASSES[k] for k in data.tags["train_0000"].nonzero().flatten()]
    assert present
    annotation = (root / "Annotations/train_0000.xml").read_text()
    assert present == [name for name in CLASSES if f"<name>{name}</name>" in annotation]


def step_of(path: Path) -> list[str]:
    """The eight statements of a training step that are ours, without what only some trainers need."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        text = "\n".join("".join(cell["source"]) for cell in cells)
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Assign, ast.Expr))]
    plain = [ast.unparse(node).replace("self.", "") for node in sorted(found, key=lambda node: node.lineno)]
    plain = [line.replace(" / pixels", "").replace(" / pairs", "") for line in plain]
    starts = ("student_out =", "loss =", "teacher_out =", "mask =", "bank.update(", "cams =")
    return [line for line in plain if line.startswith(starts)][:8]


@pytest.mark.parametrize(
    "name", ["quickstart.py", "recipes/lightning_module.py", "recipes/several_gpus.py", "notebooks/trainer.ipynb"]
)
def test_a_training_step_is_the_same_lines_everywhere(name):
    step = step_of(EXAMPLES / "recipes/plain_loop.py")
    assert step[0] == "student_out = pixelss.multi_scale_forward(student, images)"
    assert step[-1] == "loss = loss + mal(*cams, tags)"
    assert step_of(EXAMPLES / name) == step


def digest(root: Path) -> str:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


SCRIPTS = [
    *(EXAMPLES / name for name in ("quickstart.py", "shapes.py", "lite0_weights.py")),
    *(EXAMPLES / "voc" / name for name in ("run.py", "tables.py", "headroom.py")),
    *sorted(path for path in (ROOT / "benchmarks").glob("*.py") if path.stem != "paired"),
    *sorted(path for path in (ROOT / "docs").glob("*.py") if path.stem != "conf"),
    *sorted((ROOT / ".ci").glob("*.py")),
    *(ROOT / "tests" / name for name in ("voc/kills.py", "voc/disks.py", "voc/fuzz.py", "backbones/fuzz.py")),
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_fits_a_terminal(script, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    monkeypatch.syspath_prepend(script.parent)
    with pytest.raises(SystemExit, match=r"^(0|None)?$"):
        runpy.run_path(str(script), run_name="__main__")
    shown = capsys.readouterr().out
    assert f"{script.name} " in shown
    assert "options:" in shown
    assert [line for line in shown.splitlines() if len(line) > 80] == []


def test_shapes_are_the_same_for_the_same_seed_and_kept(tmp_path):
    first, again, other = (
        write_shapes(tmp_path / name, train=3, val=2, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert digest(first).split() == digest(again).split()
    assert digest(first) != digest(other)
    assert write_shapes(first, train=3, val=2) == first
    with pytest.raises(FileExistsError, match="root must be free"):
        write_shapes(first, train=4, val=2)


def test_shapes_are_in_the_voc_layout(tmp_path):
    root = write_shapes(tmp_path / "set", train=8, val=2)
    assert (root / "classes.txt").read_text().split() == list(CLASSES)
    stems = (root / "ImageSets/Segmentation/train.txt").read_text().split()
    assert len(stems) == 8
    for stem in stems:
        with Image.open(root / "SegmentationClass" / f"{stem}.png") as mask:
            mask.load()
        with Image.open(root / "JPEGImages" / f"{stem}.jpg") as image:
            assert image.size == mask.size
        assert mask.getpalette() == voc_palette().flatten().tolist()
        values = set(np.unique(np.array(mask))) - {0, VOID}
        tags = {
            CLASSES.index(name) + 1
            for name in CLASSES
            if f"<name>{name}</name>" in (root / f"Annotations/{stem}.xml").read_text()
        }
        assert values == tags


# Copied out of the package: python -m pixelss.examples FOLDER


def test_the_copy_holds_what_git_holds(tmp_path, capsys):
    folder = tmp_path / "of my own"
    main([str(folder)])
    copied = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"quickstart.py", "recipes/plain_loop.py", "notebooks/refine.ipynb", "voc/run.py", "voc/own.yaml"} <= copied
    assert all((folder / name).read_bytes() == (EXAMPLES / name).read_bytes() for name in copied)
    said = capsys.readouterr().out
    assert said.startswith(f"Wrote {len(copied)} files; ")
    assert said.splitlines()[-1].endswith(f"python '{folder / 'quickstart.py'}'")
    if (EXAMPLES.parent / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(["git", "ls-files"], cwd=EXAMPLES, check=True, capture_output=True, text=True).stdout
        assert copied == {name for name in listed.splitlines() if (EXAMPLES / name).exists()}


def test_a_copy_leaves_out_results_and_caches_and_itself(tmp_path, monkeypatch):
    for name in ("a.py", "voc/b.yaml", "lite0.pth", "runs/c.py", "voc/__pycache__/d.py", ".ipynb_checkpoints/e.ipynb"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr("pixelss.examples._CHECKOUT", tmp_path)
    (tmp_path / "inside").mkdir()
    assert copy_examples(tmp_path / "inside") == [tmp_path / "inside" / name for name in ("a.py", "voc/b.yaml")]


@pytest.mark.parametrize("place", ["full", "full/mine.txt", "full/mine.txt/below"])
def test_a_copy_overwrites_nothing(tmp_path, capsys, place):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / place)])
    assert ended.value.code == 2
    assert place in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine.txt"]
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"


def test_a_package_without_examples_says_so(tmp_path, monkeypatch):
    (tmp_path / "none").mkdir()
    monkeypatch.setattr("pixelss.examples._CHECKOUT", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="came without examples"):
        copy_examples(tmp_path / "copy")


def test_a_copy_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pixelss.examples.find_spec", lambda name: None)
    main([str(tmp_path / "copy")])
    assert '\nNext: python -m pip install "pixelss[examples]" && python ' in capsys.readouterr().out


def test_the_extra_and_the_wheel_have_what_the_copy_looks_for():
    project = (EXAMPLES.parent / "pyproject.toml").read_text()
    assert tuple(re.findall(r'"/examples/\*\*/\*(\.\w+)"', project)) == _SUFFIXES
    (extra,) = re.findall(r"^examples = \[(.*)\]$", project, re.MULTILINE)
    named = {name.lower() for name in re.findall(r'"([a-z]+)[\[>]', extra)} - {"pixelss"} | {"matplotlib"}  # of viz
    assert {{"PIL": "pillow", "yaml": "pyyaml"}.get(name, name) for name in _EXTRA} == named
