"""Folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from transclip_fast.errors import InputError
from transclip_fast.store.atomic import (
    clean,
    exchanged,
    locked,
    new_folder,
    read_json,
    write_json,
)

CONTENTS = frozenset({"a", "b"})


@pytest.fixture
def earlier(tmp_path):
    """A folder that an earlier run wrote."""
    write(tmp_path / "out", a="old")
    return tmp_path / "out"


def write(path, **files):
    with new_folder(path, CONTENTS) as folder:
        for name, text in files.items():
            (folder / name).write_text(text)


def listing(folder):
    """What lies in a folder, hidden entries too, with the text of files one level down."""
    return {
        entry.name: {file.name: file.read_text() for file in entry.iterdir()}
        for entry in folder.iterdir()
    }


def test_appears_only_when_it_is_whole(tmp_path):
    with new_folder(tmp_path / "out", CONTENTS) as folder:
        (folder / "a").write_text("new")
        assert not (tmp_path / "out").exists()
    assert listing(tmp_path) == {"out": {"a": "new"}}


def test_parents_are_made(tmp_path):
    write(tmp_path / "x" / "y" / "out", a="new")
    assert listing(tmp_path / "x" / "y") == {"out": {"a": "new"}}


def test_replaces_an_earlier_result(earlier, tmp_path):
    with new_folder(earlier, CONTENTS) as folder:
        (folder / "b").write_text("new")
        assert (earlier / "a").read_text() == "old"
    assert listing(tmp_path) == {"out": {"b": "new"}}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, InputError])
def test_failure_leaves_nothing_and_the_earlier_result(error, earlier, tmp_path):
    def fail(path):
        with new_folder(path, CONTENTS) as folder:
            (folder / "a").write_text("half")
            raise error

    for path in (earlier, tmp_path / "other"):
        with pytest.raises(error):
            fail(path)
    assert listing(tmp_path) == {"out": {"a": "old"}}


def test_an_empty_folder_is_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", a="new")
    assert listing(tmp_path) == {"out": {"a": "new"}}


def test_other_files_are_never_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("old")
    (tmp_path / "out" / "thesis").write_text("mine")
    with pytest.raises(InputError, match="holds other files \\(thesis\\)"):
        write(tmp_path / "out", a="new")
    assert listing(tmp_path) == {"out": {"a": "old", "thesis": "mine"}}


def test_files_that_came_while_it_was_written_stay(earlier, tmp_path):
    def write_slowly():
        with new_folder(earlier, CONTENTS) as folder:
            (folder / "a").write_text("new")
            (earlier / "thesis").write_text("mine")

    with pytest.raises(InputError, match="holds other files \\(thesis\\)"):
        write_slowly()
    assert listing(tmp_path) == {"out": {"a": "old", "thesis": "mine"}}


def test_a_link_to_the_folder_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/out")
    for text in ("first", "second"):
        write(tmp_path / "out", a=text)
        assert (tmp_path / "out").is_symlink()
        assert listing(tmp_path / "disk") == {"out": {"a": text}}


@pytest.mark.parametrize("failing", ["first", "second"])
def test_a_rename_that_fails_leaves_the_earlier_result(failing, earlier, tmp_path, monkeypatch):
    rename = Path.rename
    monkeypatch.setattr("transclip_fast.store.atomic.exchanged", lambda *_: False)

    def fail(self, target):
        if (failing == "first") == (self.name == "out") and not self.name.endswith("replaced"):
            raise OSError(errno.EACCES, "")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(InputError, match="cannot be written \\(Permission denied\\)"):
        write(earlier, a="new")
    assert listing(tmp_path) == {"out": {"a": "old"}}


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("state", ["writing", "between the renames", "after the renames"])
def test_what_a_killed_run_left_is_cleaned(state, again, earlier, tmp_path):
    (tmp_path / ".out.lock").touch()
    if state == "writing":
        (tmp_path / ".out.partial" / "deep").mkdir(parents=True)
        (tmp_path / ".out.partial" / "a").write_text("half")
    elif state == "between the renames":
        earlier.rename(tmp_path / ".out.replaced")
        (tmp_path / ".out.partial").mkdir()
    else:
        (tmp_path / ".out.replaced").mkdir()
    if again:
        write(earlier, b="new")
        assert listing(tmp_path) == {"out": {"b": "new"}}
    else:
        with pytest.raises(RuntimeError), new_folder(earlier, CONTENTS):
            raise RuntimeError
        assert listing(tmp_path) == {"out": {"a": "old"}}


def test_two_writers(earlier, tmp_path):
    with new_folder(earlier, CONTENTS) as folder:
        (folder / "a").write_text("first")
        with pytest.raises(InputError, match="out: another process is writing this folder"):
            write(earlier, a="second")
        assert (folder / "a").read_text() == "first"
        write(tmp_path / "beside", a="third")
    assert listing(tmp_path) == {"out": {"a": "first"}, "beside": {"a": "third"}}


def test_a_lock_that_its_owner_has_just_removed_is_not_taken(tmp_path, monkeypatch):
    open_ = os.open

    def slow(path, *args, **kwargs):
        lock = open_(path, *args, **kwargs)
        if str(path).endswith(".lock"):
            os.unlink(path)
        return lock

    monkeypatch.setattr(os, "open", slow)
    with pytest.raises(InputError, match="another process"):
        write(tmp_path / "out", a="new")
    assert listing(tmp_path) == {}


def test_no_locks_on_this_file_system(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOLCK, "")

    monkeypatch.setattr("fcntl.flock", fail)
    with pytest.raises(InputError, match="No locks available"):
        write(tmp_path / "out", a="new")


def test_files_and_folder_are_synced_before_the_rename(tmp_path, monkeypatch):
    synced = []
    fsync, rename = os.fsync, Path.rename

    def record(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def check(self, target):
        assert set(synced) >= {"a", ".out.partial"}
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(Path, "rename", check)
    write(tmp_path / "out", a="new")
    assert synced[-1] == tmp_path.name


def test_no_exchange_of_names_on_this_file_system(earlier, tmp_path, monkeypatch):
    monkeypatch.setattr("transclip_fast.store.atomic.exchanged", lambda *_: False)
    write(earlier, a="new")
    assert listing(tmp_path) == {"out": {"a": "new"}}


def test_two_folders_are_exchanged(earlier, tmp_path):
    (tmp_path / "other").mkdir()
    if not exchanged(earlier, tmp_path / "other"):
        pytest.skip("this file system cannot exchange two names")
    assert listing(tmp_path) == {"out": {}, "other": {"a": "old"}}
    assert not exchanged(earlier, tmp_path / "missing")


def refuse_to_remove(monkeypatch, name):
    """Files of this name cannot be removed."""
    unlink = os.unlink

    def fail(path, *args, **kwargs):
        if Path(os.fsdecode(path)).name == name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        unlink(path, *args, **kwargs)

    monkeypatch.setattr(os, "unlink", fail)


@pytest.mark.parametrize("name", [".out.lock", "a", ".out.state"])
def test_what_cannot_be_removed_is_told_and_goes_the_next_time(
    name, earlier, tmp_path, monkeypatch
):
    (tmp_path / ".out.state").write_text("kept")
    obsolete = [tmp_path / ".out.state"]
    with monkeypatch.context() as patch:
        refuse_to_remove(patch, name)
        with (
            pytest.warns(UserWarning, match="cannot remove .* \\(Input/output error\\)"),
            new_folder(earlier, CONTENTS, obsolete=obsolete) as folder,
        ):
            (folder / "b").write_text("new")
    left = {file.name for file in tmp_path.iterdir()} - {"out"}
    assert len(left) == 1
    assert [file.name for file in earlier.iterdir()] == ["b"]
    clean(earlier, obsolete)
    assert listing(tmp_path) == {"out": {"b": "new"}}


def test_nothing_is_cleaned_under_the_lock_of_another(earlier, tmp_path):
    with locked(earlier), pytest.raises(InputError, match="another process"):
        clean(earlier, [])


def test_json_there_and_back(tmp_path):
    value = {"name": "ç", "list": [1, 2.5, None]}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "no such file"), (b"{", "as JSON"), (b"\xff", "as JSON"), (b"[1]", "a JSON object")],
)
def test_bad_json(content, expected, tmp_path):
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=f"x.json: .*{expected}"):
        read_json(tmp_path / "x.json")


def test_a_worker_does_not_keep_the_lock_of_a_killed_parent(tmp_path):
    program = f"""
import os, signal, time
from transclip_fast.store.atomic import locked
with locked({str(tmp_path / "out")!r}):
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    print("forked", flush=True)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as parent:
        parent.stdout.readline()
        parent.wait()
        try:
            write(tmp_path / "out", a="new")
        finally:
            os.killpg(parent.pid, signal.SIGKILL)
    assert (tmp_path / "out/a").read_text() == "new"
