"""Linear maps of embeddings, against numpy and from files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import unit
from transclip_fast import InputError
from transclip_fast.store.features import load_features
from transclip_fast.store.linear_maps import (
    check_map_file,
    linear_map,
    map_features,
    read_map,
    save_map,
)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("bias", [False, True])
def test_against_numpy(problem, dtype, bias):
    rows, _, _ = problem(n=20)
    draw = np.random.default_rng(0)
    given = [a.astype(dtype) for a in (rows, draw.normal(size=(8, 33)), draw.normal(size=8))]
    for array in given:
        array.setflags(write=False)
    x, a, b = (array.astype(float) for array in given)
    found = linear_map(*given[: 2 + bias])
    np.testing.assert_allclose(found, unit(x @ a.T + (b if bias else 0)), atol=1e-7)
    assert found.dtype == torch.float32


def test_a_layer_of_torch(problem):
    rows, _, _ = problem(n=20)
    layer = torch.nn.Linear(33, 33)
    with torch.no_grad():
        expected = torch.nn.functional.normalize(layer(torch.from_numpy(rows)), dim=1)
    found = linear_map(rows, layer.weight, layer.bias)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("weight", "bias", "expected"),
    [
        (np.eye(5), None, "weight: has 5 columns, expected 33, those of rows"),
        (np.eye(33), np.ones(5), "weight: bias: has 5 columns, expected 33"),
        (np.full((33, 33), np.nan), None, "weight: row 0 contains NaN"),
        (np.zeros((33, 33)), None, "weight: maps row 0 of rows to no direction"),
        (np.ones(33), None, "weight: expected a non-empty"),
    ],
)
def test_maps_that_do_not_fit(weight, bias, expected, problem):
    with pytest.raises(InputError, match=expected):
        linear_map(problem()[0], weight, bias)


def saved(folder, content, name="map.pt"):
    torch.save(content, folder / name)
    return str(folder / name)


@pytest.fixture
def stored(problem, tmp_path):
    """A problem with shots and validation rows, as loaded from a file."""
    features, prototypes, labels = problem()
    np.savez(
        tmp_path / "features.npz",
        image_features=features[:50],
        text_features=prototypes,
        support_features=features[50:70],
        support_labels=labels[50:70],
        validation_features=features[70:],
        validation_labels=labels[70:],
    )
    return load_features(tmp_path / "features.npz")


@pytest.mark.parametrize("layout", ["matrix", "layer", "nested"])
def test_from_files(layout, stored, tmp_path):
    before = {name: np.array(array) for name, array in stored.arrays.items()}
    layer = torch.nn.Linear(33, 33, bias=layout != "matrix")
    content = {"matrix": layer.weight, "layer": layer.state_dict()}.get(
        layout, {f"module.map.{name}": array for name, array in layer.state_dict().items()}
    )
    map_features(stored, text=saved(tmp_path, content))
    expected = linear_map(before["text_features"], layer.weight, layer.bias)
    np.testing.assert_array_equal(stored.get("text_features"), expected)
    np.testing.assert_array_equal(stored.get("image_features"), before["image_features"])
    assert stored.maps.keys() == {"text_map"}
    map_features(stored, text=None, image=saved(tmp_path, content))
    for kind in ("image", "support", "validation"):
        expected = linear_map(before[f"{kind}_features"], layer.weight, layer.bias)
        np.testing.assert_array_equal(stored.get(f"{kind}_features"), expected)


def test_texts_of_several_templates(stored, tmp_path):
    layer, texts = torch.nn.Linear(33, 9), np.array(stored.get("text_features"))
    stored.arrays["text_features"] = np.stack([texts, texts[::-1]])
    map_features(stored, text=saved(tmp_path, layer.state_dict()))
    expected = linear_map(texts, layer.weight, layer.bias)
    np.testing.assert_array_equal(stored.get("text_features"), [expected, expected.flip(0)])


def test_files_that_are_no_map(stored, tmp_path):
    two = saved(tmp_path, {"a": torch.eye(33), "b": torch.eye(33)})
    with pytest.raises(InputError, match=r"map\.pt: has no array 'weight', only a, b"):
        map_features(stored, text=two)
    narrow = saved(tmp_path, torch.eye(5))
    with pytest.raises(InputError, match=r"map\.pt: has 5 columns, expected 33, those of .*text"):
        map_features(stored, text=narrow)
    del stored.arrays["text_features"]
    with pytest.raises(InputError, match=r"map\.pt: there are no text features to map"):
        map_features(stored, text=narrow)


ENCODER = {"model": "ViT-B-32", "weights": "openai", "quick_gelu": True}


@pytest.mark.parametrize("encoder", [None, ENCODER])
def test_a_trained_map_is_for_its_model(encoder, tmp_path):
    path, weight = tmp_path / "map.safetensors", torch.arange(6.0).reshape(2, 3)
    save_map(path, torch.zeros(1, 1), {"encoder": ENCODER})
    save_map(path, weight, {"encoder": encoder})  # replaces an earlier one
    for given in (None, ENCODER):
        found, bias = read_map(path, given)
        assert torch.equal(found, weight)
        assert bias is None
    other = {**ENCODER, "weights": "laion2b_s34b_b79k"}
    if encoder is None:  # of features of which no model is known
        assert torch.equal(read_map(path, other)[0], weight)
        return
    expected = (
        r"was trained on texts of ViT-B-32 \(openai, QuickGELU\), these are of ViT-B-32 \(laion"
    )
    with pytest.raises(InputError, match=expected):
        read_map(path, other)


def test_metadata_take_no_tensors_into_memory(tmp_path, monkeypatch):
    save_map(tmp_path / "map.safetensors", torch.eye(3), {"encoder": ENCODER})
    monkeypatch.setattr(torch, "empty", None)
    check_map_file(tmp_path / "map.safetensors")


@pytest.mark.parametrize("about", ["[]", "{", '{"encoder": 5}'])
def test_damaged_metadata(about, tmp_path):
    path = tmp_path / "map.safetensors"
    save_file({"weight": torch.eye(3)}, path, {"transclip_fast.text_map": about})
    with pytest.raises(InputError, match=r"map\.safetensors: damaged or truncated"):
        read_map(path)
    with pytest.raises(InputError, match="is there and is no trained map"):
        save_map(path, torch.eye(3), {"encoder": None})
