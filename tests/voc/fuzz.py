"""Damaged images, masks, lists, tables, results: read right, or named.

    python tests/voc/fuzz.py --count 2000 --seed 0

Each damaged file lies in a small data set, or in a finished run, and `run.py`
goes through the stages that read it.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from PIL import Image

from tests.mutations import fuzz, mutated
from tests.voc.runs import TINY, VOC, load_once, unfinished

# After the path of the examples, which tests.voc sets.
import run  # isort: skip
from shapes import write_shapes  # isort: skip

FAST = """
cam: {schedule: {iterations: 1, batch: 4}, mam: 0, rcm: 0, scales: [1.0], cls_scales: [1.0]}
infer_cam: {scales: [1.0], crf: null}
affinity: {schedule: {iterations: 1}}
make_labels: {crf: null}
seg: {crf: null, schedule: {iterations: 1}}
"""
SIGNS = [
    ",",
    ";",
    "\t",
    '"',
    "\n",
    "\r\n",
    "\r",
    " ",
    "/",
    "..",
    "\\",
    "\0",
    "é",
    "🐟",
    "-1",
    ".jpg",
    "<",
    "&",
    "'",
    "#",
]
TEXTS = [
    "image,tags\na,cat\n".encode("utf-16"),
    "Käfer\n".encode("latin-1"),
    b'<?xml version="1.0" encoding="utf-16"?><annotation>',
    b'<!DOCTYPE a [<!ENTITY b "cc"><!ENTITY c "&b;&b;">]><annotation>&c;',
    b'image;tags;x\n"train_0000.jpg";"beetle, fish";\n',
    b"train_0000 1\n/JPEGImages/train_0001.jpg /SegmentationClass/train_0001.png\n",
]
# What is damaged: where such files lie, and the stages that read them.
FOUND: dict[str, tuple[str, str]] = {
    "image": ("JPEGImages/train_*.jpg", "train_cam,infer_cam"),
    "mask": ("SegmentationClass/train_*.png", "train_cam,score_cam"),
    "annotation": ("Annotations/train_*.xml", "train_cam,infer_cam"),
    "list": ("ImageSets/Segmentation/train.txt", "train_cam,infer_cam"),
    "classes": ("classes.txt", "train_cam,infer_cam"),
}
# Of a finished run: results, and the stages that read them.
RESULTS: dict[str, tuple[str, str]] = {
    "network": ("train_*/model.pt", "infer_cam,make_labels,infer_seg"),
    "CAM": ("infer_cam/*.png", "score_cam,train_affinity,make_labels"),
    "label": ("make_labels/*.png", "train_seg"),
    "CRF label": ("train_affinity/labels/*/*.png", "train_affinity"),
    "segmentation": ("infer_seg/*/*.png", "evaluate,export_test"),
    "record": ("*.json*", "train_seg"),
    "record of a stage": ("*/*.json*", "train_seg"),
    "config": ("config.yaml", "train_seg"),
}


def odd_images(folder: Path) -> list[bytes]:
    """Return images of other kinds than a data set's: deep, grey, transparent, turned, of other formats."""
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = Image.fromarray(rng.integers(0, 2**16, (32, 40), dtype=np.uint16))
    kinds: list[tuple[Image.Image, str, dict[str, object]]] = [
        (colours, "PNG", {}),
        (colours, "JPEG", {"exif": turned}),
        (colours, "JPEG", {"progressive": True}),
        (colours.convert("CMYK"), "JPEG", {}),
        (colours.convert("RGBA"), "PNG", {}),
        (colours.convert("P"), "PNG", {}),
        (colours.convert("1"), "TIFF", {"compression": "group4"}),
        (colours, "TIFF", {}),
        (colours, "WEBP", {}),
        (colours, "BMP", {}),
        (colours, "GIF", {}),
        (deep, "PNG", {}),
    ]
    contents = []
    for image, kind, options in kinds:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        contents.append(buffer.getvalue())
    return contents


class Fuzz:
    """Trials over one small data set and one finished run; number i is the same whatever came before it.

    Args:
        folder: for both.
        seed: of all random choices.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        torch.set_num_threads(1)
        run.load_config = load_once
        self.seed, self.out = seed, folder / "out"
        self.root = write_shapes(folder / "set", train=4, val=2, size=32)
        self.photographs, self.table = folder / "photographs", folder / "photographs" / "tags.csv"
        for stem in (path.stem for path in (self.root / "JPEGImages").glob("train_*.jpg")):
            place = self.photographs / ("deep" if stem.endswith("1") else "") / f"{stem}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.root / "JPEGImages" / f"{stem}.jpg", place)
        rows = ["train_0000.jpg,beetle fish", "train_0001,snail", "train_0002.jpg,", "train_0003.jpg,worm"]
        self.table.write_text("\n".join(["image,tags", *rows]) + "\n")
        self.config = folder / "fuzz.yaml"
        self.config.write_text(TINY)
        self.fast = folder / "fast.yaml"
        self.fast.write_text(FAST)
        self.finished = folder / "finished"
        message = self.start(self.root, "all", self.finished)
        assert message is None, message
        self.images = odd_images(folder)
        mask = (self.root / "SegmentationClass/train_0000.png").read_bytes()
        self.others = [*self.images, mask, *TEXTS, b"%!PS-Adobe-3.0\n"]

    def __call__(self, number: int) -> str:
        rng = random.Random(f"{self.seed} {number}")
        kinds = (
            ["image"] * 6 + ["mask"] * 4 + ["annotation"] * 4 + ["list", "classes"] * 2 + ["table", "photograph"] * 2
        )
        kind = rng.choice(kinds + list(RESULTS))
        skips = ("--data.on_bad_file", "skip") if rng.random() < 0.5 else ()
        shutil.rmtree(self.out, ignore_errors=True)
        if kind in RESULTS:
            pattern, stages = RESULTS[kind]
            shutil.copytree(self.finished, self.out)
            file = self.out / rng.choice(sorted(str(path.relative_to(self.out)) for path in self.out.glob(pattern)))
            for stage in stages.split(","):
                if self.out / stage / "done.json" != file:
                    (self.out / stage / "done.json").unlink()
            words: tuple[object, ...] = (self.root, stages)
        elif kind in FOUND:
            pattern, stages = FOUND[kind]
            file, words = rng.choice(sorted(self.root.glob(pattern))), (self.root, stages)
        else:
            file = self.table if kind == "table" else rng.choice(sorted(self.photographs.rglob("*.jpg")))
            words = (self.photographs, "train_cam,infer_cam", "--tags", self.table, "--data.longest", 24)
        content = file.read_bytes()
        file.write_bytes(self.damaged(content, kind, rng))
        try:
            message = self.start(*words, *skips)
            self.check(message, file)
        finally:
            if file.is_relative_to(self.out):
                shutil.rmtree(self.out)
            else:
                file.write_bytes(content)
        return f"{kind}: {'told' if message else 'done'}"

    def damaged(self, content: bytes, kind: str, rng: random.Random) -> bytes:
        if kind in ("image", "photograph") and rng.random() < 0.4:
            content = rng.choice(self.images)
            if rng.random() < 0.3:
                return content
        if kind in ("annotation", "list", "classes", "table") and rng.random() < 0.7:
            text = content.decode()
            for _ in range(rng.choice((1, 1, 2, 5))):
                where = rng.randrange(len(text) + 1)
                end = where + rng.choice((0, 1, 1, 5, 30))
                again = text[(start := rng.randrange(len(text) + 1)) : start + 20]
                text = text[:where] + rng.choice([*SIGNS, again, ""]) + text[end:]
            return text.encode()
        return mutated(content, rng, self.others)

    def start(self, root: Path, stages: str, *words: object) -> str | None:
        """Run stages as run.py does; returns its message where it stops, None where it does its work."""
        out = self.out
        if words and words[0] == self.finished:
            out, words = self.finished, words[1:]
        files = ("--config", VOC / "demo.yaml", "--config", self.config, "--config", self.fast)
        sys.argv = ["run.py", *map(str, ("--data", root, "--out", out, *files, "--stages", stages, *words))]
        quiet = io.StringIO()
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                run.guarded(run.main)
            except SystemExit as error:
                return str(error.code)
        return None

    def check(self, message: str | None, file: Path) -> None:
        """Raise unless the message names the file, or every result is whole."""
        if message is not None:
            named = str(file) in message or (str(file.parent) in message and file.name in message)
            assert named, f"the message does not name {file}: {message}"
        assert not unfinished(self.out)
        for path in self.out.rglob("*.json"):
            assert path == file or json.loads(path.read_text())
        for path in self.out.rglob("*.png"):
            if path != file:
                with Image.open(path) as image:
                    image.load()


if __name__ == "__main__":
    fuzz(Fuzz, __doc__, count=2000)
