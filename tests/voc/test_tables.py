"""tables.py: rows, figures and files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tables
import yaml
from PIL import Image

from tests.voc.runs import VOC, Call


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


def test_table_of_the_field_has_the_row_seam(shapes: Path, tiny: Path, tmp_path: Path, call: Call) -> None:
    base = ("--data", shapes, "--out", tmp_path, "--config", VOC / "demo.yaml", "--config", tiny)
    assert "The table field needs --start" in call(tables.main, "field", *base, ok=False)
    printed = call(tables.main, "field", *base, "--infer_cam.par", "{}", "--start", tiny)
    rows = [line.split(" | ")[0] for line in printed.splitlines() if line.startswith("| ")]
    assert rows == ["| row", "| ---", *(f"| {row}" for row in tables.TABLES["field"].rows)]
    assert {"baseline", "SEAM", "OC-CSE", "CPN", "Puzzle-CAM", "PPC", "ICD", "direct", "RCM", "MAM"} < {*tables.ROWS}
    for name in ("miou", "precision", "crf_miou", "par_miou"):
        assert f" | {name} | {name}, paper |" in printed
    losses = (tmp_path / "rows/SEAM/seed-0/train_cam/metrics.jsonl").read_text().splitlines()
    assert {"cls", "er", "ecr", "minpool"} <= set(json.loads(losses[0])) - {"rcm", "mam"}


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
