"""Files that are not what they claim: one line and exit code 2, whatever the kind."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import zipfile
from itertools import product

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from transclip_fast.store.arrays import file_sha256

DEEP = "[" * 200_000 + "]" * 200_000


@pytest.fixture(autouse=True)
def _no_endless_wait():
    """A read of a FIFO that nobody writes would wait for ever."""

    def stop(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    yield
    signal.alarm(0)


@pytest.fixture
def solve(save, arrays, refused, tmp_path):
    """A `solve` with these options, which must be refused; its line."""

    def run(*options):
        return refused("solve", save(arrays), *options, "--out", tmp_path / "result")

    return run


@pytest.fixture
def accuracy(save, arrays, succeeds, tmp_path):
    """The accuracy of a solve with labels in a file, by default of all arrays."""

    def run(file=None, *options):
        command = "solve", file or save(arrays), *options, "--out", tmp_path / "result", "--json"
        out = succeeds(*command)
        return json.loads(out[out.index("{") :])["accuracy"]

    return run


def npy(array):
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def with_shape(array, shape):
    """The content of a .npy whose header claims another shape."""
    content = npy(array)
    old, new = repr(array.shape).encode(), repr(shape).encode()
    return content.replace(old + b", }" + b" " * (len(new) - len(old)), new + b", }", 1)


def packed(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return file.getvalue()


def members_of(arrays):
    return [(f"{name}.npy", npy(array)) for name, array in arrays.items()]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: [*m, m[0]], "two arrays of one name"),
        (lambda m: [*m, (m[0][0][:-4], m[0][1])], "two arrays of one name"),
        (lambda m: [("image_features.npy", b"text"), *m[1:]], "damaged"),
        (lambda m: [("image_features", b"text"), *m[1:]], "damaged"),
        (lambda m: [("image_features/", b""), *m[1:]], "has no array 'image_features'"),
        (lambda m: [(m[0][0], m[0][1] + b"more"), *m[1:]], "claims 10,164 bytes"),
        (lambda m: [(m[0][0], m[0][1][:-4]), *m[1:]], "claims 10,164 bytes"),
        (lambda m: [(m[0][0], with_shape(np.eye(77, 33), (2**63, 33))), *m[1:]], "claims"),
        (lambda m: [(m[0][0], with_shape(np.eye(77, 33), (-77, -33))), *m[1:]], "damaged"),
        (lambda m: [(m[0][0], npy(np.zeros((77, 33), "M8[s]"))), *m[1:]], "expected numbers"),
        (lambda m: [(m[0][0], npy(np.zeros((77, 33), "f4,f8"))), *m[1:]], "expected numbers"),
    ],
)
def test_npz_members(change, expected, arrays, refused, tmp_path):
    (tmp_path / "x.npz").write_bytes(packed(change(members_of(arrays))))
    message = refused("solve", tmp_path / "x.npz", "--out", tmp_path / "result")
    assert expected in message
    assert "x.npz" in message


def test_npz_members_that_no_one_asked_for_are_not_read(arrays, succeeds, tmp_path):
    others = [("other.npy", b"no array"), ("notes.txt", b"text"), ("folder/", b"")]
    (tmp_path / "x.npz").write_bytes(packed([*members_of(arrays), *others]))
    succeeds("solve", tmp_path / "x.npz", "--out", tmp_path / "result")


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_a_header_that_claims_less_than_there_is(suffix, arrays, refused, tmp_path):
    """Rows that are dropped in silence: no checksum is reached."""
    cut = npy(arrays["image_features"]).replace(b"(77, 33)", b"(76, 33)", 1)
    file = tmp_path / f"x{suffix}"
    named = [("image_features.npy", cut), *members_of(arrays)[1:]]
    file.write_bytes(cut if suffix == ".npy" else packed(named))
    np.save(tmp_path / "text.npy", arrays["text_features"])
    options = ["--text-features", tmp_path / "text.npy"]
    assert "damaged" in refused("solve", file, *options, "--out", tmp_path / "result")


TENSORS = {
    "stride 0": (lambda x: torch.ones(1).expand(2**31, 2**20), "repeats few numbers"),
    "nested": (lambda x: torch.nested.nested_tensor([x[0], x[1]]), "expected dense tensors"),
    "sparse": (lambda x: x.to_sparse(), "expected dense tensors"),
    "quantised": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "dense tensors"),
    "meta": (lambda x: x.to("meta"), "expected dense tensors"),
    "float8": (lambda x: x.to(torch.float8_e4m3fn), "holds torch.float8_e4m3fn"),
    "complex": (lambda x: x.to(torch.complex64), "holds torch.complex64"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:.*quantiz")
@pytest.mark.parametrize("name", ["image_features", "text_features", "support_labels"])
@pytest.mark.parametrize("kind", TENSORS)
def test_tensors(kind, name, arrays, refused, tmp_path):
    make, expected = TENSORS[kind]
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    tensors |= {"support_features": tensors["image_features"], "support_labels": tensors["labels"]}
    tensors[name] = make(tensors[name].float())
    torch.save(tensors, tmp_path / "x.pt")
    assert expected in refused("solve", tmp_path / "x.pt", "--out", tmp_path / "result")


@pytest.mark.parametrize("kind", [torch.uint16, torch.uint32, torch.uint64])
@pytest.mark.parametrize("suffix", [".pt", ".npz"])
def test_unsigned_labels_are_numbers(kind, suffix, arrays, accuracy, tmp_path):
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    tensors["labels"] = tensors["labels"].to(kind)
    file = tmp_path / f"x{suffix}"
    if suffix == ".pt":
        torch.save(tensors, file)
    else:
        np.savez(file, **{key: tensor.numpy() for key, tensor in tensors.items()})
    assert accuracy(file) == accuracy()


def test_a_flipped_bit_in_a_file_of_torch(arrays, refused, tmp_path):
    file = tmp_path / "x.pt"
    torch.save({key: torch.from_numpy(array) for key, array in arrays.items()}, file)
    content = bytearray(file.read_bytes())
    place = content.index(arrays["image_features"].tobytes()[:64])
    content[place + 6] ^= 1
    file.write_bytes(content)
    assert "x.pt: damaged" in refused("solve", file, "--out", tmp_path / "result")


def test_safetensors_that_name_a_tensor_twice(arrays, refused, tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({key: torch.from_numpy(array) for key, array in arrays.items()}, file)
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    again = json.dumps({"labels": json.loads(header)["labels"]})[1:-1]
    header = header[:-1] + b"," + again.encode() + b"}"
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    assert "'labels' is there twice" in refused("solve", file, "--out", tmp_path / "result")


CSR = {
    "indptr cut": {"indptr": np.arange(77)},
    "indptr falls": {"indptr": np.arange(78)[::-1]},
    "indptr of a table": {"indptr": np.zeros((78, 1), int)},
    "indptr of fractions": {"indptr": np.linspace(0, 77, 78) + 0.5 * (np.arange(78) == 3)},
    "indptr of one": {"indptr": np.array(0)},
    "class outside": {"indices": np.full(77, 6)},
    "class negative": {"indices": np.full(77, -1)},
    "huge shape": {"shape": np.array([77, 2**40])},
    "seven classes": {"shape": np.array([77, 7])},
    "shape of texts": {"shape": np.array(["77", "6"])},
    "values short": {"data": np.ones(76)},
}


@pytest.mark.parametrize(
    ("kind", "alone"),
    # With nothing else, seven classes are as good as six.
    [case for case in product(CSR, (False, True)) if case != ("seven classes", True)],
)
def test_sparse_priors(kind, alone, save, arrays, refused, tmp_path):
    csr = {
        "format": np.array(b"csr"),
        "shape": np.array([77, 6]),
        "data": np.full(77, 0.6),
        "indices": np.arange(77) % 6,
        "indptr": np.arange(78),
    }
    np.savez(tmp_path / "prior.npz", **{**csr, **CSR[kind]})
    features = {"image_features": arrays["image_features"]} if alone else arrays
    command = "solve", save(features), "--prior", tmp_path / "prior.npz"
    assert "prior.npz" in refused(*command, "--out", tmp_path / "result")


def bytes_as_text(n_rows):
    offsets = pa.py_buffer(np.arange(n_rows + 1, dtype=np.int32).tobytes())
    return pa.Array.from_buffers(
        pa.string(), n_rows, [None, offsets, pa.py_buffer(b"\xff" * n_rows)]
    )


TABLES = {
    "bytes": lambda n: pa.table({"label": bytes_as_text(n), "name": bytes_as_text(n)}),
    "doubled": lambda n: pa.Table.from_arrays([pa.array([0] * n)] * 2, ["label", "label"]),
    "lists": lambda n: pa.table({"label": [[1]] * n, "name": [["a"]] * n}),
    "objects": lambda n: pa.table({"label": [{"a": 1}] * n, "name": [{"a": 1}] * n}),
    "numbers": lambda n: pa.table({"label": [99] * n, "name": [1] * n}),
    "fractions": lambda n: pa.table({"label": [0.5] * n, "name": ["a"] * n}),
    "nothing": lambda n: pa.table({"label": pa.nulls(0), "name": pa.nulls(0)}),
}


@pytest.mark.parametrize(
    ("kind", "option", "n_rows"),
    # A label in a list of its own is a label.
    [(kind, "--labels", 77) for kind in TABLES if kind != "lists"]
    + [(kind, "--class-names", 6) for kind in TABLES],
)
def test_tables(kind, option, n_rows, solve, tmp_path):
    pq.write_table(TABLES[kind](n_rows), tmp_path / "x.parquet")
    assert "x.parquet" in solve(option, tmp_path / "x.parquet")


def test_a_folder_is_no_column(arrays, save, accuracy, tmp_path):
    """Readers of data sets take the folder "label=3" for a column of the files in it."""
    (tmp_path / "label=3").mkdir()
    file = tmp_path / "label=3" / "labels.parquet"
    pq.write_table(pa.table({"label": arrays["labels"]}), file)
    expected = accuracy()
    del arrays["labels"]
    assert accuracy(save(arrays), "--labels", file) == expected


NAMES = [
    ("x.json", DEEP, "recursion"),
    ("x.json", '{"a": 0, "a": 1}', "'a' is there twice"),
    ("x.json", '["a", "\\ud800", "c", "d", "e", "f"]', "surrogates not allowed"),
    ("x.json", '["a", "b\\u0000", "c", "d", "e", "f"]', "class 1 has a NUL character"),
    ("x.json", "[1e999]", "x.json"),
    ("x.txt", "a\nb\0b\nc\nd\ne\nf\n", "line 2 has a NUL character"),
    ("x.csv", "name,label\n" + "a\0,0\n" * 6, "x.csv"),
]


@pytest.mark.parametrize(("name", "text", "expected"), NAMES)
def test_class_names(name, text, expected, solve, tmp_path):
    (tmp_path / name).write_text(text)
    assert expected in solve("--class-names", tmp_path / name)


@pytest.mark.parametrize("code", [0xD800, 0x110000, 0xFFFFFFFF])
@pytest.mark.parametrize("name", ["class_names", "labels"])
def test_arrays_of_what_is_no_text(name, code, save, arrays, refused, tmp_path):
    n = 6 if name == "class_names" else 77
    texts = np.array([f"{k % 6}" for k in range(n)], "<U4")
    texts.view(np.uint32)[5] = code
    file = save({**arrays, name: texts})
    assert "features.npz: " in refused("solve", file, "--out", tmp_path / "result")


RUNS = [
    {"n_classes": -6}, {"n_classes": True}, {"n_classes": 6.0}, {"config": []}, {"maps": []},
    {"config": {"likelihood_weight": 1e999, "kl_weight": 1}},
    {"config": {"likelihood_weight": 10**400, "kl_weight": 1}},
    {"config": {"likelihood_weight": True, "kl_weight": 1}},
    {"config": {"likelihood_weight": 1, "kl_weight": -1}}, {"sha256": 3}, {"sha256": {}},
    {"maps": {"image_map": 3}}, {"class_names": {}}, {"class_names": "abcdef"},
]  # fmt: skip


@pytest.mark.parametrize("change", RUNS)
def test_run_json(change, solved, save, arrays, refused, tmp_path):
    run = json.loads((solved / "run.json").read_text())
    (solved / "run.json").write_text(json.dumps(run | change))
    message = refused("predict", solved, save(arrays), "--out", tmp_path / "more")
    assert "run.json" in message or "predictions" in message or "mixture" in message


@pytest.mark.parametrize("text", [DEEP, '{"n_classes": 6, "n_classes": 6}', '{"a": "\\udfff"}'])
def test_texts_of_run_json(text, solved, refused):
    (solved / "run.json").write_text(text)
    assert "run.json: cannot be read as JSON" in refused("evaluate", solved)


@pytest.mark.parametrize(
    ("command", "name"), [("evaluate", "predictions.parquet"), ("predict", "mixture.safetensors")]
)
def test_a_result_that_was_changed_is_refused(
    command, name, solved, save, arrays, refused, tmp_path
):
    if name.endswith("parquet"):
        table = pq.read_table(solved / name)
        pq.write_table(table.take(list(range(76, -1, -1))), solved / name)
    else:
        content = bytearray((solved / name).read_bytes())
        content[-6] ^= 1  # of a variance
        (solved / name).write_bytes(content)
    more = [save(arrays), "--out", tmp_path / "more"] if command == "predict" else []
    assert f"{name}: differs from its run.json" in refused(command, solved, *more)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda x: np.where(np.arange(3) == 1, x + np.float32(0.01), x),
            "differ from its manifest",
        ),
        (lambda x: x[:, ::-1], "differ from its manifest"),
        (lambda x: x.view(">f4"), "bytes in another order"),
    ],
)
def test_a_graph_that_was_changed_is_refused(
    change, expected, save, arrays, succeeds, refused, tmp_path
):
    file = save(arrays)
    succeeds("graph", file, "--out", tmp_path / "graph")
    similarities = tmp_path / "graph/similarities.npy"
    np.save(similarities, change(np.load(similarities)))
    message = refused("solve", file, "--graph", tmp_path / "graph", "--out", tmp_path / "result")
    assert expected in message


GRAPHS = [
    {"search": 3}, {"search": None}, {"recall": "1"}, {"recall": -1}, {"recall": 1e999},
    {"probes": 3}, {"recall_rows": 3}, {"probes": "a", "lists": 3}, {"index": ["a"]},
    {"recall_rows": 3, "weight_error": [1]}, {"recall_rows": -3, "weight_error": 0.1},
]  # fmt: skip


@pytest.mark.parametrize("change", GRAPHS)
def test_manifests_of_graphs(change, save, arrays, succeeds, refused, tmp_path):
    file = save(arrays)
    succeeds("graph", file, "--out", tmp_path / "graph")
    manifest = json.loads((tmp_path / "graph/manifest.json").read_text())
    (tmp_path / "graph/manifest.json").write_text(json.dumps(manifest | change))
    message = refused("solve", file, "--graph", tmp_path / "graph", "--out", tmp_path / "result")
    assert "manifest.json: " in message


FOLDER = {
    "shards.pop": (lambda m: m.pop("shards"), "shards is missing"),
    "shards": (lambda m: m.update(shards=None), "shards is None"),
    "complete": (lambda m: m.update(complete="yes"), "complete is 'yes'"),
    "config": (lambda m: m.update(config=[]), "config is []"),
    "model": (lambda m: m["config"].update(model=3), "model is 3"),
}


@pytest.fixture
def folder(tmp_path, arrays):
    """A feature folder with a manifest."""
    folder = tmp_path / "folder"
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    np.save(folder / "img_emb/img_emb_00000.npy", arrays["image_features"])
    np.save(folder / "prototypes.npy", arrays["text_features"])
    metadata = folder / "metadata/metadata_00000.parquet"
    pq.write_table(pa.table({"key": [str(row) for row in range(77)]}), metadata)
    shard = {
        "rows": 77,
        "features_sha256": file_sha256(folder / "img_emb/img_emb_00000.npy"),
        "metadata_sha256": file_sha256(metadata),
        "failures": [],
    }
    manifest = {
        "complete": True,
        "rows": 77,
        "config": {"model": "m", "weights": "w", "quick_gelu": False},
        "prototypes_sha256": file_sha256(folder / "prototypes.npy"),
        "shards": {"0": shard},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_a_valid_folder(folder, succeeds, tmp_path):
    succeeds("solve", folder, "--out", tmp_path / "result")


@pytest.mark.parametrize("kind", FOLDER)
def test_manifests_of_folders(kind, folder, refused, tmp_path):
    change, expected = FOLDER[kind]
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    message = refused("solve", folder, "--out", tmp_path / "result")
    assert f"manifest.json: {expected}" in message


def test_a_manifest_without_shards_skips_no_hash(folder, refused, tmp_path):
    rows = np.load(folder / "img_emb/img_emb_00000.npy")
    np.save(folder / "img_emb/img_emb_00000.npy", rows[::-1])
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["shards"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "manifest.json" in refused("solve", folder, "--out", tmp_path / "result")


def test_shards_of_no_numbers(folder, refused, tmp_path):
    (folder / "manifest.json").unlink()
    np.save(folder / "img_emb/img_emb_00001.npy", np.zeros((3, 33), "f4,f4"))
    (folder / "metadata/metadata_00000.parquet").unlink()
    message = refused("solve", folder, "--out", tmp_path / "result")
    assert "img_emb_00001.npy: expected numbers" in message


@pytest.mark.parametrize(
    "name",
    ["manifest.json", "img_emb/img_emb_00000.npy", "metadata/metadata_00000.parquet",
     "prototypes.npy"],
)  # fmt: skip
def test_fifos_in_a_folder(name, folder, refused_unread, tmp_path):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert name in refused_unread("solve", folder, "--out", tmp_path / "result")


@pytest.fixture
def refused_unread(cli):
    """Run a command that must refuse a file that is none; contents are not compared."""

    def run(*args):
        ran = cli(*args)
        assert ran.code == 2
        assert ran.err.startswith("error: ")
        assert ran.err.count("\n") == 1
        return ran.err

    return run


FILES = [
    "--labels x.csv", "--labels x.txt", "--labels x.npy", "--labels x.parquet",
    "--class-names x.json", "--class-names x.txt", "--class-names x.parquet", "--prior x.npz",
    "--text-features x.npy", "--head x.safetensors", "--text-map x.npy", "--graph x",
    "--index x.index",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["fifo", "zero"])
@pytest.mark.parametrize("options", FILES)
def test_what_is_no_regular_file(kind, options, save, arrays, refused_unread, tmp_path):
    option, name = options.split()
    file = tmp_path / name
    if name == "x":
        file.mkdir()
        file = file / "manifest.json"
    if kind == "fifo":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero")
    out = tmp_path / "result"
    assert name in refused_unread("solve", save(arrays), option, tmp_path / name, "--out", out)


def test_features_that_are_a_fifo(refused_unread, tmp_path):
    os.mkfifo(tmp_path / "x.npz")
    assert "x.npz" in refused_unread("solve", tmp_path / "x.npz", "--out", tmp_path / "result")


def test_names_that_are_not_text_are_shown_escaped(save, arrays, tmp_path):
    """The shell may give any bytes as a path."""
    out = os.fsencode(tmp_path) + b"/r\xff"
    ran = command_line("solve", save(arrays), "--out", out, "--head", b"\xe9.safetensors")
    assert (ran.returncode, ran.stderr.count(b"\n")) == (2, 1)
    ran = command_line("solve", save(arrays), "--out", out)
    assert ran.returncode == 0, ran.stderr
    assert b"r\\udcff" in ran.stdout
    assert os.path.isfile(out + b"/predictions.parquet")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_output_that_cannot_be_written(options, save, arrays, tmp_path):
    with open("/dev/full", "wb") as full:
        ran = command_line("solve", save(arrays), "--out", tmp_path / "r", *options, stdout=full)
    expected = b"error: standard output: cannot be written (No space left on device)\n"
    assert (ran.returncode, ran.stderr) == (2, expected)


def command_line(*args, stdout=subprocess.PIPE):
    command = [sys.executable, "-m", "transclip_fast.cli", *args]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, check=False)
