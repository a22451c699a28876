"""`train-map`: false captions given and made, the file it writes, and what takes that file."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from tests.conftest import unit
from tests.tiny import padded_tokenizer
from transclip_fast.data.pairs import PairFeatures
from transclip_fast.heads.text_map import MapTraining, train_text_map

MODEL = ("--model", "tiny", "--pretrained", "none", "--workers", 0)
ENCODER = {"model": "tiny", "weights": "none"}
SHORT = ("--epochs", 3, "--batch-pairs", 4, "--held-out", 0.4)


@pytest.fixture
def captions(tmp_path, monkeypatch, backbone):
    """A file of 20 captions of 10 images: false ones given, to be swapped, and none."""

    def ordered(texts):  # or the tiny model could not tell a swapped caption
        return (padded_tokenizer(texts) + 3 * torch.arange(40)) % 128

    backbone.tokenizer = ordered
    monkeypatch.setattr("transclip_fast.encode.models.load_backbone", lambda *_, **__: backbone)
    draw = np.random.default_rng(0)
    rows = ["image,caption,negative"]
    for k in range(10):
        pixels = draw.integers(0, 256, (12, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{k}.png")
        rows.append(f"{k}.png,a red hat and a blue dog no {k},")
        rows.append(f"{k}.png,{k} dogs," + ("cats" if k < 7 else ""))
    (tmp_path / "captions.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "captions.csv"


def metadata(file):
    with safe_open(file, "pt") as found:
        return json.loads(found.metadata()["transclip_fast.text_map"])


def test_counts_and_file(captions, succeeds, tmp_path, backbone):
    given = ("train-map", captions, *MODEL, *SHORT, "--out", tmp_path / "map.safetensors")
    run = json.loads(succeeds(*given, "--json"))
    assert (run["n_given"], run["n_swapped"]) == (7, 10)
    assert run["without_negative"] == [[15, "7 dogs"], [17, "8 dogs"], [19, "9 dogs"]]
    assert (run["n_trained"], run["n_held_out"], run["n_failed"]) == (12, 8, 0)
    about = metadata(tmp_path / "map.safetensors")
    assert about["encoder"] == ENCODER
    assert {key: run[key] for key in ("epoch", "accuracy", "loss", "training")} == {
        key: about[key] for key in ("epoch", "accuracy", "loss", "training")
    }
    assert run["training"] == {
        "epochs": 3, "batch_size": 4, "logit_scale": 100, "held_out": 0.4, "seed": 0
    }  # fmt: skip
    before = (tmp_path / "map.safetensors").read_bytes()
    text = succeeds(*given)
    assert (tmp_path / "map.safetensors").read_bytes() == before
    for line in (
        "7 false captions of the file, 10 made by swapping attributes",
        "3 captions without one, such as\n  row 15: 7 dogs\n",
        "trained on 12 pairs; 8 held out",
    ):
        assert line in text


def test_logit_scale_of_the_model(captions, succeeds, tmp_path, backbone):
    backbone.model.logit_scale = torch.nn.Parameter(torch.tensor(2.5))
    given = ("train-map", captions, *MODEL, *SHORT, "--out", tmp_path / "map.safetensors", "--json")
    scale = json.loads(succeeds(*given))["training"]["logit_scale"]
    assert scale == pytest.approx(np.exp(2.5))
    scale = json.loads(succeeds(*given, "--logit-scale", 7))["training"]["logit_scale"]
    assert scale == 7


def test_attributes_of_ones_own(captions, succeeds, tmp_path):
    (tmp_path / "words.txt").write_text("hat\ndog\n")
    given = ("--attributes", tmp_path / "words.txt", "--out", tmp_path / "map.safetensors")
    run = json.loads(succeeds("train-map", captions, *MODEL, *SHORT, *given, "--json"))
    assert (run["n_given"], run["n_swapped"]) == (7, 10)
    (tmp_path / "words.txt").write_text("hat\n")
    run = json.loads(succeeds("train-map", captions, *MODEL, *SHORT, *given, "--json"))
    assert (run["n_swapped"], len(run["without_negative"])) == (0, 13)


@pytest.fixture
def bound():
    """Features whose captions have a part of the image turned, which a map can turn back."""
    draw = np.random.default_rng(0)
    things, binding = draw.normal(size=(2, 400, 6))
    turned = np.roll(binding, 1, axis=1)
    rows = [np.concatenate([things, x], 1) for x in (binding, turned, -turned)]
    names = ("image_features", "caption_features", "negative_features")
    return {name: unit(x).astype(np.float32) for name, x in zip(names, rows, strict=True)}


def test_a_map_of_features_and_what_it_does(bound, save, succeeds, tmp_path):
    parts = [
        save({name: x[rows] for name, x in bound.items()}, f"{rows.start}.npz")
        for rows in (slice(0, 300), slice(300, 400))
    ]
    out = tmp_path / "map.safetensors"
    given = ("--epochs", 60, "--batch-pairs", 16, "--logit-scale", 20, "--seed", 3)
    run = json.loads(succeeds("train-map", parts[0], *given, "--out", out, "--json"))
    assert run["accuracy"] > 90 > run["identity_accuracy"]
    with safe_open(out, "pt") as found:
        weight = found.get_tensor("weight")
    training = MapTraining(epochs=60, batch_size=16, logit_scale=20, seed=3)
    expected = train_text_map(PairFeatures.of(*(x[:300] for x in bound.values())), training)
    assert torch.equal(weight, expected.weight)

    def accuracy(*options):
        return json.loads(succeeds("evaluate-pairs", parts[1], *options, "--json"))["accuracy"]

    assert accuracy("--text-map", out) > 90 > accuracy() + 20


def test_the_map_of_another_model_is_refused(captions, folder, succeeds, refused, tmp_path):
    out = tmp_path / "map.safetensors"
    succeeds("train-map", captions, *MODEL, *SHORT, "--out", out)
    given = ("--text-map", out, "--out", tmp_path / "result")
    message = refused("solve", folder, *given)
    assert "map.safetensors: was trained on texts of tiny (none), these are of m (w)" in message


def test_a_place_that_cannot_be_written_is_refused_before_images_are_encoded(
    captions, backbone, refused, monkeypatch
):
    monkeypatch.setattr(backbone.model, "encode_image", lambda _: pytest.fail("encoded"))
    out = "/proc/map.safetensors"
    assert "cannot be written" in refused("train-map", captions, *MODEL, "--out", out)


def test_bad_input(captions, bound, save, refused, tmp_path):
    out = tmp_path / "map.safetensors"
    assert "ends in .safetensors" in refused("train-map", captions, *MODEL, "--out", tmp_path / "m")
    out.write_bytes(b"a head")
    message = refused("train-map", captions, *MODEL, "--out", out)
    assert "map.safetensors: is there and is no trained map" in message
    out.unlink()
    (tmp_path / "words.txt").write_text("\n")
    message = refused("train-map", captions, "--attributes", tmp_path / "words.txt", "--out", out)
    assert "words.txt: holds no line" in message
    captions.write_text("image,caption\n0.png,dogs\n1.png,cats\n")
    message = refused("train-map", captions, *MODEL, "--out", out)
    assert "no row has a negative, nor two attributes to swap" in message
    captions.write_text("image,caption,negative\n0.png,dogs,cats\n1.png,cats,cats\n")
    message = refused("train-map", captions, *MODEL, "--out", out)
    assert "captions.csv: row 1: its negative is its caption" in message
    one = save({name: x[:1] for name, x in bound.items()}, "one.npz")
    assert "one.npz: are of one image" in refused("train-map", one, "--out", out)
