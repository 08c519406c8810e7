"""Lists, class names, annotations and tables of tags as they are in the world."""

from __future__ import annotations

import pytest
from data import VOCFolder
from texts import BadFileError, check_classes, read_classes, read_list, read_names, read_tags

ONE = "<object><name>{}</name></object>"


def list_of(root, *lines, names=(), ends="\n", encoding="utf-8"):
    for name in names:
        path = root / "JPEGImages" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    path = root / "ImageSets/Segmentation/odd.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + ends for line in lines).encode(encoding))
    return read_list(root, "odd")


@pytest.mark.parametrize(
    ("line", "stem"),
    [
        ("2007_000032", "2007_000032"),
        (" 2007_000032\t", "2007_000032"),
        ("trip_2021.05.03", "trip_2021.05.03"),
        ("trip_2021.05.03.jpg", "trip_2021.05.03"),
        ("garden/001", "garden/001"),
        ("garden\\001.JPG", "garden/001"),
        ("photo.png", "photo"),
        ("2007_000032  1", "2007_000032"),
        ("2007_000032 -1", "2007_000032"),
        ("2007_000032 0", "2007_000032"),
        ("/JPEGImages/a_b.jpg /SegmentationClassAug/a_b.png", "a_b"),
        ("JPEGImages/garden/a b.jpg SegmentationClass/garden/a b.png", "garden/a b"),
        ("/home/me/VOC2012/JPEGImages/a.jpg", "a"),
        ("/home/me/photographs/a.jpg", "a"),
        ("C:\\VOC2012\\JPEGImages\\garden\\a.jpg", "garden/a"),
        ("Käfer", "Käfer"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_line_of_a_list_is_one_image_name(tmp_path, line, stem, encoding):
    assert list_of(tmp_path, line, "", "z", ends="\r\n", encoding=encoding) == [stem, "z"]


@pytest.mark.parametrize("name", ["my photo 1", "my photo", "a 1", "b.jpg", "c.jpg d.png"])
def test_a_whole_line_is_a_name_where_such_an_image_is(tmp_path, name):
    assert list_of(tmp_path, name, names=[name]) == [name]


def test_lists_that_cannot_be_meant_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train_aug\.txt is missing.*SBD"):
        read_list(tmp_path, "train_aug")
    for lines, message in (
        ([" "], "lists no image"),
        (["a", "b.jpg", "b"], r"odd\.txt must list every image once, but lists 1 more often: 'b'"),
        (["../secret"], r"below JPEGImages, but lists '\.\./secret'"),
    ):
        with pytest.raises(BadFileError, match=message):
            list_of(tmp_path, *lines)


@pytest.mark.parametrize(
    "content",
    [
        b"traffic light\ndog\n",
        b"traffic light \n dog\t\n\n",
        b"\xef\xbb\xbftraffic light\r\ndog",
        b"\n\ntraffic light\rdog",
    ],
)
def test_class_names_are_lines_without_blanks_around_them(tmp_path, content):
    (tmp_path / "classes.txt").write_bytes(content)
    assert VOCFolder(tmp_path).classes == ["traffic light", "dog"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["background", "cat"], r"foreground classes alone.*\['background'\]"),
        (["__ignore__", "_background_", "cat"], r"\['__ignore__', '_background_'\]"),
        (["cat", "Void"], r"\['Void'\]"),
        (["cat", "dog", "cat"], r"every class once, in one spelling, but has \['cat', 'cat'\]"),
        (["Cat", "dog", "cat"], r"every class once, in one spelling, but has \['Cat', 'cat'\]"),
        (["K\u00e4fer", "Ka\u0308fer"], "every class once"),
        ([], "one class or more"),
        (["cat", " "], "one class or more"),
        ([f"c{i}" for i in range(255)], r"names 255 classes, but label maps are 8-bit PNGs.*254 at most"),
    ],
)
def test_class_lists_that_cannot_be_meant_are_refused(tmp_path, names, message):
    with pytest.raises(BadFileError, match=rf"data\.classes .*{message}"):
        VOCFolder(tmp_path, names).classes  # noqa: B018
    assert check_classes(["cat", "Background noise"], "x") == ["cat", "Background noise"]
    assert len(check_classes([f"c{i}" for i in range(254)], "x")) == 254


@pytest.mark.parametrize("read", [read_classes, read_tags])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_text_in_another_encoding_is_named(tmp_path, read, encoding):
    (tmp_path / "a.txt").write_bytes("image,tags\nKäfer,Käfer\n".encode(encoding))
    with pytest.raises(BadFileError, match=r"a\.txt must be text in UTF-8: save it so"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (f"<annotation>{ONE}</annotation>", "utf-8"),
        (f'<annotation xmlns="http://example.org/voc">{ONE}</annotation>', "utf-8-sig"),
        (f'<v:annotation xmlns:v="http://example.org/voc">{ONE}</v:annotation>', "utf-8"),
        (f"<root><annotation>{ONE}</annotation></root>", "utf-8"),
        (f'<?xml version="1.0" encoding="gb2312"?><annotation>{ONE}</annotation>', "gb2312"),
        (f'<?xml version="1.0" encoding="latin-1"?><annotation>{ONE}</annotation>', "latin-1"),
        (f'<?xml version="1.0" encoding="utf-16"?><annotation>{ONE}</annotation>', "utf-16"),
    ],
)
def test_annotations_in_any_namespace_and_encoding(tmp_path, text, encoding):
    name = {"gb2312": "\u56fe", "latin-1": "Käfer"}.get(encoding, "Ka\u0308fer")
    path = tmp_path / "a.xml"
    path.write_bytes(text.replace("{}", f" {name}\n").encode(encoding))
    assert read_names(path) == {"\u56fe" if encoding == "gb2312" else "Käfer"}


def test_annotations_without_names_are_refused_and_parts_are_no_objects(tmp_path):
    path = tmp_path / "a.xml"
    part = "<part><name>head</name></part>"
    path.write_text(f"<annotation><object><name>person</name>{part}</object></annotation>")
    assert read_names(path) == {"person"}
    path.write_text("<annotation></annotation>")
    assert read_names(path) == set()
    for text, message in (
        ("<annotation><object><name/></object></annotation>", "one has no name"),
        ("<annotation><object>", "no readable XML"),
        ('<?xml version="1.0" encoding="nonsense"?><annotation/>', "no readable XML"),
    ):
        path.write_text(text)
        with pytest.raises(BadFileError, match=rf"a\.xml .*{message}"):
            read_names(path)


@pytest.mark.parametrize(
    "text",
    [
        "image,tags\n0.jpg,cat dog\n1.jpg,dog\n2.jpg,\n",
        "\ufeffimage,tags\r\n0.jpg,cat dog\r\n1.jpg,dog\r\n2.jpg,\r\n",
        "Image ; Tags\n0.jpg;cat, dog\n\n1.jpg;dog\n2.jpg;\n",
        'image,tags\n"0.jpg","cat,dog"\n1.jpg, dog\n2.jpg,""\n',
        "tags\tid\timage\ncat;dog;cat\t7\t0.jpg\ndog\t8\t1.jpg\n\t9\t2.jpg\n",
        "image,tags,,\n0.jpg,cat dog,,\n1.jpg,dog,,,\n2.jpg,,,\n",
    ],
)
def test_tables_of_tags(tmp_path, text):
    (tmp_path / "tags.csv").write_bytes(text.encode())
    rows = read_tags(tmp_path / "tags.csv")
    assert [(row.image, list(row.tags)) for row in rows] == [
        ("0.jpg", ["cat", "dog"]),
        ("1.jpg", ["dog"]),
        ("2.jpg", []),
    ]


def test_names_of_several_words_need_a_comma_somewhere_in_the_table(tmp_path):
    (tmp_path / "tags.csv").write_text('image,tags\n0.jpg,"polar  bear, dog"\n1.jpg,polar bear\n')
    assert [list(row.tags) for row in read_tags(tmp_path / "tags.csv")] == [["polar bear", "dog"], ["polar bear"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\n0.jpg,cat\n", r"header with image and tags, but begins with 'file,label'"),
        ("", "header|no image"),
        ("image,tags\n", "lists no image"),
        ("image,tags\n0.jpg,cat,dog\n", r"line 2 has 3 cells, but the header 'image,tags' has 2"),
        ("image;tags\n0.jpg;cat;dog\n", "line 2 has 3 cells"),
        ("image,tags\n0.jpg,cat\n1.jpg\n", "line 3 has 1 cells"),
        ("image,tags\n,cat\n", "line 2 must name an image"),
        ("image,tags\n0.jpg,cat\n0.jpg,dog\n", r"line 3 repeats the image 0\.jpg of line 2"),
        ('image,tags\n0.jpg,"cat\n', "no readable table"),
    ],
)
def test_tables_that_cannot_be_meant_name_line_and_header(tmp_path, text, message):
    (tmp_path / "tags.csv").write_text(text)
    with pytest.raises(BadFileError, match=rf"tags\.csv.*({message})"):
        read_tags(tmp_path / "tags.csv")
