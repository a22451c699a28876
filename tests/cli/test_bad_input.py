"""Bad input: exit code 2, one line that says what and where, and no file touched."""

from __future__ import annotations

import errno
import os
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from transclip_fast.store.arrays import SUFFIXES


@pytest.fixture
def solve(save, refused, tmp_path):
    """Run a `solve` of arrays that must be refused; its line on standard error."""

    def run(arrays, *options):
        file = save({name: array for name, array in arrays.items() if array is not None})
        return refused("solve", file, "--out", tmp_path / "result", *options)

    return run


def changed(array, index, value):
    array = array.copy()
    array[index] = value
    return array


BAD_FEATURES = {
    "NaN": (lambda x: changed(x, (3, 1), np.nan), "row 3 contains NaN"),
    "infinite": (lambda x: changed(x, (2, 0), -np.inf), "row 2 contains an infinite value"),
    "zero": (lambda x: changed(x, 5, 0), "row 5 is all zero"),
    "huge": (lambda x: changed(x.astype(float), (4, 0), 1e300), "row 4 is too large for float32"),
    "1-d": (lambda x: x[:, 0], "(77,)"),
    "0-d": (lambda x: x[0, 0], "shape ()"),
    "3-d": (lambda x: x[None], "(1, 77, 33)"),
    "4-d": (lambda x: x[None, None], "(1, 1, 77, 33)"),
    "no rows": (lambda x: x[:0], "(0, 33)"),
    "no columns": (lambda x: x[:, :0], "(77, 0)"),
    "complex": (lambda x: x.astype(complex), "numbers"),
    "strings": (lambda x: x.astype("U3"), "numbers"),
    "structured": (lambda x: np.zeros((77, 33), [("a", "f4")]), "numbers"),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        case
        for case in product(("image_features", "text_features", "support_features"), BAD_FEATURES)
        if case != ("text_features", "3-d")  # of several templates
    ],
)
def test_features(kind, name, arrays, solve):
    arrays |= {"support_features": arrays["image_features"], "support_labels": arrays["labels"]}
    spoil, expected = BAD_FEATURES[kind]
    if name == "text_features":  # (6, 33): another shape than the one above, if the last
        expected = expected.replace("77", "6")
    message = solve({**arrays, name: spoil(arrays[name])}, "--gamma", 0.02)
    assert f"features.npz: {name}: " in message
    assert expected in message


@pytest.mark.parametrize("name", ["text_features", "support_features", "prototypes"])
def test_dimensions_that_differ(name, arrays, solve):
    arrays |= {"support_features": arrays["image_features"], "support_labels": arrays["labels"]}
    narrow = arrays["text_features" if name == "prototypes" else name][:, :30]
    message = solve({**arrays, name: narrow}, "--gamma", 0.02)
    assert f"{name}: has 30 columns, expected 33" in message


BAD_LABELS = {
    "too high": (lambda y: changed(y, 7, 6), "row 7 has label 6"),
    "too low": (lambda y: changed(y, 8, -2), "row 8 has label -2"),
    "short": (lambda y: y[:-1], "77 labels"),
    "columns": (lambda y: np.stack([y, y], 1), "is not one-hot"),
    "probabilities": (lambda y: np.full((77, 6), 1 / 6), "row 0 is not one-hot"),
    "two hot": (lambda y: changed(np.eye(6)[y], (3, slice(2)), 1), "row 3 is not one-hot"),
    "fractional": (lambda y: changed(y.astype(float), 9, 0.5), "row 9 has label 0.5"),
    "infinite": (lambda y: changed(y.astype(float), 9, np.inf), "row 9 has label inf"),
    "names": (lambda y: np.array(["cat"] * 77), "row 0: label 'cat' is no position; give the cl"),
    "fractions as text": (lambda y: changed(y.astype("U3"), 5, "0.5"), "row 5: label '0.5' is no"),
}
NO_LABEL = {
    "negative": (lambda y: changed(y, 8, -1), "row 8 has label -1"),
    "NaN": (lambda y: changed(y.astype(float), 9, np.nan), "row 9 has label nan"),
    "empty text": (lambda y: changed(y.astype("U3"), 5, ""), "row 5 has label -1"),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *product(("labels", "known_labels", "support_labels", "validation_labels"), BAD_LABELS),
        *product(("support_labels", "validation_labels"), NO_LABEL),
    ],
)
def test_labels(kind, name, arrays, solve):
    spoil, expected = (BAD_LABELS | NO_LABEL)[kind]
    for use in ("support", "validation"):
        arrays |= {f"{use}_features": arrays["image_features"], f"{use}_labels": arrays["labels"]}
    message = solve({**arrays, name: spoil(arrays["labels"])})
    assert f"features.npz: {name}: " in message
    assert expected in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"text_features": None}, "give text_features, prototypes, prior or prior_logits"),
        ({"support_features": np.ones((2, 33))}, "support_labels"),
        ({"support_labels": np.zeros(2)}, "support_features"),
        ({"known_labels": np.zeros(9)}, "known_labels: expected 77 labels, one a row"),
        ({"known_labels": np.full(77, -2)}, "known_labels: row 0 has label -2, outside -1 .. 5"),
        ({"class_names": np.array(["a", "b"])}, "class_names: 2 names for 6 classes"),
        ({"class_names": np.arange(6)}, "class_names: expected a list of strings"),
        ({"prior": np.full((5, 6), 1 / 6)}, "prior: has 5 rows, expected 77"),
        ({"prior": np.full((77, 6), 1.0)}, "prior: row 0 sums to 6"),
        ({"prior": np.eye(6)[np.arange(77) % 6] - 1}, "prior: row 0 has a negative"),
        ({"prior": np.full((77, 7), 1 / 7)}, "6 classes, the prior 7"),
        ({"prior_logits": np.full((77, 6), 1e300)}, "prior_logits: row 0 is too large"),
        ({"prior": np.full((77, 6), 1 / 6), "prior_logits": np.ones((77, 6))}, "not several"),
    ],
)
def test_what_does_not_go_together(change, expected, arrays, solve):
    message = solve({**arrays, **change})
    assert "features.npz" in message
    assert expected in message


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (("--labels", "none.npy"), "none.npy: no such file"),
        (("--class-names", "none.txt"), "none.txt: no such file"),
        (("--text-features", "notes.txt"), "notes.txt: expected a file ending in .npy"),
        (("--graph", "none"), "none: is not a graph folder"),
        (("--device", "cuda:99"), "cuda:99"),
        (("--device", "abacus"), "abacus"),
        (("--n-neighbors", 0), "n_neighbors"),
        (("--max-iter", -1), "max_iter"),
        (("--gamma", "nan"), "gamma"),
        (
            ("--gamma", 0.02),
            "gamma: is the weight of the support, and there is none; leave --gamma",
        ),
        (("--logit-scale", 0), "logit_scale must be greater than 0"),
    ],
)
def test_options(option, expected, arrays, solve):
    assert expected in solve(arrays, *option)


@pytest.mark.parametrize("name", ["none.npz", "notes.txt", "", "x" * 300 + ".npz", "a/b.pt"])
def test_missing_features(name, refused, tmp_path):
    assert name in refused("solve", tmp_path / name, "--out", tmp_path / "result")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncated_files(suffix, arrays, save, refused, tmp_path):
    whole = write(suffix, arrays, tmp_path).read_bytes()
    cut = tmp_path / f"cut{suffix}"
    for end in [0, 1, 5, 60, *np.linspace(100, len(whole) - 1, 12, dtype=int)]:
        cut.write_bytes(whole[:end])
        message = refused("solve", cut, "--out", tmp_path / "result")
        assert message.startswith(f"error: {cut}: damaged")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_random_bytes(suffix, refused, tmp_path):
    source = np.random.default_rng(SUFFIXES.index(suffix))
    file = tmp_path / f"random{suffix}"
    for length in [1, 7, *source.integers(300, size=60)]:
        file.write_bytes(source.bytes(length))
        message = refused("solve", file, "--out", tmp_path / "result")
        assert message.startswith(f"error: {file}: damaged")


class Malicious:
    """Pickles to a command that leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt"])
def test_nothing_is_unpickled(suffix, arrays, refused, tmp_path):
    trap = tmp_path / "executed"
    file = tmp_path / f"features{suffix}"
    if suffix == ".npy":
        np.save(file, np.array([Malicious(trap)], object), allow_pickle=True)
    elif suffix == ".npz":
        np.savez(file, **arrays, class_names=np.array([Malicious(trap)], object))
    else:
        torch.save({"image_features": Malicious(trap)}, file)
    assert "pickled" in refused("solve", file, "--out", tmp_path / "result")
    assert not trap.exists()


@pytest.mark.parametrize("content", [{"image_features": [1.0]}, [torch.ones(2)], 3])
def test_pt_of_something_else(content, refused, tmp_path):
    torch.save(content, tmp_path / "features.pt")
    message = refused("solve", tmp_path / "features.pt", "--out", tmp_path / "result")
    assert "features.pt: expected a tensor or a dictionary of tensors" in message


def test_sparse_tensors(refused, tmp_path):
    torch.save({"image_features": torch.eye(4).to_sparse()}, tmp_path / "features.pt")
    message = refused("solve", tmp_path / "features.pt", "--out", tmp_path / "result")
    assert "expected dense tensors" in message


@pytest.mark.parametrize(
    ("out", "expected"),
    [
        ("features.npz", "is a file"),
        ("features.npz/below", "features.npz is a file"),
        ("/proc/here", "cannot be written"),
        ("/", "name a new folder"),
        ("x" * 300, "name too long"),
        ("loop/x", "cannot be written"),
        ("album", "holds other files (cat.jpg)"),
    ],
)
def test_where_nothing_can_be_written(out, expected, arrays, save, refused, tmp_path):
    (tmp_path / "album").mkdir()
    (tmp_path / "album" / "cat.jpg").write_bytes(b"cat")
    (tmp_path / "album" / "run.json").write_bytes(b"{}")
    (tmp_path / "loop").symlink_to("loop")
    message = refused("solve", save(arrays), "--out", tmp_path / out)
    assert str(tmp_path / out) in message
    assert expected in message


@pytest.mark.parametrize(
    "command",
    [
        ("graph", "features.npz", "--out", "loop/x"),
        ("graph", "features.npz", "--out", "graph", "--search", "faiss", "--save-index", "loop/x"),
        ("predict", "result", "features.npz", "--out", "loop/x"),
        ("convert", "weights.safetensors", "--model", "ViT-B-32", "--out", "loop/x.safetensors"),
        ("report", "result", "--before", "loop/x"),
    ],
)
def test_a_link_to_itself_is_one_line(command, solved, refused, tmp_path, monkeypatch):
    """In place of a folder: `Path.resolve` raises RuntimeError until Python 3.12."""
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "weights.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    assert ("weights.safetensors: does" if "convert" in command else "loop/x") in refused(*command)


@pytest.mark.parametrize(
    ("owner", "name"),
    [(os, "fsync"), (pq.ParquetWriter, "write_table"), (Path, "write_text"), (Path, "rename")],
)
@pytest.mark.parametrize("earlier", [False, True])
def test_full_disk(owner, name, earlier, arrays, save, succeeds, refused, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "no space")

    file = save(arrays)
    if earlier:
        succeeds("solve", file, "--out", tmp_path / "result", "--max-iter", 1)
    monkeypatch.setattr(owner, name, fail)
    message = refused("solve", file, "--out", tmp_path / "result")
    assert f"{tmp_path / 'result'}: cannot be written (No space left on device)" in message
    monkeypatch.undo()


def test_usage_errors_are_click_s(cli):
    ran = cli("solve", "features.npz")
    assert (ran.code, ran.out) == (2, "")
    assert "Missing option '--out'" in ran.err


def write(suffix, arrays, folder):
    """The arrays in a file of that type."""
    path = folder / f"whole{suffix}"
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if suffix == ".npy":
        np.save(path, arrays["image_features"])
    elif suffix == ".npz":
        np.savez(path, **arrays)
    elif suffix == ".pt":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    return path
