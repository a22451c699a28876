"""Arrays by name from every type of file."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from transclip_fast.errors import InputError
from transclip_fast.store.arrays import SINGLE, SUFFIXES, read_array, read_arrays

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.array([3, 1], dtype=np.int64)


def write(path, **arrays):
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    writers = {
        ".npz": lambda: np.savez_compressed(path, **arrays),
        ".pt": lambda: torch.save(tensors, path),
        ".safetensors": lambda: save_file(tensors, path),
    }
    writers[path.suffix]()
    return path


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
def test_by_name(suffix, tmp_path):
    read = read_arrays(write(tmp_path / f"x{suffix}", a=A, b=B))
    assert read.keys() == {"a", "b"}
    for name, array in (("a", A), ("b", B)):
        np.testing.assert_array_equal(np.asarray(read[name]), array)
        assert np.asarray(read[name]).dtype == array.dtype


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="no list of memory maps")
@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
def test_what_is_read_is_no_longer_in_the_file(suffix, tmp_path):
    """A process that touches a map of a file that was cut is killed."""
    file = write(tmp_path / f"x{suffix}", a=A, b=B)
    read = read_arrays(file)
    assert str(file) not in Path("/proc/self/maps").read_text()
    file.write_bytes(b"")
    np.testing.assert_array_equal(np.asarray(read["a"]), A)


def test_nameless(tmp_path):
    np.save(tmp_path / "x.npy", A)
    torch.save(torch.from_numpy(A), tmp_path / "x.pt")
    for name in ("x.npy", "x.pt"):
        np.testing.assert_array_equal(np.asarray(read_arrays(tmp_path / name)[SINGLE]), A)


def test_old_pt_format(tmp_path):
    torch.save({"a": torch.from_numpy(A)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    np.testing.assert_array_equal(read_array(tmp_path / "x.pt", "a"), A)


def test_a_parameter_comes_without_its_gradient(tmp_path):
    torch.save({"a": torch.nn.Parameter(torch.from_numpy(A))}, tmp_path / "x.pt")
    np.testing.assert_array_equal(read_array(tmp_path / "x.pt", "a").numpy(), A)


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
def test_one_array_of_a_file(suffix, tmp_path):
    two = write(tmp_path / f"two{suffix}", a=A, b=B)
    one = write(tmp_path / f"one{suffix}", other=B)
    np.testing.assert_array_equal(read_array(two, "b"), B)
    np.testing.assert_array_equal(read_array(one, "labels"), B)
    with pytest.raises(InputError, match=r"two\..*has no array 'labels', only a, b"):
        read_array(two, "labels")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_not_a_file(suffix, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_arrays(tmp_path / f"x{suffix}")
    (tmp_path / f"x{suffix}").mkdir()
    with pytest.raises(InputError, match="is not a file"):
        read_arrays(tmp_path / f"x{suffix}")


def test_unreadable_is_not_called_damaged(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    np.save(tmp_path / "x.npy", A)
    monkeypatch.setattr(np, "load", refuse)
    with pytest.raises(InputError, match=r"x.npy: cannot be read \(Permission denied\)$"):
        read_arrays(tmp_path / "x.npy")


def test_a_flipped_bit_in_a_compressed_file(tmp_path):
    file = write(tmp_path / "x.npz", a=A)
    data = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        start = archive.infolist()[0].header_offset
    data[start + 60] ^= 16
    file.write_bytes(data)
    with pytest.raises(InputError, match="damaged or truncated") as error:
        read_arrays(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("header", ["{'descr': ((", "{'descr': '<f4', 'shape': (99999999999999,)"])
def test_a_damaged_npy_header(header, tmp_path):
    text = header.encode().ljust(117) + b"\n"
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\x00" + bytes([118, 0]) + text)
    with pytest.raises(InputError, match=r"x\.npy: damaged") as error:
        read_arrays(tmp_path / "x.npy")
    assert "\n" not in str(error.value)
