"""No row of a webdataset tar is lost, doubled or swapped in silence, whatever the tar is like."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections import Counter

import pytest
from PIL import Image

from tests.encode.test_sources import write_tar
from tests.tiny import tiny_backbone
from transclip_fast.encode import tars
from transclip_fast.encode.folder import encode_source
from transclip_fast.encode.pixels import suffixes
from transclip_fast.encode.sources import open_source, resolve_labels
from transclip_fast.errors import InputError
from transclip_fast.store.features import load_features

BLOCK = 512


def header(name, size=0, **fields):
    """A member's header, with a right checksum."""
    info = tarfile.TarInfo(name)
    info.size = size
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def member(name, content=b"", **fields):
    """Header and data of a member."""
    return header(name, len(content), **fields) + content + bytes(-len(content) % BLOCK)


def patched(block, at, value):
    """A header with other bytes at a place, and the checksum of those."""
    block = block[:at] + value + block[at + len(value) :]
    total = sum(block[:148]) + 8 * 32 + sum(block[156:])
    return block[:148] + b"%06o\0 " % total + block[156:]


END = bytes(2 * BLOCK)
ROWS = [(f"{i}.jpg", bytes([i]) * (300 + 400 * i)) for i in range(8)]
WHOLE = b"".join(member(*row) for row in ROWS) + END


@pytest.fixture
def tar(tmp_path):
    """Maker of a tar of these bytes; returns its path."""

    def make(content):
        file = tmp_path / "a.tar"
        file.write_bytes(content)
        return file

    return make


def rows(tar):
    """Key and content of every image, in order."""
    source = open_source(tar)
    return [(key, source.read(row)) for row, key in enumerate(source.keys)]


def refusals(tar):
    """The reason why each refused image is refused, by key."""
    source = open_source(tar)
    found = {}
    for row, reason in source.refusals.items():
        with pytest.raises(InputError) as error:
            source.read(row)
        assert str(error.value) == reason
        found[source.keys[row]] = reason
    return found


def test_a_whole_tar(tar):
    expected = [(f"a.tar/{name[0]}", content) for name, content in ROWS]
    assert rows(tar(WHOLE)) == expected
    assert rows(tar(WHOLE + bytes(20 * BLOCK))) == expected


def test_every_flipped_bit_of_a_header_is_noticed_or_harmless(tar):
    start = sum(len(member(*row)) for row in ROWS[:3])

    def found(content):
        try:
            return tars.read_samples(tar(content), Counter())
        except InputError as error:
            return str(error)

    samples, refused = found(WHOLE), 0
    for bit in range(8 * BLOCK):
        damaged = bytearray(WHOLE)
        damaged[start + bit // 8] ^= 1 << bit % 8
        now = found(damaged)
        assert now == samples or isinstance(now, str)
        refused += isinstance(now, str)
    assert refused > 8 * (BLOCK - 8)  # the checksum's own field has bits that stand for nothing


@pytest.mark.parametrize("length", [*range(BLOCK // 2, len(WHOLE) - 1, BLOCK), len(WHOLE) - 1])
def test_a_cut_tar_is_refused(tar, length):
    with pytest.raises(InputError, match=r"a.tar: .*(pack|copy) it again"):
        open_source(tar(WHOLE[:length]))


@pytest.mark.parametrize(
    "content",
    [
        WHOLE[:-BLOCK],  # one block of zeros
        WHOLE + WHOLE,
        WHOLE[: -2 * BLOCK] + bytes(3 * BLOCK) + WHOLE,
        WHOLE + bytes(30 * BLOCK) + b"\1",
        bytes(BLOCK) + WHOLE,
    ],
)
def test_a_tar_that_does_not_end_as_tars_do_is_refused(tar, content):
    with pytest.raises(InputError, match=r"a.tar: .*it again"):
        open_source(tar(content))


NEGATIVE = b"\xff" * 11 + b"\x00"  # -256 in base 256
SIZES = [NEGATIVE, b"\xff" * 12, b"\x80" + b"\xff" * 11, b"77777777777\0", b"00000100000\0"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [b"0", b"L", b"K", b"x", b"g", b"S", b"Z"])
def test_sizes_that_cannot_be_are_refused(tar, size, kind):
    block = patched(header("1.jpg", type=kind), 124, size)
    content = member(*ROWS[0]) + block + member(*ROWS[1]) + END
    with pytest.raises(InputError) as error:
        open_source(tar(content))
    assert "a.tar" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def grown(tar):
    """Maker of a tar in which the file at a place takes in more files, with a right checksum."""

    def make(files, place, more):
        sizes = [len(member(*file)) for file in files]
        start = sum(sizes[:place])
        content = b"".join(member(*file) for file in files) + END
        size = sum(sizes[place : place + 1 + more]) - BLOCK
        block = patched(content[start : start + BLOCK], 124, b"%011o\0" % size)
        return tar(content[:start] + block + content[start + BLOCK :])

    return make


@pytest.mark.parametrize("more", [1, 2, 5])
def test_an_image_that_takes_in_the_next_files_stops_the_encode(more, grown, tmp_path):
    """Decoders ignore what follows an image, so the others would be lost without a word."""
    file = grown(ROWS, 2, more)
    source = open_source(file)
    with pytest.raises(OSError, match="takes in the next file; pack it again"):
        source.read(2)
    others = [source.read(row) for row in range(len(source)) if row != 2]
    assert others == [content for _, content in ROWS[:2] + ROWS[3 + more :]]
    for by_content in (False, True):
        source.by_content = by_content
        with pytest.raises(InputError, match=r"a.tar.*takes in the next file; pack it again"):
            encode_source(source, tiny_backbone(), tmp_path / "out", None, batch_size=2)


@pytest.mark.parametrize("name", ["2.cls", "2.txt", "2.npy", "README", ".hidden"])
def test_a_tar_in_which_another_file_takes_in_an_image_is_refused(name, grown):
    files = [*ROWS[:3], (name, b"1"), *ROWS[3:]]
    assert len(tars.read_samples(grown(files, 3, 0), Counter())) == len(ROWS)
    with pytest.raises(InputError, match=rf"a.tar: {name} .*takes in the next file; pack it again"):
        open_source(grown(files, 3, 2))


def test_an_image_may_hold_the_words_of_a_header(tar):
    content = bytes(300) + b"ustar" + bytes(300)
    assert rows(tar(member("a.jpg", content) + END)) == [("a.tar/a", content)]


def test_a_header_takes_no_more_memory_than_a_header(tar):
    block = patched(header("name", type=b"L"), 124, b"%011o\0" % (len(WHOLE) + 100 * BLOCK))
    with pytest.raises(InputError, match=r"a.tar: .*the header of name claims 72,192 bytes"):
        open_source(tar(member(*ROWS[0]) + block + bytes(100 * BLOCK) + WHOLE))


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names(tmp_path, kind):
    names = [f"{'folder/' * 40}{name}" for name, _ in ROWS]
    with tarfile.open(tmp_path / "a.tar", "w", format=kind) as archive:
        for name, (_, content) in zip(names, ROWS, strict=True):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    expected = [(f"a.tar/{name[:-4]}", row[1]) for name, row in zip(names, ROWS, strict=True)]
    assert rows(tmp_path / "a.tar") == expected


def test_a_size_in_a_pax_header_that_the_file_does_not_have(tar):
    record = b"19 size=8589934592\n"
    block = member("pax", record, type=b"x") + header("1.jpg", 300)
    with pytest.raises(InputError, match=r"a.tar: 1.jpg claims 8,589,934,592 bytes"):
        open_source(tar(member(*ROWS[0]) + block + bytes(BLOCK) + END))
    with pytest.raises(InputError, match=r"a.tar: "):
        open_source(tar(member("pax", b"9 size=5\n", type=b"g") + WHOLE))


def test_a_hard_link_is_the_file_that_it_names(tar):
    link = {"type": tarfile.LNKTYPE}
    content = (
        member("a.jpg", b"first")
        + header("b.jpg", linkname="a.jpg", **link)
        + header("c.jpg", linkname="b.jpg", **link)
        + member("c.cls", b"1")
        + header("d.jpg", linkname="z.jpg", **link)
        + member("z.jpg", b"last")
        + END
    )
    source = open_source(tar(content))
    assert source.keys == [f"a.tar/{key}" for key in "abcdz"]
    assert [source.read(row) for row in (0, 1, 2, 4)] == [b"first"] * 3 + [b"last"]
    assert source.refusals.keys() == {3}
    assert "d.jpg is a hard link to z.jpg, which is not before it" in source.refusals[3]
    assert source.labels == [None, None, 1, None, None]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"type": tarfile.SYMTYPE, "linkname": "0.jpg"}, "is a link"),
        ({"type": tarfile.FIFOTYPE}, "is no file"),
        ({"type": tarfile.CHRTYPE}, "is no file"),
        ({"type": tarfile.GNUTYPE_SPARSE}, "is stored sparse"),
        ({"type": b"M"}, "is no file"),
    ],
)
def test_members_that_are_no_plain_file_fail(tar, fields, reason):
    content = member(*ROWS[0]) + header("x.jpg", **fields) + member(*ROWS[1]) + END
    found = refusals(tar(content))
    assert list(found) == ["a.tar/x"]
    assert found["a.tar/x"].startswith(f"x.jpg {reason}")
    assert open_source(tar(content)).read(2) == ROWS[1][1]


def test_a_sparse_file_as_gnu_tar_writes_it_today(tar):
    pax = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"
    pax += b"25 GNU.sparse.name=x.jpg\n26 GNU.sparse.realsize=40\n"
    data = (b"1\n0\n20\n" + bytes(BLOCK))[:BLOCK] + b"x" * 20
    content = member("pax", pax, type=b"x") + member("GNUSparseFile.0/x.jpg", data)
    found = refusals(tar(content + member(*ROWS[1]) + END))
    assert found == {"a.tar/x": "x.jpg is stored sparse; pack the file itself"}


def test_two_images_in_one_sample_fail(tmp_path):
    pair = [("x.jpg", b"photo"), ("x.png", b"mask"), ("x.cls", b"1"), ("y.jpg", b"other")]
    write_tar(tmp_path / "a.tar", pair)
    found = refusals(tmp_path / "a.tar")
    assert list(found) == ["a.tar/x"]
    assert "sample x has 2 images (x.jpg, x.png)" in found["a.tar/x"]
    source = open_source(tmp_path / "a.tar")
    assert source.read(1) == b"other"
    assert source.labels is None
    write_tar(tmp_path / "a.tar", pair[:3])
    with pytest.raises(InputError, match=r"a.tar: holds no image .*; sample x has 2 images"):
        open_source(tmp_path / "a.tar")


def test_names_that_are_not_text(tar, backbone, tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (9, 9), "red").save(picture, "PNG")
    odd = [member(os.fsdecode(b"caf\xe9.png"), picture.getvalue())] * 2
    good = member(os.fsdecode(b"\xe8.png"), picture.getvalue())
    source = open_source(tar(b"".join([*odd, good, END])))
    failures = encode_source(source, backbone, tmp_path / "out", None, batch_size=2).failures
    assert [(failure.key, failure.reason) for failure in failures] == [
        ("a.tar/caf\\xe9", "caf\\udce9.png is in the tar twice; keep one")
    ]
    assert load_features(tmp_path / "out").keys == ["a.tar/\\xe8"]


def test_labels_of_the_others_stay_where_they_are(tmp_path):
    files = [("x.jpg", b""), ("x.png", b""), ("y.cls", b"1"), ("y.jpg", b""), ("z.jpg", b"")]
    write_tar(tmp_path / "a.tar", [*files, ("z.cls", b"0"), ("z.jpg", b"again"), ("w.txt", b"dog")])
    write_tar(tmp_path / "b.tar", [("x.jpg", b""), ("x.txt", b"dog")])
    with pytest.warns(UserWarning, match="labels without an image 1"):
        source = open_source(tmp_path)
    assert source.keys == ["a.tar/x", "a.tar/y", "a.tar/z", "b.tar/x"]
    assert source.refusals[2] == "z.jpg is in the tar twice; keep one"
    assert resolve_labels(source, ["cat", "dog"])[[1, 3]].tolist() == [1, 1]


def test_a_byte_order_mark_is_no_part_of_a_label(tmp_path):
    labels = {"cls": b"1", "txt": b"dog", "json": b'{"label": 1}'}
    files = []
    for suffix, label in labels.items():
        files += [(f"{suffix}.jpg", b""), (f"{suffix}.{suffix}", b"\xef\xbb\xbf" + label)]
    write_tar(tmp_path / "a.tar", files)
    found = resolve_labels(open_source(tmp_path / "a.tar"), ["cat", "dog"])
    assert found.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("first", "second"),
    [("./0.jpg", "0.jpg"), ("a//0.jpg", "a/0.jpg"), ("a/0.jpg", "a/./0.jpg"), ("/0.jpg", "0.jpg")],
)
def test_two_spellings_of_one_path_are_one_file(first, second, tar):
    content = member(first, b"1") + member(second, b"2") + member("b.jpg", b"3") + END
    key = f"a.tar/{first.removesuffix('.jpg')}"
    assert open_source(tar(content)).keys == [key, "a.tar/b"]
    assert refusals(tar(content)) == {
        key: f"{second} is in the tar twice, first as {first}; keep one"
    }


def test_a_sample_may_spell_its_files_differently(tar):
    link = header("c.jpg", type=tarfile.LNKTYPE, linkname="a/./0.jpg")
    content = member("a/0.jpg", b"1") + member("./a/0.cls", b"1") + member("./b.jpg", b"2") + link
    source = open_source(tar(content + END))
    assert source.keys == ["a.tar/a/0", "a.tar/./b", "a.tar/c"]
    assert (source.labels, source.read(2)) == ([1, None, None], b"1")


def test_dots_in_names(tmp_path):
    files = [("v1.0.jpg", b"1"), ("v1.0.cls", b"0"), ("v2.0.JPG", b"2"), ("v2.cls", b"1")]
    write_tar(tmp_path / "a.tar", [*files, ("a/in.put.jpg", b"3"), ("a/in.put.txt", b"1")])
    source = open_source(tmp_path / "a.tar")
    assert source.keys == ["a.tar/v1", "a.tar/v2", "a.tar/a/in"]
    assert [source.read(row) for row in range(3)] == [b"1", b"2", b"3"]
    assert resolve_labels(source, ["cat", "dog"]).tolist() == [0, 1, 1]
    write_tar(tmp_path / "a.tar", [("v1.0.jpg", b"1"), ("v1.1.jpg", b"2"), ("w.jpg", b"3")])
    assert "v1 has 2 images (v1.0.jpg, v1.1.jpg)" in refusals(tmp_path / "a.tar")["a.tar/v1"]


def test_every_suffix_that_is_read_in_folders_is_read_in_tars(tmp_path):
    names = [f"x{i:03}{suffix}" for i, suffix in enumerate(sorted(suffixes()))]
    assert {".jpg", ".jfif", ".jpe", ".jp2", ".bmp", ".gif", ".tif", ".mpo"} < suffixes()
    write_tar(tmp_path / "a.tar", [(name, name.encode()) for name in names])
    source = open_source(tmp_path / "a.tar")
    assert [source.read(row).decode() for row in range(len(source))] == names


def test_what_is_left_out_of_a_tar_is_counted(tmp_path):
    files = [("x.jpg", b"photo"), ("x.mask.png", b"mask"), ("x.npy", b""), ("y.npy", b"")]
    write_tar(tmp_path / "a.tar", [*files, ("y.cls", b"1"), ("._x.jpg", b""), ("README", b"")])
    (tmp_path / "a.parquet").touch()
    (tmp_path / "more").mkdir()
    line = (
        ": 8 files left out, not images that can be read here: .npy 2, "
        ".mask.png beside an image 1, .parquet 1, folders 1, hidden 1, "
        "labels without an image 1, no suffix 1"
    )
    with pytest.warns(UserWarning, match=re.escape(f"{tmp_path}{line}") + "$"):
        source = open_source(tmp_path)
    assert (source.keys, source.read(0)) == (["a.tar/x"], b"photo")


def test_hidden_files_beside_tars_are_left_out(tmp_path):
    """As macOS and previews leave them: they are neither tars nor images."""
    write_tar(tmp_path / "a.tar", [("x.jpg", b"photo")])
    (tmp_path / "._a.tar").write_bytes(b"\0\5\x16\7")
    (tmp_path / ".thumb.jpg").write_bytes(b"preview")
    line = "2 files left out, not images that can be read here: hidden 2"
    with pytest.warns(UserWarning, match=re.escape(f"{tmp_path}: {line}") + "$"):
        assert open_source(tmp_path).keys == ["a.tar/x"]
    (tmp_path / "a.tar").rename(tmp_path / ".a.tar")
    with pytest.raises(
        InputError, match="holds no images .* not images .*: hidden 3; name a folder"
    ):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("x.cls", b"cat"), ("x.json", b"{"), ("x.txt", b"\xff"), ("x.txt", b" " * 2**20 + b"dog")],
)
def test_a_bad_label_is_a_failure_of_its_image_alone(tmp_path, name, content):
    write_tar(
        tmp_path / "a.tar", [("x.jpg", b""), (name, content), ("y.jpg", b""), ("y.cls", b"1")]
    )
    found = refusals(tmp_path / "a.tar")
    assert list(found) == ["a.tar/x"]
    assert found["a.tar/x"].startswith(f"{name}: is ")
    assert resolve_labels(open_source(tmp_path / "a.tar"), ["cat", "dog"])[1] == 1


@pytest.mark.parametrize("size", [len(WHOLE) // 3, len(WHOLE)])
def test_a_tar_that_changes_after_it_was_listed(tar, size, tmp_path):
    """Nothing is known of where its images are now: the encode stops, whatever the row."""
    file = tar(WHOLE)
    source = open_source(file)
    assert source.read(0) == ROWS[0][1]
    file.write_bytes(WHOLE[:size])
    os.utime(file, ns=(0, 0))
    with pytest.raises(OSError, match="a.tar changed after it was listed"):
        source.read(0)
    with pytest.raises(InputError, match="a.tar changed after it was listed; run again"):
        encode_source(source, tiny_backbone(), tmp_path / "out", None, batch_size=2)


def test_a_tar_that_changes_while_it_is_listed(tar, monkeypatch):
    file = tar(WHOLE)

    def then_changed(*arguments):
        yield from tars.read_samples(*arguments)
        os.utime(file, ns=(0, 0))

    monkeypatch.setattr("transclip_fast.encode.sources.read_samples", then_changed)
    with pytest.raises(InputError, match="a.tar: changed while it was listed; run again"):
        open_source(file)
