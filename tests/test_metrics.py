"""Scores against hand computation, and when a labelling looks wrong."""

from __future__ import annotations

import numpy as np
import pytest

from transclip_fast.metrics import (
    accuracy,
    check_assignments,
    check_class_order,
    evaluate,
    outlier_scores,
    rejected_rows,
)

TRUTH = np.array([0, 0, 0, 0, 2, 2, 3])
ZERO_SHOT = np.array([0, 1, 1, 2, 2, 0, 2])
LABELS = np.array([0, 0, 1, 1, 2, 2, 2])


def test_by_hand():
    scores = evaluate(LABELS, ZERO_SHOT, TRUTH)
    assert scores.accuracy == 57.1429
    assert scores.zero_shot_accuracy == 28.5714
    assert scores.mean_class_accuracy == 50.0
    assert (scores.n_queries, scores.n_flipped) == (7, 3)
    assert (scores.corrected, scores.broken) == (2, 0)
    assert scores.per_class == [(3, 1, 0.0, 0.0), (0, 4, 25.0, 50.0), (2, 2, 50.0, 100.0)]
    assert scores.confusions == [(0, 1, 2), (3, 2, 1)]


def test_broken_rows():
    scores = evaluate(ZERO_SHOT, LABELS, TRUTH)
    assert (scores.corrected, scores.broken) == (0, 2)


def test_nothing_wrong():
    scores = evaluate(TRUTH, TRUTH, TRUTH)
    assert (scores.accuracy, scores.mean_class_accuracy) == (100.0, 100.0)
    assert scores.confusions == []
    assert scores.n_flipped == 0


def test_changes_are_counted_in_all_rows():
    """Those whose truth is unknown are neither corrected nor broken, but they did change."""
    scores = evaluate(np.array([1, 1, 1]), np.array([0, 0, 0]), np.array([1, -1, -1]))
    assert (scores.n_queries, scores.n_labelled, scores.n_flipped) == (3, 1, 3)
    assert (scores.corrected, scores.broken) == (1, 0)


def test_against_loops():
    rng = np.random.default_rng(0)
    labels, zero_shot, truth = rng.integers(9, size=(3, 200))
    truth[truth == 4] = 5  # a class that does not occur
    scores = evaluate(labels, zero_shot, truth)
    expected = [
        (
            int(k),
            int((truth == k).sum()),
            accuracy(zero_shot[truth == k], truth[truth == k]),
            accuracy(labels[truth == k], truth[truth == k]),
        )
        for k in np.unique(truth)
    ]
    assert sorted(scores.per_class) == expected
    pairs = {(t, p): 0 for t in range(9) for p in range(9)}
    for t, p in zip(truth.tolist(), labels.tolist(), strict=True):
        pairs[t, p] += t != p
    assert {(t, p): n for t, p, n in scores.confusions} == {k: n for k, n in pairs.items() if n}
    counts = [n for _, _, n in scores.confusions]
    assert counts == sorted(counts, reverse=True)


def test_a_class_that_swallows_the_others():
    labels = np.array([1] * 8 + [0, 2])
    message, = check_assignments(labels, np.arange(10) % 3, 3, ["a", "b", "c"])  # fmt: skip
    assert message.startswith("class 1 (b) got 8 of 10 images, 3 by zero-shot alone")


def test_a_class_that_was_large_before_swallows_nothing():
    labels = np.array([1] * 8 + [0, 2])
    assert check_assignments(labels, labels, 3) == []
    assert check_assignments(np.zeros(5, int), np.zeros(5, int), 1) == []


@pytest.mark.parametrize("charged", [False, True])
@pytest.mark.parametrize(
    ("n", "before", "warned"), [(38, 30, True), (38, 38, True), (20, 20, False)]
)
def test_one_label_for_all(n, before, warned, charged):
    zero_shot = np.repeat([1, 0], [before, n - before])
    labels, names = np.ones(n, int), ["sea", "desert"]
    found = check_assignments(labels, zero_shot, 2, names, charged=charged)
    line = f"all {n} images have the label class 1 (desert): do model and class names fit them?"
    assert (line in found) == warned
    assert sum("all " in text and "desert" in text for text in found) == warned
    assert check_assignments(0 * labels, 0 * labels, 1) == []


def test_lost_and_empty_classes():
    zero_shot = np.array([0, 0, 1, 1, 2, 2])
    labels = np.array([0, 0, 0, 1, 1, 1])
    lost, empty = check_assignments(labels, zero_shot, 5)
    assert lost == "1 of 5 classes lost all their images, e.g. class 2"
    assert empty.startswith("2 of 5 classes got no image, not even by zero-shot, e.g. class 3")


def test_empty_classes_are_no_news_with_fewer_rows_than_classes():
    assert check_assignments(np.array([0, 1]), np.array([0, 1]), 3) == []


@pytest.mark.parametrize(("shift", "warned"), [(0, False), (1, True)])
def test_class_order(shift, warned):
    truth = np.arange(300) % 5
    found = check_class_order((truth + shift) % 5, truth)
    assert bool(found) == warned
    if warned:
        assert found[0].startswith("zero-shot labels match on 0.0 % of images but would on 100.0 %")


def test_poor_labels_are_not_a_wrong_order():
    rng = np.random.default_rng(0)
    assert check_class_order(rng.integers(5, size=300), rng.integers(5, size=300)) == []


def test_two_classes_can_simply_be_wrong():
    truth = np.arange(300) % 2
    assert check_class_order(1 - truth, truth) == []


@pytest.mark.parametrize("n_classes", [10, 30])
def test_texts_that_know_nothing_are_no_wrong_order(n_classes):
    """Each class has a label, drawn at random, on all of its rows: some happen to be one-to-one."""
    warned = 0
    for seed in range(200):
        usual = np.random.default_rng(seed).integers(n_classes, size=n_classes)
        truth = np.arange(400) % n_classes
        warned += bool(check_class_order(usual[truth], truth))
    assert warned <= 30


@pytest.mark.parametrize(("rows", "warned"), [(15, False), (16, True)])
def test_few_rows_say_nothing(rows, warned):
    truth = np.arange(rows) % 5
    assert bool(check_class_order((truth + 1) % 5, truth)) == warned


def test_rows_without_a_truth_say_nothing():
    labels = np.arange(40) % 5
    assert check_class_order(labels, np.full(40, -1)) == []
    assert check_class_order(labels[:0], labels[:0]) == []


def test_some_classes_of_many():
    """Ten classes out of a thousand have labels of their own whatever the texts know."""
    truth = np.repeat(np.arange(10), 20)
    labels = np.random.default_rng(0).permutation(1000)[truth]
    assert check_class_order(np.r_[labels, 999], np.r_[truth, 999]) == []


def test_outlier_scores_average_over_neighbors():
    """Row 0 has the neighbours 1 and 2, row 1 has row 0, row 2 has none; three times."""
    neighbors = np.array([[1, 2], [0, -1], [-1, -1]])
    average = np.array([[1, 1, 1], [1.5, 1.5, 0], [0, 0, 3]]) / 3
    confidences = np.array([0.9, 0.5, 0.2], np.float32)
    expected = np.linalg.matrix_power(average, 3) @ (1 - confidences.astype(float))
    found = outlier_scores(confidences, neighbors)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_outlier_scores_of_one_row():
    np.testing.assert_allclose(outlier_scores(np.array([0.25]), np.full((1, 3), -1)), 0.75)


def test_rejected_rows_score_highest():
    scores = np.array([0.2, 0.9, 0.5, 0.9, 0.9])
    assert rejected_rows(scores, 0.4).tolist() == [False, True, False, True, False]
    assert not rejected_rows(scores, 0.0).any()
    assert rejected_rows(scores, 1.0).all()
