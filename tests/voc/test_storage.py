"""Files that are either whole or absent."""

from __future__ import annotations

import errno
import os
import stat

import pytest
import storage
import torch

from tests.processes import run_script
from tests.voc import VOC


def test_a_full_disk_leaves_the_file_that_was(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    storage.write_atomic(path, b"whole")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "fsync", full)
        with pytest.raises(OSError, match=r"could not write .*model\.pt \(No space left") as caught:
            storage.write_atomic(path, b"new")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"whole"
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("refused", ["open", "fsync"])
def test_a_folder_that_cannot_be_synced_does_no_harm(tmp_path, monkeypatch, refused):
    real = getattr(os, refused)

    def refuse(what, *args, **kwargs):  # Windows opens no folder, some mounts sync none
        if what == tmp_path if refused == "open" else stat.S_ISDIR(os.fstat(what).st_mode):
            raise PermissionError(13, "Permission denied", str(tmp_path))
        return real(what, *args, **kwargs)

    monkeypatch.setattr(storage.os, refused, refuse)
    storage.write_atomic(tmp_path / "done.json", "{}")
    assert (tmp_path / "done.json").read_text() == "{}"


def test_checkpoints_are_kept_in_order_and_checked(tmp_path):
    assert storage.load_checkpoint(tmp_path) is None
    for step in (1, 2, 10):
        storage.save_checkpoint(tmp_path, step, {"step": step, "x": torch.full((3,), step)})
    assert [p.name[:12] for p in sorted(tmp_path.iterdir())] == ["step-0000002", "step-0000010"]
    state = storage.load_checkpoint(tmp_path)
    assert state is not None
    assert state["x"].tolist() == [10, 10, 10]
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="is damaged"):
        assert storage.load_checkpoint(tmp_path) is None
    (tmp_path / ".model.pt.77.tmp").touch()
    storage.remove_unfinished(tmp_path)
    storage.remove_checkpoints(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("present", [[], [2], [0, 3]])
def test_cams_survive_a_png_in_steps_of_1_255(tmp_path, present):
    labels = torch.zeros(4)
    labels[present] = 1
    cam = torch.rand(4, 7, 5) * labels[:, None, None]
    storage.save_cam(tmp_path / "cam.png", cam, labels)
    again = storage.load_cam(tmp_path / "cam.png", 4)
    assert again.shape == cam.shape
    assert (again - cam).abs().max() <= 0.5 / 255 + 1e-6
    assert not again[labels == 0].any()
    storage.save_cam(tmp_path / "again.png", again, labels)
    assert torch.equal(storage.load_cam(tmp_path / "again.png", 4), again)
    (tmp_path / "cam.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"cam\.png is no CAM file"):
        storage.load_cam(tmp_path / "cam.png", 4)


def test_a_cam_file_may_be_larger_than_pillow_lets_an_image_be(tmp_path):
    script = tmp_path / "script.py"  # the limit is one of a process, lifted where images are read first
    path = str(tmp_path / "cam.png")
    script.write_text(
        "import sys\nfrom PIL import Image\nImage.MAX_IMAGE_PIXELS = 1000\n"
        f"sys.path.insert(0, {str(VOC)!r})\nimport pixels, storage, torch\nfrom pathlib import Path\n"
        f"storage.save_cam(Path({path!r}), torch.zeros(254, 36, 10), torch.ones(254))\n"
        f"print(tuple(storage.load_cam(Path({path!r}), 254).shape))\n"
    )
    done = run_script(script)
    assert done.stdout == "(254, 36, 10)\n", done.stderr


def read_only(*_, **__):
    raise OSError(errno.EROFS, "Read-only file system", "the temporary file")


@pytest.mark.parametrize("refused", ["open", "mkdir"])
def test_a_read_only_disk_is_told_naming_the_file(tmp_path, monkeypatch, refused):
    for name in (refused, "unlink"):  # there, not even what is absent can be removed
        monkeypatch.setattr(storage.Path, name, read_only)
    for write in (storage.write_atomic, storage.append_line):
        with pytest.raises(OSError, match=r"could not write .*model\.pt \(Read-only file system\)"):
            write(tmp_path / "model.pt", "")


@pytest.mark.parametrize("damage", ["cut", "bit", "other"])
def test_a_damaged_network_is_named(tmp_path, damage):
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.rand(400)}, path)
    assert storage.load_weights(path, "train again")["weight"].shape == (400,)
    content = bytearray(path.read_bytes())
    content[content.index(b"data/0") + 500] ^= 1  # among the numbers, where torch sees no fault
    path.write_bytes({"cut": content[:-9], "bit": content, "other": b"<html>"}[damage])
    with pytest.raises(ValueError, match=r"model\.pt is damaged: train again \("):
        storage.load_weights(path, "train again")
