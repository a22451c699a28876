"""What is told about few classes: beforehand by `plan` and `solve`, and after a solve."""

import json

import numpy as np
import pytest

from tests import reference
from tests.cli.test_solve import read
from tests.solver.test_class_cost_choice import weak
from transclip_fast.cli.class_outlook import describe_outlook

NAMES = [f"name{k}" for k in range(20)]
CHARGED = "each class in use is charged, so that absent ones take no images (--class-cost)"
UNDECIDED = "solved twice, with and without a charge for each class in use (--class-cost)"
NO_CHARGE = "no charge for a class in use (--class-cost)"


@pytest.fixture
def few(save, problem):
    """A file of rows of 3 of 20 classes, and their prior (N, K)."""
    features, text, labels = problem(n=600, k=20)
    chosen = labels < 3
    log_prior = reference.log_prior(features[chosen].astype(float), text.astype(float), 300.0)
    prior = np.exp(log_prior)
    names = np.array(NAMES)
    return save({"image_features": features[chosen], "prior": prior, "class_names": names}), prior


def test_plan_tells_how_many_classes_are_in_use(few, succeeds):
    file, prior = few
    effective = reference.effective_classes(prior)
    assert effective < 0.8 * 20
    found = json.loads(succeeds("plan", file, "--json"))["outlook"]
    assert found["n_effective_classes"] == pytest.approx(effective, rel=1e-4)
    assert found["rows"] == len(prior)
    assert found["class_cost"] is None
    rare = np.flatnonzero(20 * prior.mean(0) < 0.05)
    assert found["rare_classes"] == rare.tolist()
    line = succeeds("plan", file).splitlines()[-1]
    some = ", ".join(NAMES[k] for k in rare[:3]) + ", ..." * (len(rare) > 3)
    assert line == (
        f"plan: by {len(prior)} images, the prior uses about {effective:.0f} of 20 classes: "
        f"{UNDECIDED}; {len(rare)} hardly occur: {some}"
    )


@pytest.mark.parametrize(("value", "found"), [(np.nan, "contains NaN"), (0, "is all zero")])
@pytest.mark.parametrize("command", ["plan", "solve"])
@pytest.mark.parametrize("given", [False, True])
def test_rows_that_cannot_be_used_are_named_first(
    given, command, value, found, arrays, save, cli, tmp_path
):
    """Also where a prior is given, which has nothing of these rows."""
    arrays["image_features"][7] = value
    if given:
        arrays["prior"] = np.full((77, 6), 1 / 6)
    out = ("--out", tmp_path / "result") if command == "solve" else ()
    ran = cli(command, file := save(arrays), *out)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(f"error: {file}: image_features: row 7 {found}; remove or recompute")


def test_soft_text_is_sharpened(few, save, problem, succeeds, tmp_path):
    """Logits divided by eight spread over most classes; `plan` and `solve` count the same few."""
    features, text, labels = problem(n=600, k=20)
    chosen = labels < 3
    log_prior = reference.log_prior(features[chosen].astype(float), text.astype(float), 300.0 / 8)
    soft = np.exp(log_prior)
    assert reference.effective_classes(soft) > 0.8 * 20
    file = save({"image_features": features[chosen], "prior": soft})
    found = json.loads(succeeds("plan", file, "--class-cost", "on", "--json"))["outlook"]
    succeeds("solve", file, "--class-cost", "on", "--out", tmp_path / "result")
    run, _ = read(tmp_path / "result")
    assert found["n_effective_classes"] < 0.5 * 20
    assert found["n_effective_classes"] == pytest.approx(run["n_effective_classes"], rel=1e-3)
    assert found["class_cost"] is run["config"]["class_cost"] is True


def test_few_rows_stand_for_many(few, succeeds, monkeypatch):
    """The rest is not read twice: 2^10 entries are those of 31 rows, of 20 classes and d = 33."""
    monkeypatch.setattr("transclip_fast.cli.class_outlook.SAMPLE_ENTRIES", 1 << 10)
    monkeypatch.setattr("transclip_fast.cli.class_outlook.PRIOR_SAMPLE_ROWS", 5)
    file, prior = few
    found = json.loads(succeeds("plan", file, "--json"))["outlook"]
    assert found["rows"] == 31 < len(prior)


def test_one_of_each_is_singular():
    found = {"rows": 1, "n_effective_classes": 3.2, "class_cost": False, "rare_classes": [3]}
    assert describe_outlook(found | {"by": "zero-shot"}, 4, None) == (
        f"plan: by 1 image, zero-shot uses about 3 of 4 classes: {NO_CHARGE}; "
        "1 hardly occurs: class 3"
    )


def test_a_solve_decides_where_it_is_open(save, succeeds, cli, tmp_path):
    """The plan says that it solves twice, the result which of the solutions it kept."""
    features, texts = weak(0)
    file = save({"image_features": features, "text_features": texts})
    assert json.loads(succeeds("plan", file, "--json"))["outlook"]["class_cost"] is None
    assert UNDECIDED in succeeds("plan", file)
    shown = cli("solve", file, "--out", tmp_path / "result").out
    run, _ = read(tmp_path / "result")
    kept = "with" if run["config"]["class_cost"] else "without"
    assert shown.count(f"in use; kept: {kept} it (--class-cost)") == 1


@pytest.mark.parametrize("by", ["zero-shot", "the prior"])
def test_whether_texts_or_another_prior_count_the_classes(save, problem, succeeds, by):
    """Also where there are texts beside the prior."""
    features, text, _ = problem()
    arrays = {"image_features": features, "text_features": text}
    if by == "the prior":
        arrays["prototypes"] = text
    line = succeeds("plan", save(arrays)).splitlines()[-1]
    assert line.startswith(f"plan: by 77 images, {by} uses about 6 of 6 classes: ")


@pytest.mark.parametrize(("options", "cost"), [((), CHARGED), (("--class-cost", "off"), NO_CHARGE)])
def test_solve_tells_what_it_did(few, cli, tmp_path, options, cost):
    file, prior = few
    ran = cli("solve", file, "--out", tmp_path / "result", *options)
    run, table = read(tmp_path / "result")
    charged = cost == CHARGED
    assert run["config"]["class_cost"] is charged
    assert run["n_effective_classes"] == pytest.approx(reference.effective_classes(prior), 1e-4)
    said = cost if options else f"{UNDECIDED.removesuffix(' (--class-cost)')}; kept: with it"
    assert "zero-shot uses" not in ran.out  # but the prior
    assert ran.out.count(f"of 20 classes: {said}") == 1
    labels, before = (np.array(table[name].to_pylist()) for name in ("label", "zero_shot_label"))
    changes = np.bincount(labels, minlength=20) - np.bincount(before, minlength=20)
    assert [now - was for _, was, now in run["size_changes"]] == [
        changes[k] for k, _, _ in run["size_changes"]
    ]
    assert len(run["size_changes"]) == min(6, np.count_nonzero(changes))
    k, was, now = next(change for change in run["size_changes"] if change[2] > change[1])
    assert f"grew most: {NAMES[k]} {was} -> {now}" in ran.out
    # Classes are meant to be empty where they cost something.
    assert charged != any("lost all their images" in warning for warning in run["warnings"])


def test_class_cost_takes_three_values(few, cli, tmp_path):
    file, _ = few
    for value, code in (("on", 0), ("auto", 0), ("off", 0), ("yes", 2)):
        assert cli("solve", file, "--out", tmp_path / value, "--class-cost", value).code == code
