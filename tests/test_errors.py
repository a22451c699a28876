"""Errors of readers become one line with the file, the reason and a remedy."""

from __future__ import annotations

import os
import pickle

import pytest

from transclip_fast.errors import InputError, printable, reading

CASES = [
    (FileNotFoundError(2, "No such file or directory"), r"no such file$"),
    (PermissionError(13, "Permission denied"), r"cannot be read \(Permission denied\)$"),
    (OSError(22, "Invalid argument"), r"damaged or truncated \(.*Invalid argument\); write or"),
    (OSError("bad magic"), r"damaged or truncated \(bad magic\); write or copy it again$"),
    (AssertionError(), r"damaged or truncated \(AssertionError\); "),
    (ValueError("two\n  lines"), r"damaged or truncated \(two lines\); "),
    (MemoryError("x" * 999), r"damaged or truncated \(x{200}\); "),
    (pickle.UnpicklingError("no"), r"damaged, or holds pickled Python objects, .* never loaded; "),
    (ValueError("allow_pickle=False"), r"damaged, or holds pickled Python objects, "),
    (InputError("x.npy: too narrow; widen it"), r"too narrow; widen it$"),
]


@pytest.mark.parametrize(("error", "message"), CASES)
def test_one_line(error, message):
    with pytest.raises(InputError, match=rf"^x\.npy: {message}") as caught, reading("x.npy"):
        raise error
    assert "\n" not in str(caught.value)


def test_words_of_another_format():
    with (
        pytest.raises(InputError, match=r"^x: is no list \('gone'\); pack it again$"),
        reading("x", "is no list", "pack it again"),
    ):
        raise KeyError("gone") from None


def test_an_interrupt_passes():
    with pytest.raises(KeyboardInterrupt), reading("x.npy"):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("a\nb\r\nc", "a b c"),
        ("caf\udce9.npz: é", "caf\\udce9.npz: é"),
        ("a\0b \x1b[31m", "a\\x00b \\x1b[31m"),
        ("two  spaces stay", "two  spaces stay"),
    ],
)
def test_messages_are_one_line_that_a_terminal_can_show(message, line):
    assert printable(message) == line


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_what_is_no_regular_file_is_not_read(kind, tmp_path):
    file = tmp_path / "x.npy"
    os.mkfifo(file) if kind == "fifo" else file.symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"x\.npy: is no regular file"), reading(file):
        pytest.fail("was read")
