"""The encode loop and the folder it writes: what is in it, and what survives interruption."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from transclip_fast.encode import encoder, feed
from transclip_fast.encode.folder import encode_source
from transclip_fast.encode.sources import open_source
from transclip_fast.encode.text import ClassPrompts
from transclip_fast.errors import InputError
from transclip_fast.store.atomic import locked
from transclip_fast.store.feature_writer import FeatureWriter
from transclip_fast.store.features import load_features

TEXT = ClassPrompts(["dog", "cat"], [["a dog"], ["a cat"]], "here")


def encode(folder, backbone, out, text=TEXT, **options):
    options = {"batch_size": 2, "workers": 0, "shard_rows": 3, **options}
    source = open_source(folder, labels_from_folders=True)
    return encode_source(source, backbone, out, text, **options)


def contents(folder):
    """Bytes of every file by its path."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_features_are_unit_rows_in_source_order(images, backbone, tmp_path):
    folder = images(7)
    encode(folder, backbone, tmp_path / "out")
    stored = load_features(tmp_path / "out")
    weights = backbone.model.image.detach().double().numpy()
    for row, key in enumerate(open_source(folder).keys):
        pixels = np.asarray(Image.open(folder / key).convert("RGB").resize((8, 8)), float) / 255
        expected = pixels.transpose(2, 0, 1).reshape(-1) @ weights
        np.testing.assert_allclose(
            stored.get("image_features")[row], expected / np.linalg.norm(expected), atol=1e-3
        )
    assert stored.get("image_features").dtype == np.float16
    assert stored.keys == open_source(folder).keys
    assert stored.source_rows.tolist() == list(range(7))
    assert stored.get("labels").tolist() == [1, 1, 1, 1, 0, 0, 0]
    assert stored.class_names == ["dog", "cat"]
    assert stored.get("text_features").shape == (2, 5)


def test_manifest_names_every_shard_with_its_hash(images, backbone, tmp_path):
    encode(images(7), backbone, tmp_path / "out")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["complete"] is True
    assert manifest["rows"] == 7
    assert [entry["rows"] for entry in manifest["shards"].values()] == [3, 3, 1]
    for number, entry in manifest["shards"].items():
        data = (tmp_path / f"out/img_emb/img_emb_{int(number):05}.npy").read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["features_sha256"]


def test_unreadable_images_leave_no_row_and_shift_none(images, backbone, tmp_path):
    folder = images(7)
    (folder / "cat/002.png").write_bytes((folder / "cat/002.png").read_bytes()[:60])
    (folder / "dog/001.png").write_text("no picture")
    (folder / "dog/003.png").write_text("no picture either")
    (folder / "dog/005.png").write_text("nor this")
    encoded = encode(folder, backbone, tmp_path / "out", shard_rows=4)
    stored = load_features(tmp_path / "out")
    assert stored.source_rows.tolist() == [0, 2, 3]
    assert stored.keys == ["cat/000.png", "cat/004.png", "cat/006.png"]
    with open(tmp_path / "out/failures.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["source_row"]), row["key"]) for row in rows] == [
        (1, "cat/002.png"),
        (4, "dog/001.png"),
        (5, "dog/003.png"),
        (6, "dog/005.png"),
    ]
    assert all(row["reason"] for row in rows)
    assert [failure.source_row for failure in encoded.failures] == [1, 4, 5, 6]
    assert encoded.n_rows == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_images_with_more_pages_than_one_are_counted(workers, images, backbone, tmp_path):
    folder = images(7)
    first, second = (Image.new("RGB", (20, 20), colour) for colour in ("red", "blue"))
    for name in ("dog/a.tif", "dog/b.gif"):
        first.save(folder / name, save_all=True, append_images=[second] * 4)
    first.save(folder / "dog/c.tif")
    message = (
        r"^2 images have more than one page or frame, of which the first is taken, "
        r"e.g. dog/a.tif$"
    )
    with pytest.warns(UserWarning, match=message):
        encode(folder, backbone, tmp_path / "out", workers=workers)
    stored = load_features(tmp_path / "out")
    rows = dict(zip(stored.keys, stored.get("image_features"), strict=True))
    np.testing.assert_array_equal(rows["dog/a.tif"], rows["dog/c.tif"])
    first.save(folder / "dog/b.tif", save_all=True, append_images=[second])
    with pytest.warns(UserWarning, match=r"^1 image has more than one .* dog/b.tif$"):
        encode(folder, backbone, tmp_path / "out", workers=workers)


class Killed(Exception):
    """Stands for a signal."""


def dying(monkeypatch, batches):
    """Let encoding die after so many batches, as the list returned counts down."""
    embed, left = encoder.launch, [batches]

    def dies(*arguments):
        if not left[0]:
            raise Killed
        left[0] -= 1
        return embed(*arguments)

    monkeypatch.setattr(encoder, "launch", dies)
    return left


@pytest.mark.parametrize(("batches", "repeated"), [(0, 5), (1, 5), (2, 3), (3, 3), (4, 2)])
def test_an_interrupted_run_ends_in_the_same_bytes(
    images, backbone, tmp_path, monkeypatch, batches, repeated
):
    folder = images(7)
    (folder / "dog/001.png").write_text("no picture")
    encode(folder, backbone, tmp_path / "whole")
    left = dying(monkeypatch, batches)
    with pytest.raises(Killed):
        encode(folder, backbone, tmp_path / "resumed")
    assert not json.loads((tmp_path / "resumed/manifest.json").read_text())["complete"]
    with pytest.raises(InputError, match=r"is not finished|no img_emb"):
        load_features(tmp_path / "resumed")
    left[0] = 99
    encode(folder, backbone, tmp_path / "resumed", batch_size=5)  # the first run's 2 is kept
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")
    # Of the 5 batches, those of unfinished shards; and images that failed are tried again.
    assert 99 - left[0] == repeated


def test_finished_shards_are_not_encoded_again(images, backbone, tmp_path, monkeypatch):
    folder = images(7)
    encode(folder, backbone, tmp_path / "out")
    before = contents(tmp_path / "out")
    monkeypatch.setattr(encoder, "launch", None)
    encode(folder, backbone, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_a_damaged_shard_is_encoded_again(images, backbone, tmp_path):
    folder = images(7)
    encode(folder, backbone, tmp_path / "out")
    before = contents(tmp_path / "out")
    shard = tmp_path / "out/img_emb/img_emb_00001.npy"
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(InputError, match="img_emb_00001.npy"):
        load_features(tmp_path / "out")
    encode(folder, backbone, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_other_prompts_replace_only_the_prototypes(images, backbone, tmp_path, monkeypatch):
    folder = images(7)
    encode(folder, backbone, tmp_path / "out")
    before = contents(tmp_path / "out")
    monkeypatch.setattr(encoder, "launch", None)
    encode(
        folder, backbone, tmp_path / "out", ClassPrompts(["dog", "cat"], [["x"], ["y"]], "there")
    )
    after = contents(tmp_path / "out")
    assert {name for name in before if before[name] != after[name]} == {
        "prototypes.npy",
        "manifest.json",
    }


def test_another_model_is_refused(images, backbone, tmp_path):
    folder = images(7)
    encode(folder, backbone, tmp_path / "out")
    before = contents(tmp_path / "out")
    backbone.identity["weights"] = "laion"
    with pytest.raises(InputError, match="was begun with weights 'none', now 'laion'"):
        encode(folder, backbone, tmp_path / "out")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("rules", [None, "as they are"])
def test_a_folder_of_other_rules_for_pixels_is_refused(images, backbone, tmp_path, rules):
    folder = images(7)
    encode(folder, backbone, tmp_path / "out")
    file = tmp_path / "out/manifest.json"
    manifest = json.loads(file.read_text())
    assert "upright" in manifest["config"]["pixels"]
    if rules is None:  # as before images were turned
        del manifest["config"]["pixels"]
    else:
        manifest["config"]["pixels"] = rules
    file.write_text(json.dumps(manifest))
    assert load_features(tmp_path / "out").get("image_features").shape == (7, 5)
    with pytest.raises(InputError, match=f"was begun with pixels {rules!r}, now 'upright"):
        encode(folder, backbone, tmp_path / "out")


def test_a_folder_of_other_files_is_refused(images, backbone, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.doc").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        encode(images(), backbone, tmp_path / "out")
    assert contents(tmp_path / "out") == {"thesis.doc": b"mine"}


def test_workers_change_nothing(images, backbone, tmp_path):
    folder = images(7)
    (folder / "dog/001.png").write_text("no picture")
    encode(folder, backbone, tmp_path / "none")
    encode(folder, backbone, tmp_path / "two", workers=2)
    assert contents(tmp_path / "two") == contents(tmp_path / "none")


def test_the_number_of_threads_is_given_back(images, backbone, tmp_path):
    before = torch.get_num_threads()
    encode(images(), backbone, tmp_path / "out")
    assert torch.get_num_threads() == before


def test_progress_counts_failures_and_what_was_there(images, backbone, tmp_path):
    folder = images(7)
    (folder / "dog/001.png").write_text("no picture")
    seen = []
    encoded = encode(folder, backbone, tmp_path / "out")
    shard = tmp_path / "out/img_emb/img_emb_00002.npy"
    shard.unlink()
    source = open_source(folder)
    writer = FeatureWriter(tmp_path / "out", encoded.config, source.table(None))
    encoder.encode_shards(source, backbone, writer, [2], workers=0, progress=seen.append)
    assert [(state.done, state.total) for state in seen] == [(7, 7)]
    assert 0 <= seen[0].waiting <= 1


def test_a_kill_between_any_two_writes_is_continued(images, backbone, tmp_path, monkeypatch):
    folder = images(7)
    (folder / "dog/001.png").write_text("no picture")
    encode(folder, backbone, tmp_path / "whole")
    rename, renames = Path.rename, []
    monkeypatch.setattr(Path, "rename", lambda *paths: (renames.append(1), rename(*paths))[1])
    encode(folder, backbone, tmp_path / "counted")
    monkeypatch.setattr(feed, "PREFETCHED_BATCHES", 1)
    for last in range(len(renames)):
        left = [last]

        def dies(*paths, left=left):
            if not left[0]:
                raise Killed
            left[0] -= 1
            return rename(*paths)

        monkeypatch.setattr(Path, "rename", dies)
        out = tmp_path / f"killed-{last}"
        with pytest.raises(Killed):
            encode(folder, backbone, out)
        with pytest.raises(InputError):
            load_features(out)
        monkeypatch.setattr(Path, "rename", rename)
        encode(folder, backbone, out)
        assert contents(out) == contents(tmp_path / "whole")


def test_labels_follow_the_order_of_the_classes(images, backbone, tmp_path, monkeypatch):
    folder = images(7)
    encode(folder, backbone, tmp_path / "out")
    assert load_features(tmp_path / "out").get("labels").tolist() == [1, 1, 1, 1, 0, 0, 0]
    monkeypatch.setattr(encoder, "launch", None)
    turned = ClassPrompts(["cat", "dog"], [["a cat"], ["a dog"]], "here")
    encode(folder, backbone, tmp_path / "out", turned)
    assert load_features(tmp_path / "out").get("labels").tolist() == [0, 0, 0, 0, 1, 1, 1]
    with (
        pytest.warns(UserWarning, match="labels are not kept without class names"),
        pytest.warns(UserWarning, match="class names and prototypes of an earlier encode"),
    ):
        encode(folder, backbone, tmp_path / "out", None)
    assert load_features(tmp_path / "out").get("labels") is None


@pytest.mark.parametrize("name", ["prototypes.npy", "metadata/metadata_00001.parquet"])
def test_a_changed_file_is_noticed_and_mended(images, backbone, tmp_path, name):
    folder = images(7)
    encode(folder, backbone, tmp_path / "out")
    before = contents(tmp_path / "out")
    other = {"prototypes.npy": "img_emb/img_emb_00002.npy"}.get(
        name, "metadata/metadata_00000.parquet"
    )
    (tmp_path / "out" / name).write_bytes(before[other])
    with pytest.raises(InputError, match="differs from its manifest"):
        load_features(tmp_path / "out")
    encode(folder, backbone, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_two_writers_are_refused(images, backbone, tmp_path):
    with locked(tmp_path / "out"), pytest.raises(InputError, match="another process is writing"):
        encode(images(), backbone, tmp_path / "out")


@pytest.mark.parametrize(
    "damage",
    [
        {"shards": {"x": {}}},
        {"shards": {"0": {}}},
        {"shards": {"0": {"rows": 2, "features_sha256": "x", "batch_size": 2, "failures": [3]}}},
        {"config": {}},
        {"shards": 3},
    ],
)
def test_a_damaged_manifest_is_one_line(images, backbone, tmp_path, damage):
    folder = images(7)
    encode(folder, backbone, tmp_path / "out")
    file = tmp_path / "out/manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **damage}))
    with pytest.raises(InputError) as error:
        encode(folder, backbone, tmp_path / "out")
    assert "\n" not in str(error.value)


def test_names_that_are_not_text(images, backbone, tmp_path):
    folder = images(3)
    odd = os.fsencode(folder / "cat") + b"/caf\xe9.png"
    os.rename(folder / "cat/000.png", odd)
    encode(folder, backbone, tmp_path / "out")
    assert load_features(tmp_path / "out").keys[1] == "cat/caf\\xe9.png"


def test_decoders_may_raise_anything(images, backbone, tmp_path):
    def odd(image):
        raise NotImplementedError("a strange format")

    backbone.preprocess = odd
    encoded = encode(images(3), backbone, tmp_path / "out")
    assert [failure.reason for failure in encoded.failures] == ["a strange format"] * 3
    assert np.load(tmp_path / "out/img_emb/img_emb_00000.npy").shape == (0, 5)


def test_a_failing_machine_is_not_a_failing_image(images, backbone, tmp_path):
    good = backbone.preprocess

    def out_of_memory(image):
        raise MemoryError("no memory")

    backbone.preprocess = out_of_memory
    with pytest.raises(InputError, match="no memory; run again to continue"):
        encode(images(3), backbone, tmp_path / "out")
    backbone.preprocess = good
    assert encode(images(3), backbone, tmp_path / "out").failures == []


def test_metadata_has_paths_and_keys(images, backbone, tmp_path):
    folder = images(2)
    encode(folder, backbone, tmp_path / "out")
    table = pq.read_table(tmp_path / "out/metadata/metadata_00000.parquet")
    names = ["source_row", "key", "path", "label", "size", "mtime_ns", "sha256"]
    assert table.column_names == names
    for row in table.to_pylist():
        file = folder / row["key"]
        assert (row["size"], row["mtime_ns"]) == (file.stat().st_size, file.stat().st_mtime_ns)
        assert row["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert table.column("path").to_pylist() == [
        str(folder / key) for key in table["key"].to_pylist()
    ]
