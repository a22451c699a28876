"""Every image below a folder is listed, and what is left out is counted and named."""

from __future__ import annotations

import io
import os
import re
import shutil
import stat

import pytest
from PIL import Image

from tests.encode.test_encoder import encode
from transclip_fast.encode.pixels import decode, suffixes
from transclip_fast.encode.sources import open_source
from transclip_fast.encode.walk import walk_images
from transclip_fast.errors import InputError


def left_out(folder, line):
    """The warning that names exactly this."""
    return pytest.warns(UserWarning, match=re.escape(f"{folder}: {line}") + "$")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of formats that Pillow gives up
def test_all_that_pillow_writes_and_reads_is_listed(tmp_path):
    picture, names = Image.new("RGB", (40, 30), (200, 100, 50)), []
    for suffix, kind in sorted(Image.registered_extensions().items()):
        content = io.BytesIO()
        try:
            picture.save(content, kind)
            Image.open(content).load()
        except (KeyError, OSError, ValueError, AttributeError):  # not written, or not from colours
            continue
        if kind not in ("EPS", "PDF"):  # programs, not pixels
            names.append(f"x{suffix}")
            (tmp_path / names[-1]).write_bytes(content.getvalue())
            assert decode(content.getvalue()).shape[2] == 3
    assert {"x.jpg", "x.jfif", "x.jpe", "x.png", "x.bmp", "x.gif", "x.tif", "x.jp2"} < {*names}
    (tmp_path / "x.jpg").rename(tmp_path / "x.JpG")
    assert {key.lower() for key in open_source(tmp_path).keys} == {*names}


def test_no_program_runs_on_an_image():
    assert suffixes().isdisjoint({".eps", ".ps", ".pdf"})
    content = io.BytesIO()
    Image.new("RGB", (40, 30)).save(content, "EPS")
    with pytest.raises(OSError, match="cannot identify"):
        decode(content.getvalue())


def test_what_is_left_out_is_counted_by_suffix(images):
    folder = images(3)
    for name in ("a.heic", "cat/b.HEIC", "README", "notes.tx\nt"):
        (folder / name).touch()
    line = "4 files left out, not images that can be read here: .heic 2, '.tx\\nt 1', no suffix 1"
    with left_out(folder, line):
        assert len(open_source(folder)) == 3
    for name in "abcdefgh":
        (folder / f"x.{name}").touch()
    with pytest.warns(UserWarning, match=r"12 files .*, \.f 1, \.g 1, \.\.\.$"):
        open_source(folder)


def test_hidden_and_system_folders_and_files_are_left_out(images, tmp_path):
    folder = images(3)
    folder = folder.rename(tmp_path / ".hidden")  # the one that is named is not
    picture = folder / "cat/000.png"
    for name in (".ipynb_checkpoints", "cat/@eaDir", "__MACOSX/cat", ".git/objects"):
        (folder / name).mkdir(parents=True)
        shutil.copy(picture, folder / name / "a.png")
    (folder / "linked").symlink_to(folder / ".git")
    for name in (".h.png", "cat/._000.png", ".DS_Store", "cat/a.b.png"):
        shutil.copy(picture, folder / name)
    line = (
        "3 files left out, not images that can be read here: hidden 3; 4 hidden or system folders "
        f"left out: {folder}/.git, {folder}/.ipynb_checkpoints, {folder}/__MACOSX, "
        f"{folder}/cat/@eaDir; "
        f"1 link to folders, not followed without --follow-links: {folder}/linked"
    )
    with left_out(folder, line):
        source = open_source(folder)
    assert source.keys == ["cat/000.png", "cat/002.png", "cat/a.b.png", "dog/001.png"]


def test_many_subfolders_are_not_compared_with_each_other(monkeypatch, tmp_path):
    compared = []

    class Name(str):
        def __eq__(self, other):
            compared.append(other)
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    names = [Name(number) for number in range(1000)]
    monkeypatch.setattr(os, "walk", lambda *_, **__: [(str(tmp_path), [*names], [])])
    for follow_links in (True, False):
        walk_images(tmp_path, follow_links)
    assert len(compared) < 10 * len(names)


def test_a_folder_of_hidden_images_says_so(tmp_path):
    (tmp_path / "@eaDir").mkdir()
    message = (
        r"holds no images that can be read here; 1 hidden or system folder left out: .*/@eaDir"
    )
    with pytest.raises(InputError, match=message):
        open_source(tmp_path)


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    (tmp_path / "a.heic").touch()
    line = (
        "holds no images that can be read here; 1 file left out, not an image that can be read "
        "here: .heic 1"
    )
    with pytest.raises(InputError, match=line):
        open_source(tmp_path)


def test_links_to_folders(images, tmp_path):
    folder = images(3)
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    (folder / "cat/000.png").rename(elsewhere / "deep/a.png")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "cat/000.png").symlink_to(elsewhere / "deep/a.png")  # a link to a file is a file
    line = f"1 link to folders, not followed without --follow-links: {folder}/linked"
    with left_out(folder, line):
        assert open_source(folder).keys == ["cat/000.png", "cat/002.png", "dog/001.png"]
    source = open_source(folder, follow_links=True)
    expected = ["cat/000.png", "cat/002.png", "dog/001.png", "linked/deep/a.png"]
    assert source.keys == expected
    assert source.read(3) == source.read(0)


@pytest.mark.parametrize("target", [".", "..", "cat"])
def test_links_that_lead_back_end(images, tmp_path, target):
    folder = images(2)
    (folder / "cat/back").symlink_to(folder / target)
    (tmp_path / "other").mkdir()
    (folder / "dog/there").symlink_to(tmp_path / "other")
    (tmp_path / "other/again").symlink_to(folder / "dog")
    line = f"2 links to a folder above, not followed: {folder}/cat/back, {folder}/dog/there/again"
    with left_out(folder, line):
        source = open_source(folder, follow_links=True)
    assert source.keys == ["cat/000.png", "dog/001.png"]


def test_what_is_no_regular_file_fails_and_does_not_wait(images, backbone, tmp_path):
    folder = images(3)
    os.mkfifo(folder / "cat/pipe.jpg")
    os.mkfifo(os.fsencode(folder / "cat") + b"/caf\xe9.jpg")
    (folder / "cat/zero.jpg").symlink_to("/dev/zero")
    (folder / "cat/loop.jpg").symlink_to(folder / "cat/loop.jpg")
    (folder / "cat/nothing.jpg").symlink_to(folder / "nothing")
    with open(folder / "dog/huge.png", "wb") as file:
        file.truncate(2**40)  # takes no space on the disk
    failures = encode(folder, backbone, tmp_path / "out").failures
    assert {failure.key: failure.reason.rpartition(": ")[2] for failure in failures} == {
        "cat/caf\\xe9.jpg": "is no regular file",
        "cat/loop.jpg": f"'{folder}/cat/loop.jpg'",
        "cat/nothing.jpg": f"'{folder}/cat/nothing.jpg'",
        "cat/pipe.jpg": "is no regular file",
        "cat/zero.jpg": "is no regular file",
        "dog/huge.png": "has 1,099,511,627,776 bytes, more than 1,073,741,824; compress it",
    }


@pytest.mark.parametrize("name", ["a.tar", "a.txt", "a.csv", "a.parquet", "a.json", "in/a.tar"])
def test_a_source_that_is_no_regular_file_is_refused(tmp_path, name):
    (tmp_path / "in").mkdir()
    os.mkfifo(tmp_path / name)
    assert stat.S_ISFIFO(os.stat(tmp_path / name).st_mode)
    path = tmp_path / "in" if name.startswith("in") else tmp_path / name
    with pytest.raises(InputError, match=f"{name}: is no regular file"):
        open_source(path)


def test_a_folder_that_is_called_like_a_tar_is_a_folder(images):
    folder = images(2)
    (folder / "dog").rename(folder / "x.tar")
    assert open_source(folder).keys == ["cat/000.png", "x.tar/001.png"]


def test_what_is_written_into_the_folder_holds_no_images(images, backbone):
    folder = images(3)
    written = encode(folder, backbone, folder / "out")
    line = "5 files left out, not images that can be read here: .npy 2, .csv 1, .json 1, .parquet 1"
    with left_out(folder, line):
        again = encode(folder, backbone, folder / "out")
    assert (again.n_rows, again.n_kept, written.n_rows) == (3, 3, 3)
