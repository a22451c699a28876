"""ARO's accuracies against plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.conftest import unit
from transclip_fast.data.pairs import PairFeatures
from transclip_fast.errors import InputError
from transclip_fast.protocols.pairs import evaluate_pairs

SIZES = {"on": 1, "in": 7, "near": 24, "under": 25, "at": 40}


@pytest.fixture
def made():
    """Features of 97 pairs, every eighth a tie, with groups of uneven sizes, and their truth."""
    draw = np.random.default_rng(0)
    groups = np.concatenate([[name] * size for name, size in SIZES.items()])
    groups = groups[draw.permutation(len(groups))]
    images, true, false = unit(draw.normal(size=(3 * len(groups), 6))).reshape(3, -1, 6)
    false[::8] = true[::8]
    true, false = true.astype(np.float32), false.astype(np.float32)
    images = images.astype(np.float32)
    cosines = np.stack([(images.astype(float) * x.astype(float)).sum(1) for x in (false, true)], 1)
    right = cosines.argmax(1) == 1  # as the published code has it: of a tie the false one
    return PairFeatures.of(images, true, false, groups), groups, right


@pytest.mark.parametrize("minimum", [1, 25, 41])
@pytest.mark.parametrize("leave_out", [(), ("at", "on")])
def test_means_of_pairs_and_of_groups(minimum, leave_out, made):
    pairs, groups, right = made
    scores = evaluate_pairs(pairs, min_pairs=minimum, leave_out=leave_out)
    assert scores.accuracy == pytest.approx(100 * right.mean(), abs=1e-4)
    assert (scores.n_pairs, scores.n_ties) == (97, 13)
    counted = [g for g, size in SIZES.items() if size >= minimum and g not in leave_out]
    expected = {g: 100 * right[groups == g].mean() for g in counted}
    assert {g: a for g, _, a in scores.per_group} == pytest.approx(expected, abs=1e-4)
    assert all(size == SIZES[g] for g, size, _ in scores.per_group)
    if counted:
        assert scores.group_accuracy == pytest.approx(np.mean([*expected.values()]), abs=1e-4)
    else:
        assert scores.group_accuracy is None
    assert scores.left_out == sorted((g, n) for g, n in SIZES.items() if g not in counted)
    assert [row[2] for row in scores.per_group] == sorted(row[2] for row in scores.per_group)


def test_without_groups(made):
    pairs, _, right = made
    plain = evaluate_pairs(PairFeatures.of(pairs.images, pairs.captions, pairs.negatives))
    assert plain.accuracy == pytest.approx(100 * right.mean(), abs=1e-4)
    assert (plain.group_accuracy, plain.per_group, plain.left_out) == (None, None, None)


def test_what_cannot_be_compared(made):
    pairs, _, _ = made
    without = torch.zeros_like(pairs.negatives)
    without[:3] = pairs.negatives[:3]
    with pytest.raises(InputError, match="row 3 has no false caption"):
        evaluate_pairs(PairFeatures(pairs.images, pairs.captions, without))
    images = pairs.images
    for changed, message in (
        ((images, images[1:], images), "caption_features: has 96 rows, expected 97"),
        ((images, images, images[:, 1:]), "negative_features: has 5 columns, expected 6"),
        ((images, images, images, ["a"]), "groups: has 1 rows, expected 97"),
        ((images, images, 0 * images), "negative_features: row 0 is all zero"),
    ):
        with pytest.raises(InputError, match=message):
            PairFeatures.of(*changed)
