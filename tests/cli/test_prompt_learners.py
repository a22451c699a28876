"""CoCoOp and PLOT from training to a solve, and prompt learners in the protocols."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.cli.conftest import contents
from tests.cli.test_train_head import NAMES, backbone, digits  # noqa: F401 - fixtures
from transclip_fast import TransCLIP
from transclip_fast.data.patches import PatchedRows
from transclip_fast.heads import SETTINGS, fit_head
from transclip_fast.heads.files import read_head
from transclip_fast.heads.prompts import ContextSettings, Prompting, Schedule, TextTower
from transclip_fast.protocols.data import load_data

MODEL = ("--model", "demo")


@pytest.fixture
def patched(digits):  # noqa: F811
    """The digits with three patches each, made up: the image and a little noise."""
    draw = np.random.default_rng(0)
    return {
        **digits,
        **{
            f"{use}local_features": digits[f"{use or 'image_'}features"][:, None]
            + 0.02 * draw.normal(size=(len(digits[f"{use or 'image_'}features"]), 3, 512))
            for use in ("", "support_", "validation_")
        },
    }


def labelled(arrays):
    return {k: a for k, a in arrays.items() if k.startswith(("support", "validation"))}


def run_of(folder):
    return json.loads((folder / "run.json").read_text())


def runs_of(folder):
    return pq.read_table(folder / "runs.parquet").to_pylist()


def test_cocoop_from_training_to_a_solve(save, digits, backbone, cli, tmp_path):  # noqa: F811
    head, file = tmp_path / "cocoop.safetensors", save(digits)
    ran = cli("train-head", "cocoop", file, *MODEL, "--epochs", 3, "--out", head, "--json")
    assert ran.code == 0
    context, schedule = SETTINGS["cocoop"]
    settings = context, Schedule(3, schedule.batch_size, schedule.rate)
    expected = fit_head(
        "cocoop",
        digits["text_features"],
        **labelled(digits),
        prompting=Prompting(TextTower(backbone), NAMES, *settings),
    )
    found = read_head(head)
    for name in ("text", "context", "down", "down_bias", "up", "up_bias"):
        assert torch.equal(getattr(found.head, name), getattr(expected, name))
    assert (found.head.position, found.head.words) == ("end", expected.words)
    assert found.head.reader is None
    assert json.loads(ran.out)["parameters"] == {"n_ctx": 4}
    ran = cli("solve", file, "--head", head, "--out", tmp_path / "result")
    assert ran.code == 0
    warning = (
        "head cocoop: 55 images, each in the prompts of 5 classes, are 275 runs of the text tower"
    )
    assert warning in ran.err
    rows = torch.from_numpy(digits["image_features"])
    model = TransCLIP().fit(rows, digits["text_features"], **expected.prior(rows))
    run = run_of(tmp_path / "result")
    assert run["accuracy"] == accuracy(model.transduction_, digits["labels"])
    assert run["head"]["accuracy"] == accuracy(expected.predict(rows), digits["labels"])


def test_cocoop_needs_the_tower_again(save, digits, cli, refused, tmp_path):  # noqa: F811
    head, file = tmp_path / "cocoop.safetensors", save(digits)
    assert cli("train-head", "cocoop", file, *MODEL, "--epochs", 1, "--out", head).code == 0
    other = ("--model", "ViT-S-32", "--pretrained", "none")
    message = refused("solve", file, "--head", head, *other, "--out", tmp_path / "result")
    assert message.count("features.npz") == 1
    assert "was encoded with demo" in message


def accuracy(labels, truth):
    return round(100 * float((np.asarray(labels) == truth).mean()), 4)


def test_plot_from_training_to_a_solve(save, patched, backbone, done, tmp_path):  # noqa: F811
    head, file = tmp_path / "plot.safetensors", save(patched)
    short = ("--epochs", 3, "--context", 4)
    out = done("train-head", "plot", file, *MODEL, *short, "--out", head, "--json")
    schedule = Schedule(epochs=3)
    expected = fit_head(
        "plot",
        patched["text_features"],
        **labelled(patched),
        prompting=Prompting(TextTower(backbone), NAMES, ContextSettings(4), schedule),
    )
    found = read_head(head).head
    assert torch.equal(found.contexts, expected.contexts)
    assert torch.equal(found.texts, expected.texts)
    assert found.patches == 3
    assert json.loads(out)["parameters"] == {"n_ctx": 4, "patches": 3}
    rows = torch.from_numpy(patched["image_features"])
    seen = PatchedRows(rows, patched["local_features"], "local")
    assert json.loads(out)["accuracy"] == accuracy(expected.predict(seen), patched["labels"])
    done("solve", file, "--head", head, "--out", tmp_path / "result")
    run = run_of(tmp_path / "result")
    assert run["head"]["accuracy"] == accuracy(expected.predict(seen), patched["labels"])
    model = TransCLIP().fit(rows, patched["text_features"], **expected.prior(seen))
    assert run["accuracy"] == accuracy(model.transduction_, patched["labels"])
    assert "local_features" in run["inputs_sha256"]
    done("solve", file, "--out", tmp_path / "plain")
    assert "local_features" not in run_of(tmp_path / "plain")["inputs_sha256"]


def test_plot_without_patches_says_so(save, digits, patched, cli, tmp_path):  # noqa: F811
    head, bare = tmp_path / "plot.safetensors", save(digits, "bare.npz")
    short = (*MODEL, "--epochs", 1, "--context", 4)
    ran = cli("train-head", "plot", bare, *short, "--out", head)
    assert ran.code == 0
    assert "warning: head plot: no local features" in ran.err
    ran = cli("solve", bare, "--head", head, "--out", tmp_path / "result")
    assert ran.code == 0
    other = tmp_path / "other.safetensors"
    assert cli("train-head", "plot", save(patched), *short, "--out", other).code == 0
    ran = cli("solve", bare, "--head", other, "--out", tmp_path / "again")
    assert ran.code == 2
    assert "plot was trained with them, and these rows have none" in ran.err


@pytest.mark.parametrize("name", ["cocoop", "plot"])
def test_contexts_of_each_class_are_refused(name, save, digits, refused, tmp_path):  # noqa: F811
    args = (*MODEL, "--class-specific", "--epochs", 1, "--context", 4)
    file = save(digits)
    message = refused("train-head", name, file, *args, "--out", tmp_path / "x.safetensors")
    assert "shared by all classes" in message


LEARNERS = ("coop", "cocoop", "plot", "prograd")


@pytest.fixture
def short(monkeypatch):
    """Contexts that the demo's tower has room for."""
    for name in ("coop", "prograd", "plot"):
        monkeypatch.setitem(SETTINGS, name, (ContextSettings(4), SETTINGS[name][1]))
    return (*MODEL, "--epochs", 2, "--shots", 4, "--seeds", 1)


def learned(name, source, tower, seed=0):
    """A prompt learner trained on four shots of a data set."""
    context, schedule = SETTINGS[name]
    schedule = Schedule(2, schedule.batch_size, schedule.rate)
    drawn = source.pools["support"].draw(4, seed)
    prompting = Prompting(tower, source.class_names, context, schedule)
    shots = (drawn.features, drawn.labels)
    return fit_head(name, source.text, *shots, seed=seed, prompting=prompting)


@pytest.mark.filterwarnings("ignore:head plot. no local features")
def test_base_to_new(save, digits, backbone, short, cli, tmp_path):  # noqa: F811
    command = ("protocol", "base-to-new", save(digits), *short, "--head", *LEARNERS)
    ran = cli(*command, "--out", tmp_path / "t")
    assert ran.code == 0
    rows = runs_of(tmp_path / "t")
    assert [(row["head"], row["classes"]) for row in rows] == [
        (name, classes) for name in LEARNERS for classes in ("base", "new")
    ]
    (data,) = load_data([str(tmp_path / "features.npz")], pools=True)
    base, new = data.halves
    assert (base.class_names, new.class_names) == (NAMES[:3], NAMES[3:])
    tower = TextTower(backbone)
    for name, row in zip(LEARNERS, rows[1::2], strict=True):
        head = learned(name, base, tower).for_classes(tower, NAMES[3:])
        assert row["head_accuracy"] == accuracy(head.predict(new.features), new.labels)
        model = TransCLIP().fit(new.features, new.text, **head.prior(new.features))
        assert row["accuracy"] == accuracy(model.transduction_, new.labels)
    table = (tmp_path / "t/table.md").read_text()
    assert "| features | harmonic mean | cocoop | 4 | 1 |" in table
    before = contents(tmp_path / "t/runs")
    assert cli(*command, "--out", tmp_path / "t").code == 0
    assert contents(tmp_path / "t/runs") == before


def test_other_settings_are_run_anew(save, digits, short, done, tmp_path):  # noqa: F811
    command = ("protocol", "base-to-new", save(digits), "--head", "coop", "--out", tmp_path / "t")
    done(*command, *short)
    first = set(contents(tmp_path / "t/runs"))
    done(*command, *short, "--epochs", 3)
    assert len(set(contents(tmp_path / "t/runs")) - first) == len(first) == 2


def test_cross_dataset_and_domains(save, digits, backbone, short, done, tmp_path):  # noqa: F811
    names = ["digit", "hand", "photo"]
    kept = digits["labels"] < 3
    target = {
        "image_features": digits["image_features"][kept],
        "labels": digits["labels"][kept],
        "text_features": digits["text_features"][:3],
        "class_names": np.array(names),
    }
    file, other = save(digits), save(target, "target.npz")
    command = ("--head", "coop", *short)
    done("protocol", "cross-dataset", file, other, *command, "--out", tmp_path / "t")
    (row,) = runs_of(tmp_path / "t")
    (source,), (data,) = load_data([str(file)], pools=True), load_data([str(other)], pools=False)
    tower = TextTower(backbone)
    head = learned("coop", source, tower)
    moved = head.for_classes(tower, names)
    assert row["head_accuracy"] == accuracy(moved.predict(data.features), data.labels)
    save({**target, "class_names": np.array(NAMES[:3])}, "target.npz")
    done("protocol", "domains", file, other, *command, "--out", tmp_path / "d")
    (row,) = runs_of(tmp_path / "d")
    own = head.restrict(torch.arange(3)).predict(data.features)
    assert row["head_accuracy"] == accuracy(own, data.labels)


def test_few_shot_with_patches(save, patched, backbone, short, done, tmp_path):  # noqa: F811
    file = save(patched)
    command = ("--head", "plot", "taskres", *short)
    done("protocol", "few-shot", file, *command, "--out", tmp_path / "t")
    row, other = runs_of(tmp_path / "t")
    assert row["head_parameters"] == "n_ctx 4, patches 3"
    (data,) = load_data([str(file)], pools=True, local=True)
    drawn = data.pools["support"].draw(4, 0)
    assert drawn.features.shape == (20, 4, 512)
    head = fit_head(
        "plot",
        data.text,
        drawn.features[:, 0],
        drawn.labels,
        support_local_features=drawn.features[:, 1:],
        prompting=Prompting(TextTower(backbone), NAMES, ContextSettings(4), Schedule(epochs=2)),
    )
    assert row["head_accuracy"] == accuracy(head.predict(data.patched), data.labels)
    assert other["head"] == "taskres"
    halves = data.halves
    whole = data.patched[:]
    assert torch.equal(halves[1].patched[:], whole[data.labels >= 3])


def test_shots_with_patches_and_queries_without(save, patched, short, cli, tmp_path):
    patched.pop("local_features")
    command = (save(patched), *short, "--head", "plot", "--out", tmp_path / "t")
    for protocol in ("few-shot", "base-to-new"):
        ran = cli("protocol", protocol, *command)
        assert ran.code == 2
        assert "features: has no local_features, which the shots of features have" in ran.err


@pytest.mark.parametrize(
    ("protocol", "change", "options", "expected"),
    [
        ("few-shot", {"class_names": None}, MODEL, "has no class_names, of which coop makes"),
        ("base-to-new", {"class_names": None}, MODEL, "features: has no class_names to make"),
        ("few-shot", {}, (), "features.npz: does not say what encoded it; give --model"),
        ("base-to-new", {}, ("--model", "nonsense"), "unknown model 'nonsense'"),
    ],
)
def test_what_cannot_be_run(protocol, change, options, expected, save, digits, cli, tmp_path):  # noqa: F811
    kept = {k: a for k, a in {**digits, **change}.items() if a is not None}
    args = ("--head", "coop", "--shots", 1, "--seeds", 1, "--out", tmp_path / "t")
    ran = cli("protocol", protocol, save(kept), *args, *options)
    assert ran.code == 2
    assert ran.err.count("\n") == 1
    assert expected in ran.err
