"""Lists of images: how their columns are found, and lists that lead nowhere."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from transclip_fast.encode.sources import open_source, resolve_labels
from transclip_fast.errors import InputError

NAMES = ["cat", "dog"]


@pytest.fixture
def photos(tmp_path):
    """A folder with the files a.png and b c.png."""
    for name in ("a.png", "b c.png"):
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def listed(folder, text, name="list.csv"):
    (folder / name).write_text(text, encoding="utf-8")
    return open_source(folder / name)


@pytest.mark.parametrize(
    "text",
    [
        "path,label\na.png,1\nb c.png,0\n",
        "path, label\na.png, 1\nb c.png, 0\n",
        "\ufeffpath,labels\na.png,1\nb c.png,0\n\n",
        " Label ,PATH\n dog, a.png \n cat, b c.png \n",
        'note,path,label\n"1,2",a.png,dog\n,"b c.png",Cat\n',
        "path,label,labels\r\na.png,1,9\r\nb c.png,0,9\r\n",
    ],
)
def test_columns_as_people_spell_them(text, photos):
    source = listed(photos, text)
    assert source.keys == ["a.png", "b c.png"]
    assert source.read(1) == b"b c.png"
    assert resolve_labels(source, NAMES).tolist() == [1, 0]


@pytest.mark.parametrize("labels", [["dog", None], [1, None], [1.0, None]])
def test_rows_without_a_label(labels, photos):
    pq.write_table(pa.table({"path": ["a.png", "b c.png"], "label": labels}), photos / "l.parquet")
    assert resolve_labels(open_source(photos / "l.parquet"), NAMES).tolist() == [1, -1]
    unlabelled = listed(photos, "path,label\na.png,\n")
    assert resolve_labels(unlabelled, NAMES) is None


@pytest.mark.parametrize("paths", [[0, None], [0.0, float("nan")]])
def test_a_row_without_a_path(paths, photos):
    pq.write_table(pa.table({"path": paths}), photos / "l.parquet")
    with pytest.raises(InputError, match="row 1 has no path"):
        open_source(photos / "l.parquet")


def test_columns_that_are_not_read_are_named(photos):
    with pytest.warns(UserWarning, match=r"list\.csv: has no column 'label'; not read: target, x"):
        source = listed(photos, "path,target,x\na.png,1,2\n")
    assert source.labels is None


@pytest.mark.parametrize("line", ["{} 0", "{}\t0", "{},0", "{}, 0", "{} polar bear"])
@pytest.mark.parametrize("name", ["a.png", "b c.png"])
def test_a_txt_with_labels(line, name, photos):
    with pytest.raises(InputError, match=rf"but '{name}' is; .* labels go in a \.csv with the col"):
        listed(photos, line.format(name) + "\n", "list.txt")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "list.txt",
            "x/a.png\nx/b.png\n",
            "none of its 2 files exists, the first should be .*x/a.png",
        ),
        (
            "list.csv",
            "path,label\nx/a.png,0\n",
            "none of its 1 files exists, the first should be .*x/a",
        ),
        ("list.csv", "a.png,0\nb c.png,1\n", "has no column 'path', only a.png, 0"),
        ("list.csv", "path,label\na.png,0\n,1\n", "row 1 has no path"),
        ("list.csv", "path,label\na.png,0\nb, c.png,1\n", "line 3 has 3 values, the first line 2"),
        ("list.csv", "path,label, label\na.png,0,1\n", "several columns 'label'"),
    ],
)
def test_lists_that_lead_nowhere(name, text, message, photos):
    with pytest.raises(InputError, match=message):
        listed(photos, text, name)


def test_single_files_that_are_missing_fail_later(photos):
    assert len(listed(photos, "none.png\nb c.png\n", "list.txt")) == 2
    source = listed(photos, "../none\0.png\nb c.png\n", "list.txt")
    with pytest.raises(ValueError, match="null byte"):
        source.read(0)


@pytest.mark.parametrize("again", ["a.png", "./a.png", ".//a.png", "x/../a.png", "{folder}/a.png"])
@pytest.mark.parametrize("labels", [("cat", "dog"), ("cat", ""), ("0", "1")])
def test_an_image_with_two_labels_is_refused(again, labels, photos):
    (photos / "x").mkdir()
    again = again.format(folder=photos)
    text = f"path,label\na.png,{labels[0]}\nb c.png,cat\n{again},{labels[1]}\n"
    message = rf"list.csv: rows 0 and 2 are one image, .*a.png, .* '{labels[0]}' and '{labels[1]}'"
    with pytest.raises(InputError, match=message):
        listed(photos, text)


def test_images_that_are_there_again_are_counted(photos):
    message = r"list.csv: 2 of 4 rows are images of earlier rows, first row 2 \(.*a.png, as row 0\)"
    with pytest.warns(UserWarning, match=message):
        source = listed(photos, "path,label\na.png,cat\nb c.png,dog\n./a.png,Cat\nb c.png,dog\n")
    assert source.keys == ["a.png", "b c.png", "./a.png", "b c.png"]
    with pytest.warns(UserWarning, match=r"list.txt: 1 of 2 rows are images of earlier rows"):
        assert len(listed(photos, "a.png\na.png\n", "list.txt")) == 2


def test_a_path_through_a_link_is_not_taken_for_another(photos):
    (photos / "far" / "in").mkdir(parents=True)
    (photos / "far" / "a.png").write_bytes(b"another")
    (photos / "link").symlink_to(photos / "far" / "in")
    source = listed(photos, "path,label\na.png,0\nlink/../a.png,1\n")
    assert source.read(1) == b"another"


def test_a_split_gives_an_image_one_label(photos):
    entries = '["a.png", 0, "cat"], ["b c.png", 1, "dog"], ["./a.png", 1, "dog"]'
    with pytest.raises(InputError, match=r"split.json: rows 0 and 2 are one image"):
        listed(photos, f'{{"test": [{entries}]}}', "split.json")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["x", "x"], "rows 0 and 1 have the key 'x'; give each row its own"),
        (["x", ""], "row 1 has no key; give each row one, or drop the column"),
        ([None, "x"], "row 0 has no key"),
        ([1.0, float("nan")], "row 1 has no key"),
    ],
)
def test_every_row_has_a_key_of_its_own(keys, message, photos):
    pq.write_table(pa.table({"path": ["a.png", "b c.png"], "key": keys}), photos / "l.parquet")
    with pytest.raises(InputError, match=f"l.parquet: {message}"):
        open_source(photos / "l.parquet")


def test_a_column_without_a_name_is_named(photos):
    with pytest.warns(UserWarning, match="not read: one without a name, x$"):
        listed(photos, "path,,x\na.png,1,2\n")


def test_numbers_that_may_be_names_of_classes(photos):
    pq.write_table(pa.table({"path": ["a.png", "b c.png"], "label": [1, 0]}), photos / "l.parquet")
    with pytest.warns(UserWarning, match="labels: 1 is taken as a position, of class '2'"):
        assert resolve_labels(open_source(photos / "l.parquet"), ["1", "2"]).tolist() == [1, 0]


def test_numbers_of_a_split_are_positions(photos, recwarn):
    split = '{"test": [["a.png", 1, "2"], ["b c.png", 0, "1"]]}'
    assert resolve_labels(listed(photos, split, "split.json"), ["1", "2"]).tolist() == [1, 0]
    assert not recwarn.list
