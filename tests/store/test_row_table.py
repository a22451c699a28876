"""Which rows of an earlier folder are the same images, against plain loops."""

from __future__ import annotations

import io

import numpy as np
import pyarrow.parquet as pq
import pytest

from transclip_fast.store.row_table import RowTable


def table(names, stamps, contents=None, own_keys=False, root="a"):
    stamps = np.array(stamps, np.int64).reshape(-1, 2)
    hashes = None if contents is None else lambda: contents
    return RowTable(names, [f"{root}/{name}" for name in names], None, stamps, hashes, own_keys)


def stored(rows, sha256):
    content = rows.parquet(range(len(rows.keys)), sha256)
    return pq.read_table(io.BytesIO(content))


@pytest.mark.parametrize("by_content", [False, True])
def test_same_images_are_found(by_content):
    draw = np.random.default_rng(0)

    def make(number):
        names = [f"ü{k}" for k in draw.permutation(40)[:number]]
        stamps = draw.integers(0, 2, (number, 2))
        return names, stamps, [str(k) for k in draw.integers(0, 3, number)]

    (old_names, old_stamps, old), (names, stamps, new) = make(30), make(25)
    before = stored(table(old_names, old_stamps), old)
    now = table(names, stamps, new if by_content else None)
    rows = [int(row) for row in draw.permutation(25)[:20]]
    expected = []
    for row in rows:
        place = old_names.index(names[row]) if names[row] in old_names else -1
        if by_content:
            same = place >= 0 and old[place] == new[row]
        else:
            same = place >= 0 and (old_stamps[place] == stamps[row]).all()
        expected.append(place if same else -1)
    found = now.find(rows, before)
    assert found.tolist() == expected
    assert 0 < sum(place >= 0 for place in expected) < 20
    assert set(now.absent(before)) == set(old_names) - set(names)


def test_rows_match_in_their_order_only():
    names, stamps = ["x", "y", "z"], [[1, 1], [2, 2], [3, 3]]
    before = stored(table(names, stamps), ["p", "q", "r"])
    now = table(names, stamps, root="moved")
    assert now.matches([0, 1, 2], before)
    assert not now.matches([0, 2, 1], before)
    assert not now.matches([0, 1], before)
    assert not table(names, [[1, 1], [2, 2], [3, 4]]).matches([0, 1, 2], before)
    assert table(names, [[0, 0]] * 3, ["p", "q", "r"]).matches([0, 1, 2], before)
    assert not table(names, stamps, ["p", "q", "s"]).matches([0, 1, 2], before)


def test_keys_of_the_user_count_with_their_paths():
    names, stamps = ["0", "1"], [[1, 1], [1, 1]]
    before = stored(table(names, stamps, own_keys=True), ["p", "q"])
    assert table(names, stamps, own_keys=True).matches([0, 1], before)
    assert not table(names, stamps, own_keys=True, root="b").matches([0, 1], before)
    assert table(names, stamps, own_keys=True, root="b").find([0, 1], before).tolist() == [-1, -1]


def test_metadata_without_hashes_are_of_other_images():
    before = stored(table(["x"], [[1, 1]]), None)
    assert table(["x"], [[1, 1]]).find([0], before).tolist() == [0]
    assert table(["x"], [[1, 1]], ["p"]).find([0], before).tolist() == [-1]


def test_a_recorded_path_that_is_another_file_is_no_match(tmp_path):
    for folder in ("monday", "tuesday"):
        (tmp_path / folder).mkdir()
        for name in "xyz":
            (tmp_path / folder / name).write_text(folder)
    (tmp_path / "monday/y").unlink()  # moved
    (tmp_path / "monday/z").unlink()
    (tmp_path / "monday/z").hardlink_to(tmp_path / "tuesday/z")
    names, stamps = ["x", "y", "z"], [[1, 1], [2, 2], [3, 3]]
    before = stored(table(names, stamps, root=tmp_path / "monday"), ["p", "q", "r"])
    now = table(names, stamps, root=tmp_path / "tuesday")
    assert now.find([0, 1, 2], before).tolist() == [-1, 1, 2]
    assert not now.matches([0, 1, 2], before)
    by_content = table(names, stamps, ["p", "q", "r"], root=tmp_path / "tuesday")
    assert by_content.find([0, 1, 2], before).tolist() == [0, 1, 2]
    assert by_content.matches([0, 1, 2], before)
    (tmp_path / "monday/x").unlink()
    assert now.matches([0, 1, 2], before)
