"""tables.py: rows, figures and files."""

from __future__ import annotations

import json
import math
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tables
import torch
import train_seg
import yaml
from costs import code_lines, megabytes, seconds_a_step, watched
from PIL import Image
from run import load_config
from torch import Tensor
from train_cam import TERMS

import pixelss
from tests.voc.runs import VOC, Call, config, load_once, new_run


def test_tables(shapes: Path, tiny: Path, tmp_path: Path, call: Call) -> None:
    start = tmp_path / "start.yaml"
    start.write_text("cam: {rcm: 1, schedule: {iterations: 1}}\n")  # without modules all the same
    rows = ("--cam.schedule.iterations", 3)  # of the rows alone
    base = ("--data", shapes, "--out", tmp_path / "out", "--config", VOC / "demo.yaml", "--config", tiny)
    printed = call(tables.main, "table5", *base, *rows, "--seeds", 0, 1, "--start", start)
    text = (tmp_path / "out" / "table5.md").read_text()
    assert text in printed
    assert "| MAM+RCM |" in text
    for word in ("train.txt", "seeds 0, 1", "3 iterations", "(6 images)", "46.0"):
        assert word in text
    assert (tmp_path / "out" / "table5.csv").read_text().startswith("row,column,seed,value,paper")
    for name in ("table5.png", "table5-curves.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.size[0] > 500
    made = {path.name for path in (tmp_path / "out" / "rows").iterdir()}
    assert made == {"start", "baseline", "MAM+RCM"}
    settings = [yaml.safe_load((tmp_path / f"out/rows/{row}/seed-1/config.yaml").read_text()) for row in sorted(made)]
    assert [(one["cam"]["schedule"]["iterations"], one["cam"]["rcm"]) for one in settings] == [(3, 1), (3, 0), (1, 0)]
    for name in ("data", "infer_cam", "network", "seed"):
        assert settings[0][name] == settings[1][name]
    for name in ("schedule", "cls_scales", "augment", "optimizer", "start_from"):
        assert settings[0]["cam"][name] == settings[1]["cam"][name]
    assert settings[0]["cam"]["start_from"].endswith("start/seed-1/train_cam")
    dates = [path.stat().st_mtime_ns for path in (tmp_path / "out/rows").rglob("done.json")]
    assert call(tables.main, "table5", *base, *rows, "--seeds", 0, 1, "--start", start).endswith(
        printed[printed.index("Table 5") :]
    )
    assert [path.stat().st_mtime_ns for path in (tmp_path / "out/rows").rglob("done.json")] == dates


def test_rows_change_settings_to_values_of_their_types() -> None:
    """What a row makes of a config is what a config made with the row's settings is, which takes longer."""
    merged = {name: value for changes in tables.ROWS.values() for name, value in changes.items()}
    words = [f"--cam.{name}={list(value) if isinstance(value, tuple) else value}" for name, value in merged.items()]
    made = load_config([VOC / "demo.yaml"], words).cam
    assert {name: repr(getattr(made, name)) for name in merged} == {name: repr(v) for name, v in merged.items()}
    assert all(type(v) is type(merged[name]) for changes in tables.ROWS.values() for name, v in changes.items())


def test_settings_are_read_once_a_row(
    shapes: Path, tiny: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, told = [], []
    monkeypatch.setattr(tables, "execute", lambda run, stages: rows.append(run.out.parent.name))
    monkeypatch.setattr(tables, "figures_of", lambda *_: told.append(len(reads)) or sys.exit())
    reads: list[object] = []
    whole = load_once
    monkeypatch.setattr("tests.voc.conftest.load_once", lambda *args: reads.append(args) or whole(*args))
    base = ("--data", shapes, "--out", tmp_path, "--config", VOC / "demo.yaml", "--config", tiny)
    call(tables.main, "fig7", *base, "--seeds", 0, 1)
    assert set(rows) == {"baseline", "RCM", *(f"RCM-t={t}" for t in tables.THRESHOLDS if t != 0.2)}
    assert told == [1 + 2 * len(tables.TABLES["fig7"].rows)]


def test_table_of_the_field(
    shapes: Path, tiny: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its groups; a killed table continues; a row and a refinement are an entry each.

    Of the rows those whose networks have modules of their own: every row's step is taken in test_terms.py.
    """
    assert all(set(table.rows) <= tables.ROWS.keys() for table in tables.TABLES.values())
    assert all(code_lines(TERMS[name]) > 0 for name in TERMS.keys() - {"cls"})
    few = ["baseline", "PPC", "Sub-category"]
    monkeypatch.setitem(tables.TABLES, "field", tables.TABLES["field"]._replace(rows=few))
    base = ("--data", shapes, "--out", tmp_path, "--config", VOC / "demo.yaml", "--config", tiny)
    assert "The table field needs --start" in call(tables.main, "field", *base, ok=False)
    rows = tables.TABLES["field"].rows
    assert rows[0] == "baseline"
    climb, climbed = pixelss.climb_cam, []

    def killed(*args: object, **kwargs: int) -> Tensor:
        if len(climbed) == 3:
            raise KeyboardInterrupt
        climbed.append(kwargs["iterations"])
        return climb(*args, iterations=1)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(pixelss, "climb_cam", killed)
        assert "continues where it was" in call(tables.main, "field", *base, "--start", tiny, ok=False)
    assert climbed == [13, 27, 13]  # an image has two scales
    monkeypatch.setattr(pixelss, "climb_cam", lambda *args, iterations: climbed.append(0) or climb(*args, iterations=1))
    whole, stopped = train_seg.energy_of, []

    def killed_too(*args: Any) -> Tensor:
        stopped.append(1)
        if len(stopped) == 2:  # of the steps of the last row
            raise KeyboardInterrupt
        return whole(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_seg, "energy_of", killed_too)
        assert "continues where it was" in call(tables.main, "field", *base, "--start", tiny, ok=False)
    assert len(climbed) == 3 + 2 * (6 - 1)  # the image that was finished is not climbed on again
    made = [*(tmp_path / "rows").rglob("done.json"), *(tmp_path / "rows").rglob("field/*.json")]
    before = {path: path.stat().st_mtime_ns for path in made}
    printed = call(tables.main, "field", *base, "--start", tiny)
    assert {path: path.stat().st_mtime_ns for path in made} == before
    check_table_of_the_field(printed, rows)
    losses = (tmp_path / "rows/PPC/seed-0/train_cam/metrics.jsonl").read_text().splitlines()
    assert {"cls", "er", "ecr", "minpool", "ppc"} <= set(json.loads(losses[0])) - {"rcm", "mam"}
    losses = (tmp_path / "rows/seg-energy/seed-0/train_seg/metrics.jsonl").read_text().splitlines()
    assert json.loads(losses[-1])["energy"] < 0  # it is negative
    text = (tmp_path / "field.csv").read_text()
    assert text.startswith("group,row,column,seed,value")
    made = [*(tmp_path / "rows").rglob("done.json"), *(tmp_path / "rows").rglob("field/*.json")]
    before = {path: path.stat().st_mtime_ns for path in made}
    assert call(tables.main, "field", *base, "--start", tiny) == printed[printed.index("The paper's modules") :]
    assert {path: path.stat().st_mtime_ns for path in made} == before
    assert (tmp_path / "field.csv").read_text() == text
    monkeypatch.setattr(sys, "argv", ["field_picture.py", str(tmp_path), "--out", str(tmp_path / "drawn.png")])
    runpy.run_path(str(VOC.parent.parent / "docs" / "field_picture.py"), run_name="__main__")
    with Image.open(tmp_path / "drawn.png") as picture:
        assert picture.size == (176 + 4 * 118, (2 + len(rows) + 1 + 7 + 2) * 118)


def check_table_of_the_field(printed: str, rows: Sequence[str]) -> None:
    """Both tables have every row, in 80 columns, and every figure that the row has."""
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    assert max(map(len, lines)) <= 80
    table = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    heads = [i for i, line in enumerate(table) if line[0] == "row"]
    scores, costs = (
        {line[0]: line[1:] for line in part[2:] if "**" not in line[0]}
        for part in (table[: heads[1]], table[heads[1] :])
    )
    refined, masks = ["none", "PMM", "AffinityNet", "IRNet", "BES"], ["dense CRF", "PAR", "SSDD"]
    segmentations = ["cross-entropy", "RRM's energy"]
    assert list(scores) == list(costs) == [*rows, "AdvCAM", *refined, *masks, *segmentations]
    columns = {"CAM mIoU", "mask mIoU", "precision", "recall", "t"}
    lacking = {"AdvCAM": columns} | {row: {"CAM mIoU"} for row in masks} | {row: {"t"} for row in segmentations}
    for row, cells in scores.items():
        figures = dict(zip(table[heads[0]][1:], cells, strict=True))
        assert {name for name, figure in figures.items() if not figure} == lacking.get(row, set())
        assert all(0 <= float(figure) <= 100 for figure in figures.values() if figure)
    assert scores["none"] == scores["baseline"]
    assert scores["none"][1] == scores["dense CRF"][1]
    for row, (few, _, peak, code) in costs.items():  # two steps may be too fast for the clock of the progress bar
        assert bool(few) == (row in [*rows, "AdvCAM"])
        assert bool(peak) == (row in [*rows, *segmentations])
        assert not peak or float(peak) > 100
        assert (int(code) > 0) == (row not in ("baseline", "none", "cross-entropy"))


def test_costs_of_a_training(shapes: Path, tmp_path: Path) -> None:
    run = new_run(shapes, tmp_path, settings=config(**{"cam.schedule.batch": 6}))
    assert math.isnan(megabytes(run, "train_cam"))
    log = run.folder("train_cam") / "metrics.jsonl"
    log.write_text("".join(f'{{"images_per_s": {speed}}}\n' for speed in (0.0, 1.0, 2.0, 12.0)))
    assert seconds_a_step(run, "train_cam") == 3.0
    log.write_text('{"images_per_s": 0.0}\n')
    assert math.isnan(seconds_a_step(run, "train_cam"))
    with watched(run, "train_cam"):
        pass
    before = megabytes(run, "train_cam")
    with watched(run, "train_cam"):
        torch.ones(50_000_000)
    if sys.platform == "linux":
        assert 150 < megabytes(run, "train_cam") - before < 250  # of 200
        with watched(run, "train_cam"):
            pass
        assert megabytes(run, "train_cam") - before < 50  # which are free again


def test_table_shows_mean_half_range_and_the_paper_s_figure(tmp_path: Path) -> None:
    text = tables.write_table("table1", {"MAM": {"miou": [50.0, 54.0]}}, "A caption.", [3, 5], tmp_path)
    assert text.splitlines() == [
        "A caption.", "", "| row | miou | miou, paper |", "| --- | --- | --- |", "| MAM | 52.0 ± 2.0 | 58.0 |"
    ]  # fmt: skip
    assert (tmp_path / "table1.csv").read_text().split() == [
        "row,column,seed,value,paper", "MAM,miou,3,50.0,58.0", "MAM,miou,5,54.0,58.0"
    ]  # fmt: skip


@pytest.mark.slow
def test_all_tables(shapes: Path, tiny: Path, tmp_path: Path, call: Call) -> None:
    base = ("--data", shapes, "--out", tmp_path, "--config", VOC / "demo.yaml", "--config", tiny)
    call(tables.main, "all", *base, "--start", tiny)
    for name in tables.TABLES:
        assert {f"{name}.md", f"{name}.csv", f"{name}.png"} <= {path.name for path in tmp_path.iterdir()}
    assert "| MMM+RCM |" in (tmp_path / "table1.md").read_text()
    assert (tmp_path / "rows" / "RCM-t=0.35").is_dir()
    assert not (tmp_path / "rows" / "RCM-t=0.2").exists()  # the same settings as the row RCM
