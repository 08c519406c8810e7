"""The records of the stages: consistent, and all that adding a stage takes."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from config import Config, decisive
from pipeline import FIRST, STAGES
from run import execute, load_config, main, parse_args
from runfolder import UserError, open_run
from stages import IMAGES, Run, Stage

from tests.voc.runs import VOC, Call, config, new_run


def test_a_stage_comes_after_what_it_reads() -> None:
    names = list(STAGES)
    for stage in STAGES.values():
        assert all(names.index(other) < names.index(stage.name) for other in (*stage.needs, *stage.uses))
    assert names[0] == FIRST


def test_settings_of_the_records_exist_and_no_two_stages_claim_one() -> None:
    starts = [start for stage in STAGES.values() for start in stage.settings]
    assert len(starts) == len(set(starts))
    known = {field.name for field in fields(Config)}
    settings = {f"{name}." for name in decisive({name: vars_of(getattr(Config(), name)) for name in known})}
    for start in starts:
        assert any(name.startswith(f"{start}.") for name in settings), start
    for stage in STAGES.values():
        assert stage.section is None or stage.section in known


def vars_of(value: object) -> object:
    return {name: vars_of(part) for name, part in vars(value).items()} if hasattr(value, "__dict__") else value


def test_a_new_stage_is_one_record(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    def count(run: Run) -> None:
        run.finish("count", images=len(run.data.stems("val")))

    record = Stage(
        "count",
        count,
        memory="nothing",
        needs=("train_cam",),
        reads=lambda config: [("absent", IMAGES)],
        settings=("make_labels.beta",),
        pixels=lambda plan: 1e12 * plan.images("val", "train"),
    )
    monkeypatch.setitem(STAGES, "count", record)
    base = ("--data", str(shapes), "--out", str(tmp_path / "out"), "--config", str(VOC / "demo.yaml"))
    assert parse_args([*base, "--stages", "from:export_test"])[0].stages == ["export_test", "count"]
    message = call(main, *base, "--dry-run", "--stages", "count", "--network.backbone", "resnet38", ok=False)
    assert "absent.txt is missing" in message
    monkeypatch.setitem(STAGES, "count", Stage(**{**vars(record), "reads": lambda config: [("val", IMAGES)]}))
    message = call(main, *base, "--dry-run", "--stages", "count", "--network.backbone", "resnet38")
    assert "count          to do" in message
    assert any(line.startswith("count") and line.split()[-1] != "do" for line in message.splitlines())
    made = new_run(shapes, tmp_path / "out")
    with pytest.raises(UserError, match="count needs train_cam, not finished"):
        execute(made, ["count"])
    (made.folder("train_cam") / "done.json").write_text("{}")
    made = open_run(config(), shapes, made.out, torch.device("cpu"))
    execute(made, ["count"])
    assert made.results("count") == {"images": 3}
    with pytest.raises(UserError, match=r"or remove count in it:\n  make_labels\.beta"):
        open_run(load_config([VOC / "demo.yaml"], ["--make_labels.beta=3"]), shapes, made.out, torch.device("cpu"))
