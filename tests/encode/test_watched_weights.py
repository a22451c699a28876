"""Weights that change while they are in use stop the work."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from tests.encode.test_models import a_folder
from transclip_fast.cli.pairs import load_pairs
from transclip_fast.encode import models, networks
from transclip_fast.encode.architectures import network_config
from transclip_fast.encode.folder import encode_images
from transclip_fast.encode.models import identify, watch_weights
from transclip_fast.encode.pairs import encode_pairs
from transclip_fast.encode.weights import WatchedFiles, read_checkpoint
from transclip_fast.errors import InputError
from transclip_fast.store.tensors import unmapped

CPU = torch.device("cpu")


@pytest.mark.parametrize("change", ["written", "replaced", "removed"])
def test_weights_that_change_stop_the_encode(weights, save, images, tmp_path, change):
    """Nothing of the other weights is kept: the former ones finish the folder as in one run."""
    file, folder = save(weights), images(7)
    options = {
        "model": "small-clip", "pretrained": file, "device": "cpu", "workers": 0, "batch_size": 1,
        "shard_rows": 2,
    }  # fmt: skip
    encode_images(folder, tmp_path / "whole", **options)
    before = (tmp_path / "w.safetensors").read_bytes()

    def at_the_third(state):
        if state.done == 3:
            other = save({name: -tensor for name, tensor in weights.items()}, "other.safetensors")
            if change == "written":
                (tmp_path / "w.safetensors").write_bytes((tmp_path / other).read_bytes())
            elif change == "replaced":
                (tmp_path / other).rename(file)
            else:
                (tmp_path / "w.safetensors").unlink()

    with pytest.raises(InputError, match="w.safetensors: changed while it was in use"):
        encode_images(folder, tmp_path / "out", progress=at_the_third, **options)
    assert len(list((tmp_path / "out/records").glob("*.json"))) == 1
    (tmp_path / "w.safetensors").write_bytes(before)
    encode_images(folder, tmp_path / "out", **options)
    for kind in ("img_emb", "metadata"):
        for shard in (tmp_path / "whole" / kind).iterdir():
            assert (tmp_path / "out" / kind / shard.name).read_bytes() == shard.read_bytes()


def hub_cache(folder, monkeypatch, weights):
    """The weights as org/name in a cache of the hub, and a tag of small-clip that names them."""
    snapshot = folder / "models--org--name/snapshots/0123"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("0123")
    weights.rename(folder / "blob")
    (snapshot / "open_clip_model.safetensors").symlink_to(folder / "blob")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    tags = {"web": {"hf_hub": "org/name/"}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "small-clip", tags)
    return folder / "blob"


def test_cached_weights_of_a_tag_are_watched(weights, save, images, tmp_path, monkeypatch):
    (tmp_path / "hub").mkdir()
    blob = hub_cache(tmp_path / "hub", monkeypatch, Path(save(weights)))
    options = {"model": "small-clip", "pretrained": "web", "device": "cpu", "workers": 0}
    encoded = encode_images(images(3), tmp_path / "whole", **options)
    assert (encoded.n_rows, encoded.config["weights"]) == (3, "web")

    def change(state):
        blob.write_bytes(blob.read_bytes()[::-1])

    with pytest.raises(InputError, match=r"open_clip_model\.safetensors: changed while it was in"):
        encode_images(images(3), tmp_path / "out", progress=change, batch_size=1, **options)
    assert not list(tmp_path.glob("out/img_emb/*"))


def test_weights_that_are_downloaded_now_are_watched(weights, save, images, tmp_path, monkeypatch):
    """As in `evaluate-pairs`: there were none to watch before."""
    hub, elsewhere = tmp_path / "hub", tmp_path / "elsewhere"
    hub.mkdir()
    blob = hub_cache(hub, monkeypatch, Path(save(weights)))
    hub.rename(elsewhere)
    load = models._from_open_clip

    def download(*arguments):
        elsewhere.rename(hub)
        return load(*arguments)

    def change_and_encode(*arguments, **options):
        blob.write_bytes(blob.read_bytes()[::-1])
        return encode_pairs(*arguments, **options)

    monkeypatch.setattr(models, "_from_open_clip", download)
    monkeypatch.setattr("transclip_fast.cli.pairs.encode_pairs", change_and_encode)
    images(1)
    (tmp_path / "pairs.csv").write_text("image,caption,negative\nimages/cat/000.png,a cat,a dog\n")
    values = {"model": "small-clip", "pretrained": "web", "device": "cpu", "workers": 0}
    values |= {"precision": "fp32", "allow_hub": False, "batch_size": 1}
    with pytest.raises(InputError, match=r"open_clip_model\.safetensors: changed while it was in"):
        load_pairs(
            str(tmp_path / "pairs.csv"), {**values, "features": None, "root": None}, lambda x: x
        )


def test_weights_are_watched_before_they_are_hashed(weights, save, images, tmp_path, monkeypatch):
    options = {"model": "small-clip", "pretrained": save(weights), "device": "cpu", "workers": 0}

    def identify_then_change(*arguments):
        identity = identify(*arguments)
        save({name: -tensor for name, tensor in weights.items()})
        return identity

    monkeypatch.setattr("transclip_fast.encode.models.identify", identify_then_change)
    with pytest.raises(InputError, match="w.safetensors: changed while it was in use"):
        encode_images(images(3), tmp_path / "out", **options)
    assert not list(tmp_path.glob("out/img_emb/*"))


def test_all_files_of_a_checkpoint_are_watched(small, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
    (tmp_path / "part.safetensors").write_bytes(b"x")
    watched = watch_weights("small-clip", str(index))
    watched.check()
    then = os.stat(tmp_path / "part.safetensors")
    (tmp_path / "part.safetensors").write_bytes(b"y")  # as a copy that keeps the time does
    os.utime(tmp_path / "part.safetensors", ns=(then.st_atime_ns, then.st_mtime_ns))
    with pytest.raises(InputError, match="part.safetensors: changed"):
        watched.check()
    assert not watch_weights("small-clip", "none").states


def test_a_folders_configuration_is_watched(small, tmp_path):
    folder = a_folder(tmp_path)
    watched = watch_weights(str(folder), "none")
    watched.check()
    with open(folder / "open_clip_config.json", "a") as file:
        file.write("\n")
    with pytest.raises(InputError, match="open_clip_config.json: changed"):
        watched.check()


@pytest.mark.parametrize(
    ("suffix", "write"),
    [("safetensors", save_file), ("pt", torch.save),
     ("pt", partial(torch.save, _use_new_zipfile_serialization=False))],
)  # fmt: skip
def test_weights_in_a_path_that_is_no_utf8(suffix, write, tmp_path):
    file = tmp_path / os.fsdecode(b"\xff") / f"w.{suffix}"
    file.parent.mkdir()
    write({"a": torch.arange(3)}, tmp_path / "w")
    (tmp_path / "w").rename(file)
    assert read_checkpoint(file)["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("length", [None, 0, 9000])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_weights_that_change_while_they_are_loaded(suffix, length, weights, tmp_path, monkeypatch):
    """Also if they are cut: the system kills a process that reads the map of a file beyond."""
    file, copied = tmp_path / f"w.{suffix}", []
    (save_file if suffix == "safetensors" else torch.save)(weights, file)

    def copy_then_change(tensor):
        copied.append(tensor)
        if len(copied) == 3:
            os.utime(file) if length is None else os.truncate(file, length)
        return unmapped(tensor)

    net = networks.empty_network(network_config("small-clip"))
    watched = WatchedFiles.of([file])
    monkeypatch.setattr(networks, "unmapped", copy_then_change)
    with (
        pytest.raises(InputError, match=f"w.{suffix}: changed while it was in use"),
        watched.in_use(),
    ):
        networks.load_weights(net, read_checkpoint(file), str(file), CPU)
