"""`plan`: its figures, and that `solve` keeps to them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.conftest import balanced


def plan_of(succeeds, *command):
    return json.loads(succeeds("plan", *command, "--json"))


def test_of_sizes(succeeds):
    shape = ("--queries", 50_000, "--classes", 300, "--dim", 64)
    found = plan_of(succeeds, *shape)
    assert found["size"]["n_rows"] == 50_000
    assert found["layout"] == {"candidates": 128, "held": True}
    assert found["passes"] == 25
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert list(stages) == ["load", "graph", "solve", "write"]
    assert stages["load"]["disk"] == 3 * 2 * 50_000 * 64
    assert stages["graph"]["disk"] == 12 * 3 * 50_000
    assert stages["solve"]["disk"] == 2 * 50_000 * 64 + 11 * 40 * 50_000
    assert stages["solve"]["work"] == 12 * 2 * 50_000 * 300 * 64
    assert found["graph"] == "faiss"
    assert found["peak"] == max(stage["host"] for stage in found["stages"]) <= found["limit"]
    text = succeeds("plan", *shape)
    assert "50,000 rows, 300 classes, 64 dimensions, 3 neighbours" in text
    assert "plan: sparse, 128 candidates a row, features held, faiss graph, at most" in text


def test_streamed_features_are_read_in_every_pass(succeeds):
    shape = ("--queries", 2_000_000, "--classes", 100, "--dim", 512, "--graph", "somewhere")
    found = plan_of(succeeds, *shape, "--candidates", 32, "--max-iter", 2, "--memory", "4GiB")
    assert found["layout"] == {"candidates": 32, "held": False}
    assert found["passes"] == 9
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert list(stages) == ["load", "solve", "write"]
    rows = 2 * 2_000_000 * 512
    assert stages["solve"]["disk"] == 9 * rows + 3 * 40 * 2_000_000
    assert found["graph"] == "given"


def test_runs_of_gamma_and_given_priors_count(save, arrays, succeeds):
    plain = plan_of(succeeds, save(arrays))
    features, labels = arrays["image_features"], arrays["labels"]
    rows = balanced(labels, 3)
    shots = {"support_features": features[rows], "support_labels": labels[rows]}
    held_out = {"validation_features": features[20:30], "validation_labels": labels[20:30]}
    few_shot = plan_of(succeeds, save(arrays | shots | held_out))
    assert (plain["passes"], few_shot["passes"]) == (25, 4 * 25)
    assert few_shot["stages"][2]["work"] == 4 * plain["stages"][2]["work"]
    assert plan_of(succeeds, save(arrays | shots), "--gamma", 0.02)["passes"] == 25
    assert plan_of(succeeds, save(arrays | shots))["passes"] == 25  # by default one gamma
    prior = {"prior": np.full((77, 6), 1 / 6, np.float32)}
    given = plan_of(succeeds, save(arrays | prior))
    assert given["passes"] == 24
    assert given["size"]["input_bytes"] == plain["size"]["input_bytes"] + 16 * 77 * 6


def test_of_features_is_what_solve_does(save, arrays, succeeds, tmp_path):
    arrays["image_features"] = np.tile(arrays["image_features"], (3, 1))
    del arrays["labels"]
    command = (save(arrays), "--assignments", "sparse", "--candidates", 5)
    found = plan_of(succeeds, *command)
    summary = json.loads(succeeds("solve", *command, "--out", tmp_path / "result", "--json"))
    assert summary["truncation"]["candidates"] == found["layout"]["candidates"] == 5
    assert summary["memory"]["allowed"] > summary["memory"]["planned"]


def test_solve_says_it_first(save, arrays, succeeds, tmp_path):
    file = save(arrays)
    line, classes = succeeds("plan", file).splitlines()[-2:]
    first, second = succeeds("solve", file, "--out", tmp_path / "result").splitlines()[:2]
    assert first.startswith("plan: dense, features held, exact graph, at most ")
    assert line.startswith(first.partition(" at most")[0])
    assert (
        second == classes == "plan: by 77 rows the prior uses about 6 of 6 classes: class cost off"
    )


def test_the_memory_of_a_search_counts(refused, succeeds):
    shape = ("--queries", 2_000_000, "--classes", 4, "--dim", 512)
    message = refused("plan", *shape, "--memory", "4GiB")
    assert "memory: searching the neighbours of 2,000,000 rows needs 4.23 GiB" in message
    assert "what fits: --memory 5GiB, or --graph with neighbours" in message
    assert plan_of(succeeds, *shape, "--memory", "5GiB")["peak"] <= 5 << 30


@pytest.mark.parametrize("command", ["plan", "solve"])
def test_what_does_not_fit_is_refused(command, save, arrays, refused, tmp_path):
    args = [command, save(arrays), "--memory", "100MiB"]
    message = refused(*args, *(("--out", tmp_path / "result") if command == "solve" else ()))
    assert "memory: 77 rows and 6 classes, dense, need" in message
    assert "there are 100 MiB" in message


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((), "plan needs FEATURES, or --queries, --classes and --dim"),
        (("--queries", 5, "--dim", 3), "plan needs FEATURES, or --queries"),
        (("none.npz",), "none.npz: no such file"),
        (("none.npz", "--queries", 5), "not both"),
        (("--queries", 5, "--classes", 3, "--dim", 3, "--memory", "lots"), "a size like 8GiB"),
        (("--queries", 5, "--classes", 3, "--dim", 3, "--candidates", 0), "candidates must be"),
    ],
)
def test_bad_input(args, expected, refused):
    assert expected in refused("plan", *args)


def test_warnings_are_a_line_and_name_the_file(save, arrays, cli):
    file = save(arrays | {"text_features": 3 * arrays["text_features"]})
    ran = cli("plan", file)
    assert ran.code == 0
    assert ran.err.startswith(f"warning: {file}: text_features: ")
    assert ran.err.count("\n") == 1


def test_errors_about_the_queries_name_the_file(save, arrays, refused):
    words = np.full(arrays["image_features"].shape, "a")
    file = save(arrays | {"image_features": words})
    assert f"error: {file}: image_features: expected numbers" in refused("plan", file)


def test_the_class_cost_may_read_once_more(succeeds):
    shape = ("--queries", 2_000_000, "--classes", 100, "--dim", 512, "--memory", "16GiB")
    assert plan_of(succeeds, *shape)["passes"] == 25
    assert plan_of(succeeds, *shape, "--class-cost", "off")["passes"] == 24
