"""Images as they are shown: orientation, depth, size; masks that are checked."""

from __future__ import annotations

import numpy as np
import pytest
from data import VOCFolder
from PIL import Image, ImageOps
from pixels import opened_image, read_image, read_mask, read_size, resize_mask
from texts import BadFileError


def turned(path, orientation, **options):
    """Write a picture that is white above, as the camera stored it, and return it as it is shown."""
    stored = np.zeros((40, 64, 3), np.uint8)
    stored[:20] = 255
    tag = Image.Exif()
    tag[0x0112] = orientation
    Image.fromarray(stored).save(path, exif=tag, **options)
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("end", ["jpg", "png", "webp", "tif"])
def test_images_and_their_sizes_are_upright(tmp_path, orientation, end):
    path = tmp_path / f"a.{end}"
    shown = turned(path, orientation)
    image = read_image(path)
    assert np.array_equal(image, shown)
    assert read_size(path) == image.shape[:2] == ((40, 64) if orientation < 5 else (64, 40))
    small = read_image(path, 32)
    assert read_size(path, 32) == small.shape[:2] == ((20, 32) if orientation < 5 else (32, 20))
    assert abs(small.astype(int) - np.asarray(Image.fromarray(shown).resize(small.shape[1::-1]))).mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("longest", [None, 80])
@pytest.mark.parametrize("end", ["jpg", "png"])
def test_a_part_is_that_of_the_whole_image_and_less_is_decoded(tmp_path, orientation, longest, end):
    path = tmp_path / f"a.{end}"
    y, x = np.mgrid[:100, :161]
    tag = Image.Exif()
    tag[0x0112] = orientation
    Image.fromarray(np.stack([x + 40, 2 * y, 0 * x + 90], -1).astype(np.uint8)).save(path, exif=tag)
    whole = read_image(path, longest)
    H, W = whole.shape[:2]
    for factor, decoded in ((1.3, 1), (0.6, 1), (0.4, 2), (0.2, 4), (0.1, 8)):
        box = (0.1 * W, 0.2 * H, 0.9 * W, H)
        size = round(0.8 * W * factor), round(0.8 * H * factor)
        with opened_image(path, longest) as picture:
            part = picture.part(box, size)
        expected = np.asarray(Image.fromarray(whole).resize(size, Image.Resampling.BILINEAR, box))
        assert part.shape == (3, size[1], size[0])
        assert abs(part.transpose(1, 2, 0).astype(int) - expected).mean() < 3
        with opened_image(path, longest) as picture:
            levels = picture.read((round(H * factor), round(W * factor)))
        if end == "png" or longest is None:
            assert max(levels.size) == (-(-161 // decoded) if end == "jpg" else longest or 161)
        assert min(factor, 1) * min(H, W) - 1 < min(levels.size) <= min(H, W)


@pytest.mark.parametrize("orientation", [3, 6])
def test_an_image_and_the_mask_that_an_annotator_drew_on_it_agree(tmp_path, orientation):
    for name in ("JPEGImages", "SegmentationClass"):
        (tmp_path / name).mkdir()
    shown = turned(tmp_path / "JPEGImages/a.jpg", orientation, quality=95)
    Image.fromarray((shown[..., 0] > 127).astype(np.uint8)).save(tmp_path / "SegmentationClass/a.png")
    data = VOCFolder(tmp_path, ["dog"])
    assert np.array_equal(data.image("a")[..., 0] > 127, data.mask("a") == 1)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's own
def test_a_damaged_exif_block_turns_nothing(tmp_path):
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*nonsense")
    assert read_image(tmp_path / "a.jpg").shape == (4, 6, 3)
    assert read_size(tmp_path / "a.jpg") == (4, 6)


RAMP = np.tile(np.linspace(0.01, 1, 64), (40, 1))


@pytest.mark.parametrize(
    ("pixels", "kind"), [((RAMP * 65535).astype(np.uint16), "PNG"), ((RAMP * 65535).astype(np.uint16), "TIFF")]
)
def test_sixteen_bits_become_eight(tmp_path, pixels, kind):
    eight = tmp_path / "8.png"
    Image.fromarray((RAMP * 255).astype(np.uint8)).save(eight)
    path = tmp_path / "a.jpg"  # renamed, as people do
    Image.fromarray(pixels).save(path, kind)
    assert abs(read_image(path).astype(int) - read_image(eight)).max() <= 1
    assert read_image(path, 32).shape == (20, 32, 3)


@pytest.mark.parametrize("pixels", [RAMP.astype(np.float32), (RAMP * 1e6).astype(np.int32)])
def test_depths_of_no_known_range_are_refused(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(BadFileError, match=r"a\.tif has mode [FI], of no known range"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_other_modes_are_read_as_rgb(tmp_path, mode):
    Image.new("RGB", (6, 4), (255, 255, 255)).convert(mode).save(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif").min() > 250


def test_what_is_transparent_is_white_whatever_lies_below(tmp_path):
    pixels = np.zeros((1, 2, 4), np.uint8)
    pixels[0, 0] = 10, 20, 30, 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_an_image_that_is_too_large_is_named_so_that_it_can_be_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr("pixels._MOST_PIXELS", 100)
    Image.new("L", (19, 9)).save(tmp_path / "a.jpg")
    for read in (read_image, read_size):
        with pytest.raises(BadFileError, match=r"a\.jpg has 19 x 9 pixels, more than 100"):
            read(tmp_path / "a.jpg")


def test_pillow_sets_no_limit_of_its_own(tmp_path):
    Image.new("1", (19000, 9500)).save(tmp_path / "a.png")
    with pytest.raises(BadFileError, match="more than 178,956,970"):
        read_size(tmp_path / "a.png")


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_whatever_a_reader_raises_names_the_file(tmp_path, content, monkeypatch):
    (tmp_path / "a.png").write_bytes(content)
    for read in (read_image, read_size, lambda path: read_mask(path, (4, 6), 1)):
        with pytest.raises(BadFileError, match=r"a\.png cannot be read"):
            read(tmp_path / "a.png")

    def strange(path):
        raise LookupError("a codec")

    monkeypatch.setattr(Image, "open", strange)
    with pytest.raises(BadFileError, match=r"a\.png cannot be read.*a codec"):
        read_image(tmp_path / "a.png")


def test_masks_are_class_indices_of_their_images_size(tmp_path):
    path = tmp_path / "a.png"
    for values in ([[0, 1, 255]], [[0, 1, 1]]):
        Image.fromarray(np.array(values, np.uint8)).save(path)
        assert read_mask(path, (1, 3), 1).tolist() == values
    Image.fromarray(np.array([[True, False, True]])).save(path)
    assert read_mask(path, (1, 3), 1).tolist() == [[1, 0, 1]]
    with pytest.raises(BadFileError, match=r"its image's size \(3, 1\)"):
        read_mask(path, (3, 1), 1)
    Image.fromarray(np.array([[0, 2, 7]], np.uint8)).save(path)
    with pytest.raises(BadFileError, match=r"0 to 1 or 255, but holds \[2, 7\]"):
        read_mask(path, (1, 3), 1)
    assert resize_mask(np.array([[0, 7]], np.uint8), (2, 4)).tolist() == [[0, 0, 7, 7]] * 2
