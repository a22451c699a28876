"""Memory: sizes as text, what this process uses, and what is free."""

import numpy as np
import pytest
import torch

from transclip_fast import InputError, memory
from transclip_fast.memory import parse_memory, peak_bytes, reset_peak, show_bytes

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GiB", 8 << 30),
        ("8 GB", 8 << 30),
        ("8g", 8 << 30),
        ("1.5T", 3 << 39),
        ("300M", 300 << 20),
        ("12345", 12345),
        (12345, 12345),
        (None, None),
    ],
)
def test_parse(text, expected):
    assert parse_memory(text) == expected


@pytest.mark.parametrize(
    "text", ["", "8 apples", "-1G", "0", 0, -5, True, 1.5, "GiB", "1e9", "0.5", "9" * 400]
)
def test_what_is_no_size(text):
    with pytest.raises(InputError, match="memory must be a size like 8GiB, got"):
        parse_memory(text)


@pytest.mark.parametrize("text", ["16", " 500", "1023", "1.5"])
def test_a_size_without_its_unit(text):
    with pytest.raises(InputError, match=f"^memory: .* did you mean {text.strip()}GiB"):
        parse_memory(text)
    assert parse_memory(f"{text}GiB") == int(float(text) * 2**30)


@pytest.mark.parametrize(
    ("number", "text"), [(5, "5 B"), (1536, "1.5 KiB"), (3 << 29, "1.5 GiB"), (10**12, "931 GiB")]
)
def test_shown(number, text):
    assert show_bytes(number) == text


def test_the_peak_begins_anew():
    block = np.ones(32 << 20)  # 256 MiB, which the system gets back
    before = peak_bytes()
    del block
    if not reset_peak():
        pytest.skip("the system does not let a process reset its peak")
    assert peak_bytes() < before - (128 << 20)


def test_memory_of_a_container(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    free = memory.free_bytes(CPU)
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes(CPU) > free / 2
    (tmp_path / "memory.max").write_text("5000\n")
    assert memory.free_bytes(CPU) == 4000
