"""`predict`: new rows, labelled from a result folder as by the estimator that made it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from tests.conftest import unit
from transclip_fast import TransCLIP


@pytest.fixture
def new(problem, save):
    """New rows of the same classes, and the file they are in."""
    features, _, labels = problem(n=120, noise=0.05)
    return features[77:], labels[77:], save({"image_features": features[77:]}, "new.npz")


def test_equals_the_estimator(solved, new, arrays, succeeds, tmp_path):
    rows, labels, file = new
    np.save(tmp_path / "labels.npy", labels)
    out = succeeds("predict", solved, file, "--out", tmp_path / "more", "--labels",
                   tmp_path / "labels.npy", "--json")  # fmt: skip
    model = TransCLIP().fit(arrays["image_features"], text_features=arrays["text_features"])
    expected = model.predict_proba(rows)
    table = pq.read_table(tmp_path / "more" / "predictions.parquet")
    run = json.loads((tmp_path / "more" / "run.json").read_text())
    np.testing.assert_array_equal(table["confidence"], expected.max(1))
    np.testing.assert_array_equal(table["label"], expected.argmax(1))
    zero_shot = (rows @ arrays["text_features"].T).argmax(1)
    np.testing.assert_array_equal(table["zero_shot_label"], zero_shot)
    assert run["accuracy"] == round(100 * (expected.argmax(1) == labels).mean(), 4)
    assert run["n_flipped"] == (expected.argmax(1) != zero_shot).sum()
    assert (run["n_queries"], run["n_classes"], run["dim"]) == (43, 6, 33)
    assert json.loads(out) == run
    text = succeeds("predict", solved, file, "--out", tmp_path / "more")
    assert text.splitlines()[:2] == [
        "43 images labelled one by one, without neighbours: labels may differ from the result's",
        f"{run['n_flipped']} labels changed from zero-shot",
    ]


@pytest.mark.parametrize("kind", ["prior", "prior_logits"])
def test_after_a_prior_fit(kind, new, arrays, save, succeeds, refused, tmp_path):
    rows, labels, file = new
    known, given = (
        np.full((len(y), 6), 0.1) + 0.4 * np.eye(6)[y] for y in (arrays["labels"], labels)
    )
    if kind == "prior_logits":
        known, given = 4 * known, 4 * given
    option = "--" + kind.replace("_", "-")
    np.save(tmp_path / "given.npy", given)
    succeeds("solve", save({**arrays, kind: known}), "--out", tmp_path / "result")
    message = refused("predict", tmp_path / "result", file, "--out", tmp_path / "more")
    assert "give one of --prior and --prior-logits" in message
    succeeds("predict", tmp_path / "result", file, "--out", tmp_path / "more", option,
             tmp_path / "given.npy")  # fmt: skip
    model = TransCLIP().fit(
        arrays["image_features"], text_features=arrays["text_features"], **{kind: known}
    )
    table = pq.read_table(tmp_path / "more" / "predictions.parquet")
    expected = model.predict_proba(rows, **{kind: given})
    np.testing.assert_array_equal(table["confidence"], expected.max(1))
    zero_shot = (rows @ arrays["text_features"].T).argmax(1)
    np.testing.assert_array_equal(table["zero_shot_label"], zero_shot)


def test_a_prior_that_the_result_has_no_use_for(solved, new, refused, tmp_path):
    np.save(tmp_path / "prior.npy", np.full((43, 6), 1 / 6))
    message = refused("predict", solved, new[2], "--out", tmp_path / "more", "--prior",
                      tmp_path / "prior.npy")  # fmt: skip
    assert "prior.npy" in message
    assert "not with a prior" in message


@pytest.mark.parametrize("kind", ["prior", "prior_logits"])
def test_a_prior_in_the_file_that_the_result_has_no_use_for(
    kind, solved, arrays, save, refused, tmp_path
):
    rows = arrays["image_features"][:5]
    file = save({"image_features": rows, kind: np.full((5, 6), 1 / 6)}, "new.npz")
    message = refused("predict", solved, file, "--out", tmp_path / "new")
    assert f"{file}: {kind}: the result was solved with prototypes, not with a prior" in message


def test_more_rows_than_memory_has_room_for(solved, new, refused, monkeypatch, tmp_path):
    monkeypatch.setattr("transclip_fast.cli.predict.free_bytes", lambda device: 43 * 6 * 8 - 1)
    message = refused("predict", solved, new[2], "--out", tmp_path / "more")
    assert "image_features: probabilities of 43 rows and 6 classes take 2.02 KiB" in message


def test_what_does_not_fit_the_result_is_warned_of(arrays, save, succeeds, cli, tmp_path):
    """Labels in another order, other classes, and known labels, which a solve would keep."""
    text = unit(
        np.stack([arrays["image_features"][arrays["labels"] == k].mean(0) for k in range(6)])
    )
    names = np.array(list("abcdef"))
    succeeds(
        "solve", save(arrays | {"text_features": text, "class_names": names}), "--out",
        tmp_path / "result",
    )  # fmt: skip
    new = {"image_features": arrays["image_features"], "class_names": names[::-1]}
    file = save(new | {"known_labels": arrays["labels"]}, "new.npz")
    np.save(tmp_path / "y.npy", (arrays["labels"] + 1) % 6)
    ran = cli(
        "predict", tmp_path / "result", file, "--labels", tmp_path / "y.npy", "--out",
        tmp_path / "more",
    )  # fmt: skip
    assert ran.code == 0
    lines = ran.err.splitlines()
    assert [line.startswith("warning: ") for line in lines] == [True] * 3
    assert f"{file}: its class 0 is not that of {tmp_path / 'result'}" in lines[0]
    assert f"{file}: known_labels: not used" in lines[1]
    assert "would on" in lines[2]
    assert "if classes were renamed" in lines[2]
    assert len(json.loads((tmp_path / "more/run.json").read_text())["warnings"]) == 3


def test_rows_of_another_model(solved, save, refused, tmp_path):
    file = save({"image_features": np.eye(30)}, "new.npz")
    message = refused("predict", solved, file, "--out", tmp_path / "more")
    assert "new.npz: image_features: has 30 columns, expected 33" in message


def test_rows_of_another_model_of_the_same_dimension(folder, succeeds, refused, tmp_path):
    def with_config(name, config):
        shutil.copytree(folder, tmp_path / name)
        file = tmp_path / name / "manifest.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"config": config}))
        return tmp_path / name

    own = {"model": "ViT-B-32", "weights": "openai", "quick_gelu": True}
    succeeds("solve", with_config("own", own), "--out", tmp_path / "result")
    assert json.loads((tmp_path / "result" / "run.json").read_text())["encoder"] == own
    other = with_config("other", own | {"weights": "laion2b"})
    message = refused("predict", tmp_path / "result", other, "--out", tmp_path / "more")
    assert "result: is of ViT-B-32 (openai, QuickGELU), " in message
    assert "other was encoded with ViT-B-32 (laion2b, QuickGELU); encode both with" in message
    # An entry that one of them does not have is no difference.
    earlier = {"model": "ViT-B-32", "weights": "openai"}
    for name, config in {"same": own, "unknown": {}, "earlier": earlier}.items():
        file = with_config(name, config)
        succeeds("predict", tmp_path / "result", file, "--out", tmp_path / f"of-{name}")
    run = json.loads((tmp_path / "result" / "run.json").read_text())
    del run["encoder"]  # as earlier versions wrote it
    (tmp_path / "result" / "run.json").write_text(json.dumps(run))
    succeeds("predict", tmp_path / "result", other, "--out", tmp_path / "of-earlier-result")


def remove(name):
    return lambda folder: (folder / name).unlink()


def rewrite(**change):
    def spoil(folder):
        tensors = load_file(folder / "mixture.safetensors") | change
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(kept, folder / "mixture.safetensors")

    return spoil


def run_json(**change):
    def spoil(folder):
        run = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(run | change))

    return spoil


DAMAGE = {
    "folder": (shutil.rmtree, "is not a result folder"),
    "run.json": (remove("run.json"), "is not a result folder"),
    "n_classes": (run_json(n_classes=None), "run.json: has no n_classes"),
    "config": (run_json(config=3), "run.json: has no n_classes or config"),
    "class_names": (run_json(class_names=["a"]), "run.json: class_names are not 6 names"),
    "kl_weight": (run_json(config={"likelihood_weight": 0.02}), "has no kl_weight"),
    "mixture": (remove("mixture.safetensors"), "mixture.safetensors: no such file"),
    "means": (rewrite(means=None), "mixture.safetensors: "),
    "flat means": (rewrite(means=np.ones(6)), "means is damaged"),
    "NaN": (rewrite(means=np.full((6, 33), np.nan)), "means is damaged"),
    "variances": (rewrite(variances=None), "variances are missing"),
    "short variances": (rewrite(variances=np.ones(32)), "variances is damaged"),
    "zero variances": (rewrite(variances=np.zeros(33)), "variances are missing or damaged"),
    "weights": (rewrite(prior_weights=np.ones((5, 33))), "prior_weights is damaged"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_results(kind, solved, new, refused, tmp_path):
    spoil, expected = DAMAGE[kind]
    spoil(solved)
    message = refused("predict", solved, new[2], "--out", tmp_path / "more")
    assert str(solved) in message
    assert expected in message


def test_keys_of_own_features_come_out(arrays, save, succeeds, tmp_path):
    keys = [f"folder/{i}.jpg" for i in range(len(arrays["image_features"]))]
    succeeds("solve", save({**arrays, "keys": keys}), "--out", tmp_path / "result")
    found = pq.read_table(tmp_path / "result" / "predictions.parquet")
    assert found["key"].to_pylist() == keys
    np.save(tmp_path / "more.npy", arrays["image_features"][:2])
    (tmp_path / "more.txt").write_text("x.jpg\ny.jpg\n")
    new = (tmp_path / "more.npy", "--keys", tmp_path / "more.txt", "--out", tmp_path / "more")
    succeeds("predict", tmp_path / "result", *new)
    found = pq.read_table(tmp_path / "more" / "predictions.parquet")
    assert found["key"].to_pylist() == ["x.jpg", "y.jpg"]
