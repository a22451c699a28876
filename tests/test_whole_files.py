"""Files that appear whole or not at all, whoever else writes them."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from transclip_fast.errors import InputError
from transclip_fast.whole_files import check_replaced, new_file, starts_with


def write(target, content, before=lambda: None):
    with new_file(target) as partial:
        partial.write_text(content)
        before()


def test_appears_only_when_it_is_whole(tmp_path):
    target = tmp_path / "a"
    write(target, "old")
    write(target, "new", lambda: target.read_text() == "old" or pytest.fail("too early"))
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_nothing_but_the_earlier_file(error, tmp_path):
    def fail():
        raise error

    write(tmp_path / "a", "old")
    for name in ("a", "b"):
        with pytest.raises(error):
            write(tmp_path / name, "half", fail)
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_the_second_of_two_writers_is_refused(tmp_path):
    target = tmp_path / "a"

    def second():
        with pytest.raises(InputError, match="a: another process is writing it; wait for it"):
            write(target, "second")

    write(target, "first", second)
    assert target.read_text() == "first"
    assert os.listdir(tmp_path) == ["a"]


def test_pairs_that_start_together(tmp_path):
    """Every file is that of one of the two, and one of them has written it."""
    start = Barrier(2)

    def writer(content):
        outcomes = []
        for pair in range(40):
            start.wait()
            try:
                write(tmp_path / str(pair), content * 10_000)
                outcomes.append(True)
            except InputError:
                outcomes.append(False)
        return outcomes

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(writer, "xy")
    assert all(a or b for a, b in zip(first, second, strict=True))
    contents = {file.read_text() for file in tmp_path.iterdir()}
    assert contents <= {"x" * 10_000, "y" * 10_000}
    assert len(os.listdir(tmp_path)) == 40


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # that threads are not forked
def test_what_a_killed_writer_left_is_written_over(tmp_path):
    """Its children do not keep its lock."""
    ready, wait = os.pipe(), os.pipe()
    writer = os.fork()
    if writer == 0:

        def killed():
            if os.fork() == 0:
                os.write(ready[1], str(os.getpid()).encode())
                os.close(wait[1])
                os.read(wait[0], 1)
                os._exit(0)
            signal.pause()

        write(tmp_path / "a", "half a file", killed)
    child = int(os.read(ready[0], 20))
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    try:
        assert os.listdir(tmp_path) == [".a.partial"]
        write(tmp_path / "a", "whole")
        assert (tmp_path / "a").read_text() == "whole"
        assert os.listdir(tmp_path) == ["a"]
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_link_in_its_place_is_not_followed(tmp_path):
    (tmp_path / ".a.partial").symlink_to("other")
    with pytest.raises(OSError, match="symbolic links"):
        write(tmp_path / "a", "new")
    assert not (tmp_path / "other").exists()


def test_only_a_file_of_the_kind_is_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "page").write_text("<p>")
    (tmp_path / "other").write_text("p")
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")

    def check(name):
        check_replaced(tmp_path / name, "page", lambda file: starts_with(file, b"<"))

    check("page")
    check("new")
    with pytest.raises(InputError, match="folder: is a folder; name a file"):
        check("folder")
    for name in ("other", "dangling", "pipe"):
        with pytest.raises(InputError, match=f"{name}: is there and is no page; name another file"):
            check(name)
