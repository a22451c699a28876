"""`evaluate-pairs`: files of pairs and of features, groups, ties, maps, and bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from tests.conftest import unit
from tests.tiny import padded_tokenizer, preprocess
from transclip_fast.cli.pairs import text_lines

CAPTIONS = ["a red hat", "a blue hat", "two dogs", "A dog", "nothing at all"]
GROUPS = ("in", "on", "by")
MODEL = ("--model", "tiny", "--pretrained", "none", "--workers", 0)


@pytest.fixture
def pairs(tmp_path, monkeypatch, backbone):
    """A file of 60 pairs of 12 images with boxes, and the numbers that a tiny model gives."""
    backbone.tokenizer = padded_tokenizer
    monkeypatch.setattr("transclip_fast.encode.models.load_backbone", lambda *_, **__: backbone)
    draw = np.random.default_rng(1)
    (tmp_path / "photos").mkdir()
    entries, margins = [], []
    image, text = (x.detach().double().numpy() for x in (backbone.model.image, backbone.model.text))
    for k in range(12):
        picture = Image.fromarray(draw.integers(0, 256, (30, 41, 3), dtype=np.uint8))
        picture.save(tmp_path / "photos" / f"{k}.png")
        for _ in range(5):
            true, false = draw.choice(len(CAPTIONS), 2)
            x, y, w, h = (int(draw.integers(*ends)) for ends in ((20,), (20,), (1, 21), (1, 10)))
            entries.append(
                {"image_path": f"{k}.png", "true_caption": CAPTIONS[true],
                 "false_caption": CAPTIONS[false], "relation_name": GROUPS[k % 3],
                 "bbox_x": x, "bbox_y": y, "bbox_w": w, "bbox_h": h}
            )  # fmt: skip
            cut = preprocess(picture.crop((x, y, x + w, y + h))).flatten().double().numpy()
            texts = np.stack(
                [text[padded_tokenizer([CAPTIONS[i]])[0].numpy()].sum(0) for i in (true, false)]
            )
            true_cosine, false_cosine = unit(texts) @ unit((cut @ image)[None])[0]
            margins.append(0.0 if true == false else true_cosine - false_cosine)
    (tmp_path / "pairs.json").write_text(json.dumps(entries))
    margins = np.array(margins)
    assert np.abs(margins[margins != 0]).min() > 1e-4  # features are in float16
    return tmp_path / "pairs.json", margins, np.array([entry["relation_name"] for entry in entries])


def test_accuracies_are_those_of_numpy(pairs, succeeds, tmp_path):
    file, margins, groups = pairs
    (tmp_path / "symmetric.txt").write_text("by\n\n")
    given = ("--leave-out", tmp_path / "symmetric.txt", "--features", tmp_path / "features")
    out = json.loads(succeeds("evaluate-pairs", file, *MODEL, *given, "--json"))
    right = margins > 0
    assert out["accuracy"] == pytest.approx(100 * right.mean(), abs=1e-4)
    assert (out["n_pairs"], out["n_ties"], out["n_failed"]) == (60, int((margins == 0).sum()), 0)
    assert out["n_ties"] > 3
    expected = np.mean([100 * right[groups == name].mean() for name in ("in", "on")])
    assert out["group_accuracy"] == pytest.approx(expected, abs=1e-4)
    assert out["left_out"] == [["by", 20]]
    text = succeeds("evaluate-pairs", file, *MODEL, *given)
    assert f"accuracy {100 * right.mean():.2f} % of 60 pairs, {out['n_ties']} ties" in text
    assert f"mean over 2 groups {expected:.2f} %, 1 group (20 pairs) left out" in text


def test_images_that_fail(pairs, cli, tmp_path):
    file, margins, _ = pairs
    (tmp_path / "photos/0.png").write_bytes(b"damaged")
    out = json.loads(cli("evaluate-pairs", file, *MODEL, "--json").out)
    assert (out["n_pairs"], out["n_failed"]) == (55, 5)
    assert out["accuracy"] == pytest.approx(100 * (margins[5:] > 0).mean(), abs=1e-4)
    assert {key.split("#")[0] for key, _ in out["failures"]} == {"0.png"}
    assert (
        "5 pairs left out, as images could not be read" in cli("evaluate-pairs", file, *MODEL).out
    )


@pytest.fixture
def arrays():
    draw = np.random.default_rng(0)
    names = ("image_features", "caption_features", "negative_features")
    return {name: unit(draw.normal(size=(50, 6))).astype(np.float32) for name in names}


def accuracy(images, true, false):
    true, false = ((images * unit(x)).sum(1) for x in (true, false))
    return 100 * (true > false).mean()


def test_features_and_a_map(arrays, save, succeeds, tmp_path):
    file = save(arrays | {"groups": np.repeat(["a", "b"], 25)}, "pairs.npz")
    out = json.loads(succeeds("evaluate-pairs", file, "--min-pairs", 26, "--json"))
    assert out["accuracy"] == pytest.approx(accuracy(*arrays.values()), abs=1e-4)
    assert (out["group_accuracy"], out["left_out"]) == (None, [["a", 25], ["b", 25]])
    assert "no group counts" in succeeds("evaluate-pairs", file, "--min-pairs", 26)
    weight = np.random.default_rng(1).normal(size=(6, 6))
    np.save(tmp_path / "map.npy", weight)
    out = json.loads(succeeds("evaluate-pairs", file, "--text-map", tmp_path / "map.npy", "--json"))
    images, true, false = arrays.values()
    expected = accuracy(images, true @ weight.T, false @ weight.T)
    assert out["accuracy"] == pytest.approx(expected, abs=1e-4)
    assert expected != accuracy(*arrays.values())


def test_bad_input(pairs, arrays, save, refused, tmp_path):
    file, _, _ = pairs
    assert "lists images, so give --model" in refused("evaluate-pairs", file)
    entries = json.loads(file.read_text())
    entries[7].pop("false_caption")
    file.write_text(json.dumps(entries))
    assert "pairs.json: row 7 has no negative" in refused("evaluate-pairs", file, *MODEL)
    features = save(arrays, "f.npz")
    np.save(tmp_path / "wide.npy", np.eye(7, 6))
    for name, expected in (("wide", "maps to 7 columns, expected 6"), ("none", "no such file")):
        given = ("--text-map", tmp_path / f"{name}.npy")
        assert expected in refused("evaluate-pairs", features, *given)
    assert "none.txt: no such file" in refused(
        "evaluate-pairs", features, "--leave-out", tmp_path / "none.txt"
    )
    message = refused("evaluate-pairs", save({"image_features": np.eye(3)}, "g.npz"))
    assert "g.npz: has no array 'caption_features', only image_features" in message
    arrays["negative_features"] = arrays["negative_features"][1:]
    message = refused("evaluate-pairs", save(arrays, "h.npz"))
    assert "h.npz: negative_features: has 49 rows, expected 50" in message


def test_names_that_are_no_group(arrays, save, cli, tmp_path):
    file = save(arrays | {"groups": np.repeat(["a", "b"], 25)}, "pairs.npz")
    (tmp_path / "names.txt").write_text("a\nc\n")
    ran = cli("evaluate-pairs", file, "--leave-out", tmp_path / "names.txt")
    assert ran.code == 0
    assert "names.txt: 1 of 2 names are no group of" in ran.err


def test_lines_end_at_newlines_alone(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("\ufeffin\u2028on\r\nby\x0cor\n\n in\u2028on\n", encoding="utf-8")
    assert text_lines(str(file)) == ["in\u2028on", "by\x0cor"]


def test_groups_of_a_file_of_features(save, succeeds, refused, tmp_path):
    """Bytes, as of numpy's S, are the texts that --leave-out has."""
    rows = {
        f"{use}_features": unit(np.random.default_rng(k).normal(size=(6, 4)))
        for k, use in enumerate(("image", "caption", "negative"))
    }
    groups = np.array(["in", "on", "by"] * 2)
    (tmp_path / "left.txt").write_text("by\n")
    for kind in ("U", "S"):
        file = save(rows | {"groups": groups.astype(kind)})
        out = succeeds("evaluate-pairs", file, "--leave-out", tmp_path / "left.txt", "--json")
        assert {name for name, *_ in json.loads(out)["per_group"]} == {"in", "on"}
    message = refused("evaluate-pairs", save(rows | {"groups": groups[:, None]}))
    assert "groups: expected one a row, got shape (6, 1)" in message
