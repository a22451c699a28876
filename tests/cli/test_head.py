"""`solve --head`: a few-shot method first, TransCLIP on top of it."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from transclip_fast import TransCLIP
from transclip_fast.heads import HEADS, fit_head


@pytest.fixture
def shots(problem):
    """77 queries, 40 shots and 20 validation rows of one problem."""
    features, text, labels = problem(n=137)
    return {
        "image_features": features[60:],
        "labels": labels[60:],
        "text_features": text,
        "support_features": features[:40],
        "support_labels": labels[:40],
        "validation_features": features[40:60],
        "validation_labels": labels[40:60],
    }


def head_of(name, shots, **more):
    given = {key: shots[key] for key in shots if key.startswith(("support_", "validation_"))}
    return fit_head(name, shots["text_features"], **given, **more)


def read(folder):
    run = json.loads((folder / "run.json").read_text())
    return run, pq.read_table(folder / "predictions.parquet")


@pytest.mark.parametrize("name", HEADS)
def test_head_alone_and_below_transclip(name, shots, save, done, tmp_path):
    out = done("solve", save(shots), "--head", name, "--out", tmp_path / "result")
    run, table = read(tmp_path / "result")
    head, labels = head_of(name, shots), shots["labels"]
    rows = torch.from_numpy(shots["image_features"])
    alone = round(100 * float((head.predict(rows).numpy() == labels).mean()), 4)
    model = TransCLIP().fit(rows, shots["text_features"], **head.prior(rows))
    assert run["head"] == {"name": name, "accuracy": alone, "parameters": head.parameters}
    assert run["accuracy"] == round(100 * (model.transduction_ == labels).mean(), 4)
    assert (run["config"]["kl_weight"], run["config"]["gamma"]) == (1.0, None)
    assert run["seconds"].keys() >= {"head", "solve"}
    np.testing.assert_array_equal(table["confidence"], model.label_distributions_.max(1))
    zero_shot = (shots["image_features"] @ shots["text_features"].T).argmax(1)
    np.testing.assert_array_equal(table["zero_shot_label"], zero_shot)
    assert f"% zero-shot, {alone:.2f} % {name} -> {run['accuracy']:.2f} %" in out


def test_without_a_head_there_is_none(solved):
    assert read(solved)[0]["head"] is None


def test_seed_and_scale_reach_the_head(shots, save, done, tmp_path):
    given = ("--seed", 5, "--logit-scale", 30)
    done("solve", save(shots), "--head", "clip-adapter", *given, "--out", tmp_path / "result")
    head = head_of("clip-adapter", shots, seed=5, logit_scale=30.0)
    rows = torch.from_numpy(shots["image_features"])
    model = TransCLIP(logit_scale=30.0).fit(rows, **head.prior(rows))
    np.testing.assert_array_equal(
        read(tmp_path / "result")[1]["confidence"], model.label_distributions_.max(1)
    )


def test_several_templates(arrays, save, done, tmp_path):
    text = arrays["text_features"]
    noise = 0.1 * np.random.default_rng(0).normal(size=(4, *text.shape))
    prompts = text + noise / 33**0.5
    prompts /= np.linalg.norm(prompts, axis=2, keepdims=True)
    file = save({**arrays, "text_features": prompts})
    done("solve", file, "--head", "prompt-ensemble", "--out", tmp_path / "result")
    _, table = read(tmp_path / "result")
    rows = torch.from_numpy(arrays["image_features"])
    head = fit_head("prompt-ensemble", prompts)
    model = TransCLIP().fit(rows, prompts[0], **head.prior(rows))
    np.testing.assert_array_equal(table["confidence"], model.label_distributions_.max(1))
    np.testing.assert_array_equal(table["zero_shot_label"], model.zero_shot_labels_)


def test_rows_that_are_no_unit_vectors_are_reported_once(shots, save, cli, tmp_path):
    scaled = {**shots, "image_features": 3 * shots["image_features"]}
    ran = cli("solve", save(scaled), "--head", "tip-adapter", "--out", tmp_path / "result")
    assert (ran.code, ran.err.count("were not unit vectors")) == (0, 1)


def test_new_rows_of_a_head_with_prototypes(shots, save, done, tmp_path):
    file = save(shots)
    done("solve", file, "--head", "taskres", "--out", tmp_path / "result")
    done("predict", tmp_path / "result", file, "--out", tmp_path / "more")
    rows = torch.from_numpy(shots["image_features"])
    head = head_of("taskres", shots)
    model = TransCLIP().fit(rows, **head.prior(rows))
    np.testing.assert_allclose(
        read(tmp_path / "more")[1]["confidence"], model.predict_proba(rows).max(1), atol=1e-5
    )


@pytest.mark.parametrize(
    ("change", "options", "expected"),
    [
        ({}, ("--head", "lora"), "head 'lora' is not known; choose one of prompt-ensemble, tip"),
        ({"support_features": None, "support_labels": None}, (), "head taskres needs shots"),
        ({"support_labels": None}, (), "come together"),
        ({"text_features": None}, (), "head taskres needs text_features"),
        ({"prior": np.full((77, 6), 1 / 6)}, (), "prior: the head taskres is the prior"),
        ({"prototypes": np.ones((6, 33))}, (), "prototypes: the head taskres is the prior"),
        ({}, ("--gamma", 0.02), "gamma: the shots go to the head taskres; leave gamma out"),
        ({"support_labels": np.full(40, 7)}, (), "support_labels: row 0 has label 7"),
        ({"support_features": np.ones((40, 9))}, (), "has 9 columns, expected 33"),
    ],
)
def test_what_cannot_be_solved(change, options, expected, shots, save, refused, tmp_path):
    kept = {key: array for key, array in {**shots, **change}.items() if array is not None}
    message = refused(
        "solve", save(kept), "--out", tmp_path / "result", "--head", "taskres", *options
    )
    assert expected in message
