"""`encode` and `run`: images to labels in one command."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import warnings

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch

from tests.cli.conftest import contents
from tests.cli.test_plan import DENSE
from tests.cli.test_ranks import start
from transclip_fast.encode import encoder
from transclip_fast.store.features import load_features


def test_encode_makes_a_folder_that_solve_opens(images, names, tiny, succeeds, cli, tmp_path):
    out = succeeds(
        "encode", images(12), "--classes", names, "--labels-from-folders", *tiny,
        "--out", tmp_path / "features", "--json",
    )  # fmt: skip
    summary = json.loads(out)
    assert (summary["n_rows"], summary["failures"]) == (12, [])
    assert summary["config"]["model"] == "tiny"
    assert cli("solve", tmp_path / "features", "--out", tmp_path / "result").code == 0
    table = pq.read_table(tmp_path / "result/predictions.parquet")
    assert table["key"].to_pylist() == load_features(tmp_path / "features").keys
    assert table["source_row"].to_pylist() == list(range(12))
    assert set(table["label_name"].to_pylist()) <= {"cat", "dog"}


def test_encode_tells_what_it_waited_for(images, tiny, succeeds, tmp_path):
    command = ("encode", images(12), *tiny, "--out", tmp_path / "out", "--json")
    fast = json.loads(succeeds(*command))["throughput"]
    assert (fast["images"], fast["batch_size"]) == (12, 16)
    assert fast["images_per_second"] == pytest.approx(12 / fast["seconds"])
    assert list(fast["waiting"]) == ["images", "model", "writing"]
    assert 0 < sum(fast["waiting"].values()) <= 1
    assert fast["waiting"][fast["bottleneck"]] == max(fast["waiting"].values())
    assert json.loads(succeeds(*command))["throughput"] is None  # all was there


def test_synthetic(tiny, succeeds, refused, monkeypatch):
    monkeypatch.setattr("transclip_fast.encode.batch_size.TIMED_SECONDS", 0)
    model = tiny[:4]  # without workers
    assert "images a second in batches of 16, the model alone" in succeeds(
        "encode", "--synthetic", *model
    )
    summary = json.loads(succeeds("encode", "--synthetic", *model, "--batch-size", 5, "--json"))
    assert summary["batch_size"] == 5
    assert (summary["images_per_second"] > 0, summary["warnings"]) == (True, [])
    assert "needs IMAGES and --out" in refused("encode", *tiny)
    flags = ("--strict", "--labels-from-folders", "--by-content")
    for unused in ("IMAGES", "--out", "--classes", "--local-features", "--workers", *flags):
        words = ["1"] if unused == "IMAGES" else [unused] if unused in flags else [unused, "1"]
        line = refused("encode", "--synthetic", *model, *words)
        assert line == f"error: {unused}: --synthetic times the model alone; leave it out\n"


def test_what_timing_warns_of_is_one_line(tiny, cli, monkeypatch):
    def rate(*_):
        warnings.warn("cudnn is old", stacklevel=1)
        return 5.0

    monkeypatch.setattr("transclip_fast.cli.encode.forward_rate", rate)
    ran = cli("encode", "--synthetic", *tiny[:4], "--json")
    assert (ran.code, ran.err) == (0, "warning: cudnn is old\n")
    assert json.loads(ran.out)["warnings"] == ["cudnn is old"]


def test_ranks_share_a_run(images, names, tiny, tmp_path):
    """Also one that has finished, of which the report is written again."""
    command = "run", images(24), "--classes", names, *tiny, "--workers", 1, "--shard-rows", 5
    command += "--labels-from-folders", "--device", "cpu", "--csv", "--out"
    for size in (1, 3):
        codes, errors = start(size, *command, tmp_path / f"{size}")
        assert codes == [0] * size, errors
    (tmp_path / "3/report.html").unlink()
    assert start(2, *command, tmp_path / "3")[0] == [0, 0]
    assert (tmp_path / "3/report.html").exists()
    names = ("graph/neighbors.npy", "graph/similarities.npy", "features/prototypes.npy")
    names += "result/predictions.parquet", "result/predictions.csv", "result/mixture.safetensors"
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()
    features = [load_features(tmp_path / f"{n}/features").get("image_features") for n in (1, 3)]
    np.testing.assert_array_equal(features[0][:], features[1][:])
    folders = [tmp_path / f"3{place}" for place in ("", "/features", "/graph", "/result")]
    assert [file for folder in folders for file in folder.iterdir() if file.name[0] == "."] == []


def test_one_rank_warns(images, tiny, tmp_path):
    """Of what every rank that lists the images finds."""
    folder = images(4)
    (folder / "a.heic").touch()
    command = "encode", folder, *tiny, "--shard-rows", 2, "--device", "cpu"
    codes, errors = start(2, *command, "--out", tmp_path / "out")
    assert codes == [0, 0]
    assert [text.count("left out, not an image that can be read") for text in errors] == [1, 0]


def test_a_rank_lost_in_an_encode_ends_a_run(images, names, tiny, tmp_path, monkeypatch):
    """Also where the processes that decode for it have its connections, too."""
    command = "run", images(24), "--classes", names, *tiny, "--workers", 1, "--shard-rows", 5
    command += "--device", "cpu", "--out", tmp_path / "out"
    launch = encoder.launch

    def dies(*arguments):
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return launch(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(encoder, "launch", dies)
        codes, errors = start(2, *command)
    assert codes == [2, -signal.SIGKILL]
    lines = [line for line in errors[0].splitlines() if line.startswith("error")]
    assert lines == ["error: rank 1 ended early; run the same command again to continue"]
    assert start(1, *command)[0] == [0]


@pytest.mark.parametrize(("precision", "error"), [("bf16", 3e-2), ("fp16", 3e-3)])
def test_a_folder_as_a_model_in_another_precision(images, succeeds, tmp_path, precision, error):
    config = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
        "text_cfg": {"width": 32, "heads": 2, "layers": 2},
    }
    (tmp_path / "model").mkdir()
    (tmp_path / "model/open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    net = open_clip.CLIP(**config)
    torch.save({"state_dict": net.state_dict()}, tmp_path / "model/tuned.pt")
    rows = []
    for kind in ("fp32", precision):
        succeeds(
            "encode", images(6), "--model", tmp_path / "model", "--precision", kind,
            "--workers", 0, "--out", tmp_path / kind,
        )  # fmt: skip
        rows.append(np.load(tmp_path / kind / "img_emb/img_emb_00000.npy").astype(float))
    np.testing.assert_allclose(rows[1], rows[0], atol=error)
    assert not np.array_equal(*rows)


def test_encode_without_classes_has_no_prototypes(images, tiny, succeeds, refused, tmp_path):
    succeeds("encode", images(), *tiny, "--out", tmp_path / "features")
    assert not (tmp_path / "features/prototypes.npy").exists()
    assert "text_features" in refused("solve", tmp_path / "features", "--out", tmp_path / "result")


def test_run_goes_the_whole_way_and_skips_what_is_there(
    images, names, tiny, cli, tmp_path, monkeypatch
):
    command = (
        "run", images(12), "--classes", names, "--labels-from-folders", *tiny,
        "--out", tmp_path / "out",
    )  # fmt: skip
    first = cli(*command)
    assert first.code == 0
    assert "12 images encoded" in first.out
    assert "accuracy" in first.out
    run = json.loads((tmp_path / "out/result/run.json").read_text())
    assert run["n_queries"] == 12
    assert run["seconds"]["solve"] > 0
    before = contents(tmp_path / "out")
    for stage in ("encode.models.load_backbone", "cli.graph.build_graph", "cli.run.solve_features"):
        monkeypatch.setattr(f"transclip_fast.{stage}", None)
    again = cli(*command)
    lines = first.out.splitlines(keepends=True)
    kept = f"0 of 12 images encoded, 12 kept in {tmp_path / 'out/features'}\n"
    assert (again.code, again.out) == (0, kept + "".join(lines[3:]))
    assert lines[0].startswith(DENSE)
    assert "images a second in batches of 16; time spent waiting for images" in lines[2]
    assert contents(tmp_path / "out") == before


def test_the_result_tells_of_its_images(images, names, tiny, cli, tmp_path):
    """What encoding took and warned of is in run.json and on the page, which is written later."""
    (images(12) / "notes.heic").touch()
    (images(12) / "broken.png").touch()
    ran = cli("run", images(12), "--classes", names, *tiny, "--out", tmp_path / "out")
    assert ran.code == 0
    run = json.loads((tmp_path / "out/result/run.json").read_text())
    warning = "1 file left out, not an image that can be read here: .heic 1"
    assert [text.endswith(warning) for text in run["warnings"]].count(True) == 1
    assert list(run["seconds"]) == ["list", "load", "text", "images", "graph", "solve"]
    page = (tmp_path / "out/report.html").read_text()
    assert warning in page
    assert "1 image has no label, as it could not be read" in page
    assert str(tmp_path / "out/graph") in page  # of the command that solves again


def test_one_image_is_counted_as_one(images, tiny, cli, tmp_path):
    out = cli("encode", images(1), *tiny, "--out", tmp_path / "out").out
    assert out.startswith("1 image encoded into ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "ViT-B32", "--pretrained", "none"), "unknown model 'ViT-B32'; nearest: ViT-B"),
        (("--model", "ViT-B-32", "--pretrained", "opneai"), "nearest: openai"),
        (("--model", "$%&", "--pretrained", "none"), "unknown model '$%&'\n"),
        (("--model", "demo"), "model demo: is for the digits of `transclip-fast demo`, and for "),
        (("--model", "ViT-B-32", "--pretrained", "missing.pt"), "missing.pt: no such file"),
    ],
)  # fmt: skip
def test_unknown_models(images, refused, tmp_path, arguments, message):
    assert message in refused("encode", images(), *arguments, "--out", tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"nonsense", pickle.dumps([1, 2])])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_checkpoint_that_is_none(images, refused, tmp_path, content, suffix):
    (tmp_path / f"weights.{suffix}").write_bytes(content)
    message = refused(
        "encode", images(), "--model", "ViT-S-32", "--pretrained", tmp_path / f"weights.{suffix}",
        "--out", tmp_path / "out",
    )  # fmt: skip
    pickled = suffix == "pt" and content
    reason = "damaged, or holds pickled Python objects" if pickled else "does not load"
    assert f"weights.{suffix}: {reason}" in message


def test_run_needs_classes(images, tiny, refused, tmp_path):
    message = refused("run", images(), *tiny, "--out", tmp_path / "out")
    assert "run needs --classes" in message


def test_real_images_with_two_unreadable(golden_dir, tmp_path, cli, no_network):
    """A real open_clip model with random weights, no connection."""
    folder = tmp_path / "images"
    shutil.copytree(golden_dir / "images", folder)
    (folder / "classes.txt").chmod(0o644)
    shutil.move(folder / "classes.txt", tmp_path / "classes.txt")
    files = sorted(folder.iterdir())
    for file in files:
        file.chmod(0o644)
    files[4].write_bytes(files[4].read_bytes()[:20000])
    files[30].write_text("no picture")
    command = (
        "run", folder, "--classes", tmp_path / "classes.txt", "--model", "ViT-S-32",
        "--pretrained", "none", "--workers", "0", "--out", tmp_path / "out",
    )  # fmt: skip
    ran = cli(*command)
    assert ran.code == 0
    random = "the weights are random (--pretrained none): the labels mean nothing"
    assert ran.err.count(f"warning: {random}\n") == 1
    assert random in json.loads((tmp_path / "out/result/run.json").read_text())["warnings"]
    features = np.load(tmp_path / "out/features/img_emb/img_emb_00000.npy")
    assert features.shape == (36, 384)
    np.testing.assert_allclose(np.linalg.norm(features.astype(float), axis=1), 1, atol=1e-3)
    lines = (tmp_path / "out/features/failures.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in lines[1:]] == [
        ["4", files[4].name],
        ["30", files[30].name],
    ]
    strict = cli(*command, "--strict", "--json")
    assert strict.code == 1
    assert strict.err.count(random) == 1
    assert [row[0] for row in json.loads(strict.out)["failures"]] == [4, 30]


@pytest.mark.parametrize("command", ["encode", "run"])
def test_no_image_at_all_is_no_success(images, names, tiny, cli, tmp_path, command):
    folder = images(2)
    for file in folder.glob("*/*.png"):
        file.write_text("no picture")
    ran = cli(command, folder, "--classes", names, *tiny, "--out", tmp_path / "out")
    assert ran.code == 2
    assert ran.err.splitlines()[-1].startswith("error: ")
    assert "none of the images could be read" in ran.err


def test_what_is_left_out_is_one_line_and_links_are_followed_on_request(
    images, names, tiny, cli, tmp_path
):
    folder = images(2)
    (folder / "a.heic").touch()
    (tmp_path / "elsewhere").mkdir()
    (folder / "cat/000.png").rename(tmp_path / "elsewhere/a.png")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    command = ("encode", folder, "--classes", names, *tiny)
    ran = cli(*command, "--out", tmp_path / "out")
    line = (
        f"{folder}: 1 file left out, not an image that can be read here: .heic 1; "
        f"1 link to folders, not followed without --follow-links: {folder}/linked"
    )
    assert ran.code == 0
    assert [text for text in ran.err.splitlines() if "warning" in text] == [f"warning: {line}"]
    summary = json.loads(cli(*command, "--out", tmp_path / "out", "--json").out)
    assert (summary["n_rows"], summary["warnings"]) == (1, [line])
    assert cli(*command, "--follow-links", "--out", tmp_path / "more").code == 0
    assert load_features(tmp_path / "more").keys == ["dog/001.png", "linked/a.png"]


@pytest.mark.parametrize("command", ["run", "demo"])
def test_another_page_is_refused_before_any_work(command, images, names, tiny, refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/report.html").write_text("mine")
    given = () if command == "demo" else (images(3), "--classes", names, *tiny)
    message = refused(command, *given, "--out", tmp_path / "out")
    assert "out/report.html: is there and is no page of a result" in message


def test_a_split_json_from_images_to_a_protocol(images, tiny, succeeds, cli, tmp_path):
    folder = images(12)
    entries = [
        [f"{name}/{i:03}.png", k, ("a_cat", "dog")[k]]
        for i in range(12)
        for k, name in enumerate(("cat", "dog"))
        if i % 2 == k
    ]
    parts = {"train": entries[:4], "val": entries[4:6], "test": entries[6:]}
    file = folder.parent / "split_zhou.json"
    file.write_text(json.dumps(parts))
    for split in parts:
        succeeds("encode", file, "--split", split, *tiny, "--out", tmp_path / "pets" / split)
    stored = load_features(tmp_path / "pets/test")
    assert stored.class_names == ["a cat", "dog"]
    assert stored.keys == [path for path, *_ in parts["test"]]
    assert stored.get("labels").tolist() == [label for _, label, _ in parts["test"]]
    assert stored.get("text_features").shape[0] == 2
    ran = cli(
        "protocol", "few-shot", tmp_path / "pets", "--head", "tip-adapter", "--shots", "2",
        "--seeds", "1", "--out", tmp_path / "table",
    )  # fmt: skip
    assert ran.code == 0
    assert "| pets | tip-adapter | 2 | 1 |" in ran.out
    assert cli("run", file, *tiny, "--out", tmp_path / "out").code == 0


def test_a_split_that_is_not_there(images, tiny, refused, tmp_path):
    folder = images(2)
    (tmp_path / "split.json").write_text('{"test": [["../x.png", 0, "cat"]]}')
    for path, message in (
        (tmp_path / "split.json", "has no split 'val'"),
        (folder, "leave them out"),
    ):
        out = ("--out", tmp_path / "features")
        assert message in refused("encode", path, "--split", "val", *tiny, *out)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("out", "is for images alone, not for "),
        ("out/features", "is in "),
        ("names.txt", "is a file; name a folder"),
    ],
)
def test_a_target_is_refused_before_a_run(target, message, images, tiny, names, refused, tmp_path):
    command = ("run", images(3), "--classes", names, *tiny, "--out", tmp_path / "out")
    assert message in refused(*command, "--sort-into", tmp_path / target)


def test_run_refuses_before_it_encodes(images, tiny, names, cli, tmp_path, monkeypatch):
    monkeypatch.setattr("transclip_fast.encode.folder.encode_source", None)
    command = ("run", images(12), "--classes", names, *tiny, "--memory", "100MiB")
    ran = cli(*command, "--out", tmp_path / "out")
    assert (ran.code, ran.out) == (2, "")
    assert "error: memory: 12 rows and 2 classes, dense, need" in ran.err
