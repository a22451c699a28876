"""`train-head`: a few-shot method to a file, and `solve --head` from it."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.cli.conftest import with_shots
from tests.conftest import unit
from transclip_fast import TransCLIP, demo
from transclip_fast.cli import train_head
from transclip_fast.encode.folder import encode_source
from transclip_fast.encode.sources import open_source
from transclip_fast.encode.text import ClassPrompts, encode_text
from transclip_fast.heads import clip_adapter, fit_head
from transclip_fast.heads.files import read_head
from transclip_fast.heads.prompts import ContextSettings, Prompting, Schedule, TextTower

# Words that the demo's model has read, but never of a digit alone.
NAMES = ["photo", "picture", "image", "number", "scan"]
SHORT = ("--epochs", 3, "--context", 4)
COMMAND = (
    "from transclip_fast.cli import main, train_head; train_head.CHECKPOINT_SECONDS = 0; main()"
)


@pytest.fixture(scope="module")
def backbone():
    return demo.backbone()


@pytest.fixture(scope="module")
def digits(backbone):
    """The first five digits under other names: shots, validation rows and queries."""
    images, labels = demo.digits()
    rows = np.concatenate([np.flatnonzero(labels == k)[:22] for k in range(5)])
    pixels = [backbone.preprocess(Image.fromarray(demo.enlarge(images[row]))) for row in rows]
    with torch.inference_mode():
        features = backbone.model.encode_image(torch.stack(pixels), normalize=True).numpy()
    prompts = ClassPrompts(NAMES, [[f"a photo of the digit {name}."] for name in NAMES], "test")
    place = np.tile(np.arange(22), 5)
    found = {"text_features": encode_text(backbone, prompts), "class_names": np.array(NAMES)}
    for name, chosen in (
        ("support", place < 8),
        ("validation", (place >= 8) & (place < 11)),
        ("image", place >= 11),
    ):
        found[f"{name}_features"] = features[chosen]
        found[f"{name}_labels"] = labels[rows][chosen]
    found["labels"] = found.pop("image_labels")
    return found


@pytest.fixture
def coop(save, digits, done, tmp_path):
    """A file of CoOp, trained for a moment."""
    head = tmp_path / "coop.safetensors"
    done("train-head", "coop", save(digits), "--model", "demo", *SHORT, "--out", head)
    return head


def read(folder):
    return json.loads((folder / "run.json").read_text())


@pytest.mark.parametrize("name", ["coop", "prograd"])
def test_what_it_writes_is_what_python_fits(name, save, digits, backbone, done, tmp_path):
    head = tmp_path / "head.safetensors"
    given = ("--model", "demo", "--class-specific", "--position", "middle", "--seed", 2, *SHORT)
    out = done("train-head", name, save(digits), *given, "--out", head, "--json")
    run, found = json.loads(out), read_head(head)
    prompting = Prompting(
        TextTower(backbone), NAMES, ContextSettings(4, True, "middle"), Schedule(epochs=3)
    )
    labelled = {k: digits[k] for k in digits if k.startswith(("support", "validation"))}
    expected = fit_head(name, digits["text_features"], **labelled, seed=2, prompting=prompting)
    assert torch.equal(found.head.text, expected.text)
    assert torch.equal(found.head.context, expected.context)
    assert (found.name, found.class_names) == (name, NAMES)
    assert found.encoder == {k: backbone.identity[k] for k in ("model", "weights")}
    rows = torch.from_numpy(digits["image_features"])
    right = 100 * (expected.predict(rows).numpy() == digits["labels"]).mean()
    assert run["accuracy"] == pytest.approx(right, abs=1e-4)
    zero_shot = (digits["image_features"] @ digits["text_features"].T).argmax(1)
    right = 100 * (zero_shot == digits["labels"]).mean()
    assert run["zero_shot_accuracy"] == pytest.approx(right, abs=1e-4)
    assert run["nearest_words"].keys() == set(NAMES)
    assert [w for words in run["nearest_words"].values() for w in words] == expected.words
    assert run["loss"] > 0
    assert (run["n_shots"], run["n_queries"], run["parameters"]) == (40, 55, {"n_ctx": 4})
    assert {path.name for path in tmp_path.iterdir()} == {"head.safetensors", "features.npz"}


def test_it_learns_what_zero_shot_cannot_do(save, digits, done, tmp_path):
    head = tmp_path / "coop.safetensors"
    args = ("--model", "demo", "--context", 4, "--class-specific", "--epochs", 60)
    out = done("train-head", "coop", save(digits), *args, "--out", head, "--json")
    run = json.loads(out)
    assert run["accuracy"] > run["zero_shot_accuracy"] + 30
    done("solve", tmp_path / "features.npz", "--head", head, "--out", tmp_path / "result")
    solved = read(tmp_path / "result")
    assert solved["head"]["accuracy"] == run["accuracy"]
    assert solved["accuracy"] > run["zero_shot_accuracy"] + 30


def test_transclip_on_top(coop, digits, done, tmp_path):
    features = tmp_path / "features.npz"
    out = done("solve", features, "--head", coop, "--out", tmp_path / "result")
    head = read_head(coop).head
    rows = torch.from_numpy(digits["image_features"])
    model = TransCLIP().fit(rows, digits["text_features"], **head.prior(rows))
    table = pq.read_table(tmp_path / "result/predictions.parquet")
    np.testing.assert_array_equal(table["confidence"], model.label_distributions_.max(1))
    np.testing.assert_array_equal(table["zero_shot_label"], model.zero_shot_labels_)
    run = read(tmp_path / "result")
    assert run["head"]["file"] == str(coop)
    assert run["head"]["name"] == "coop"
    assert f"% zero-shot, {run['head']['accuracy']:.2f} % coop -> {run['accuracy']:.2f} %" in out


def test_without_shots_or_texts_in_what_is_solved(coop, save, digits, done, tmp_path):
    bare = {"image_features": digits["image_features"], "labels": digits["labels"]}
    done("solve", save(bare, "bare.npz"), "--head", coop, "--out", tmp_path / "result")
    run = read(tmp_path / "result")
    assert run["zero_shot_accuracy"] == run["head"]["accuracy"]


def test_its_words_are_shown(coop, save, digits, done, tmp_path):
    out = done(
        "train-head", "coop", tmp_path / "features.npz", "--model", "demo", *SHORT, "--out", coop
    )
    words = " ".join(read_head(coop).head.words)
    assert f"words nearest to the context of all: {words}\n" in out
    assert "s, loss " in out
    assert "accuracy on 55 images" in out
    assert "accuracy on the validation rows" in out
    assert f"`solve --head {coop}`" in out


@pytest.mark.parametrize("name", ["taskres", "tip-adapter-f", "clip-adapter"])
def test_methods_on_features_alone(name, save, digits, done, tmp_path, monkeypatch):
    monkeypatch.setattr(clip_adapter, "EPOCHS", 5)
    head = tmp_path / "head.safetensors"
    done("train-head", name, save(digits), "--out", head)
    labelled = {k: digits[k] for k in digits if k.startswith(("support", "validation"))}
    expected = fit_head(name, digits["text_features"], **labelled)
    rows = torch.from_numpy(digits["image_features"])
    assert torch.equal(read_head(head).head.logits(rows), expected.logits(rows))
    done("solve", tmp_path / "features.npz", "--head", head, "--out", tmp_path / "result")
    done("solve", tmp_path / "features.npz", "--head", name, "--out", tmp_path / "direct")
    assert read(tmp_path / "result")["accuracy"] == read(tmp_path / "direct")["accuracy"]


def test_folders_of_splits(backbone, digits, done, refused, tmp_path):
    """The manifest says which model it was; shots are drawn from train/."""
    images, labels = demo.digits()
    names = ["photo", "picture"]
    prompts = ClassPrompts(names, [[f"a photo of the digit {name}."] for name in names], "test")
    for split, start in (("train", 0), ("test", 6)):
        for k, name in enumerate(names):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for row in np.flatnonzero(labels == k)[start : start + 6]:
                Image.fromarray(demo.enlarge(images[row])).save(folder / f"{row}.png")
        source = open_source(tmp_path / "images" / split, labels_from_folders=True)
        encode_source(source, backbone, tmp_path / "sets" / split, prompts)
    head = tmp_path / "coop.safetensors"
    args = ("train-head", "coop", tmp_path / "sets", *SHORT, "--shots")
    run = json.loads(done(*args, 4, "--out", head, "--json"))
    assert (run["n_shots"], run["n_queries"]) == (8, 12)
    assert read_head(head).class_names == names
    assert read_head(head).training["shots"] == 4
    done("solve", tmp_path / "sets/test", "--head", head, "--out", tmp_path / "result")
    # Features of another model do not get this head, nor this tower.
    manifest = tmp_path / "sets/test/manifest.json"
    content = json.loads(manifest.read_text())
    content["config"]["weights"] = "0" * 64
    manifest.write_text(json.dumps(content))
    message = refused("solve", tmp_path / "sets/test", "--head", head, "--out", tmp_path / "more")
    assert "coop.safetensors: is of demo (" in message
    assert "sets/test was encoded with demo (000000000000); encode both" in message
    message = refused(*args, 4, "--out", head)
    assert "sets/train: is of demo (" in message
    (tmp_path / "sets/train").rename(tmp_path / "train")
    given = []
    for name in ("support_features", "support_labels"):
        np.save(tmp_path / f"{name}.npy", digits[name][:16])
        given += [f"--{name.replace('_', '-')}", tmp_path / f"{name}.npy"]
    message = refused(*args, 4, "--out", head, *given)
    assert "was encoded with demo (000000000000), not with demo (" in message


def test_fewer_rows_than_shots_are_reported(save, digits, cli, tmp_path):
    ran = cli(
        "train-head", "taskres", save(digits), "--shots", 9, "--out", tmp_path / "h.safetensors"
    )
    assert ran.code == 0
    assert "5 of 5 classes have fewer than 9 rows to draw from, at least 8" in ran.err


def test_interrupted_again_and_again(save, digits, killed, done, monkeypatch, tmp_path):
    monkeypatch.setattr(train_head, "CHECKPOINT_SECONDS", 0.0)
    command = ["train-head", "coop", save(digits), "--model", "demo", *SHORT, "--out"]
    done(*command, tmp_path / "whole.safetensors")
    for stop in (1, 3):
        killed(stop, *command, tmp_path / "head.safetensors")
        assert not (tmp_path / "head.safetensors").exists()
    state = np.load(tmp_path / ".head.safetensors.training.npz")
    assert int(state["step"]) == 4
    assert {*state} - {"identity", "sha256"} == {"step", "threads", "context", "momentum.context"}
    done(*command, tmp_path / "head.safetensors")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"features.npz", "whole.safetensors", "head.safetensors"}
    whole, again = ((tmp_path / f"{n}.safetensors").read_bytes() for n in ("whole", "head"))
    assert whole == again


def test_a_checkpoint_that_cannot_be_removed(save, digits, cli, monkeypatch, tmp_path):
    unlink, head = Path.unlink, tmp_path / "head.safetensors"

    def fail(self, **options):
        if self.name == ".head.safetensors.training.npz":
            raise OSError(errno.EIO, "no disk")
        unlink(self, **options)

    monkeypatch.setattr(Path, "unlink", fail)
    ran = cli("train-head", "coop", save(digits), "--model", "demo", *SHORT, "--out", head)
    lines = [line for line in ran.err.splitlines() if not line.startswith("train ")]
    assert (ran.code, len(lines)) == (0, 1)
    assert lines[0].startswith("warning: cannot remove ")
    assert "(no disk); do so by hand" in lines[0]
    assert read_head(head).name == "coop"


def test_killed(save, digits, done, tmp_path):
    command = [
        "train-head",
        "coop",
        save(digits),
        "--model",
        "demo",
        "--epochs",
        60,
        "--context",
        4,
    ]
    command = [*map(str, command), "--out"]
    head, state = tmp_path / "head.safetensors", ".head.safetensors.training.npz"
    process = subprocess.Popen([sys.executable, "-c", COMMAND, *command, str(head)])
    for _ in range(6000):
        if (tmp_path / state).exists() or process.poll() is not None:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not head.exists()
    assert 0 < int(np.load(tmp_path / state)["step"]) < 120
    done(*command, head)
    done(*command, tmp_path / "whole.safetensors")
    assert head.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_another_training_is_not_continued(save, digits, killed, cli, monkeypatch, tmp_path):
    monkeypatch.setattr(train_head, "CHECKPOINT_SECONDS", 0.0)
    head = tmp_path / "head.safetensors"
    command = ["train-head", "coop", save(digits), "--model", "demo", *SHORT, "--out", head]
    killed(2, *command)
    ran = cli(*command, "--rate", 0.01)
    assert ran.code == 0
    assert "is of other input or parameters; training begins anew" in ran.err


@pytest.mark.parametrize(
    ("change", "options", "expected"),
    [
        ({}, ("--model", "demo", "--start", "the", "--context", 3), "leave --context out"),
        (
            {},
            ("--model", "demo", "--context", 13),
            "class 'photo': its prompt has 15 tokens with 13",
        ),
        ({}, ("--model", "demo", "--start", "zebra"), "does not know 'zebra'"),
        ({}, (), "features.npz: does not say what encoded it; give --model and --pretrained"),
        ({}, ("--model", "ViT-S-32", "--pretrained", "none"), "has 512 dimensions, embeddings of"),
        ({"class_names": None}, ("--model", "demo"), "has no class_names"),
        ({"class_names": np.array(NAMES[:4])}, ("--model", "demo"), "4 names for 5 classes"),
        ({"support_features": None, "support_labels": None}, (), "has no shots: give a folder"),
        ({"support_labels": None}, (), "come together; one is missing"),
        ({"text_features": None}, (), "head coop needs text_features"),
        ({"labels": np.full(55, 9)}, ("--model", "demo"), "labels: row 0 has label 9"),
    ],
)
def test_what_cannot_be_trained(change, options, expected, save, digits, refused, tmp_path):
    kept = {key: array for key, array in {**digits, **change}.items() if array is not None}
    out = ("--out", tmp_path / "head.safetensors")
    assert expected in refused("train-head", "coop", save(kept), "--epochs", 1, *out, *options)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("lora", "--out", "h.safetensors"), "head 'lora' is not known; choose one of"),
        (("coop", "--out", "head.pt"), "head.pt: name a file that ends in .safetensors"),
        (("taskres", "--out", "h.safetensors", "--start", "a"), "taskres learns no prompts"),
    ],
)
def test_what_makes_no_sense(args, expected, save, digits, refused):
    assert expected in refused("train-head", args[0], save(digits), *args[1:])


def test_other_files_are_not_replaced(save, digits, refused, tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "weights.safetensors")
    out = tmp_path / "weights.safetensors"
    assert "is there and is no head" in refused("train-head", "taskres", save(digits), "--out", out)


@pytest.mark.parametrize(
    ("change", "options", "expected"),
    [
        ({"image_features": np.ones((4, 9))}, (), "is for 512 dimensions, "),
        ({"class_names": np.array(["a", *NAMES[1:]])}, (), "its class 0 is 'photo', that of"),
        ({"text_features": np.eye(6, 512)}, (), "has 5 classes, "),
        ({}, ("--logit-scale", 50), "was trained with --logit-scale 100"),
        ({}, ("--gamma", 0.1), "gamma: the shots go to the head"),
        ({"prototypes": np.eye(5, 512)}, (), "is the prior; leave one of them out"),
    ],
)
def test_heads_that_do_not_fit(change, options, expected, coop, save, digits, refused, tmp_path):
    file = save({**digits, **change}, "other.npz")
    message = refused("solve", file, "--head", coop, "--out", tmp_path / "result", *options)
    assert expected in message
    assert message.count("error: ") == 1
    if "its class" in expected or "is for 512" in expected:
        assert message.startswith(f"error: {coop}: ")


@pytest.mark.parametrize("name", ["taskres", "tip-adapter"])
def test_texts_in_another_order_than_the_heads(name, save, digits, done, refused, tmp_path):
    head, out = tmp_path / "head.safetensors", ("--out", tmp_path / "result")
    done("train-head", name, save(digits), "--out", head)
    unnamed = {key: array for key, array in digits.items() if key != "class_names"}
    done("solve", save(unnamed), "--head", head, *out)
    swapped = {**unnamed, "text_features": digits["text_features"][[0, 3, 2, 1, 4]]}
    assert refused("solve", save(swapped, "other.npz"), "--head", head, *out) == (
        f"error: {head}: its class 1 has the text of class 3 of {tmp_path / 'other.npz'}; give "
        "--text-features in the order of the head\n"
    )


def test_solve_names_what_trains_prompts(save, digits, refused, tmp_path):
    message = refused("solve", save(digits), "--head", "coop", "--out", tmp_path / "result")
    assert "`transclip-fast train-head coop` does that and writes a file for --head" in message
    message = refused(
        "solve", save(digits), "--head", "no.safetensors", "--out", tmp_path / "result"
    )
    assert message == "error: no.safetensors: no such file\n"


def test_shots_in_another_order_than_the_texts_are_warned_of(save, arrays, cli, tmp_path):
    text = np.stack([arrays["image_features"][arrays["labels"] == k].mean(0) for k in range(6)])
    few_shot = with_shots(arrays | {"text_features": unit(text)}, 4)
    few_shot["support_labels"] = (few_shot["support_labels"] + 1) % 6
    features = save(few_shot)
    ran = cli("train-head", "taskres", features, "--out", tmp_path / "head.safetensors")
    assert ran.code == 0
    (line,) = (line for line in ran.err.splitlines() if line.startswith("warning: "))
    assert line.startswith(f"warning: {features}: support_labels: zero-shot labels match on ")
