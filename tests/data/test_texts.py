"""Text features of several templates, whichever axis they are on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.conftest import unit
from tests.new_tensors import LargestTensor
from transclip_fast import TransCLIP, fit_head
from transclip_fast.data.texts import ensemble, moved_text, templates_first
from transclip_fast.errors import InputError

TEXTS = np.random.default_rng(0).normal(size=(7, 5, 4))  # (P, K, d)


def test_the_number_of_classes_tells_the_axis():
    turned = TEXTS.swapaxes(0, 1)
    np.testing.assert_array_equal(templates_first(TEXTS, 5), TEXTS)
    np.testing.assert_array_equal(templates_first(turned, 5), TEXTS)
    np.testing.assert_array_equal(templates_first(torch.from_numpy(turned), 5), TEXTS)
    np.testing.assert_array_equal(templates_first(TEXTS[:3], None), TEXTS[:3])
    np.testing.assert_array_equal(templates_first(TEXTS[0], 4), TEXTS[0])
    assert templates_first(TEXTS[:1, :1], 1).shape == (1, 1, 4)


def test_as_many_templates_as_classes():
    with pytest.raises(InputError, match=r"shape \(5, 5, 4\) can be .* give the mean"):
        templates_first(TEXTS[:5], 5)


def test_the_mean_of_unit_texts():
    unit = TEXTS / np.linalg.norm(TEXTS, axis=2, keepdims=True)
    mean = unit.mean(0)
    expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    with pytest.warns(UserWarning, match="were not unit vectors"):
        np.testing.assert_allclose(ensemble(TEXTS, n_classes=5), expected, atol=1e-6)


def test_the_mean_needs_no_second_copy_of_all_texts():
    rows = np.random.default_rng(1).normal(size=(24_000, 4))
    texts = unit(rows).astype(np.float32).reshape(8, 3000, 4)
    with LargestTensor(torch.float32, texts) as largest:
        found = ensemble(texts)
    assert 0 < largest.bytes < texts.nbytes / 2
    np.testing.assert_allclose(found, unit(texts.mean(0)), atol=1e-6)


def test_more_templates_than_classes_are_named():
    with pytest.warns(UserWarning, match=r"\(7, 2, 4\) is taken as 7 templates of 2 classes"):
        templates_first(np.ones((7, 2, 4)), None)
    templates_first(np.ones((2, 7, 4)), None)
    templates_first(np.ones((7, 2, 4)), 2)


def test_classes_with_the_same_text(problem):
    features, texts, _ = problem()
    equal = texts.copy()
    equal[[2, 5]] = texts[[0, 1]]
    message = r"^{}: class 2 has the row of class 0, as 1 more do; such classes cannot be told"
    for name in ("text_features", "prototypes"):
        with pytest.warns(UserWarning, match=message.format(name)):
            TransCLIP(device="cpu").fit(features, **{name: equal})


# -- every way in

IMAGES = unit(np.random.default_rng(1).normal(size=(40, 8))).astype(np.float32)
TEMPLATES = unit(np.random.default_rng(2).normal(size=(90, 8))).astype(np.float32)
TEMPLATES = TEMPLATES.reshape(3, 30, 8)  # (P, K, d)
TURNED = TEMPLATES.swapaxes(0, 1)
PRIORS = {
    "prior": np.full((40, 30), 1 / 30, np.float32),
    "prior_logits": np.zeros((40, 30), np.float32),
    "prototypes": TEMPLATES[0],
}


@pytest.mark.parametrize("name", PRIORS)
def test_a_fit_turns_texts_by_the_classes_of_its_prior(name):
    given = {name: PRIORS[name]}
    expected = TransCLIP(device="cpu").fit(IMAGES, text_features=TEMPLATES, **given)
    for texts in (TURNED, torch.from_numpy(TURNED), TURNED.tolist()):
        found = TransCLIP(device="cpu").fit(IMAGES, text_features=texts, **given)
        np.testing.assert_allclose(
            found.zero_shot_confidences_, expected.zero_shot_confidences_, atol=1e-6
        )
        np.testing.assert_array_equal(found.zero_shot_labels_, expected.zero_shot_labels_)


def test_what_does_not_know_its_classes_warns():
    warning = r"text_features: shape \(30, 3, 8\) is taken as 30 templates of 3 classes"
    for texts in (TURNED, TURNED.tolist()):
        with pytest.warns(UserWarning, match=warning):
            model = TransCLIP(device="cpu").fit(IMAGES, text_features=texts)
        assert model.label_distributions_.shape == (40, 3)
        with pytest.warns(UserWarning, match=warning):
            fit_head("prompt-ensemble", texts)


def test_nested_lists_of_templates():
    np.testing.assert_allclose(ensemble(TEMPLATES.tolist()), ensemble(TEMPLATES), atol=1e-6)


def test_a_list_of_templates_is_taken_as_it_is():
    """Of 30 templates and 3 classes, say: its owner has told which axis is which."""
    assert len(ensemble(list(TURNED))) == 3


def test_texts_in_another_order_are_found():
    draw = np.random.default_rng(3)
    texts = torch.from_numpy(draw.normal(size=(3000, 64)) + 2).float()
    retold = texts + 0.3 * torch.from_numpy(draw.normal(size=texts.shape)).float()
    assert moved_text(texts, retold) is None
    assert moved_text(texts[:1], texts[:1]) is None
    order = torch.arange(3000)
    order[[17, 40]] = order[[40, 17]]
    assert moved_text(texts, retold[order]) == (17, 40)
    assert moved_text(texts, retold.roll(1, 0)) == (0, 1)


def test_a_number_is_no_text(problem):
    with pytest.raises(InputError, match=r"^text_features: expected a non-empty .* shape \(\)"):
        TransCLIP(device="cpu").fit(problem()[0], text_features=5)
