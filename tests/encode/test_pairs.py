"""Pairs of captions: how their files are read, and the features of their images and texts."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.conftest import unit
from tests.tiny import padded_tokenizer, preprocess
from transclip_fast.encode.pairs import encode_pairs, read_pairs
from transclip_fast.encode.text import PROMPTS_PER_BATCH
from transclip_fast.errors import InputError

ARO = {
    "image_id": "1",
    "image_path": "a.png",
    "bbox_x": 2,
    "bbox_y": 1,
    "bbox_w": 5,
    "bbox_h": 9,
    "true_caption": "the red hat and the blue dog",
    "false_caption": "the blue hat and the red dog",
}
SHORT = {"image": "a.png", "caption": "one", "negative": "two"}


def written(folder, rows, kind="json"):
    """A file of these rows."""
    path = folder / f"pairs.{kind}"
    if kind == "json":
        path.write_text(json.dumps(rows))
        return path
    table = pa.Table.from_pylist(rows)
    if kind == "parquet":
        pq.write_table(table, path)
        return path
    lines = [table.column_names, *(row.values() for row in table.to_pylist())]
    text = ["" if value is None else f'"{value}"' for line in lines for value in line]
    width = len(table.column_names)
    parts = [",".join(text[start : start + width]) for start in range(0, len(text), width)]
    path.write_text("\n".join(parts) + "\n")
    return path


@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
@pytest.mark.parametrize("relation", [None, "on"])
def test_files_as_aro_publishes_them(kind, relation, tmp_path):
    grouped = {"attributes": ["red", "blue"]} if kind != "csv" else {"attributes": "red_blue"}
    if relation:
        grouped["relation_name"] = relation
    other = ARO | {"bbox_x": 0.5, "bbox_y": 1.5, "bbox_w": 2.0, "bbox_h": 2.4}
    pairs = read_pairs(written(tmp_path, [ARO | grouped, other | grouped], kind))
    assert pairs.images == ["a.png"] * 2
    assert pairs.captions == [ARO["true_caption"]] * 2
    assert pairs.negatives == [ARO["false_caption"]] * 2
    assert pairs.groups == [relation or "red_blue"] * 2
    assert pairs.grouped_by == ("relation_name" if relation else "attributes")
    picture = Image.new("RGB", (20, 20))
    assert pairs.boxes[0] == (2, 1, 7, 10)
    left, top, right, bottom = pairs.boxes[1]
    assert (right - left, bottom - top) == picture.crop((0.5, 1.5, 2.5, 3.9)).size


@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
def test_short_names_and_what_may_be_missing(kind, tmp_path):
    rows = [SHORT | {"group": 3}, {**SHORT, "negative": None, "group": 4}]
    pairs = read_pairs(written(tmp_path, rows, kind))
    assert (pairs.captions, pairs.negatives) == (["one", "one"], ["two", None])
    assert (pairs.groups, pairs.grouped_by, pairs.boxes) == (["3", "4"], "group", [None, None])
    plain = read_pairs(written(tmp_path, [{"image": "a.png", "caption": "one"}], kind))
    assert (plain.negatives, plain.groups, plain.grouped_by) == ([None], None, None)


BAD = [
    ({"caption": None}, "row 1 has no caption, but None"),
    ({"caption": " "}, "row 1 has no caption, but ' '"),
    ({"caption": 5}, "row 1 has no caption, but 5"),
    ({"image": ""}, "row 1 has no image, but ''"),
    ({"negative": ["x"]}, r"row 1 has no negative, but \['x'\]"),
    ({"group": ""}, "row 1 has no group, as others have"),
    ({"bbox_w": None}, r"row 1: its box is \[1, 1, None, 4\]; expected x, y, width and height"),
    ({"bbox_w": "wide"}, "row 1: its box is .*'wide'"),
    ({"bbox_h": float("inf")}, "row 1: its box is .*inf"),
    ({"bbox_x": float("nan")}, "row 1: its box is .*nan"),
    ({"bbox_w": 0}, r"row 1: its box \[1, 1, 0, 4\] holds no pixel"),
    ({"bbox_h": -3}, "row 1: its box .* holds no pixel"),
    ({"bbox_w": 0.2}, "row 1: its box .* holds no pixel"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_rows(change, message, tmp_path):
    good = SHORT | {"group": "g", "bbox_x": 1, "bbox_y": 1, "bbox_w": 3, "bbox_h": 4}
    path = written(tmp_path, [good, good | change])
    with pytest.raises(InputError, match=rf"pairs\.json: {message}"):
        read_pairs(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("pairs.txt", "a.png", "expected a .json, .csv or .parquet file of pairs"),
        ("pairs.json", "{}", "expected a list of objects"),
        ("pairs.json", "[]", "has no column 'image', or 'image_path'"),
        ("pairs.json", "[[1]]", "row 0 is no object"),
        ("pairs.json", '[{"image": "a", "image": "b"}]', "'image' is there twice"),
        ("pairs.json", "[", "is not JSON"),
        ("pairs.json", '[{"image": "a.png"}]', "has no column 'caption', or 'true_caption'"),
        ("pairs.csv", "caption\nx\n", "has no column 'image', or 'image_path'"),
        ("pairs.csv", "image,caption\n", "holds no pairs"),
        ("pairs.csv", "image,caption\na.png,a dog, white\n", "line 2 has 3 values"),
        ("pairs.csv", "image,caption,bbox_x\na,b,1\n", "has a part of the columns bbox_x, bbox_y"),
        ("pairs.csv", "image,Captions,CAPTION\na,b,c\n", "has several columns 'caption'"),
    ],
)
def test_bad_files(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_pairs(tmp_path / name)


@pytest.fixture
def photos(tmp_path):
    """Three images of noise in a folder of their own."""
    draw = np.random.default_rng(0)
    for name in "abc":
        file = tmp_path / "photos" / f"{name}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (30, 41, 3), dtype=np.uint8)).save(file)
    return tmp_path


@pytest.fixture
def backbone(backbone):
    backbone.tokenizer = padded_tokenizer
    return backbone


def image_truth(backbone, picture):
    return unit(
        preprocess(picture).flatten().double().numpy()[None] @ weights(backbone.model.image)
    )


def weights(parameter):
    return parameter.detach().double().numpy()


def text_truth(backbone, text):
    return unit(weights(backbone.model.text)[padded_tokenizer([text])[0].numpy()].sum(0)[None])


BOX = {"bbox_x": 3, "bbox_y": 4, "bbox_w": 17, "bbox_h": 9}


def test_features_are_those_of_boxes_and_captions(photos, backbone):
    rows = [
        SHORT,
        SHORT | {"caption": "three", "negative": None, **BOX},
        SHORT | {"image": "b.png", "negative": "four", "caption": "two"},
        SHORT | {"image": "c.png", "negative": "one", **BOX},
    ]
    pairs = read_pairs(written(photos, [row | {"group": k} for k, row in enumerate(rows)]))
    found = encode_pairs(pairs, backbone, photos / "features")
    assert (found.failures, found.n_failed) == ([], 0)
    assert found.features.groups == ["0", "1", "2", "3"]
    assert found.features.has_negative.tolist() == [True, False, True, True]
    for k, row in enumerate(rows):
        picture = Image.open(photos / "photos" / row["image"])
        if "bbox_x" in row:
            picture = picture.crop((3, 4, 20, 13))
        np.testing.assert_allclose(
            found.features.images[k : k + 1], image_truth(backbone, picture), atol=1e-3
        )
        for kind, name in (("captions", "caption"), ("negatives", "negative")):
            rows_found = getattr(found.features, kind)[k : k + 1]
            expected = np.zeros((1, 5)) if row[name] is None else text_truth(backbone, row[name])
            np.testing.assert_allclose(rows_found, expected, atol=1e-6)


def test_images_that_fail_are_named_and_their_pairs_left_out(photos, backbone):
    (photos / "photos/b.png").write_bytes(b"no image")
    wide = {"bbox_x": 0, "bbox_y": 0, "bbox_w": 400, "bbox_h": 30}
    rows = [SHORT, SHORT | {"image": "b.png"}, SHORT | {"image": "none.png"}, SHORT | wide]
    rows += [SHORT | {"image": "b.png", "caption": "last"}, SHORT | {"caption": "kept"}]
    pairs = read_pairs(written(photos, [row | {"group": k} for k, row in enumerate(rows)]))
    found = encode_pairs(pairs, backbone, photos / "features")
    assert [f.key for f in found.failures] == ["b.png", "none.png", "a.png#xywh=0,0,400,30"]
    assert "mostly outside of its 41 x 30 pixels" in found.failures[2].reason
    assert found.n_failed == 4
    assert found.features.groups == ["0", "5"]
    np.testing.assert_allclose(found.features.captions[1:], text_truth(backbone, "kept"), atol=1e-6)


def test_equal_texts_have_equal_features(photos, backbone):
    """At whatever place of a batch they stand."""
    rows = [SHORT | {"caption": f"caption {k}", "negative": "the same"} for k in range(40)]
    rows += [SHORT | {"caption": "the same", "negative": "the same"}]
    features = encode_pairs(
        read_pairs(written(photos, rows)), backbone, photos / "features"
    ).features
    assert torch.equal(features.captions[40], features.negatives[0])
    assert features.margins()[40] == 0
    assert len(rows) < PROMPTS_PER_BATCH


def test_a_second_file_keeps_the_images_that_are_there(photos, backbone, monkeypatch):
    encode_pairs(read_pairs(written(photos, [SHORT])), backbone, photos / "features")
    monkeypatch.setattr(backbone.model, "encode_image", lambda _: pytest.fail("encoded again"))
    pairs = read_pairs(written(photos, [SHORT | {"caption": "another"}] * 2))
    assert len(encode_pairs(pairs, backbone, photos / "features").features) == 2


def test_no_path_leads_out_of_the_root(photos, backbone):
    outside = [SHORT, SHORT | {"image": "../../secret.png"}]
    pairs = read_pairs(written(photos, outside))
    with pytest.raises(InputError, match="leads out of"):
        encode_pairs(pairs, backbone, photos / "features")


def test_no_image_at_all(photos, backbone):
    pairs = read_pairs(written(photos, [SHORT | {"image": "x.png"}]))
    with pytest.raises(InputError, match="neither .* has x.png; name the folder with --root"):
        encode_pairs(pairs, backbone, photos / "features")
    (photos / "photos/x.png").write_bytes(b"")
    with pytest.raises(InputError, match="none of its images could be read, the first because"):
        encode_pairs(pairs, backbone, photos / "features")
