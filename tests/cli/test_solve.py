"""`solve`: its folder, its summary, and every way of handing over a problem."""

from __future__ import annotations

import json
import os

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import balanced
from transclip_fast import TransCLIP

ACCURACIES = {"rn50": 95.9204, "vit-b-32": 90.3483, "vit-l-14": 99.1045}
KEYS = {
    "accuracy",
    "zero_shot_accuracy",
    "n_queries",
    "n_classes",
    "dim",
    "n_flipped",
    "seconds",
    "graph",
    "backend",
    "device",
    "method",
    "versions",
    "config",
}
COLUMNS = [
    "row",
    "source_row",
    "key",
    "label",
    "label_name",
    "confidence",
    "zero_shot_label",
    "zero_shot_label_name",
    "zero_shot_confidence",
    "changed",
    "top5_labels",
    "top5_label_names",
    "top5_confidences",
]


@pytest.mark.parametrize("backbone", ACCURACIES)
def test_published_accuracy_and_every_published_label(backbone, golden_dir, cli, tmp_path):
    features = golden_dir / f"whurs19_clip_{backbone}.npz"
    assert cli("solve", features, "--out", tmp_path / "result").code == 0
    with np.load(features) as file:
        official = file["official_assignments"].argmax(1)
    run, table = read(tmp_path / "result")
    assert run["accuracy"] == ACCURACIES[backbone]
    np.testing.assert_array_equal(table["label"], official)
    names = np.array(run["class_names"])
    np.testing.assert_array_equal(table["label_name"].to_pylist(), names[official])


def test_summary_and_predictions(solved, arrays):
    run, table = read(solved)
    model = fit(arrays)
    labels = arrays["labels"]
    assert run.keys() >= KEYS
    assert run["accuracy"] == round(100 * (model.transduction_ == labels).mean(), 4)
    assert run["zero_shot_accuracy"] == round(100 * (model.zero_shot_labels_ == labels).mean(), 4)
    assert (run["n_queries"], run["n_classes"], run["dim"]) == (77, 6, 33)
    assert run["n_flipped"] == (model.transduction_ != model.zero_shot_labels_).sum() > 0
    assert run["graph"].keys() >= {"search", "recall"}
    assert run["seconds"].keys() >= {"load", "graph", "solve"}
    assert run["versions"]["torch"] == torch.__version__.split("+")[0]
    assert run["config"]["n_neighbors"] == 3
    assert run["config"]["kl_weight"] == 1.0

    assert table.column_names[: len(COLUMNS)] == COLUMNS
    z = model.label_distributions_
    np.testing.assert_array_equal(table["row"], np.arange(77))
    np.testing.assert_array_equal(table["source_row"], np.arange(77))
    np.testing.assert_array_equal(table["label"], model.transduction_)
    np.testing.assert_array_equal(table["confidence"], z.max(1))
    np.testing.assert_array_equal(table["zero_shot_label"], model.zero_shot_labels_)
    np.testing.assert_array_equal(table["zero_shot_confidence"], model.zero_shot_confidences_)
    assert table["label_name"].to_pylist() == [str(k) for k in model.transduction_]
    assert table["zero_shot_label_name"].to_pylist() == [str(k) for k in model.zero_shot_labels_]
    np.testing.assert_array_equal(table["changed"], model.transduction_ != model.zero_shot_labels_)
    top = np.array(table["top5_labels"].to_pylist())
    assert top.shape == (77, 5)
    assert table["top5_label_names"].to_pylist() == [[str(k) for k in row] for row in top]
    np.testing.assert_array_equal(top[:, 0], model.transduction_)
    confidences = np.array(table["top5_confidences"].to_pylist(), np.float32)
    np.testing.assert_array_equal(confidences, -np.sort(-z, axis=1)[:, :5])
    np.testing.assert_array_equal(confidences, np.take_along_axis(z, top, 1))


def test_fewer_classes_than_five(save, problem, succeeds, tmp_path):
    features, prototypes, _ = problem(k=3)
    file = save({"image_features": features, "text_features": prototypes})
    succeeds("solve", file, "--out", tmp_path / "result")
    run, table = read(tmp_path / "result")
    assert run["accuracy"] is run["zero_shot_accuracy"] is None
    assert {len(row) for row in table["top5_labels"].to_pylist()} == {3}


def test_json_is_all_that_standard_output_holds(save, arrays, succeeds, tmp_path):
    out = succeeds("solve", save(arrays), "--out", tmp_path / "result", "--json")
    run = json.loads(out, parse_constant=pytest.fail)
    assert run == read(tmp_path / "result")[0]


def test_text_summary_names_accuracy_and_folder(save, arrays, succeeds, tmp_path):
    out = succeeds("solve", save(arrays), "--out", tmp_path / "result")
    run, _ = read(tmp_path / "result")
    assert f"{run['zero_shot_accuracy']:.2f} % zero-shot -> {run['accuracy']:.2f} %" in out
    assert str(tmp_path / "result") in out


@pytest.mark.parametrize(
    ("given", "fitted"),
    [
        (["--max-iter", 2, "--inner-iter", 1], {"max_iter": 2, "inner_iter": 1}),
        (["--no-unit-means"], {"unit_means": False}),
        (["--graph-mode", "directed"], {"graph_mode": "directed"}),
        (["--covariance", "isotropic", "--kl-weight", 0.25], {"covariance": "isotropic",
                                                             "kl_weight": 0.25}),
        (["--logit-scale", 30.0, "--n-neighbors", 5], {"logit_scale": 30.0, "n_neighbors": 5}),
    ],
)  # fmt: skip
def test_parameters(given, fitted, save, arrays, cli, tmp_path):
    assert cli("solve", save(arrays), "--out", tmp_path / "result", *given).code == 0
    run, table = read(tmp_path / "result")
    expected = fit(arrays, **fitted).label_distributions_
    np.testing.assert_array_equal(table["confidence"], expected.max(1))
    assert {name: run["config"][name] for name in fitted} == fitted


def test_sparse(save, arrays, succeeds, refused, tmp_path):
    file, given = save(arrays), ("--assignments", "sparse", "--candidates", 5, "--rank", 4)
    out = succeeds("solve", file, "--out", tmp_path / "result", *given, "--backend", "torch")
    run, table = read(tmp_path / "result")
    model = fit(arrays, assignments="sparse", candidates=5, rank=4, backend="torch")
    assert run["backend"] == "torch"
    assert run["truncation"] == model.truncation_
    assert "sparse: 5 candidates a row, 4 kept; mass misplaced at most" in out
    z = model.label_distributions_.toarray()
    np.testing.assert_array_equal(table["label"], model.transduction_)
    np.testing.assert_array_equal(table["confidence"], z.max(1))
    for row, listed in zip(z, table["top5_labels"].to_pylist(), strict=True):
        assert listed == np.argsort(-row, kind="stable")[: (row > 0).sum()].tolist()
    message = refused(
        "solve", file, "--out", tmp_path / "other", "--assignments", "dense", *given[2:]
    )
    assert "candidates: dense assignments keep every class; leave it out" in message


@pytest.mark.parametrize("kind", ["prior", "prior_logits", "prototypes"])
def test_on_top_of_another_method(kind, save, arrays, succeeds, tmp_path):
    given = {
        "prior": np.full((77, 6), 0.1) + 0.4 * np.eye(6)[arrays["labels"]],
        "prior_logits": 2 * np.eye(6)[arrays["labels"]],
        "prototypes": arrays["text_features"] + 0.05 * arrays["text_features"][::-1],
    }[kind]
    given = given / np.linalg.norm(given, axis=1, keepdims=True) if kind == "prototypes" else given
    np.save(tmp_path / "given.npy", given)
    option = "--" + kind.replace("_", "-")
    succeeds("solve", save({**arrays, kind: given}), "--out", tmp_path / "a")
    succeeds("solve", save(arrays), option, tmp_path / "given.npy", "--out", tmp_path / "b")
    model = fit({**arrays, kind: given})
    for folder in ("a", "b"):
        _, table = read(tmp_path / folder)
        np.testing.assert_array_equal(table["confidence"], model.label_distributions_.max(1))
        np.testing.assert_array_equal(table["zero_shot_label"], fit(arrays).zero_shot_labels_)


def test_few_shot(save, arrays, problem, succeeds, tmp_path):
    shots, _, classes = problem(n=30)
    rows = balanced(classes, 2)
    arrays |= {"support_features": shots[rows], "support_labels": classes[rows]}
    succeeds("solve", save(arrays), "--out", tmp_path / "given", "--gamma", 0.02)
    arrays |= {"validation_features": shots[20:], "validation_labels": classes[20:]}
    succeeds("solve", save(arrays), "--out", tmp_path / "chosen")
    for folder, model in (("given", fit(arrays, gamma=0.02)), ("chosen", fit(arrays))):
        run, table = read(tmp_path / folder)
        np.testing.assert_array_equal(table["confidence"], model.label_distributions_.max(1))
        assert run["config"]["gamma"] == model.gamma_
        assert run["config"]["kl_weight"] == 0.5


def test_too_few_shots(save, arrays, done, tmp_path):
    arrays |= {"support_features": arrays["image_features"][:4], "support_labels": np.arange(4)}
    out = done("solve", save(arrays), "--out", tmp_path / "result")
    assert "\nzero-shot with 4 shots: too few of some class for few-shot\n" in out
    run = read(tmp_path / "result")[0]
    assert (run["n_shots"], run["config"]["gamma"], run["config"]["kl_weight"]) == (4, None, 1)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors"])
def test_separate_files(suffix, arrays, solved, succeeds, tmp_path):
    options = []
    for name, array in arrays.items():
        path = tmp_path / f"{name}{suffix}"
        if suffix == ".npy":
            np.save(path, array)
        elif suffix == ".npz":
            np.savez(path, anything=array)
        elif suffix == ".pt":
            torch.save(torch.from_numpy(array), path)
        else:
            save_file({"anything": torch.from_numpy(array)}, path)
        options += ["--" + name.replace("_", "-"), path]
    if suffix in (".npz", ".safetensors"):  # FEATURES itself goes by the array's name
        np.save(tmp_path / "image_features.npy", arrays["image_features"])
        options[1] = tmp_path / "image_features.npy"
    (tmp_path / "names.txt").write_text("\ufeffa\nb\r\nç\nd\ne\nf\n\n", encoding="utf-8")
    options += ["--class-names", tmp_path / "names.txt", "--out", tmp_path / "separate"]
    succeeds("solve", *options[1:])
    run, table = read(tmp_path / "separate")
    assert run["class_names"] == ["a", "b", "ç", "d", "e", "f"]
    named = ["label_name", "zero_shot_label_name", "top5_label_names"]
    assert table.drop(named).equals(read(solved)[1].drop(named))
    assert table["label_name"].to_pylist() == ["abçdef"[k] for k in table["label"].to_pylist()]


@pytest.mark.parametrize("dtype", ["float16", "float64", "bfloat16"])
def test_float_types(dtype, arrays, save, succeeds, cli, tmp_path):
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    for name in ("image_features", "text_features"):
        tensors[name] = tensors[name].to(getattr(torch, dtype))
    torch.save(tensors, tmp_path / "features.pt")
    assert cli("solve", tmp_path / "features.pt", "--out", tmp_path / "result").code == 0
    _, table = read(tmp_path / "result")
    assert (table["label"].to_numpy() == fit(arrays).transduction_).mean() > 0.9


def test_warns_of_one_class_that_swallows_the_others(save, problem, cli, tmp_path):
    features, prototypes, _ = problem()
    logits = np.zeros((77, 6))
    logits[:, 2] = 1e-3
    file = save({"image_features": features, "text_features": prototypes, "prior_logits": logits})
    ran = cli("solve", file, "--out", tmp_path / "result", "--update-means", "--kl-weight", 100)
    run, _ = read(tmp_path / "result")
    assert ran.code == 0
    assert ran.err.splitlines() == [f"warning: {message}" for message in run["warnings"]]
    assert "class 2 got" in ran.err
    assert "swallowing" in ran.err


def test_warns_of_empty_classes(save, arrays, cli, tmp_path):
    arrays |= {"prior_logits": 20 * np.eye(6)[arrays["labels"] % 3]}
    file = save({**arrays, "class_names": np.array(list("uvwxyz"))})
    ran = cli("solve", file, "--out", tmp_path / "result", "--class-cost", "off", "--json")
    run, table = read(tmp_path / "result")
    empty = set("uvwxyz") - set(table["label_name"].to_pylist())
    assert ran.code == 0
    assert empty == set("xyz")
    assert "3 of 6 classes lost all their images, e.g. class 3 (x)" in ran.err
    assert json.loads(ran.out)["warnings"] == run["warnings"]


def test_warns_of_classes_in_another_order(save, arrays, cli, tmp_path):
    arrays["labels"] = (fit(arrays).zero_shot_labels_ + 1) % 6
    ran = cli("solve", save(arrays), "--out", tmp_path / "result")
    assert ran.code == 0
    assert "in one order" in ran.err


def test_rows_off_the_unit_sphere_are_named_with_their_file(save, arrays, cli, tmp_path):
    arrays["image_features"] = arrays["image_features"] * np.float32(2)
    file = save(arrays)
    ran = cli("solve", file, "--out", tmp_path / "result")
    assert ran.code == 0
    assert ran.err.startswith(f"warning: {file}: image_features: 77 of 77 rows were not unit")
    assert ran.err.count("\n") == 1


def fit(arrays, **parameters):
    given = {name: array for name, array in arrays.items() if name != "labels"}
    return TransCLIP(**parameters).fit(given.pop("image_features"), **given)


def read(folder):
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    return run, pq.read_table(folder / "predictions.parquet")


def test_known_labels(save, arrays, done, tmp_path):
    """In the file or beside it: the labels stay, and the others' accuracy is reported, too."""
    labels = arrays["labels"]
    known = np.where(np.arange(77) < 9, (labels + 1) % 6, -1)
    np.save(tmp_path / "known.npy", known)
    beside = ("--known-labels", tmp_path / "known.npy")
    out = done("solve", save(arrays), *beside, "--out", tmp_path / "beside")
    done("solve", save(arrays | {"known_labels": known}), "--out", tmp_path / "result")
    run, table = read(tmp_path / "result")
    assert table.equals(read(tmp_path / "beside")[1])
    model = TransCLIP(device="cpu").fit(
        arrays["image_features"], arrays["text_features"], known_labels=known
    )
    np.testing.assert_array_equal(table["label"], model.transduction_)
    right, zero_shot = model.transduction_ == labels, model.zero_shot_labels_ == labels
    assert run["accuracy"] == round(100 * right.mean(), 4)
    assert run["known_labels"] == {
        "n_known": 9,
        "accuracy_of_others": round(100 * right[9:].mean(), 4),
        "zero_shot_accuracy_of_others": round(100 * zero_shot[9:].mean(), 4),
    }
    expected = 100 * zero_shot[9:].mean(), 100 * right[9:].mean()
    assert "9 labels known; of the others {:.2f} % zero-shot -> {:.2f} %".format(*expected) in out


def test_all_labels_known(save, arrays, done, tmp_path):
    arrays["known_labels"] = arrays["labels"]
    out = done("solve", save(arrays), "--out", tmp_path / "result")
    assert "\n77 labels known\n" in out
    run = read(tmp_path / "result")[0]
    assert run["accuracy"] == 100
    assert run["known_labels"]["accuracy_of_others"] is None


def test_heads_beside_known_labels(save, arrays, done, tmp_path):
    """The head is trained on the shots; the known rows stay as they are."""
    features, labels = arrays["image_features"], arrays["labels"]
    known = np.where(np.arange(77) < 9, (labels + 1) % 6, -1)
    arrays |= {"support_features": features, "support_labels": labels, "known_labels": known}
    command = ("solve", save(arrays), "--head", "tip-adapter", "--out")
    done(*command, tmp_path / "result")
    np.testing.assert_array_equal(read(tmp_path / "result")[1]["label"][:9], known[:9])


def test_rejected_rows_are_marked(save, arrays, cli, tmp_path):
    file, out, known = save(arrays), tmp_path / "result", known_file(arrays, tmp_path)
    ran = cli("solve", file, "--out", out, "--reject", "0.1", "--known-labels", known)
    run, table = read(out)
    scores, rejected, labels, truth = (
        table[name].to_numpy() for name in ("outlier_score", "rejected", "label", "true_label")
    )
    assert rejected.sum() == 8 == run["rejected"]["n_rejected"]
    assert scores[rejected].min() >= scores[~rejected].max()
    assert scores.max() <= 1
    assert (scores[:5] == 0).all()  # their labels are known
    right = round(100 * float(np.mean(labels[~rejected] == truth[~rejected])), 4)
    assert run["rejected"]["accuracy_of_others"] == right
    assert "8 labels rejected; of the others" in ran.out

    assert cli("solve", file, "--out", out).code == 0
    run, table = read(out)
    assert run["rejected"] is None
    assert "rejected" not in table.column_names
    assert cli("solve", file, "--out", out, "--reject", "1.5").code == 2
    ran = cli("solve", file, "--out", out, "--reject", "nan")
    assert (ran.code, ran.err) == (2, "error: --reject: must be a share between 0 and 1, got nan\n")
    assert cli("solve", file, "--out", out, "--reject", "1", "--known-labels", known).code == 0
    assert read(out)[0]["rejected"]["n_rejected"] == 72  # not those that are known


def known_file(arrays, folder):
    """Labels of the first five rows."""
    known = np.full(len(arrays["labels"]), -1)
    known[:5] = arrays["labels"][:5]
    np.save(folder / "known.npy", known)
    return folder / "known.npy"


@pytest.mark.parametrize("method", ["transclip", "stata"])
def test_the_files_that_were_written_are_named(method, save, arrays, done, tmp_path):
    out, features = tmp_path / "result", save(arrays)
    for options in ((), ("--csv",)):
        said = done("solve", features, "--method", method, "--out", out, *options)
        (line,) = (line for line in said.splitlines() if line.startswith("written to "))
        assert {*line.removeprefix(f"written to {out}: ").split(", ")} == {*os.listdir(out)}


def test_odd_class_names_warn(arrays, save, cli, done, tmp_path):
    out = ("--out", tmp_path / "result")
    (tmp_path / "names.txt").write_text("# a\nowl\nowl,\n'x'\ncat\n Cat\n")
    ran = cli("solve", save(arrays), "--class-names", tmp_path / "names.txt", *out)
    lines = [line for line in ran.err.splitlines() if "names.txt" in line]
    assert [line.removeprefix(f"warning: {tmp_path / 'names.txt'}: ") for line in lines] == [
        "line 1 begins as a comment does ('# a') and is a class; take it out if it is none",
        "line 3 has a mark of lists or tables ('owl,'), which goes into the labels; take it off",
        "line 4 is in quotes (\"'x'\"), which go into the labels; take them off",
        "line 6 has the name of line 5 ('Cat'); rename it or take it out: their labels are one",
    ]
    named = {**arrays, "class_names": np.array(["a", "b", "c", "d", "B", "e"])}
    ran = cli("solve", save(named, "named.npz"), *out)
    assert "named.npz: class_names: class 4 has the name of class 1 ('B')" in ran.err
    numbered = {**arrays, "class_names": np.array([f"class_{k} {k}" for k in range(6)])}
    done("solve", save(numbered, "numbered.npz"), *out)
