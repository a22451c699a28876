"""Rows with their patches: read in slices, by index, from memory and from files."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.conftest import unit
from transclip_fast.data.labelled_rows import LabelledRows
from transclip_fast.data.npy_shards import Shard, StoredRows
from transclip_fast.data.patches import PatchedRows, images
from transclip_fast.errors import InputError
from transclip_fast.heads.task import as_fit_arguments

N, L, D = 23, 3, 5


@pytest.fixture
def parts():
    """Unit rows (N, d) and patches (N, L, d) of any length."""
    draw = np.random.default_rng(0)
    rows = unit(draw.normal(size=(N, D))).astype(np.float32)
    return torch.from_numpy(rows), draw.normal(size=(N, L, D)).astype(np.float16)


def in_files(patches, folder):
    """The patches in two .npy files."""
    flat = patches.reshape(N, -1)
    for number, part in enumerate((flat[:9], flat[9:])):
        np.save(folder / f"{number}.npy", part)
    return StoredRows([Shard.find(folder / f"{number}.npy") for number in range(2)])


def expected(rows, patches):
    lengths = np.linalg.norm(patches.astype(np.float64), axis=2, keepdims=True)
    return np.concatenate([rows.numpy()[:, None], patches / lengths], 1)


@pytest.mark.parametrize("kind", ["array", "tensor", "flat", "files"])
def test_what_is_read(kind, parts, tmp_path):
    rows, patches = parts
    given = {
        "array": lambda: patches,
        "tensor": lambda: torch.from_numpy(patches),
        "flat": lambda: patches.reshape(N, -1),
        "files": lambda: in_files(patches, tmp_path),
    }[kind]()
    found, whole = PatchedRows(rows, given, "local_features"), expected(rows, patches)
    assert (len(found), found.number) == (N, L)
    np.testing.assert_allclose(found[:], whole, atol=1e-6)
    assert found[:].dtype == torch.float32
    np.testing.assert_allclose(found[7:11], whole[7:11], atol=1e-6)
    np.testing.assert_allclose(found[20:40], whole[20:], atol=1e-6)
    chosen = torch.tensor([14, 2, 2, 22])
    np.testing.assert_allclose(found[chosen], whole[chosen.numpy()], atol=1e-6)
    some = np.array([3, 21, 8, 0])
    taken = found.take(some)
    assert len(taken) == 4
    np.testing.assert_allclose(taken[:], whole[some], atol=1e-6)
    np.testing.assert_allclose(taken[1:3], whole[some[1:3]], atol=1e-6)
    np.testing.assert_allclose(taken.take(np.array([2, 0]))[:], whole[[8, 3]], atol=1e-6)
    assert torch.equal(images(found[:]), rows)


def test_unit_rows_stay_as_they_are(parts):
    rows, patches = parts
    once = PatchedRows(rows, patches, "x")[:]
    assert torch.equal(PatchedRows(rows, once[:, 1:], "x")[:], once)


def test_by_their_names(parts):
    rows, patches = parts
    patched, labels = PatchedRows(rows, patches, "x")[:], torch.zeros(N, dtype=torch.int64)
    found = as_fit_arguments({"support": LabelledRows(patched, labels)})
    assert found.keys() == {"support_features", "support_labels", "support_local_features"}
    assert torch.equal(found["support_local_features"], patched[:, 1:])
    assert as_fit_arguments({"validation": LabelledRows(rows, labels)}).keys() == {
        "validation_features",
        "validation_labels",
    }
    assert as_fit_arguments({}) == {}


@pytest.mark.parametrize("shape", [(N - 1, L, D), (N, L, D + 1), (N, L * D + 1), (N, 0, D), (N,)])
def test_shapes_that_do_not_fit(shape, parts):
    expected = rf"local_features: expected \({N}, L, {D}\), the patches of {N} rows, got \("
    with pytest.raises(InputError, match=expected):
        PatchedRows(parts[0], np.ones(shape), "local_features")


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_patches_that_cannot_be_used_are_named(value, parts):
    rows, patches = parts
    patches[17, 1] = value
    found = PatchedRows(rows, patches, "local_features")
    _ = found[:17]
    for read in (lambda: found[10:], lambda: found.take(np.array([3, 17]))[:]):
        with pytest.raises(InputError, match="local_features: row 17 has a patch that is zero or"):
            read()


def test_masked_patches_are_refused(parts):
    rows, patches = parts
    masked = np.ma.masked_equal(patches, patches[3, 1, 2])
    with pytest.raises(InputError, match=r"local_features: has masked values \(1\)"):
        PatchedRows(rows, masked, "local_features")
