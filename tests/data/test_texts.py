"""Text features of several templates, whichever axis they are on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from transclip_fast.data.texts import ensemble, templates_first
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
        np.testing.assert_allclose(ensemble(TEXTS), expected, atol=1e-6)


def test_more_templates_than_classes_are_named():
    with pytest.warns(UserWarning, match=r"\(7, 2, 4\) is taken as 7 templates of 2 classes"):
        templates_first(np.ones((7, 2, 4)), None)
    templates_first(np.ones((2, 7, 4)), None)
    templates_first(np.ones((7, 2, 4)), 2)
