"""Images in a folder for each class, and what stays as it was."""

from __future__ import annotations

import json
import os
import shutil
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.encode.test_sources import write_tar
from tests.report.conftest import NAMES, label
from transclip_fast.cli import main
from transclip_fast.cli.session import counted
from transclip_fast.cli.summary import sorted_into
from transclip_fast.errors import InputError
from transclip_fast.report.sorting import MARK, Sorted, folder_names, safe_name, sort_images
from transclip_fast.report.thumbnails import metadata_of
from transclip_fast.store.arrays import file_sha256
from transclip_fast.store.atomic import read_json, write_json

FOLDERS = [
    "_script_alert(2)__script_",
    "___img src=y onerror=alert(3)_",
    "=cmd()_'_c calc'!A0",
    "line_break",
    "_reversed",
    "plain",
]


def rewritten(result, **columns):
    """A result folder with other columns in its predictions."""
    file = result / "predictions.parquet"
    table = pq.read_table(file)
    for name, values in columns.items():
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), name, pa.array(values))
        else:
            table = table.append_column(name, pa.array(values))
    pq.write_table(table, file)
    run = read_json(result / "run.json")
    run["sha256"][file.name] = file_sha256(file)
    write_json(result / "run.json", run)


def tree(folder):
    """Every path below a folder but the mark, with where it leads or its content."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        for path in folder.rglob("*")
        if (path.is_symlink() or path.is_file()) and path.name != MARK
    }


def test_links_by_label(made, tmp_path):
    labels = np.arange(len(made.keys)) % len(NAMES)
    rewritten(made.result, label=labels)
    found = sort_images(made.result, made.folder / "features", tmp_path / "sorted")
    assert (found.n_images, found.n_folders, found.n_copied) == (len(made.keys), len(NAMES), 0)
    images = pq.read_table(made.folder / "features/metadata").column("path").to_pylist()
    links = tree(tmp_path / "sorted")
    assert len(links) == len(images)
    by_folder = {name: set() for name in FOLDERS}
    for link, target in links.items():
        by_folder[link.split("/")[0]].add(target)
    for k, name in enumerate(FOLDERS):
        assert by_folder[name] == {
            os.path.abspath(images[row]) for row in np.flatnonzero(labels == k)
        }


def test_rejected_images_have_their_own_folder(made, tmp_path):
    rejected = np.arange(len(made.keys)) % 4 == 1
    rewritten(made.result, rejected=rejected)
    found = sort_images(made.result, made.folder / "features", tmp_path / "sorted")
    assert found.n_rejected == len(os.listdir(tmp_path / "sorted/rejected")) == rejected.sum()
    assert len(tree(tmp_path / "sorted")) == len(made.keys)


def test_two_images_of_one_name_are_kept_apart(images, tmp_path):
    source = images(3)
    (tmp_path / "many").mkdir()
    for place, name in enumerate(("a/x.png", "b/x.png", "c/X.PNG", "c/x (1).png", "d/x.b")):
        file = tmp_path / "many" / name
        file.parent.mkdir(exist_ok=True)
        shutil.copy(source / ("cat/000.png", "dog/001.png", "cat/002.png")[place % 3], file)
    files = [str(path) for path in sorted((tmp_path / "many").rglob("*.*"))]
    (tmp_path / "list.txt").write_text("\n".join(files))
    made = label(tmp_path / "list.txt", tmp_path)
    rewritten(made.result, label=np.zeros(5, int))
    sort_images(made.result, made.folder / "features", tmp_path / "sorted")
    links = tree(tmp_path / "sorted")
    assert sorted(links.values()) == files
    names = [Path(link).name for link in links]
    assert sorted(names) == ["X (2).PNG", "x (1) (3).png", "x (1).png", "x.b", "x.png"]


def test_a_name_that_is_no_utf_8(images, tmp_path):
    folder = images(2)
    name = os.fsencode(folder) + b"/cat/\xe9t\xe9.png"
    os.rename(folder / "cat/000.png", name)
    made = label(folder, tmp_path)
    found = sort_images(made.result, made.folder / "features", tmp_path / "sorted")
    assert found.n_images == 2
    assert {os.fsencode(target) for target in tree(tmp_path / "sorted").values()} > {name}


def test_images_of_tars_are_copied(images, tmp_path):
    source = images(2)
    first, second = ((source / key).read_bytes() for key in ("cat/000.png", "dog/001.png"))
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars/0.tar", [("s/x.PNG", first), ("y.png", second)])
    write_tar(tmp_path / "tars/1.tar", [("x.png", second)])
    made = label(tmp_path / "tars", tmp_path)
    rewritten(made.result, label=[5, 5, 5])
    found = sort_images(made.result, made.folder / "features", tmp_path / "sorted")
    assert (found.n_images, found.n_copied) == (3, 3)
    expected = {"plain/x.PNG": first, "plain/y.png": second, "plain/x (2).png": second}
    assert tree(tmp_path / "sorted") == expected


def test_what_it_wrote_is_replaced_and_nothing_else(made, tmp_path):
    arguments = made.result, made.folder / "features", tmp_path / "sorted"
    sort_images(*arguments)
    before = tree(tmp_path / "sorted")
    rewritten(made.result, label=[5] * len(made.keys))
    sort_images(*arguments)
    after = tree(tmp_path / "sorted")
    assert after != before
    assert {link.split("/")[0] for link in after} == {"plain"}
    assert [path.name for path in tmp_path.glob(".*")] == []


@pytest.mark.parametrize("change", ["moved", "added", "folder", "removed", "rewritten"])
def test_what_a_person_changed_is_not_replaced(change, made, tmp_path):
    arguments = made.result, made.folder / "features", tmp_path / "sorted"
    sort_images(*arguments)
    link = sorted((tmp_path / "sorted").rglob("*.png"))[0]
    if change == "moved":
        link.rename(tmp_path / "sorted" / link.name)
    elif change == "added":
        (link.parent / "notes.txt").touch()
    elif change == "folder":
        (link.parent / "mine").mkdir()
    else:
        link.unlink()
        if change == "rewritten":
            link.touch()
    there = tree(tmp_path / "sorted")
    with pytest.raises(InputError, match="holds other files, or was changed since"):
        sort_images(*arguments)
    assert tree(tmp_path / "sorted") == there


def test_images_that_are_gone_or_changed_are_counted(made_once, tmp_path):
    shutil.copytree(made_once.folder / "images", tmp_path / "images")
    made = label(tmp_path / "images", tmp_path)
    os.remove(tmp_path / "images/plain/00.png")
    with open(tmp_path / "images/plain/01.png", "ab") as file:
        file.write(b"more")
    with pytest.warns(UserWarning, match="sorted: 1 of") as warned:
        found = sort_images(made.result, made.folder / "features", tmp_path / "sorted")
    n = len(made.keys)
    assert [str(warning.message).partition("sorted: ")[2] for warning in warned] == [
        f"1 of {n} images are not where they were encoded, e.g. plain/00.png; they are left out",
        f"1 of {n} images are not as they were encoded, e.g. plain/01.png; they are left out",
    ]
    assert found.n_images == len(tree(tmp_path / "sorted")) == n - 2
    before = tree(tmp_path / "sorted")
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(InputError, match="the images are not where they were encoded; bring"):
        sort_images(made.result, made.folder / "features", tmp_path / "sorted")
    assert tree(tmp_path / "sorted") == before


def test_paths_of_some_rows_in_several_shards(tmp_path):
    (tmp_path / "metadata").mkdir()
    for number in range(3):
        table = pa.table({"key": ["a", "b"], "path": [f"{number}/a", f"{number}/b"]})
        pq.write_table(table, tmp_path / f"metadata/metadata_{number:05}.parquet")
    assert metadata_of(tmp_path, [0])[0] == {0: "0/a"}
    assert metadata_of(tmp_path, [1, 4])[0] == {1: "0/b", 4: "2/a"}


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("café", "café"),
        (unicodedata.normalize("NFD", "café"), "café"),
        ("polar bear", "polar bear"),
        ("..", "_"),
        (".", "_"),
        ("../../etc", "_._.._etc"),
        ("/", "_"),
        ("", "_"),
        (".hidden", "_hidden"),
        ("a/b\\c:d", "a_b_c_d"),
        ("nul\0", "nul_"),
        ("NUL", "NUL_"),
        ("com1.x", "com1.x_"),
        ("trailing. ", "trailing"),
        ("a\u202eb\n", "a_b_"),
        ("\ud800", "_"),
        ("é" * 300, "é" * 100),
    ],
)
def test_safe_names(name, safe, tmp_path):
    assert safe_name(name) == safe
    (tmp_path / safe).mkdir()
    assert [path.name for path in tmp_path.iterdir()] == [safe]


def test_names_of_folders_are_distinct_where_case_does_not_count():
    names = [
        "cat",
        "Cat",
        "a/b",
        "a:b",
        "rejected",
        MARK,
        "e\u0301",
        "\u00e9",
        "cat (1)",
        "x" * 300,
        "x" * 301,
    ]
    found = folder_names(names)
    assert len({unicodedata.normalize("NFC", name).casefold() for name in found}) == len(names)
    assert found[:8] == [
        "cat",
        "Cat (1)",
        "a_b",
        "a_b (3)",
        "rejected (4)",
        "sorted.json (5)",
        "é",
        "é (7)",
    ]
    assert max(len(name.encode()) for name in found) < 230


def command(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["transclip-fast", *map(str, words)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main()
    ran = capsys.readouterr()
    return stopped.value.code or 0, ran.out, ran.err


def test_the_command(made, tmp_path, monkeypatch, capsys):
    words = "solve", made.folder / "features", "--out", tmp_path / "again", "--reject", 0.2
    code, out, err = command(monkeypatch, capsys, *words, "--sort-into", tmp_path / "sorted")
    assert code == 0
    assert err == "warning: the weights are random (--pretrained none): the labels mean nothing\n"
    rejected = len(os.listdir(tmp_path / "sorted/rejected"))
    folders = len({*os.listdir(tmp_path / "sorted")} - {MARK, "rejected"})
    n, last = len(made.keys), out.splitlines()[-1]
    assert last == (
        f"{n} images linked into {counted(folders, 'class folder')} of {tmp_path / 'sorted'}/, "
        f"the {rejected} rejected into rejected/"
    )
    assert "sorted" not in read_json(tmp_path / "again/run.json")


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (Sorted(1, 1, 0, 0), "1 image linked into 1 class folder of sorted/"),
        (Sorted(3, 2, 3, 0), "3 images copied into 2 class folders of sorted/"),
        (
            Sorted(5, 3, 2, 1),
            "3 images linked and 2 images copied into 2 class folders of sorted/, the 1 rejected "
            "into rejected/",
        ),
    ],
)
def test_what_was_done_is_said(found, line, monkeypatch):
    monkeypatch.setattr("transclip_fast.cli.summary.sort_images", lambda *_: found)
    for target in ("sorted", "sorted/"):
        assert sorted_into(target, "result", "features")[1] == [line]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("features/sorted", "is in .*features; name a folder outside"),
        ("again/sorted", "is in .*again; name a folder outside"),
        ("images", "holds other files"),
        ("features/manifest.json", "is in .*features"),
    ],
)
def test_a_target_is_refused_before_the_solve(target, message, made, tmp_path, monkeypatch, capsys):
    (made.folder / "again").mkdir()
    before = {path: path.stat().st_mtime_ns for path in made.folder.rglob("*")}
    words = "solve", made.folder / "features", "--out", made.folder / "again"
    code, out, err = command(monkeypatch, capsys, *words, "--sort-into", made.folder / target)
    assert (code, out, err.count("\n")) == (2, "", 1)
    with pytest.raises(InputError, match=message):
        raise InputError(err)
    assert {path: path.stat().st_mtime_ns for path in made.folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("target", "out", "message"),
    [
        ("r/sorted", "r", "is in .*r; name a folder outside"),
        ("r", "r", "is in .*r; name a folder outside"),
        ("s", "s/r", "is for images alone, not for .*s/r; name a new folder"),
        ("file", "r", "is a file; name a folder"),
        ("file/s", "r", "file is a file; name another folder"),
    ],
)
def test_a_target_is_refused_though_nothing_is_there_yet(
    target, out, message, made, monkeypatch, capsys
):
    (made.folder / "file").touch()
    before = {path: path.stat().st_mtime_ns for path in made.folder.rglob("*")}
    words = "solve", made.folder / "features", "--out", made.folder / out
    code, out, err = command(monkeypatch, capsys, *words, "--sort-into", made.folder / target)
    assert (code, out, err.count("\n")) == (2, "", 1)
    with pytest.raises(InputError, match=message):
        raise InputError(err)
    assert {path: path.stat().st_mtime_ns for path in made.folder.rglob("*")} == before


def test_what_is_left_out_is_in_the_json(made_once, tmp_path, monkeypatch, capsys):
    shutil.copytree(made_once.folder / "images", tmp_path / "images")
    made = label(tmp_path / "images", tmp_path)
    os.remove(tmp_path / "images/plain/00.png")
    words = "solve", made.folder / "features", "--out", tmp_path / "again", "--json"
    code, out, err = command(monkeypatch, capsys, *words, "--sort-into", tmp_path / "sorted")
    assert code == 0
    *earlier, last = json.loads(out)["warnings"]
    assert last.endswith("plain/00.png; they are left out")
    assert earlier == read_json(tmp_path / "again/run.json")["warnings"]
    assert err.count(last) == 1


def test_a_target_in_the_folder_of_images_is_refused(made, monkeypatch, capsys):
    """The next encode would find each image there a second time."""
    path = metadata_of(made.folder / "features", [0])[0][0]
    images = Path(path.removesuffix(made.keys[0]))
    words = "solve", made.folder / "features", "--out", made.folder / "again"
    code, out, err = command(monkeypatch, capsys, *words, "--sort-into", images / "a" / "sorted")
    assert (code, out) == (2, "")
    assert f"sorted: is in {images}; name a folder outside of it" in err
    assert not (images / "a").exists()


def test_features_without_paths_are_refused(tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "f.npz", image_features=np.eye(3), text_features=np.eye(3))
    words = "solve", tmp_path / "f.npz", "--out", tmp_path / "r", "--sort-into", tmp_path / "s"
    code, _, err = command(monkeypatch, capsys, *words)
    assert code == 2
    assert "f.npz: does not tell where its images are; give a folder that" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.npz"]
