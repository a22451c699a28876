"""Compiled loops come from the cache only if they are whole and nobody else could write them."""

import ast
import hashlib
import os
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numba
import pytest

from transclip_fast import compiled_loops
from transclip_fast.compiled_loops import compiled

SUM = """
from transclip_fast.compiled_loops import compiled

@compiled("float32(float32[::1])", fastmath=True)
def total(row):
    found = 0.0
    for x in row:
        found += x
    return found
"""


def double(x):
    return 2 * x


class Marks:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def loaded():
    """Whether `double` came from the cache; it works in any case."""
    compiled_loops.trusted_folder.cache_clear()
    compiled_loops._warn_once.cache_clear()
    loop = compiled("int64(int64)")(double)
    assert loop(4) == 8
    return bool(loop.stats.cache_hits)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of compiled loops, with one."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    yield_to = tmp_path / "cache/transclip_fast"
    assert not loaded()
    assert len(list(yield_to.iterdir())) == 1
    yield yield_to
    compiled_loops.trusted_folder.cache_clear()


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_a_whole_file_is_loaded(folder, quiet):
    assert loaded()


def damaged(content, how):
    match how:
        case "empty":
            return b""
        case "cut":
            return content[: len(content) // 2]
        case "longer":
            return content + b"\0"
        case "zeros":
            return bytes(len(content))
        case "a bit":  # of the machine code, which would run
            place = len(content) - 500
            return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        case "a pickle":
            return pickle.dumps(double)


@pytest.mark.parametrize("how", ["empty", "cut", "longer", "zeros", "a bit", "a pickle"])
def test_a_damaged_file_is_compiled_again_with_one_warning(folder, how):
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damaged(whole, how))
    with pytest.warns(UserWarning, match=rf"{re.escape(str(folder))}: .*damaged") as found:
        assert not loaded()
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loaded()  # written anew


def test_other_sources_are_compiled_again(folder, quiet, monkeypatch):
    monkeypatch.setattr(compiled_loops, "_sources_sha256", lambda _: bytes(32))
    assert not loaded()
    assert loaded()
    assert len(list(folder.iterdir())) == 1  # nothing piles up


@pytest.mark.parametrize(
    ("place", "mode"), [("", 0o770), ("", 0o707), ("", 0o1777), ("..", 0o770), ("../..", 0o702)]
)
def test_what_others_can_write_is_not_unpickled(folder, place, mode, tmp_path, quiet):
    (file,) = folder.iterdir()
    data = compiled_loops.LoopCache(double).sources + pickle.dumps(Marks(tmp_path / "mark"))
    file.write_bytes(hashlib.sha256(data).digest() + data)
    opened = (folder / place).resolve()
    opened.chmod(mode)
    with pytest.warns(
        UserWarning, match=rf"others can write {re.escape(str(opened))}.*NUMBA_CACHE"
    ):
        assert not loaded()
    assert not (tmp_path / "mark").exists()


def test_a_folder_like_tmp_above_it_is_safe(folder, quiet):
    folder.parent.chmod(0o1777)
    assert loaded()


def test_a_file_that_others_can_write_is_not_unpickled(folder):
    (file,) = folder.iterdir()
    file.chmod(0o666)
    with pytest.warns(UserWarning, match="others can write it"):
        assert not loaded()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_another_users_folder_is_not_trusted(folder):
    os.chown(folder, 12345, 12345)
    with pytest.warns(UserWarning, match="others can write"):
        assert not loaded()


def test_without_a_folder_every_process_compiles(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="compiled in every process; .*NUMBA_CACHE_DIR") as found:
        assert not loaded()
    assert len(found) == 1
    compiled_loops.trusted_folder.cache_clear()


def test_the_next_folder_is_taken_if_the_first_is_not_safe(tmp_path, monkeypatch, quiet):
    (tmp_path / "site/__pycache__").mkdir(parents=True)
    (tmp_path / "site/__pycache__").chmod(0o777)
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new/home"))
    before = os.umask(0o002)  # of users with a group of their own
    try:
        found = compiled_loops.trusted_folder(str(tmp_path / "site"))
    finally:
        os.umask(before)
    assert found == tmp_path / "new/home/transclip_fast"


def test_a_full_disk_costs_the_cache_alone(folder, monkeypatch):
    for file in folder.iterdir():
        file.unlink()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="No space left.*compiled in every process") as found:
        assert not loaded()
    assert len(found) == 1
    assert not list(folder.iterdir())


def test_flags_whose_order_differs_between_processes_are_refused():
    with pytest.raises(ValueError, match=r"one flag, or True for all, not \['ninf', 'nnan'\]"):
        compiled("int64(int64)", fastmath={"nnan", "ninf"})


def test_code_does_not_depend_on_the_order_of_a_set(tmp_path):
    """A sum in any order has the same bits, whichever process compiled it."""
    code, file = set(), tmp_path / "loop.py"
    file.write_text(SUM)
    for seed in "12":
        folder = tmp_path / seed
        environment = {**os.environ, "PYTHONHASHSEED": seed, "NUMBA_CACHE_DIR": str(folder)}
        subprocess.run([sys.executable, file], env=environment, check=True)
        (compiled_file,) = folder.rglob("*.total.*")
        code.add(compiled_file.read_bytes())
    assert len(code) == 1


def test_constants_that_loops_compile_in_are_hashed(monkeypatch):
    """Else a loop that was compiled with others would come from the cache."""
    package, hashed = Path(compiled_loops.__file__).parent, []
    monkeypatch.setattr(compiled_loops, "_sources_sha256", lambda files: hashed.append(files))
    imported = []
    for file in package.rglob("*.py"):
        text = file.read_text()
        if "@compiled(" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            ours = isinstance(node, ast.ImportFrom) and node.module.startswith("transclip_fast.")
            if ours and any(alias.name.isupper() for alias in node.names):
                imported.append(package.parent / f"{node.module.replace('.', '/')}.py")
    compiled_loops.LoopCache(double)
    assert package / "types.py" in imported
    assert set(imported) <= {*hashed[0]}
