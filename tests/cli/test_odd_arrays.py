"""Files of arrays that are not what they claim: one line and exit code 2, whatever the kind."""

from __future__ import annotations

import io
import json
import zipfile
from itertools import product

import numpy as np
import pytest
import torch
from safetensors.torch import save_file


def npy(array):
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def with_shape(array, shape):
    """The content of a .npy whose header claims another shape."""
    content = npy(array)
    old, new = repr(array.shape).encode(), repr(shape).encode()
    return content.replace(old + b", }" + b" " * (len(new) - len(old)), new + b", }", 1)


def packed(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return file.getvalue()


def members_of(arrays):
    return [(f"{name}.npy", npy(array)) for name, array in arrays.items()]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: [*m, m[0]], "two arrays of one name"),
        (lambda m: [*m, (m[0][0][:-4], m[0][1])], "two arrays of one name"),
        (lambda m: [("image_features.npy", b"text"), *m[1:]], "damaged"),
        (lambda m: [("image_features", b"text"), *m[1:]], "damaged"),
        (lambda m: [("image_features/", b""), *m[1:]], "has no array 'image_features'"),
        (lambda m: [(m[0][0], m[0][1] + b"more"), *m[1:]], "claims 10,164 bytes"),
        (lambda m: [(m[0][0], m[0][1][:-4]), *m[1:]], "claims 10,164 bytes"),
        (lambda m: [(m[0][0], with_shape(np.eye(77, 33), (2**63, 33))), *m[1:]], "claims"),
        (lambda m: [(m[0][0], with_shape(np.eye(77, 33), (-77, -33))), *m[1:]], "damaged"),
        (lambda m: [(m[0][0], npy(np.zeros((77, 33), "M8[s]"))), *m[1:]], "expected numbers"),
        (lambda m: [(m[0][0], npy(np.zeros((77, 33), "f4,f8"))), *m[1:]], "expected numbers"),
    ],
)
def test_npz_members(change, expected, arrays, refused, tmp_path):
    (tmp_path / "x.npz").write_bytes(packed(change(members_of(arrays))))
    message = refused("solve", tmp_path / "x.npz", "--out", tmp_path / "result")
    assert expected in message
    assert "x.npz" in message


def test_npz_members_that_no_one_asked_for_are_not_read(arrays, succeeds, tmp_path):
    others = [("other.npy", b"no array"), ("notes.txt", b"text"), ("folder/", b"")]
    (tmp_path / "x.npz").write_bytes(packed([*members_of(arrays), *others]))
    succeeds("solve", tmp_path / "x.npz", "--out", tmp_path / "result")


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_a_header_that_claims_less_than_there_is(suffix, arrays, refused, tmp_path):
    """Rows that are dropped in silence: no checksum is reached."""
    cut = npy(arrays["image_features"]).replace(b"(77, 33)", b"(76, 33)", 1)
    file = tmp_path / f"x{suffix}"
    named = [("image_features.npy", cut), *members_of(arrays)[1:]]
    file.write_bytes(cut if suffix == ".npy" else packed(named))
    np.save(tmp_path / "text.npy", arrays["text_features"])
    options = ["--text-features", tmp_path / "text.npy"]
    assert "damaged" in refused("solve", file, *options, "--out", tmp_path / "result")


TENSORS = {
    "stride 0": (lambda x: torch.ones(1).expand(2**31, 2**20), "repeats few numbers"),
    "nested": (lambda x: torch.nested.nested_tensor([x[0], x[1]]), "expected dense tensors"),
    "sparse": (lambda x: x.to_sparse(), "expected dense tensors"),
    "quantised": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "dense tensors"),
    "meta": (lambda x: x.to("meta"), "expected dense tensors"),
    "float8": (lambda x: x.to(torch.float8_e4m3fn), "holds torch.float8_e4m3fn"),
    "complex": (lambda x: x.to(torch.complex64), "holds torch.complex64"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:.*quantiz")
@pytest.mark.parametrize("name", ["image_features", "text_features", "support_labels"])
@pytest.mark.parametrize("kind", TENSORS)
def test_tensors(kind, name, arrays, refused, tmp_path):
    make, expected = TENSORS[kind]
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    tensors |= {"support_features": tensors["image_features"], "support_labels": tensors["labels"]}
    tensors[name] = make(tensors[name].float())
    torch.save(tensors, tmp_path / "x.pt")
    assert expected in refused("solve", tmp_path / "x.pt", "--out", tmp_path / "result")


@pytest.mark.parametrize("kind", [torch.uint16, torch.uint32, torch.uint64])
@pytest.mark.parametrize("suffix", [".pt", ".npz"])
def test_unsigned_labels_are_numbers(kind, suffix, arrays, accuracy, tmp_path):
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    tensors["labels"] = tensors["labels"].to(kind)
    file = tmp_path / f"x{suffix}"
    if suffix == ".pt":
        torch.save(tensors, file)
    else:
        np.savez(file, **{key: tensor.numpy() for key, tensor in tensors.items()})
    assert accuracy(file) == accuracy()


def test_a_flipped_bit_in_a_file_of_torch(arrays, refused, tmp_path):
    file = tmp_path / "x.pt"
    torch.save({key: torch.from_numpy(array) for key, array in arrays.items()}, file)
    content = bytearray(file.read_bytes())
    place = content.index(arrays["image_features"].tobytes()[:64])
    content[place + 6] ^= 1
    file.write_bytes(content)
    assert "x.pt: damaged" in refused("solve", file, "--out", tmp_path / "result")


def test_safetensors_that_name_a_tensor_twice(arrays, refused, tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({key: torch.from_numpy(array) for key, array in arrays.items()}, file)
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    again = json.dumps({"labels": json.loads(header)["labels"]})[1:-1]
    header = header[:-1] + b"," + again.encode() + b"}"
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    assert "'labels' is there twice" in refused("solve", file, "--out", tmp_path / "result")


CSR = {
    "indptr cut": {"indptr": np.arange(77)},
    "indptr falls": {"indptr": np.arange(78)[::-1]},
    "indptr of a table": {"indptr": np.zeros((78, 1), int)},
    "indptr of fractions": {"indptr": np.linspace(0, 77, 78) + 0.5 * (np.arange(78) == 3)},
    "indptr of one": {"indptr": np.array(0)},
    "class outside": {"indices": np.full(77, 6)},
    "class negative": {"indices": np.full(77, -1)},
    "huge shape": {"shape": np.array([77, 2**40])},
    "seven classes": {"shape": np.array([77, 7])},
    "shape of texts": {"shape": np.array(["77", "6"])},
    "values short": {"data": np.ones(76)},
}


@pytest.mark.parametrize(
    ("kind", "alone"),
    # With nothing else, seven classes are as good as six.
    [case for case in product(CSR, (False, True)) if case != ("seven classes", True)],
)
def test_sparse_priors(kind, alone, save, arrays, refused, tmp_path):
    csr = {
        "format": np.array(b"csr"),
        "shape": np.array([77, 6]),
        "data": np.full(77, 0.6),
        "indices": np.arange(77) % 6,
        "indptr": np.arange(78),
    }
    np.savez(tmp_path / "prior.npz", **{**csr, **CSR[kind]})
    features = {"image_features": arrays["image_features"]} if alone else arrays
    command = "solve", save(features), "--prior", tmp_path / "prior.npz"
    assert "prior.npz" in refused(*command, "--out", tmp_path / "result")
