"""Class names and lists of images through `encode` and `run`: right labels, or one line."""

from __future__ import annotations

import json
import unicodedata

import pyarrow.parquet as pq
import pytest
from open_clip import IMAGENET_CLASSNAMES

from transclip_fast.encode.weights import WatchedFiles
from transclip_fast.store.features import load_features

MODEL = ("--model", "tiny", "--pretrained", "openai", "--workers", "0")


@pytest.fixture
def encode(monkeypatch, backbone, cli, tmp_path):
    """Run `encode` with a tiny model; the labels, -1 where there is none, and standard error."""
    monkeypatch.setattr("transclip_fast.encode.models.load_backbone", lambda *_, **__: backbone)
    monkeypatch.setattr("transclip_fast.encode.models.identify", lambda *_: backbone.identity)
    monkeypatch.setattr("transclip_fast.encode.models.watch_weights", lambda *_: WatchedFiles({}))
    (tmp_path / "templates.txt").write_text("a {}")

    def run(source, classes, *options):
        options = (*MODEL, "--templates", tmp_path / "templates.txt", *options)
        ran = cli("encode", source, "--classes", classes, *options, "--out", tmp_path / "features")
        assert ran.code == 0
        table = pq.read_table(tmp_path / "features/metadata")
        labels = table["label"].fill_null(-1).to_pylist() if "label" in table.column_names else None
        return labels, ran.err

    return run


@pytest.fixture
def unloaded(monkeypatch, refused, tmp_path):
    """Run `encode` and `run`, which must refuse before a model is loaded; the line."""

    def fail(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("transclip_fast.encode.models.load_backbone", fail)

    def run(source, classes, *options):
        arguments = (source, "--classes", classes, *options, *MODEL[2:], "--model", "ViT-B-32")
        line = refused("encode", *arguments, "--out", tmp_path / "features")
        assert refused("run", *arguments, "--out", tmp_path / "run") == line
        return line

    return run


def written(file, content):
    text = content if isinstance(content, str) else json.dumps(content)
    file.write_text(text, encoding="utf-8")
    return file


def renamed(folder, **names):
    for old, new in names.items():
        (folder / old).rename(folder / new)
    return folder


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_folders_in_both_unicode_forms(form, images, encode, tmp_path):
    name = unicodedata.normalize(form, "Crème_brûlée")
    folder = renamed(images(4), cat=name)
    classes = written(tmp_path / "names.json", {"dog": 0, unicodedata.normalize("NFC", name): 1})
    labels, err = encode(folder, classes, "--labels-from-folders")
    assert labels == [1, 1, 0, 0]
    assert "class 1 has '_'" in err


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        ("imagenet", (0, 1)),
        ("\n".join(sorted(IMAGENET_CLASSNAMES)), (898, 446)),
        ("goldfish\nstingray\ntench\n", (2, 0)),
        ("n01443537 Fisch\nn01440764 Schleie\n", (1, 0)),
        ({"1": ["n01440764", "a"], "0": ["n01443537", "b"]}, (1, 0)),
    ],
)
def test_synset_folders(classes, expected, images, encode, tmp_path):
    folder = renamed(images(4), cat="n01440764", dog="n01443537")  # tench, goldfish
    if classes != "imagenet":
        suffix = "txt" if isinstance(classes, str) else "json"
        classes = written(tmp_path / f"names.{suffix}", classes)
    tench, goldfish = expected
    labels, _ = encode(folder, classes, "--labels-from-folders")
    assert labels == [tench, tench, goldfish, goldfish]


def test_a_list_with_labels_of_some_rows(images, encode, cli, succeeds, tmp_path):
    images(4)
    keys = ["images/dog/001.png", "images/cat/000.png", "images/cat/002.png"]
    file = written(
        tmp_path / "list.csv", f"Path, Labels\n{keys[0]}, Dog\n{keys[1]},\n{keys[2]}, cat"
    )
    labels, err = encode(file, written(tmp_path / "names.txt", "cat\ndog\n"))
    assert (labels, err) == ([1, -1, 0], "")
    assert load_features(tmp_path / "features").get("labels").tolist()[::2] == [1, 0]
    arguments = ("solve", tmp_path / "features", "--n-neighbors", 1, "--out", tmp_path / "result")
    ran = cli(*arguments)
    assert "of the 2 images with a true label" in ran.out
    assert (
        ran.err == "warning: the weights are random (--pretrained none): the labels mean nothing\n"
    )
    for given in ((), ("--labels", file)):
        found = json.loads(succeeds("evaluate", tmp_path / "result", *given, "--json"))
        assert (found["n_queries"], found["n_labelled"]) == (3, 2)


def test_labels_without_class_names_are_mentioned(images, cli, encode, tmp_path):
    arguments = ("--labels-from-folders", *MODEL, "--out", tmp_path / "features")
    ran = cli("encode", images(2), *arguments)
    assert (ran.code, ran.err.count("\n")) == (0, 1)
    assert "warning: labels are not kept without class names" in ran.err


def test_two_classes_of_one_name(images, encode, tmp_path):
    labels, err = encode(images(2), written(tmp_path / "names.txt", "crane\ncat\nCrane\n"))
    assert labels is None
    assert err == (
        f"warning: {tmp_path / 'names.txt'}: line 3 has the name of line 1 ('Crane'); rename it "
        "or take it out: it gets no images\n"
    )


@pytest.mark.parametrize(
    ("source", "classes", "message"),
    [
        ("images/cat/000.png 0\n", "cat\ndog\n", "'images/cat/000.png' is; a .txt has one path"),
        ("cat/000.png\ndog/001.png\n", "cat\ndog\n", "none of its 2 files exists, the first"),
        ("images/cat/000.png\n", "cat\n\ndog\n", "names.txt: line 2 is empty"),
        ("images/cat/000.png\n", "['cat', 'dog']\n", "names.txt: expected one name a line"),
        ("images/cat/000.png\n", ["cat", ""], "names.json: class 1 is empty"),
        ("images/cat/000.png\n", {"1": "cat", "2": "dog"}, "names.json: classes have the numbers"),
    ],
)
def test_what_stops_before_the_model_loads(source, classes, message, images, unloaded, tmp_path):
    images(2)
    suffix = "txt" if isinstance(classes, str) else "json"
    names = written(tmp_path / f"names.{suffix}", classes)
    assert message in unloaded(written(tmp_path / "list.txt", source), names)


def test_synsets_of_names_that_nobody_knows(images, unloaded, tmp_path):
    folder = renamed(images(1), cat="n01440764")
    names = written(tmp_path / "names.txt", "\n".join(f"class {k} x" for k in range(1000)))
    message = unloaded(folder, names, "--labels-from-folders")
    assert "label 'n01440764' is none of the 1000 classes; give the names as lines" in message
