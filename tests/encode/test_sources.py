"""Every kind of source lists the same images in a fixed order, with their labels."""

from __future__ import annotations

import io
import json
import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from open_clip import IMAGENET_CLASSNAMES

from transclip_fast.encode.sources import Source, open_source, resolve_labels
from transclip_fast.errors import InputError


def write_tar(path, files):
    """A tar of (name, bytes)."""
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_folder_is_sorted_and_labelled_on_request(images):
    folder = images(5)
    source = open_source(folder)
    assert source.keys == [
        "cat/000.png",
        "cat/002.png",
        "cat/004.png",
        "dog/001.png",
        "dog/003.png",
    ]
    assert source.labels is None
    assert source.read(3) == (folder / "dog/001.png").read_bytes()
    labelled = open_source(folder, labels_from_folders=True)
    assert resolve_labels(labelled, ["dog", "Cat"]).tolist() == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("change", ["content", "size", "moved"])
def test_an_image_that_changes_after_it_was_listed_is_not_read(images, change):
    folder = images(5)
    source = open_source(folder)
    image = folder / "dog/001.png"
    content, then = image.read_bytes(), image.stat().st_mtime_ns
    if change == "moved":
        (folder / "cat/000.png").replace(image)
    else:
        image.write_bytes(content[::-1] if change == "content" else content + b"x")
        os.utime(image, ns=(then, then + (change == "content")))
    with pytest.raises(InputError, match="changed after it was listed; run again"):
        source.read(3)


def test_folder_label_that_is_no_class(images):
    source = open_source(images(), labels_from_folders=True)
    with pytest.raises(InputError, match=r"dog/001.png: label 'dog' is none of the 2 classes"):
        resolve_labels(source, ["cat", "bird"])


def test_image_without_folder_has_no_label(images):
    folder = images(2)
    (folder / "cat/000.png").rename(folder / "loose.png")
    with pytest.raises(InputError, match=r"loose.png: is in no sub-folder"):
        open_source(folder, labels_from_folders=True)


def test_synsets_go_to_their_names(images):
    folder = images(2)
    (folder / "cat").rename(folder / "n01443537")
    (folder / "dog").rename(folder / "n01440764")
    source = open_source(folder, labels_from_folders=True)
    for names in (IMAGENET_CLASSNAMES, sorted(IMAGENET_CLASSNAMES), ["goldfish", "Tench"]):
        assert dict(zip(source.keys, resolve_labels(source, names), strict=True)) == {
            "n01440764/001.png": [*map(str.lower, names)].index("tench"),
            "n01443537/000.png": names.index("goldfish"),
        }
    own = ["fish", "dish"], ["n01443537", "n01440764"]
    assert resolve_labels(source, *own).tolist() == [1, 0]
    with pytest.raises(InputError, match="label 'n01440764' is none of the 1000 classes; give"):
        resolve_labels(source, [f"class {k}" for k in range(1000)])


@pytest.mark.parametrize("suffix", ["txt", "csv", "parquet"])
def test_lists(images, suffix):
    folder = images(3)
    paths = ["images/dog/001.png", "images/cat/000.png"]
    file = folder.parent / f"list.{suffix}"
    if suffix == "txt":
        file.write_text("\n".join(paths) + "\n\n")
    elif suffix == "csv":
        file.write_text(
            "path,label,key\n" + "".join(f"{p},{i},k{i}\n" for i, p in enumerate(paths))
        )
    else:
        pq.write_table(pa.table({"path": paths, "label": [0, 1], "key": ["k0", "k1"]}), file)
    source = open_source(file)
    assert source.read(0) == (folder / "dog/001.png").read_bytes()
    if suffix == "txt":
        assert (source.keys, source.labels) == (paths, None)
    else:
        assert source.keys == ["k0", "k1"]
        assert resolve_labels(source, ["a", "b"]).tolist() == [0, 1]


def test_paths_are_those_of_any_working_directory(images, monkeypatch):
    """Pages and links are made later, in other folders."""
    folder = images(3)
    monkeypatch.chdir(folder.parent)
    keys = open_source(folder).keys
    expected = [str(folder / key) for key in keys]
    (folder.parent / "list.txt").write_text("".join(f"images/{key}\n" for key in keys))
    for path in ("images", "./images", "list.txt"):
        found = open_source(path).table(None).paths
        monkeypatch.chdir("/")
        assert all(map(os.path.samefile, found, expected))
        monkeypatch.chdir(folder.parent)


def test_webdataset_with_class_numbers(images):
    folder = images(3)
    pictures = [(folder / key).read_bytes() for key in ("cat/000.png", "dog/001.png")]
    write_tar(
        folder.parent / "part-1.tar", [("a/x.png", pictures[1]), ("a/x.cls", b"1"), ("b", b"")]
    )
    write_tar(folder.parent / "part-0.tar", [("y.cls", b" 0\n"), ("y.PNG", pictures[0])])
    (folder.parent / "images").rename(folder.parent / "elsewhere")
    with pytest.warns(UserWarning, match="2 files .* here: folders 1, no suffix 1"):
        source = open_source(folder.parent)
    assert source.keys == ["part-0.tar/y", "part-1.tar/a/x"]
    assert [source.read(0), source.read(1)] == pictures
    assert resolve_labels(source, ["zero", "one"]).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("member", "content", "label"),
    [
        ("x.json", json.dumps({"label": "dog"}).encode(), 1),
        ("x.json", b'{"label": null, "class": 1.0, "caption": "a cat"}', 1),
        ("x.json", b'"dog"', 1),
        ("x.json", b"1", 1),
        ("x.JSON", b'{"label": "1"}', 1),
        ("x.CLS", b"1", 1),
        ("x.txt", b"cat", 0),
        ("x.Txt", b"dog", 1),
    ],
)
def test_webdataset_with_class_names(images, member, content, label):
    picture = (images(1) / "cat/000.png").read_bytes()
    tar = images(1).parent / "a.tar"
    write_tar(tar, [("x.jpg", picture), (member, content)])
    assert resolve_labels(open_source(tar), ["cat", "dog"]).tolist() == [label]


@pytest.mark.parametrize("content", [b'{"label": [0, 1]}', b'{"cls": {"id": 1}}', b"[1]"])
def test_labels_that_are_no_numbers_are_counted(images, content):
    picture = (images(1) / "cat/000.png").read_bytes()
    tar = images(1).parent / "a.tar"
    write_tar(tar, [("x.jpg", picture), ("x.json", content), ("y.jpg", picture), ("y.cls", b"1")])
    with pytest.warns(UserWarning, match="here: labels that are neither number nor text 1$"):
        source = open_source(tar)
    assert resolve_labels(source, ["cat", "dog"]).tolist() == [-1, 1]


def test_suffixes_in_any_case(images):
    folder = images(2)
    picture = (folder / "cat/000.png").read_bytes()
    shards = folder.parent / "shards"
    shards.mkdir()
    write_tar(shards / "A.TAR", [("x.PNG", picture), ("x.Cls", b"1")])
    assert open_source(shards).keys == open_source(shards / "A.TAR").keys == ["A.TAR/x"]
    (folder / "L.CSV").write_text("path,label\ncat/000.png,1\n")
    (folder / "L.TXT").write_text("cat/000.png\n")
    assert open_source(folder / "L.CSV").keys == open_source(folder / "L.TXT").keys
    (folder / "S.JSON").write_text(json.dumps({"test": [["cat/000.png", 0, "cat"]]}))
    assert open_source(folder / "S.JSON", split="test").keys == ["cat/000.png"]


def test_captions_are_not_labels(images):
    picture = (images(1) / "cat/000.png").read_bytes()
    tar = images(1).parent / "a.tar"
    write_tar(tar, [("x.jpg", picture), ("x.txt", b"a cat on a mat")])
    with pytest.warns(UserWarning, match="taken for captions"):
        assert resolve_labels(open_source(tar), ["cat", "dog"]) is None


def test_identity_follows_names_and_sizes(images):
    folder = images(3)
    before = open_source(folder).identity()
    assert open_source(folder).identity() == before
    with open(folder / "cat/000.png", "ab") as file:
        file.write(b"more")
    after = open_source(folder).identity()
    assert after["rows"] == before["rows"] == 3
    assert after["sha256"] != before["sha256"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing", None, "no such file or folder"),
        ("a.doc", b"x", "expected a folder"),
        ("a.tar", b"not a tar" * 200, "uncompressed tar"),
        ("a.csv", b"file\nx.png\n", "no column 'path'"),
        ("a.parquet", b"nonsense", "cannot be read as a table"),
        ("a.txt", b"\n", "holds no images"),
    ],
)
def test_bad_sources_are_one_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        open_source(tmp_path / name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("option", ["labels_from_folders", "follow_links"])
@pytest.mark.parametrize("name", ["list.csv", "list.txt", "split.json", "a.tar", "tars"])
def test_options_of_a_folder_are_refused_elsewhere(name, option, images):
    folder = images(2)
    (folder / "list.csv").write_text("path\ncat/000.png\n")
    (folder / "list.txt").write_text("cat/000.png\n")
    (folder / "split.json").write_text(json.dumps({"test": [["cat/000.png", 0, "cat"]]}))
    (folder / "tars").mkdir()
    for tar in ("a.tar", "tars/a.tar"):
        write_tar(folder / tar, [("x.png", (folder / "cat/000.png").read_bytes())])
    message = f"{name}: labels_from_folders and follow_links are for a folder of images; leave"
    with pytest.raises(InputError, match=message):
        open_source(folder / name, **{option: True})
    assert len(open_source(folder / name)) == 1


def test_labels_out_of_range(tmp_path):
    (tmp_path / "x.png").touch()
    pq.write_table(pa.table({"path": ["x.png"], "label": np.array([2])}), tmp_path / "l.parquet")
    with pytest.raises(InputError, match="x.png: label 2 is none of the 2 classes"):
        resolve_labels(open_source(tmp_path / "l.parquet"), ["a", "b"])


def test_images_beside_tars_are_refused(images):
    folder = images(1)
    write_tar(folder / "a.tar", [("x.png", b"")])
    (folder / "loose.png").write_bytes(b"")
    with pytest.raises(InputError, match="holds images and .tar files"):
        open_source(folder)


def test_a_class_number_beats_a_caption(images):
    picture = (images(1) / "cat/000.png").read_bytes()
    tar = images(1).parent / "a.tar"
    write_tar(tar, [("x.txt", b"a cat"), ("x.jpg", picture), ("x.cls", b"1")])
    assert resolve_labels(open_source(tar), ["cat", "dog"]).tolist() == [1]


@pytest.mark.parametrize("label", [1.7, True, "null", "2"])
def test_labels_that_are_no_class(label):
    source = Source("list", ["x"], ["x.png"], labels=[label])
    with pytest.raises(InputError, match="x: label .* is none of the 2 classes"):
        resolve_labels(source, ["a", "b"])


def test_a_name_that_two_classes_share_is_no_label():
    source = Source("list", ["x"], ["x.png"], labels=["crane"])
    with pytest.raises(InputError, match="'crane' is the name of several classes"):
        resolve_labels(source, ["crane", "Crane"])
