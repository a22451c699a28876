"""Folders that change: what is new or changed is encoded, and the bytes are those of one run."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.encode.conftest import draw_image
from tests.encode.test_encoder import Killed, contents
from tests.encode.test_patches import towers  # noqa: F401 - a fixture
from transclip_fast.encode import encoder
from transclip_fast.encode.folder import encode_source
from transclip_fast.encode.models import load_backbone
from transclip_fast.encode.sources import Source, open_source
from transclip_fast.errors import InputError
from transclip_fast.store.features import load_features


def encode(folder, backbone, out, by_content=False, **options):
    options = {"batch_size": 2, "workers": 0, "shard_rows": 3, **options}
    source = replace(open_source(folder), by_content=by_content)
    return encode_source(source, backbone, out, None, **options)


@pytest.fixture
def seen(monkeypatch):
    """Numbers of images in the batches that were embedded."""
    launch, sizes = encoder.launch, []

    def counted(backbone, images, size):
        sizes.append(0 if images is None else len(images))
        return launch(backbone, images, size)

    monkeypatch.setattr(encoder, "launch", counted)
    return sizes


CHANGES = {  # of the folder, with the number of images that have to be encoded
    "added at the end": (lambda f: draw_image(f / "70.bmp", 7), 1),
    "added in the middle": (lambda f: draw_image(f / "15.bmp", 7), 1),
    "added in front": (lambda f: [draw_image(f / f"0{k}.bmp", 10 + k) for k in range(1, 5)], 4),
    "removed": (lambda f: (f / "20.bmp").unlink(), 0),
    "a shard removed": (lambda f: [(f / f"{k}0.bmp").unlink() for k in (4, 5, 6)], 0),
    "replaced": (lambda f: draw_image(f / "30.bmp", 99), 1),
    "renamed": (lambda f: (f / "30.bmp").rename(f / "65.bmp"), 1),
    "broken": (lambda f: (f / "30.bmp").write_bytes(b"no picture"), 0),
    "all removed but one": (lambda f: [(f / f"{k}0.bmp").unlink() for k in range(6)], 0),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.*no longer there")
def test_a_folder_that_changes_ends_in_the_bytes_of_one_run(
    change, photos, backbone, tmp_path, seen
):
    (photos / "50.bmp").write_bytes(b"no picture")
    encode(photos, backbone, tmp_path / "out")
    (tmp_path / "out/notes.txt").write_text("mine")
    edit, number = CHANGES[change]
    edit(photos)
    seen.clear()
    encoded = encode(photos, backbone, tmp_path / "out")
    assert sum(seen) == number
    assert encoded.n_rows - encoded.n_kept == number
    assert (tmp_path / "out/notes.txt").read_text() == "mine"
    (tmp_path / "out/notes.txt").unlink()
    encode(photos, backbone, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    stored = load_features(tmp_path / "out")
    assert len(stored.keys) == encoded.n_rows


@pytest.mark.filterwarnings("ignore:.*no longer there")
def test_many_changes_in_turn(photos, backbone, tmp_path, seen):
    """Against the plain count: names whose content the folder did not have the time before."""
    draw, known = np.random.default_rng(0), {}
    for step in range(12):
        for name in draw.choice(40, size=5, replace=False):
            file = photos / f"{name:02}.bmp"
            match draw.integers(4):
                case 0 if len(list(photos.iterdir())) > 1:
                    file.unlink(missing_ok=True)
                case 1:
                    file.write_bytes(b"no picture")
                case _:
                    draw_image(file, 100 * step + int(name))
        files = {file.name: file.read_bytes() for file in photos.iterdir()}
        readable = {name: data for name, data in files.items() if data != b"no picture"}
        seen.clear()
        encode(photos, backbone, tmp_path / "out")
        assert sum(seen) == sum(known.get(name) != data for name, data in readable.items())
        known = readable
        encode(photos, backbone, tmp_path / f"whole-{step}")
        assert contents(tmp_path / "out") == contents(tmp_path / f"whole-{step}")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_features_do_not_depend_on_the_batch(precision, photos, tmp_path):
    """A real network: one image is added to 40, which shifts the batches and fills the last."""
    config = {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16},
        "text_cfg": {"width": 64, "heads": 2, "layers": 2},
    }
    (tmp_path / "growing-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "growing-clip.json")
    backbone = load_backbone("growing-clip", "none", torch.device("cpu"), precision)
    for k in range(40):
        draw_image(photos / f"image-{k:02}.png", k, (50, 70))
    options = {"batch_size": 16, "shard_rows": 16}
    encode(photos, backbone, tmp_path / "out", **options)
    draw_image(photos / "00-first.png", 77, (90, 40))
    assert encode(photos, backbone, tmp_path / "out", **options).n_kept == 47
    encode(photos, backbone, tmp_path / "whole", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.filterwarnings("ignore:.*no longer there")
def test_a_kill_between_any_two_moves_is_continued(photos, backbone, tmp_path, monkeypatch):
    (photos / "50.bmp").write_bytes(b"no picture")
    encode(photos, backbone, tmp_path / "before")
    draw_image(photos / "15.bmp", 7)
    (photos / "40.bmp").unlink()
    encode(photos, backbone, tmp_path / "whole")
    moves = {name: getattr(Path, name) for name in ("rename", "replace")}

    def grown(last):
        """Whether the run ends although it is killed before this move."""
        left = [last]

        def dying(move):
            def moved(*arguments, **options):
                if not left[0]:
                    raise Killed
                left[0] -= 1
                return move(*arguments, **options)

            return moved

        out = tmp_path / f"killed-{last}"
        shutil.copytree(tmp_path / "before", out)
        for name, move in moves.items():
            monkeypatch.setattr(Path, name, dying(move))
        try:
            encode(photos, backbone, out)
        except Killed:
            return False
        finally:
            for name, move in moves.items():
                monkeypatch.setattr(Path, name, move)
            encode(photos, backbone, out)
            assert contents(out) == contents(tmp_path / "whole")
        return True

    ended = next(last for last in range(200) if grown(last))
    assert ended > 10


@pytest.mark.filterwarnings("ignore:.*no longer there")
def test_images_that_change_again_after_a_kill(photos, backbone, tmp_path, seen, monkeypatch):
    """What either run has encoded is kept."""
    encode(photos, backbone, tmp_path / "out")
    for k in range(1, 7):
        draw_image(photos / f"{k}5.bmp", 50 + k)
    launch, left = encoder.launch, [3]

    def dies(*arguments):
        if not left[0]:
            raise Killed
        left[0] -= 1
        return launch(*arguments)

    monkeypatch.setattr(encoder, "launch", dies)
    with pytest.raises(Killed):
        encode(photos, backbone, tmp_path / "out")
    with pytest.raises(InputError, match="is not finished"):
        load_features(tmp_path / "out")
    records = len(list((tmp_path / "out/records").glob("*.json")))
    done = sum(seen)
    assert records >= 1
    monkeypatch.setattr(encoder, "launch", launch)
    (photos / "00.bmp").unlink()
    draw_image(photos / "70.bmp", 3)
    seen.clear()
    encode(photos, backbone, tmp_path / "out")
    assert sum(seen) <= 7 - 1  # six were missing, of which one at least was written; one is new
    assert done >= 1
    encode(photos, backbone, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_failure_is_tried_again_though_its_file_is_as_before(
    photos, backbone, tmp_path, monkeypatch
):
    encode(photos, backbone, tmp_path / "whole")
    good = backbone.preprocess

    def no_decoder(image):
        raise OSError("no decoder for this format")

    monkeypatch.setattr(backbone, "preprocess", no_decoder)
    assert len(encode(photos, backbone, tmp_path / "out").failures) == 7
    monkeypatch.setattr(backbone, "preprocess", good)
    encoded = encode(photos, backbone, tmp_path / "out")
    assert (encoded.n_rows, encoded.n_kept, encoded.failures) == (7, 0, [])
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_image_of_equal_size_and_time_is_noticed_by_content(photos, backbone, tmp_path, seen):
    encode(photos, backbone, tmp_path / "out")
    state = (photos / "30.bmp").stat()
    draw_image(photos / "30.bmp", 99)
    os.utime(photos / "30.bmp", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (photos / "30.bmp").stat().st_size == state.st_size
    before = contents(tmp_path / "out")
    seen.clear()
    encode(photos, backbone, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    encode(photos, backbone, tmp_path / "out", by_content=True)
    assert seen == [1]
    encode(photos, backbone, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_disk_that_fails_is_no_fault_of_the_features(photos, backbone, tmp_path, monkeypatch):
    """Where the images are read to compare them."""
    encode(photos, backbone, tmp_path / "out")
    read = Source.read

    def failing(source, row):
        if source.keys[row] == "30.bmp":
            raise OSError(errno.EIO, "Input/output error", source.files[row])
        return read(source, row)

    monkeypatch.setattr(Source, "read", failing)
    message = r"^30.bmp: \[Errno 5\] Input/output error: .*30.bmp'; run again to continue$"
    with pytest.raises(InputError, match=message):
        encode(photos, backbone, tmp_path / "out", by_content=True)


def test_copied_images_are_kept_by_content(photos, backbone, tmp_path, seen):
    encode(photos, backbone, tmp_path / "out")
    for file in photos.iterdir():
        os.utime(file, (1, 1))
    shutil.copy(photos / "30.bmp", photos / "35.bmp")
    seen.clear()
    encode(photos, backbone, tmp_path / "out", by_content=True)
    assert seen == [1]  # another name is another image
    encode(photos, backbone, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    os.utime(photos / "00.bmp", (2, 2))
    seen.clear()
    assert encode(photos, backbone, tmp_path / "out").n_kept == 7
    assert seen == [1]


@pytest.mark.filterwarnings("ignore:.*no longer there")
def test_another_folder_of_equal_names_sizes_and_times_is_encoded(
    photos, backbone, tmp_path, seen, monkeypatch
):
    """As of frames of cameras, or of folders that were unpacked with one time."""
    other = tmp_path / "other"
    for k, file in enumerate(sorted(photos.iterdir())):
        draw_image(other / file.name, 20 + k)
        os.utime(file, (1, 1))
        os.utime(other / file.name, (1, 1))
    encode(photos, backbone, tmp_path / "out")
    seen.clear()
    monkeypatch.chdir(tmp_path)
    assert encode("photos", backbone, tmp_path / "out").n_kept == 7  # the same files
    assert encode(other, backbone, tmp_path / "out").n_kept == 0
    assert sum(seen) == 7
    encode(other, backbone, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    other.rename(tmp_path / "moved")
    assert encode(tmp_path / "moved", backbone, tmp_path / "out").n_kept == 7


def test_a_tar_of_an_equal_name_and_equal_sizes_and_time_is_encoded(photos, backbone, tmp_path):
    for seed, folder in enumerate(("monday", "tuesday")):
        (tmp_path / folder).mkdir()
        draw_image(photos / "00.bmp", seed)
        with tarfile.open(tmp_path / folder / "a.tar", "w") as tar:
            tar.add(photos / "00.bmp", "0.bmp")
        os.utime(tmp_path / folder / "a.tar", (1, 1))
    encode(tmp_path / "monday/a.tar", backbone, tmp_path / "out")
    assert encode(tmp_path / "tuesday/a.tar", backbone, tmp_path / "out").n_kept == 0
    encode(tmp_path / "tuesday/a.tar", backbone, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_images_that_are_gone_are_named(photos, backbone, tmp_path):
    encode(photos, backbone, tmp_path / "out")
    for k in range(5):
        (photos / f"{k}0.bmp").unlink()
    message = r"no longer there lose their rows: 5 \(00.bmp, 10.bmp, 20.bmp, ...\)$"
    with pytest.warns(UserWarning, match=message):
        encode(photos, backbone, tmp_path / "out")
    assert load_features(tmp_path / "out").keys == ["50.bmp", "60.bmp"]


def test_another_folder_of_images_does_not_replace_the_features(photos, backbone, tmp_path):
    """As where a command is given again with a wrong IMAGES or --out: hours of work would go."""
    encode(photos, backbone, tmp_path / "out")
    before = contents(tmp_path / "out")
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(photos / "00.bmp", other / "new.bmp")
    message = r"out: has features of 7 other images, such as 00\.bmp, and of none of these; name"
    with pytest.raises(InputError, match=message):
        encode(other, backbone, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    shutil.copy(photos / "60.bmp", other / "60.bmp")
    with pytest.warns(UserWarning, match="lose their rows: 6"):
        assert encode(other, backbone, tmp_path / "out").n_rows == 2


def test_the_keys_of_a_list_do_not_name_files(photos, backbone, tmp_path, seen):
    """Bitmaps of one size, unpacked in one second, numbered anew when one is added in front."""
    files = sorted(photos.iterdir())
    for file in files:
        os.utime(file, (1, 1))

    def write_list(chosen):
        rows = [f"{file},{number}" for number, file in enumerate(chosen)]
        (tmp_path / "list.csv").write_text("\n".join(["path,key", *rows]) + "\n")

    write_list(files[1:])
    encode(tmp_path / "list.csv", backbone, tmp_path / "out")
    write_list(files)
    encode(tmp_path / "list.csv", backbone, tmp_path / "out")
    encode(tmp_path / "list.csv", backbone, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    write_list(files[::-1])
    seen.clear()
    encode(tmp_path / "list.csv", backbone, tmp_path / "out", by_content=True)
    assert sum(seen) == 6  # the key in the middle has the file it had


def test_patches_are_kept_too(photos, towers, tmp_path, seen):  # noqa: F811
    encode(photos, towers[0], tmp_path / "out")
    draw_image(photos / "15.bmp", 7)
    seen.clear()
    encode(photos, towers[0], tmp_path / "out")
    assert seen == [1]
    encode(photos, towers[0], tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def without_stamps(out):
    """The folder as a version wrote it that noted no sizes, times and hashes."""
    manifest = json.loads((out / "manifest.json").read_text())
    for number, entry in manifest["shards"].items():
        file = out / f"metadata/metadata_{int(number):05}.parquet"
        table = pq.read_table(file).select(["source_row", "key", "path"])
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        file.write_bytes(sink.getvalue().to_pybytes())
        entry["metadata_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (out / "manifest.json").write_text(json.dumps(manifest))


def test_an_earlier_versions_folder(photos, backbone, tmp_path, seen):
    encode(photos, backbone, tmp_path / "out")
    without_stamps(tmp_path / "out")
    seen.clear()
    draw_image(photos / "15.bmp", 7)
    with pytest.raises(InputError, match="noted no sizes and times; name a new folder"):
        encode(photos, backbone, tmp_path / "out")
    (photos / "15.bmp").unlink()
    encode(photos, backbone, tmp_path / "out")
    assert not seen
    draw_image(photos / "15.bmp", 7)
    assert encode(photos, backbone, tmp_path / "out").n_kept == 7
    assert seen == [1]
