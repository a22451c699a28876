"""`encode_images` in Python: what it returns, and that it is the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest

import transclip_fast
from tests.encode.test_encoder import contents
from tests.encode.test_models import a_folder
from transclip_fast.encode.weights import WatchedFiles
from transclip_fast.errors import InputError
from transclip_fast.store.features import load_features


@pytest.fixture
def tiny(monkeypatch, backbone):
    """Every model name loads the tiny backbone."""
    monkeypatch.setattr("transclip_fast.encode.models.load_backbone", lambda *_: backbone)
    monkeypatch.setattr("transclip_fast.encode.models.identify", lambda *_: backbone.identity)
    monkeypatch.setattr("transclip_fast.encode.models.watch_weights", lambda *_: WatchedFiles({}))
    return {"model": "tiny", "pretrained": "none", "workers": 0, "device": "cpu"}


def test_encode_images(images, tiny, tmp_path):
    folder, out = images(7), tmp_path / "out"
    (folder / "dog/001.png").write_text("no picture")
    done, sizes = [], []
    options = {"classes": ["dog", "cat"], "labels_from_folders": True, "batch_size": 4, **tiny}
    encoded = transclip_fast.encode_images(
        folder, out, **options, progress=lambda state: done.append(state.done),
        on_sizes=lambda *numbers: sizes.append(numbers),
    )  # fmt: skip
    assert (encoded.folder, encoded.n_rows, encoded.n_kept) == (str(out), 6, 0)
    assert encoded.leads
    assert [failure.key for failure in encoded.failures] == ["dog/001.png"]
    assert encoded.config["batch_size"] == 4
    assert list(encoded.seconds) == ["list", "load", "text", "images"]
    assert encoded.throughput.images == 7
    assert (done, sizes) == ([4, 7], [(7, 2, 5)])
    stored = load_features(out)
    assert stored.class_names == ["dog", "cat"]
    assert np.linalg.norm(stored.get("image_features"), axis=1) == pytest.approx(1, abs=1e-3)
    before = contents(out)
    again = transclip_fast.encode_images(folder, out, **options)
    assert (again.n_rows, again.n_kept, again.failures) == (6, 6, encoded.failures)
    assert again.throughput.images == 1  # what failed is tried again
    assert contents(out) == before


def test_patches_of_a_compiled_tower_are_refused(images, tiny, tmp_path):
    with pytest.raises(InputError, match="compiled image tower"):
        transclip_fast.encode_images(
            images(), tmp_path / "out", **tiny, compiled=True, local_features=2
        )
    with pytest.raises(AttributeError, match="no attribute 'encode_image'"):
        transclip_fast.encode_image  # noqa: B018


def test_class_names_in_any_sequence(images, tiny, tmp_path):
    folder = images(3)
    stored = []
    for number, classes in enumerate([["dog", "cat"], ("dog", "cat"), np.array(["dog", "cat"])]):
        out = tmp_path / str(number)
        transclip_fast.encode_images(folder, out, classes=classes, batch_size=4, **tiny)
        stored.append(contents(out))
    assert stored[0] == stored[1] == stored[2]


@pytest.mark.parametrize("classes", [[], (), np.array([], str)])
def test_no_class_names_are_not_none(classes, images, tiny, tmp_path):
    with pytest.raises(InputError, match="^class names: holds no class names"):
        transclip_fast.encode_images(images(3), tmp_path / "out", classes=classes, **tiny)
    with pytest.raises(InputError, match="^class names: expected a list of strings"):
        transclip_fast.encode_images(images(3), tmp_path / "out", classes=[1, 2], **tiny)


def test_without_classes_nothing_of_earlier_classes_is_left(images, tiny, tmp_path):
    folder, out = images(7), tmp_path / "out"
    transclip_fast.encode_images(folder, tmp_path / "once", **tiny)
    for whole in (True, False):  # without a load of the model, and with one
        transclip_fast.encode_images(folder, out, classes=["dog", "cat"], **tiny)
        if not whole:
            (folder / "dog/new.png").write_bytes((folder / "dog/001.png").read_bytes())
            shutil.rmtree(tmp_path / "once")
            transclip_fast.encode_images(folder, tmp_path / "once", **tiny)
        with pytest.warns(UserWarning, match=r"out: class names and prototypes of an earlier"):
            transclip_fast.encode_images(folder, out, **tiny)
        assert contents(out) == contents(tmp_path / "once")
        assert load_features(out).class_names is None


def test_another_tokenizer_of_a_model_folder_makes_other_prototypes(
    small, images, tmp_path, monkeypatch
):
    """Features of images stay, also those of a version that did not note the tokenizer."""
    model, out, plain = a_folder(tmp_path), tmp_path / "out", open_clip.get_tokenizer(small)

    def tokenizer_of(name):
        moved = int((Path(name) / "tokenizer.json").read_text())
        return lambda texts: plain(texts).roll(moved, 1)

    monkeypatch.setattr("transclip_fast.encode.models.tokenizer_of", tokenizer_of)
    options = {"model": str(model), "pretrained": "none", "workers": 0, "device": "cpu"}
    folder = images(3)

    def encode(moved):
        (model / "tokenizer.json").write_text(str(moved))
        encoded = transclip_fast.encode_images(folder, out, classes=["dog", "cat"], **options)
        return encoded.n_kept, np.load(out / "prototypes.npy")

    kept, first = encode(0)
    assert kept == 0
    manifest = json.loads((out / "manifest.json").read_text())
    kept, second = encode(1)
    assert kept == 3
    assert not np.array_equal(first, second)
    del manifest["tokenizer_sha256"]
    np.save(out / "prototypes.npy", first)
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert load_features(out).class_names == ["dog", "cat"]
    kept, again = encode(1)
    assert kept == 3
    np.testing.assert_array_equal(again, second)
    monkeypatch.setattr("transclip_fast.encode.models.load_backbone", None)  # nothing is left to do
    assert encode(1)[0] == 3
