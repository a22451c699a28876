"""Feature folders in clip-retrieval's layout, and the hash of features."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.conftest import unit
from transclip_fast import TransCLIP
from transclip_fast.errors import InputError
from transclip_fast.store import arrays
from transclip_fast.store.arrays import array_sha256
from transclip_fast.store.features import load_features

ROWS = [2, 1, 3, 1, 1, 1, 1, 1, 1, 1, 2, 1]  # of twelve shards: 10 comes after 9, not after 1
FEATURES = np.random.default_rng(0).normal(size=(sum(ROWS), 4)).astype(np.float16)


@pytest.fixture
def folder(tmp_path):
    """What clip-retrieval writes, with captions in text_emb, and prototypes beside them."""
    folder = tmp_path / "features"
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    paths = [f"cat {row}.jpg" for row in range(len(FEATURES))]
    start = 0
    for number, rows in enumerate(ROWS):
        stop = start + rows
        np.save(folder / f"img_emb/img_emb_{number}.npy", FEATURES[start:stop])
        np.save(folder / f"text_emb/text_emb_{number}.npy", -FEATURES[start:stop])
        table = pa.table({"caption": ["a cat"] * rows, "image_path": paths[start:stop]})
        pq.write_table(table, folder / f"metadata/metadata_{number}.parquet")
        start = stop
    (folder / "img_emb" / "notes.npy").write_bytes(b"")
    np.save(folder / "prototypes.npy", FEATURES[:3])
    return folder


def metadata(folder, number, **columns):
    pq.write_table(pa.table(columns), folder / f"metadata/metadata_{number}.parquet")


def test_clip_retrieval_s_own_folder(folder):
    features = load_features(folder)
    np.testing.assert_array_equal(features.get("image_features"), FEATURES)
    np.testing.assert_array_equal(features.get("text_features"), FEATURES[:3])
    assert features.keys == [f"cat {row}.jpg" for row in range(len(FEATURES))]
    assert features.get("labels") is features.source_rows is features.class_names is None


def test_captions_are_never_prototypes(folder):
    (folder / "prototypes.npy").unlink()
    assert load_features(folder).get("text_features") is None


def test_all_columns(folder):
    (folder / "manifest.json").write_text(json.dumps({"class_names": ["ç", "b", "c"]}))
    start = 0
    for number, rows in enumerate(ROWS):
        ids = np.arange(start, start + rows)
        # int32 in one shard and int64 in the next, as readers of csv files produce
        dtype = np.int32 if number % 2 else np.int64
        metadata(folder, number, source_row=2 * ids, key=ids.astype(str), label=ids.astype(dtype))
        start += rows
    features = load_features(folder)
    np.testing.assert_array_equal(features.source_rows, 2 * np.arange(start))
    np.testing.assert_array_equal(features.get("labels"), np.arange(start))
    assert features.keys == [str(row) for row in range(start)]
    assert features.class_names == ["ç", "b", "c"]


@pytest.mark.parametrize("column", ["label", "labels", " Label"])
def test_labels_of_some_rows(folder, column):
    expected = []
    for number, rows in enumerate(ROWS):
        metadata(folder, number, **{column: pa.array([None] + [1] * (rows - 1), pa.int64())})
        expected += [np.nan] + [1] * (rows - 1)
    np.testing.assert_array_equal(load_features(folder).get("labels"), expected)


def test_labels_that_are_decimals(folder):
    for number, rows in enumerate(ROWS):
        metadata(folder, number, label=[Decimal("2.0")] + [None] * (rows - 1))
    expected = np.concatenate([[2] + [np.nan] * (rows - 1) for rows in ROWS])
    np.testing.assert_array_equal(load_features(folder).get("labels"), expected)


@pytest.mark.parametrize("kind", [pa.string(), pa.dictionary(pa.int8(), pa.string())])
def test_labels_that_are_names(kind, folder):
    """Also categories of pandas, of which a missing one has the code -1."""
    for number, rows in enumerate(ROWS):
        metadata(folder, number, label=pa.array(["dog"] + [None] * (rows - 1), kind))
    features = load_features(folder)
    with pytest.raises(InputError, match="labels: row 0: label 'dog' is no position"):
        features.get("labels")
    features.class_names = ["cat", "Dog"]
    expected = np.concatenate([[1] + [-1] * (rows - 1) for rows in ROWS])
    np.testing.assert_array_equal(features.get("labels"), expected)


def test_a_mask_with_gaps_is_no_labels(folder):
    for number, rows in enumerate(ROWS):
        metadata(folder, number, label=[True] + [None] * (rows - 1))
    with pytest.raises(InputError, match="metadata: label: is a mask of true and false"):
        load_features(folder)


def test_labels_of_no_row(folder):
    for number, rows in enumerate(ROWS):
        metadata(folder, number, label=pa.nulls(rows, pa.int64()))
    assert load_features(folder).get("labels") is None


def test_a_shard_without_rows(folder):
    np.save(folder / "img_emb/img_emb_12.npy", FEATURES[:0])
    metadata(folder, 12, image_path=pa.array([], pa.string()))
    assert len(load_features(folder).keys) == len(FEATURES)


def test_a_missing_shard_is_named(folder):
    for kind in ("img_emb", "text_emb", "metadata"):
        next((folder / kind).glob(f"{kind}_5.*")).unlink()
    with pytest.warns(UserWarning, match="has no shard 5 of 0 to 11; rows of shards"):
        assert len(load_features(folder).keys) == len(FEATURES) - ROWS[5]


def test_a_huge_shard_number_takes_no_memory(folder):
    for kind in ("img_emb", "text_emb", "metadata"):
        file = next((folder / kind).glob(f"{kind}_11.*"))
        file.rename(file.with_name(f"{kind}_{10**15}{file.suffix}"))
    with pytest.warns(UserWarning, match=f"has no shard 11 of 0 to {10**15}; rows of shards"):
        assert len(load_features(folder).keys) == len(FEATURES)


def test_misspelt_arrays_are_named(tmp_path):
    file = tmp_path / "features.npz"
    arrays = {"image_features": FEATURES, "support_feature": FEATURES, "Support_label": [0]}
    np.savez(file, **arrays, official_assignments=FEATURES)
    message = r"support_feature \(is it support_features\?\), Support_label \(is it support_labels"
    with pytest.warns(UserWarning, match="not read: " + message) as found:
        load_features(file)
    assert "official" not in str(found[0].message)


def test_tables_are_read_without_threads_of_pyarrow(folder):
    """A process that ends while such threads start is aborted by the C++ library."""
    code = (
        "import sys, os, transclip_fast.store.features as f\n"
        "def threads():\n"
        "    ids = os.listdir('/proc/self/task')\n"
        "    names = [open(f'/proc/self/task/{x}/comm').read() for x in ids]\n"
        "    return [name for name in names if 'jemalloc' not in name]\n"
        "before = threads()\n"
        "f.load_features(sys.argv[1])\n"
        "sys.exit(len(threads()) - len(before))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(folder)], check=False).returncode == 0


def test_single_arrays_replaced(folder, tmp_path):
    (tmp_path / "names.txt").write_text("x\ny\nz\n")
    np.save(tmp_path / "text.npy", FEATURES[:5])
    features = load_features(
        folder,
        {"text_features": tmp_path / "text.npy", "class_names": tmp_path / "names.txt"},
    )
    np.testing.assert_array_equal(features.get("text_features"), FEATURES[:5])
    assert features.class_names == ["x", "y", "z"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-20])


SPOILT = {
    "no shards": (lambda f: [p.unlink() for p in f.glob("img_emb/*")], "has no img_emb"),
    "shard missing": (lambda f: (f / "img_emb/img_emb_3.npy").unlink(), "shard 3 has no img_emb"),
    "metadata missing": (
        lambda f: (f / "metadata/metadata_4.parquet").unlink(),
        "shard 4 has no metadata",
    ),
    "numbered twice": (
        lambda f: np.save(f / "img_emb/img_emb_03.npy", FEATURES[:1]),
        "same number",
    ),
    "shard cut": (lambda f: truncate(f / "img_emb/img_emb_2.npy"), "img_emb_2.npy: damaged"),
    "metadata cut": (
        lambda f: truncate(f / "metadata/metadata_2.parquet"),
        "metadata_2.parquet: damaged",
    ),
    "row missing": (
        lambda f: metadata(f, 2, image_path=["a", "b"]),
        "metadata_2.parquet: has 2 rows, its features 3",
    ),
    "narrow shard": (
        lambda f: np.save(f / "img_emb/img_emb_5.npy", FEATURES[:1, :3]),
        r"img_emb_5.npy: has shape \(1, 3\)",
    ),
    "flat shard": (lambda f: np.save(f / "img_emb/img_emb_0.npy", FEATURES[0]), "img_emb_0.npy"),
    "odd keys": (
        lambda f: [metadata(f, i, key=[[1]] * n) for i, n in enumerate(ROWS)],
        "metadata: ",
    ),
    "odd source rows": (
        lambda f: [metadata(f, i, source_row=["x"] * n) for i, n in enumerate(ROWS)],
        "metadata: ",
    ),
    "missing source rows": (
        lambda f: [metadata(f, i, source_row=pa.nulls(n, pa.int64())) for i, n in enumerate(ROWS)],
        "metadata: source_row is empty in some rows",
    ),
    "manifest": (lambda f: (f / "manifest.json").write_text("{"), "manifest.json: cannot be read"),
    "names": (
        lambda f: (f / "manifest.json").write_text('{"class_names": [["a"], ["b", "c"]]}'),
        "manifest.json: class_names: expected a list of strings",
    ),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_damaged_folders(kind, folder):
    spoil, expected = SPOILT[kind]
    spoil(folder)
    with pytest.raises(InputError, match=expected) as error:
        load_features(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("odd", "expected"),
    [(np.ones((1, 12)), r"has shape \(1, 12\), the first shard \(2, 8\)"),
     (np.full((1, 8), "a"), "expected numbers, got an array of <U1")],
)  # fmt: skip
def test_shards_of_patches_that_differ(odd, expected, folder):
    (folder / "local_emb").mkdir()
    for number, rows in enumerate(ROWS):
        array = odd if number == 5 else np.ones((rows, 8))
        np.save(folder / f"local_emb/local_emb_{number}.npy", array)
    with pytest.raises(InputError, match=f"local_emb_5.npy: {expected}"):
        load_features(folder, local=True)


@pytest.mark.parametrize(
    "name",
    ["img_emb/img_emb_1.npy", "metadata/metadata_1.parquet", "prototypes.npy", "manifest.json"],
)
def test_paths_that_lead_out(name, folder, tmp_path):
    file = folder / name
    outside = tmp_path / file.name
    if file.exists():
        file.rename(outside)
    else:
        outside.write_text("{}")
    file.symlink_to(outside)
    with pytest.raises(InputError, match="leads out of"):
        load_features(folder)


def test_a_link_to_itself_is_one_line(folder):
    (folder / "img_emb/img_emb_1.npy").unlink()
    (folder / "img_emb/img_emb_1.npy").symlink_to("img_emb_1.npy")
    with pytest.raises(InputError, match=r"img_emb_1.npy: no such file$"):
        load_features(folder)


def test_a_folder_that_leads_out(folder, tmp_path):
    (folder / "img_emb").rename(tmp_path / "elsewhere")
    (folder / "img_emb").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="leads out of"):
        load_features(folder)


def test_a_link_to_the_folder_itself_is_fine(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert load_features(tmp_path / "link").sha256() == load_features(folder).sha256()


def test_hash_tells_type_shape_and_bytes():
    tensor = torch.from_numpy(FEATURES)
    same = {
        array_sha256(x)
        for x in (FEATURES, tensor, np.asfortranarray(FEATURES), tensor.T.contiguous().T)
    }
    assert len(same) == 1
    others = (FEATURES[::-1], FEATURES.astype(np.float32), FEATURES.reshape(-1, 2), FEATURES[:-1],
              tensor.view(torch.bfloat16))  # fmt: skip
    assert len({array_sha256(x) for x in others} | same) == 6


def test_hash_of_one_column_of_others():
    column = torch.ones(5, 6)[:, 2:3]
    assert array_sha256(column) == array_sha256(np.ones((5, 1), np.float32))
    one = torch.ones(1, 6).T[:1]  # contiguous for torch, though its stride is not 1
    assert array_sha256(one) == array_sha256(np.ones((1, 1), np.float32))


@pytest.mark.parametrize("shape", [(), (7,), (5, 0), (3, 4), (2, 3, 5)])
def test_hash_of_blocks_of_any_size(shape, monkeypatch):
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    text = f"float32 {shape} ".encode()
    for size in (1, 30, 1 << 20):
        monkeypatch.setattr(arrays, "HASHED_BYTES", size)
        for given in (array, torch.from_numpy(array)):
            assert array_sha256(given) == hashlib.sha256(text + array.tobytes()).hexdigest()


def test_hash_of_wide_rows_takes_little_memory():
    class Seen(np.ndarray):
        def __getitem__(self, rows):
            found = super().__getitem__(rows)
            sizes.append(found.nbytes)
            return found

    sizes, array = [], np.zeros((30, 1 << 17), np.float32)
    array_sha256(array.view(Seen))
    assert sum(sizes) == array.nbytes
    assert max(sizes) == arrays.HASHED_BYTES


def test_names_settle_the_axis_of_templates_for_a_fit(tmp_path):
    """80 templates of 2 named classes: no fit that gets them warns that it may be the other way."""
    images = unit(FEATURES.astype(np.float32))
    texts = np.stack([images[:2]] * 80)
    for given in (texts, texts.swapaxes(0, 1)):
        np.savez(
            tmp_path / "x.npz",
            image_features=images,
            text_features=given,
            class_names=["cat", "dog"],
        )
        features = load_features(tmp_path / "x.npz")
        model = TransCLIP(device="cpu")
        model.fit(features.get("image_features"), text_features=features.get("text_features"))
        assert model.label_distributions_.shape == (len(images), 2)
