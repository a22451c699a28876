"""Splits of a data set as CoOp has them: the right images, labels and names, none from outside."""

from __future__ import annotations

import json

import pytest

from transclip_fast.encode.sources import open_source, resolve_labels
from transclip_fast.errors import InputError

ENTRIES = [
    ["cat/000.png", 0, "house_cat"],
    ["dog/001.png", 1, "dog"],
    ["cat/002.png", 0, "house_cat"],
]


@pytest.fixture
def split(images):
    """Maker of split.json beside the folder images/; keywords replace or add parts."""
    folder = images(5)

    def make(**parts):
        file = folder.parent / "split.json"
        whole = {"train": ENTRIES[:2], "val": [ENTRIES[1]], "test": ENTRIES[1:], **parts}
        file.write_text(
            json.dumps({name: part for name, part in whole.items() if part is not None})
        )
        return file

    return make


def test_splits_and_their_classes(split):
    file = split()
    source = open_source(file)
    assert source.keys == ["dog/001.png", "cat/002.png"]
    assert source.class_names == ["house cat", "dog"]
    assert resolve_labels(source, source.class_names).tolist() == [1, 0]
    assert source.read(1) == (file.parent / "images/cat/002.png").read_bytes()
    assert open_source(file, split="train").keys == ["cat/000.png", "dog/001.png"]
    assert open_source(file, split="val").keys == ["dog/001.png"]


def test_a_byte_order_mark(split):
    """As some editors write it."""
    file = split()
    file.write_text(file.read_text(), encoding="utf-8-sig")
    assert open_source(file).keys == ["dog/001.png", "cat/002.png"]


def test_other_names_are_joined_by_name(split):
    source = open_source(split())
    assert resolve_labels(source, ["Dog", "bird", "House_cat"]).tolist() == [0, 2]
    with pytest.raises(
        InputError, match=r"cat/002.png: label 'house cat' is none of the 2 classes"
    ):
        resolve_labels(source, ["bird", "dog"])


def test_the_folder_of_the_images(split, tmp_path):
    file = split()
    beside = [[f"images/{path}", *rest] for path, *rest in ENTRIES]
    assert open_source(split(test=beside)).files == [str(tmp_path / path) for path, *_ in beside]
    file = split()
    named = open_source(file, root=tmp_path / "images").files
    assert named == open_source(file).files
    (tmp_path / "other/dog").mkdir(parents=True)
    (tmp_path / "other/dog/001.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"images and .*other have dog/001.png; name .* --root"):
        open_source(file)
    assert open_source(file, root=tmp_path / "images").files == named
    (tmp_path / "images").rename(tmp_path / "deeper")
    (tmp_path / "other/dog/001.png").unlink()
    (tmp_path / "deeper").rename(tmp_path / "other/deeper")
    with pytest.raises(InputError, match=r"nor a folder in it has dog/001.png; name .* --root"):
        open_source(file)


@pytest.mark.parametrize(
    "path", ["../secret.png", "/etc/passwd", "cat/../../../x.png", "out/x.png"]
)
def test_no_path_leads_out(path, split, tmp_path, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "x.png").write_bytes(b"")
    file = split(test=[ENTRIES[0], [path, 1, "dog"]], train=None, val=None)
    (tmp_path / "images/out").symlink_to(outside)
    for root in (None, tmp_path / "images"):
        with pytest.raises(InputError, match="leads out of .*images"):
            open_source(file, root=root)


def test_a_linked_folder_of_images_is_fine(split, tmp_path, tmp_path_factory):
    outside = tmp_path_factory.mktemp("disk")
    file = split()
    (tmp_path / "images").rename(outside / "pets")
    (tmp_path / "images").symlink_to(outside / "pets")
    assert open_source(file).read(0) == (outside / "pets/dog/001.png").read_bytes()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"test": None}, "has no split 'test', only train, val"),
        ({"test": {"a": 1}}, "has no split 'test'"),
        ({"test": [["a.png", 0]]}, "test, row 0: expected .path, label, class name."),
        ({"test": [["a.png", "0", "cat"]]}, "test, row 0: expected"),
        ({"test": [["a.png", True, "cat"]]}, "test, row 0: expected"),
        ({"test": [[3, 0, "cat"]]}, "test, row 0: expected"),
        ({"val": ["a.png"]}, "val, row 0: expected"),
        ({"val": [["dog/001.png", 1, "wolf"]]}, "val, row 0: calls class 1 'wolf'"),
        ({"test": [["cat/000.png", 3, "cow"]]}, "labels are not 0 .. 2"),
        ({"test": [["cat/000.png", -1, "cow"]]}, "labels are not 0 .. 2"),
        ({"test": [ENTRIES[0], ["a\0b", 0, "house_cat"]]}, "is no path"),
        ({"test": []}, "holds no images"),
    ],
)
def test_damaged_splits(parts, message, split):
    with pytest.raises(InputError, match=message) as error:
        open_source(split(**parts))
    assert "split.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b'{"test": [["a.png", 0', b"[1, 2]", b"\xff\xfe", b"null", b"[" * 99999]
)
def test_files_that_are_no_splits(content, tmp_path):
    (tmp_path / "split.json").write_bytes(content)
    with pytest.raises(InputError, match=r"split.json: (cannot be read as JSON|expected a JSON)"):
        open_source(tmp_path / "split.json")


def test_a_root_that_is_no_folder(split, tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        open_source(split(), root=tmp_path / "nowhere")


def test_only_splits_have_splits(images):
    with pytest.raises(InputError, match="split and root are for a .json of splits"):
        open_source(images(), split="test")
