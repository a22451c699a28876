"""Safetensors files written tensor by tensor."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load_file, save_file

from transclip_fast.errors import InputError
from transclip_fast.store.tensors import (
    CONVERTED_ENTRIES,
    read_tensors,
    unmapped,
    write_tensors,
)


def ignore(done, total):
    """A progress nobody looks at."""


arrays = st.dictionaries(
    st.text(max_size=5),
    hnp.arrays(
        st.sampled_from([np.float64, np.float32, np.float16, np.int64, np.uint8, np.bool_]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    ),
    max_size=4,
)


@settings(deadline=None)
@given(arrays)
def test_what_is_written_is_read(tmp_path_factory, made):
    for array in made.values():  # finite ones beyond bfloat16 are refused
        array[np.isfinite(array) & (np.abs(array.astype(float)) > 3e38)] = 0
    tensors = {name: torch.from_numpy(array) for name, array in made.items()}
    file = tmp_path_factory.getbasetemp() / "made.safetensors"
    reported = []
    size = write_tensors(file, tensors, torch.bfloat16, lambda *step: reported.append(step))
    assert size == file.stat().st_size
    assert len(reported) == len(tensors)
    assert not reported or reported[-1][0] == reported[-1][1]
    read = load_file(file)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        expected = tensor.bfloat16() if tensor.is_floating_point() else tensor
        assert read[name].dtype == expected.dtype
        torch.testing.assert_close(read[name], expected, atol=0, rtol=0, equal_nan=True)


def test_a_path_that_is_no_utf8(tmp_path):
    file = tmp_path / os.fsdecode(b"\xff") / "x.safetensors"
    write_tensors(file, {"a": torch.arange(3)}, None, metadata={"of": "b"})
    tensors, metadata = read_tensors(file)
    assert tensors["a"].tolist() == [0, 1, 2]
    assert metadata["of"] == "b"


def test_a_transposed_view(tmp_path):
    tensor = torch.arange(6.0).reshape(2, 3).T
    write_tensors(tmp_path / "a.safetensors", {"a": tensor}, torch.float32, ignore)
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], tensor)


def anonymous_bytes():
    """Memory of this process that is not a mapped file."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def memory_of_writing(folder):
    """Bytes that writing 12 tensors of 4 M entries takes at most, seen after each of them."""
    tensors = load_file(folder / "f32")  # mapped
    before, seen = anonymous_bytes(), []
    write_tensors(
        folder / "bf16.safetensors",
        tensors,
        torch.bfloat16,
        lambda *_: seen.append(anonymous_bytes()),
    )
    assert len(seen) == 12
    return max(seen) - before


def test_the_tensors_are_never_all_in_memory(tmp_path):
    side = 2048
    save_file({f"t{i}": torch.full((side, side), float(i)) for i in range(12)}, tmp_path / "f32")
    # In a process of its own: what earlier tests freed would be counted, too.
    code = (
        "import sys; from pathlib import Path; from tests.store import test_tensors\n"
        "print(test_tensors.memory_of_writing(Path(sys.argv[1])))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert int(found.stdout) < 2.5 * 2 * side**2  # all would be 12 times that of one


def test_values_beyond_the_type(tmp_path):
    """Of which the last chunk has one; what is infinite stays so."""
    tensor = torch.zeros(CONVERTED_ENTRIES + 5)
    tensor[:2] = torch.tensor([torch.inf, 65504.0])
    write_tensors(tmp_path / "a.safetensors", {"scale": tensor}, torch.float16, ignore)
    assert load_file(tmp_path / "a.safetensors")["scale"][:2].tolist() == [torch.inf, 65504.0]
    tensor[-1] = -7e4
    for dtype in (torch.float32, torch.bfloat16):
        write_tensors(tmp_path / "b.safetensors", {"scale": tensor}, dtype, ignore)
    with pytest.raises(InputError, match="^scale: has values beyond float16; bf16 has a wider"):
        write_tensors(tmp_path / "c.safetensors", {"scale": tensor}, torch.float16, ignore)
    assert not (tmp_path / "c.safetensors").exists()


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(3)}, torch.float32, ignore)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(700, 1100),  # longer than what is copied at a time
        torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1),
        torch.randn(9, 5)[1:8:3, ::2].to(torch.bfloat16),
        torch.tensor(3.0),
        torch.empty(0, 4),
        torch.tensor([True, False]),
        torch.ones(1).expand(3, 2),
    ],
)
def test_unmapped(tensor):
    copy = unmapped(tensor)
    assert torch.equal(copy, tensor)
    assert copy.dtype == tensor.dtype
    assert copy.data_ptr() != tensor.data_ptr() or not tensor.numel()


@pytest.mark.parametrize("length", [0, 1 << 20])
def test_a_tensor_of_a_file_that_was_cut(length, tmp_path):
    """The system would end this process if it read the map itself."""
    np.save(tmp_path / "x.npy", np.ones((1000, 1000), np.float32))
    mapped = torch.from_numpy(np.load(tmp_path / "x.npy", mmap_mode="c"))
    assert unmapped(mapped).sum() == 1_000_000
    os.truncate(tmp_path / "x.npy", length)
    with pytest.raises(InputError, match="their file was cut"):
        unmapped(mapped)
