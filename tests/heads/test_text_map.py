"""The trained map of texts: its loss and first step in float64, and what it learns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.conftest import unit
from transclip_fast.data.pairs import PairFeatures
from transclip_fast.errors import InputError
from transclip_fast.heads.text_map import MapTraining, pair_loss, train_text_map

TAU = 20.0
SHORT = MapTraining(epochs=40, batch_size=16, logit_scale=TAU, held_out=0.2)


def made(n=500, seed=0):
    """
    Pairs whose false caption has the things of the image, bound the other way round.

    Texts have the binding, but in other directions than images, so that cosines do not see it.
    """
    draw = np.random.default_rng(seed)
    things, binding = draw.normal(size=(2, n, 8))
    turned = binding @ np.linalg.qr(np.random.default_rng(9).normal(size=(8, 8)))[0]
    images = np.concatenate([things, binding], 1)
    captions, negatives = (np.concatenate([things, x], 1) for x in (turned, -turned))
    rows = [unit(x).astype(np.float32) for x in (images, captions, negatives)]
    return PairFeatures.of(*rows)


def without(pairs, missing):
    """The same with no false caption in some rows."""
    negatives = pairs.negatives.clone()
    negatives[missing] = 0
    return PairFeatures(pairs.images, pairs.captions, negatives)


def accuracy(pairs, weight):
    images, captions, negatives = (
        x.double().numpy() for x in (pairs.images, pairs.captions, pairs.negatives)
    )
    true, false = (
        (images * unit(x @ weight.double().numpy().T)).sum(1) for x in (captions, negatives)
    )
    return 100 * (true > false).mean()


def plain_loss(weight, pairs, tau):
    """The loss, image by image and caption by caption, in float64."""
    images, captions, negatives = (
        x.double().numpy() for x in (pairs.images, pairs.captions, pairs.negatives)
    )
    negatives = negatives[np.abs(negatives).sum(1) > 0]
    captions, negatives = (unit(x @ weight.T) if len(x) else x for x in (captions, negatives))

    def surprise(scores, right):
        return np.log(np.exp(tau * scores - tau).sum()) + tau - tau * scores[right]

    texts = np.concatenate([captions, negatives])
    of_images = np.mean([surprise(texts @ x, k) for k, x in enumerate(images)])
    of_captions = np.mean([surprise(images @ t, k) for k, t in enumerate(captions)])
    return (of_images + of_captions) / 2


@pytest.mark.parametrize("missing", [[], [0, 3, 10], range(11)])
@pytest.mark.parametrize("tau", [1.0, 100.0])
def test_the_loss(missing, tau):
    pairs = without(made(11), [*missing])
    weight = np.eye(16) + 0.2 * np.random.default_rng(1).normal(size=(16, 16))
    found = pair_loss(torch.from_numpy(weight).float(), pairs, tau)
    assert float(found) == pytest.approx(plain_loss(weight, pairs, tau), rel=1e-5)


def gradient(weight, pairs, tau, step=1e-6):
    found = np.empty_like(weight)
    for entry in np.ndindex(weight.shape):
        moved = np.zeros_like(weight)
        moved[entry] = step
        ends = (plain_loss(weight + sign * moved, pairs, tau) for sign in (1, -1))
        found[entry] = np.subtract(*ends) / (2 * step)
    return found


def test_the_first_step_is_adams_from_the_identity():
    """Of two images one is trained on, in a single batch, and the other held out."""
    pairs = without(made(12), [1, 8])
    pairs = PairFeatures(pairs.images[:2].repeat_interleave(6, 0), pairs.captions, pairs.negatives)
    found = train_text_map(pairs, MapTraining(epochs=1, logit_scale=TAU, held_out=0.5))
    halves, expected, start = (pairs.rows(slice(6)), pairs.rows(slice(6, 12))), [], np.eye(16)
    for trained, held in (halves, halves[::-1]):
        slope = gradient(start, trained, TAU)
        stepped = start - 1e-3 * slope / (np.abs(slope) + 1e-8)  # as Adam's first step is
        expected.append([plain_loss(weight, held, TAU) for weight in (start, stepped)])
    place = int(np.argmin([abs(before - found.losses[0]) for before, _ in expected]))
    assert found.losses == pytest.approx(expected[place], rel=1e-5)
    assert abs(np.subtract(*expected[place])) > 1e-3


def test_it_learns_what_cosines_do_not_see():
    pairs, others = made(), made(300, seed=1)
    found = train_text_map(pairs, SHORT)
    assert found.accuracies[0] < 65
    assert found.accuracies[found.epoch] == max(found.accuracies) > 95
    assert accuracy(others, torch.eye(16)) < 65
    assert accuracy(others, found.weight) > 95
    assert found.losses[found.epoch] < found.losses[0]
    assert len(found.accuracies) == len(found.losses) == SHORT.epochs + 1


def test_the_epoch_that_is_reported_is_the_one_that_is_kept():
    """A longer training begins as a shorter one, which ends with the map of its last epoch."""
    found = train_text_map(made(200), replace(SHORT, epochs=60))
    assert 0 < found.epoch < 60
    stopped = train_text_map(made(200), replace(SHORT, epochs=found.epoch))
    assert torch.equal(stopped.weight, found.weight)
    assert found.accuracies.index(max(found.accuracies)) == found.epoch


def test_the_seed_decides_alone():
    pairs = made(120)
    same = [train_text_map(pairs, SHORT) for _ in range(2)]
    assert torch.equal(same[0].weight, same[1].weight)
    assert same[0].accuracies == same[1].accuracies
    other = train_text_map(pairs, replace(SHORT, seed=1))
    assert not torch.equal(other.weight, same[0].weight)


@pytest.mark.parametrize(("share", "images"), [(0.001, 1), (0.25, 3), (0.5, 5), (0.999, 9)])
def test_captions_of_an_image_are_held_out_together(share, images):
    pairs = made(50)
    pairs = PairFeatures(pairs.images[:10].repeat(5, 1), pairs.captions, pairs.negatives)
    found = train_text_map(pairs, MapTraining(epochs=1, held_out=share))
    expected = 2 if share == 0.25 else images  # Python rounds a half to even
    assert (found.n_held_out, found.n_trained) == (5 * expected, 50 - 5 * expected)


def test_a_map_that_is_no_better_is_the_identity():
    pairs = made()
    pairs = PairFeatures(pairs.images, pairs.images, pairs.negatives)  # all right from the start
    found = train_text_map(pairs, SHORT)
    assert (found.epoch, found.accuracies[0]) == (0, 100)
    assert torch.equal(found.weight, torch.eye(16))


def test_what_cannot_be_trained():
    pairs = made(20)
    with pytest.raises(InputError, match="are of one image"):
        train_text_map(
            PairFeatures(pairs.images[:1].repeat(20, 1), pairs.captions, pairs.negatives)
        )
    with pytest.raises(InputError, match="none of the 2 held out has a false caption"):
        train_text_map(without(pairs, range(20)))
