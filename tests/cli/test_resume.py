"""A killed solve resumes after its last outer step, and ends with the same bytes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.cli.conftest import contents, with_shots
from transclip_fast.cli import solution
from transclip_fast.solver import loop


@pytest.fixture(autouse=True)
def after_every_step(monkeypatch):
    monkeypatch.setattr(solution, "CHECKPOINT_SECONDS", 0.0)


@pytest.fixture
def few_shot(arrays):
    """Four values of gamma to choose from: four runs."""
    return with_shots(arrays, 3)


@pytest.fixture
def steps(monkeypatch):
    """The outer steps and ends that are computed from now on, as a list that grows."""
    taken, update = [], loop.update_assignments

    def counted(*args, **more):
        taken.append(1)
        update(*args, **more)

    monkeypatch.setattr(loop, "update_assignments", counted)
    return taken


def results(folder):
    """The files of a result; run.json without what differs between two runs."""
    found = contents(folder)
    run = json.loads(found.pop(next(path for path in found if path.name == "run.json")))
    del run["seconds"], run["memory"]
    return found, run


def assert_same(folder, other):
    """The same bytes in the files of two results, and in run.json, its order included."""
    (found, run), (expected, other_run) = results(folder), results(other)
    assert found == expected
    assert json.dumps(run) == json.dumps(other_run)


@pytest.mark.parametrize(("form", "search"), [("dense", "exact"), ("sparse", "faiss")])
@pytest.mark.parametrize("stop", [1, 4, 6])
def test_killed(form, search, stop, arrays, save, succeeds, killed, steps, tmp_path):
    # The first state that is kept is of the graph's search.
    options = "--assignments", form, "--search", search, "--max-iter", 5
    command = ("solve", save(arrays), *options, "--out")
    succeeds(*command, tmp_path / "whole")
    killed(stop, *command, tmp_path / "result")
    assert not (tmp_path / "result").exists()
    steps.clear()
    succeeds(*command, tmp_path / "result")
    assert len(steps) == 6 - (stop - 1)
    assert_same(tmp_path / "result", tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"features.npz", "whole", "result"}


def test_killed_again_and_again(few_shot, save, succeeds, killed, steps, tmp_path):
    command = ("solve", save(few_shot), "--max-iter", 3, "--out")
    succeeds(*command, tmp_path / "whole")
    for _ in range(3):
        killed(4, *command, tmp_path / "result")
    steps.clear()
    succeeds(*command, tmp_path / "result")
    # 11 of 12 steps were kept, and each of the four runs ends.
    assert len(steps) == 1 + 4
    assert_same(tmp_path / "result", tmp_path / "whole")


def test_stopped_by_tol(arrays, save, succeeds, killed, steps, tmp_path):
    command = ("solve", save(arrays), "--tol", 1e-3, "--max-iter", 50, "--out")
    succeeds(*command, tmp_path / "whole")
    taken = len(steps) - 1
    assert 1 < taken < 50
    killed(1 + taken, *command, tmp_path / "result")
    steps.clear()
    succeeds(*command, tmp_path / "result")
    assert len(steps) == 1
    assert_same(tmp_path / "result", tmp_path / "whole")


@pytest.mark.parametrize("changed", ["features", "parameters", "graph"])
def test_what_was_kept_of_another_solve_is_not_used(
    changed, arrays, save, cli, succeeds, killed, steps, tmp_path
):
    command = ["solve", save(arrays), "--max-iter", 3, "--out", tmp_path / "result"]
    killed(3, *command)
    if changed == "features":
        save(arrays | {"image_features": arrays["image_features"][::-1]})
    elif changed == "parameters":
        command += ["--kl-weight", 0.9]
    else:
        succeeds("graph", command[1], "--n-neighbors", 5, "--out", tmp_path / "graph")
        for name in ("neighbors", "similarities"):
            file = tmp_path / f"graph/{name}.npy"
            np.save(file, np.load(file)[:, [0, 1, 3]])
        manifest = json.loads((tmp_path / "graph/manifest.json").read_text())
        del manifest["sha256"]  # of the lists as they were
        (tmp_path / "graph/manifest.json").write_text(json.dumps(manifest))
        command += ["--graph", tmp_path / "graph"]
    steps.clear()
    ran = cli(*command)
    assert ran.code == 0
    assert len(steps) == 4
    expected = "result.solve-0.npz: is of other input or parameters; solve-0 begins anew"
    assert expected in ran.err
    after = results(tmp_path / "result")
    ran = cli(*command)
    assert ran.code == 0
    fresh = results(tmp_path / "result")
    assert after[0] == fresh[0]
    assert [message for message in after[1]["warnings"] if expected not in message] == []


def test_a_damaged_state_is_not_used(arrays, save, cli, killed, steps, tmp_path):
    command = ("solve", save(arrays), "--max-iter", 3, "--out", tmp_path / "result")
    killed(3, *command)
    file = tmp_path / ".result.solve-0.npz"
    file.write_bytes(file.read_bytes()[:300])
    steps.clear()
    ran = cli(*command)
    assert ran.code == 0
    assert "damaged or truncated" in ran.err
    assert ran.err.endswith("solve-0 begins anew\n")
    assert len(steps) == 4


def test_other_known_labels_begin_anew(arrays, save, cli, killed, steps, tmp_path):
    def command(shift):
        known = np.where(np.arange(77) < 9, (arrays["labels"] + shift) % 6, -1)
        path = save(arrays | {"known_labels": known})
        return "solve", path, "--max-iter", 3, "--out", tmp_path / "result"

    killed(3, *command(1))
    steps.clear()
    assert "is of other input or parameters" in cli(*command(2)).err
    assert len(steps) == 4
