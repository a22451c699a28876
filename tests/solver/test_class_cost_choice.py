"""Where few classes seem to occur: solved without and with a class cost, and one is kept."""

from math import log

import numpy as np
import pytest
import torch

from tests import reference
from tests.agreement import assert_agrees
from tests.conftest import unit
from transclip_fast import TransCLIP
from transclip_fast.data.npy_shards import Shard, StoredRows
from transclip_fast.solver.class_cost import is_undecided, plausibility
from transclip_fast.store.checkpoint import FileCheckpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def test_plausibility_by_hand():
    """0.9 of the neighbours share a label; two classes of one size have an entropy of log 2."""
    assert plausibility(0.9, torch.tensor([5.0, 0.0, 5.0])) == pytest.approx(0.9 + 0.1 * log(2))
    assert plausibility(1.0, torch.tensor([0.0, 7.0])) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("class_cost", "effective", "few_shot", "expected"),
    [
        ("auto", 25.0, False, True),
        ("auto", 79.9, False, True),
        ("auto", 24.9, False, False),  # few of the classes occur, for sure
        ("auto", 80.0, False, False),
        ("auto", 50.0, True, False),
        (True, 50.0, False, False),
        (False, 50.0, False, False),
    ],
)
def test_when_auto_solves_both_ways(class_cost, effective, few_shot, expected):
    assert is_undecided(class_cost, effective, 100, few_shot=few_shot) is expected


@pytest.mark.parametrize("assignments", ["dense", "sparse"])
def test_a_weak_text_merges_no_classes(golden, assignments):
    """All classes occur, though zero-shot uses about half of them: the published method is kept."""
    labels, draw = golden["labels"], np.random.default_rng(0)
    features = unit(golden["image_features"].astype(np.float64))
    means = unit(np.stack([features[labels == k].mean(0) for k in range(19)]))
    apart = unit(draw.normal(size=(1, features.shape[1])))  # as texts lie from images
    texts = unit(0.3 * means + 0.7 * unit(draw.normal(size=means.shape)) + apart)
    values = {"device": "cpu", "assignments": assignments}
    runs = {
        x: TransCLIP(**values, class_cost=x).fit(features.astype(np.float32), texts)
        for x in ("auto", True, False)
    }
    assert 0.25 * 19 <= runs["auto"].n_effective_classes_ < 0.8 * 19
    right = {x: np.mean(run.transduction_ == labels) for x, run in runs.items()}
    assert right[True] < right[False] - 0.1
    assert runs["auto"].class_costs_ is None
    for name in ("transduction_", "means_", "objective_", "calibrated_confidences_"):
        np.testing.assert_array_equal(getattr(runs["auto"], name), getattr(runs[False], name))


def weak(seed, n=300):
    """Rows of all 20 classes beside texts that tell few of them apart: 0.25 K < K_eff < 0.8 K."""
    draw = np.random.default_rng(seed)
    centres = unit(0.5 * draw.normal(size=(20, 24)) + 1)
    features = unit(centres[np.arange(n) % 20] + 0.06 * draw.normal(size=(n, 24)))
    texts = unit(centres + 0.8 * unit(draw.normal(size=(20, 24))))
    return features.astype(np.float32), texts.astype(np.float32)


@pytest.mark.parametrize("seed", range(4))
def test_solved_both_ways_is_the_reference(seed):
    features, texts = weak(seed)
    model = TransCLIP(device="cpu", assignments="dense").fit(features, texts)
    assert 0.25 * 20 <= model.n_effective_classes_ < 0.8 * 20
    assert_agrees(model, reference.zero_shot(features, texts))


def apart(n=600):
    """Rows of 40 classes beside texts that are far from them: 0.25 K < K_eff < 0.8 K."""
    draw = np.random.default_rng(2)
    centres = unit(0.5 * draw.normal(size=(40, 64)) + 1)
    features = unit(centres[np.arange(n) % 40] + 0.03 * draw.normal(size=(n, 64)))
    far = unit(draw.normal(size=(1, 64)))
    texts = unit(0.3 * centres + 0.3 * unit(draw.normal(size=(40, 64))) + far)
    return features.astype(np.float32), texts.astype(np.float32)


def test_a_class_cost_that_is_behind_is_given_up(tmp_path):
    """After four steps; also where it was killed before."""
    features, texts = apart()
    free = TransCLIP(device="cpu", class_cost=False).fit(features, texts)

    class Killed(Exception):
        pass

    def checkpoint(name, identity):
        return FileCheckpoint(tmp_path / "out", name, identity, 0.0)

    def kill(seen):
        if seen.steps == 13:
            raise Killed

    with pytest.raises(Killed):
        TransCLIP(device="cpu").fit(features, texts, progress=kill, checkpoint=checkpoint)
    for resume in (checkpoint, checkpoint, None):  # the second resumes where it was given up
        model, seen = TransCLIP(device="cpu"), []
        model.fit(features, texts, progress=seen.append, checkpoint=resume)
        assert 0.25 * 40 <= model.n_effective_classes_ < 0.8 * 40
        assert (seen[-1].steps, seen[-1].all_steps) == (14, 20)
        assert model.class_costs_ is None
        for name in ("transduction_", "means_", "variances_", "objective_"):
            np.testing.assert_array_equal(getattr(model, name), getattr(free, name))
    assert_agrees(model, reference.zero_shot(features, texts))


def test_killed_in_the_second_solve(tmp_path):
    """It resumes there, with the same bits; progress counts the steps of both."""
    features, texts = weak(0)
    expected = TransCLIP(device="cpu").fit(features, texts)

    class Killed(Exception):
        pass

    def checkpoint(name, identity):
        return FileCheckpoint(tmp_path / "out", name, identity, 0.0)

    def kill(seen):
        if seen.steps == 14:
            raise Killed

    with pytest.raises(Killed):
        TransCLIP(device="cpu").fit(features, texts, progress=kill, checkpoint=checkpoint)
    seen = []
    model = TransCLIP(device="cpu")
    model.fit(features, texts, checkpoint=checkpoint, progress=seen.append)
    for name in ("transduction_", "means_", "variances_", "objective_"):
        np.testing.assert_array_equal(getattr(model, name), getattr(expected, name))
    second = [state.steps for state in seen if state.steps > 10]
    assert min(second) >= 13
    assert (seen[-1].steps, seen[-1].rows) == (20, seen[-1].all_rows)


def test_streamed_rows_are_decided_alike(tmp_path):
    features, texts = weak(0)
    np.save(tmp_path / "rows.npy", features)
    rows = StoredRows([Shard.find(tmp_path / "rows.npy")])
    streamed, held = (TransCLIP(device="cpu").fit(x, texts) for x in (rows, features))
    for name in ("transduction_", "means_", "variances_", "objective_"):
        np.testing.assert_array_equal(getattr(streamed, name), getattr(held, name))
