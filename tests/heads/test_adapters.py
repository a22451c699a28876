"""CLIP-Adapter's forms and Unmix-CLIP against their formulas, written plainly in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.conftest import make_problem, unit
from tests.heads.shots import TAU, fitted, logits_of, without_validation
from transclip_fast.heads import clip_adapter, unmix_clip
from transclip_fast.heads.clip_adapter_blend import BlendedHead

FORMS = {
    "clip-adapter": ("ratio",),
    "clip-adapter-text": ("text_ratio",),
    "clip-adapter-both": ("ratio", "text_ratio"),
}
NAMES = (*FORMS, "clip-adapter-blend", "unmix-clip")


def relu(x):
    return np.maximum(x, 0)


def adapted(rows, head, side=""):
    """The output of a bottleneck, "" of images or "text_"."""
    down, up = (getattr(head, f"{side}{layer}").double().numpy() for layer in ("down", "up"))
    return relu(relu(rows @ down.T) @ up.T)


def expected_logits(name, head, rows, text):
    """Logits (n, K) by the formulas of the papers, with all prototypes of all images."""
    if name == "unmix-clip":
        image, hidden, out = (
            getattr(head, layer).double().numpy() for layer in ("image", "hidden", "out")
        )
        return TAU * unit(rows @ image.T) @ unit(relu(text @ hidden.T) @ out.T).T
    if name == "clip-adapter-blend":
        a, b = expected_ratios(head, rows, text)
        images = unit(a * adapted(rows, head) + (1 - a) * rows)
        own = b[:, None] * adapted(text, head, "text_") + (1 - b[:, None]) * text  # (n, K, d)
        own /= np.linalg.norm(own, axis=2, keepdims=True)
        return TAU * np.einsum("nd,nkd->nk", images, own)
    if "ratio" in FORMS[name]:
        rows = unit(head.ratio * adapted(rows, head) + (1 - head.ratio) * rows)
    if "text_ratio" in FORMS[name]:
        text = head.text_ratio * adapted(text, head, "text_") + (1 - head.text_ratio) * text
    return TAU * rows @ unit(text).T


def expected_ratios(head, rows, text):
    """The two ratios of each image, (n, 1) each."""
    w = {x: getattr(head, f"blend_{x}").double().numpy() for x in ("image", "text")}
    hidden = relu(rows @ w["image"].T + text.mean(0) @ w["text"].T)
    ends = (head.blend_ratio, head.blend_text_ratio)
    return tuple(1 / (1 + np.exp(-hidden @ end.double().numpy()[:, None])) for end in ends)


@pytest.mark.parametrize("name", NAMES)
def test_is_its_formula(name, task):
    head = fitted(name, task)
    rows, text = (task[f"{x}_features"].astype(np.float64) for x in ("image", "text"))
    expected = expected_logits(name, head, rows, text)
    np.testing.assert_allclose(logits_of(head, task), expected, atol=1e-3)
    zero_shot = TAU * rows @ text.T
    assert np.abs(expected - zero_shot).max() > 1  # it is not what it started from


@pytest.mark.parametrize("name", NAMES)
def test_widths(name, task, short):
    shapes = {"down": (8, 33), "up": (33, 8), "image": (16, 33), "hidden": (24, 33)}
    shapes |= {"out": (16, 24), "blend_image": (8, 33), "blend_text": (8, 33)}
    head = fitted(name, task)
    for field in head.stored_tensors:
        shape = shapes.get(field.removeprefix("text_"))
        assert shape is None or getattr(head, field).shape == shape


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name, task, short):
    head = fitted(name, without_validation(task), seed=2)
    names = [x for x in head.stored_tensors if x not in ("text", "mean_text")]
    rows, labels = (torch.from_numpy(task[f"support_{x}"][::5]) for x in ("features", "labels"))
    text = torch.from_numpy(task["text_features"]).double()
    weights = [getattr(head, x).double().requires_grad_() for x in names]

    def loss(*weights):
        moved = replace(head, **dict(zip(names, weights, strict=True))).transfer(text)
        found = torch.nn.functional.cross_entropy(moved.block_logits(rows.double()), labels)
        if name == "unmix-clip":
            found = found + 0.1 * unmix_clip.decorrelation(moved.projected_text())
        return found

    assert torch.autograd.gradcheck(loss, weights, eps=1e-7, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_goes_to_other_classes(name, task, short):
    text, other = task["text_features"], make_problem(k=9, seed=5)[1]
    head = fitted(name, task)
    moved = head.transfer(torch.from_numpy(other))
    rows = task["image_features"].astype(np.float64)
    expected = expected_logits(name, head, rows, other.astype(np.float64))
    assert expected.shape == (328, 9)
    np.testing.assert_allclose(logits_of(moved, task), expected, atol=1e-3)
    back = moved.transfer(torch.from_numpy(text))
    np.testing.assert_array_equal(logits_of(back, task), logits_of(head, task))


@pytest.mark.parametrize("name", NAMES)
def test_longer_training_lowers_the_loss(name, task, monkeypatch):
    rows, labels = (torch.from_numpy(task[f"support_{x}"]) for x in ("features", "labels"))
    losses = []
    for epochs in (1, 20, 200):
        for module in (clip_adapter, unmix_clip):
            monkeypatch.setattr(module, "EPOCHS", epochs)
        logits = fitted(name, without_validation(task)).logits(rows)
        losses.append(float(torch.nn.functional.cross_entropy(logits, labels)))
    assert losses[0] > losses[1] > losses[2]
    zero_shot = rows @ torch.from_numpy(task["text_features"]).T
    learned, before = ((x.argmax(1) == labels).double().mean() for x in (logits, zero_shot))
    assert learned > before + 0.1


@pytest.mark.parametrize("name", FORMS)
def test_ratios_are_those_that_validate_best(name, task, short):
    """One after the other: each of the first with 0.2 for the second, then each of the second."""
    seen = []
    head = fitted(name, task, progress=lambda done, steps: seen.append((done, steps)))
    runs = 1 + 3 * len(FORMS[name])
    assert seen[-1] == (10 * runs, 10 * runs)
    assert len(seen) == 10 * runs
    default = fitted(name, without_validation(task))
    assert default.parameters == dict.fromkeys(FORMS[name], 0.2)
    rows, labels = (torch.from_numpy(task[f"validation_{x}"]) for x in ("features", "labels"))
    best = [float((h.predict(rows) == labels).double().mean()) for h in (head, default)]
    assert best[0] >= best[1]
    assert (head.parameters == default.parameters) == (best[0] == best[1])
    assert all(getattr(head, x) == head.parameters[x] for x in FORMS[name])


def test_the_second_ratio_is_tried_at_the_first_that_was_chosen(task, short, monkeypatch):
    tried = []

    def trained(task, ratios, place, trainings):
        tried.append((ratios["ratio"], ratios["text_ratio"]))
        # Right on as many validation rows as this says, for the choice to be known.
        score = {(0.6, 0.2): 2, (0.6, 0.8): 3, (0.2, 0.8): 4}.get(tried[-1], 1)
        return Scored(ratios, score)

    class Scored:
        def __init__(self, parameters, score):
            self.parameters, self.score = parameters, score

        def logits(self, rows):
            return torch.eye(6)[torch.where(torch.arange(24) < self.score, labels, -labels - 1)]

    labels = torch.from_numpy(task["validation_labels"])
    monkeypatch.setattr(clip_adapter, "_trained", trained)
    head = fitted("clip-adapter-both", task)
    assert head.parameters == {"ratio": 0.6, "text_ratio": 0.8}
    firsts = [(ratio, 0.2) for ratio in (0.2, 0.4, 0.6, 0.8)]
    assert tried == [*firsts, *((0.6, ratio) for ratio in (0.4, 0.6, 0.8))]


def test_the_text_form_is_a_prior_of_prototypes(task, short):
    head = fitted("clip-adapter-text", task)
    (name, prototypes), *rest = head.prior(torch.empty(0, 33)).items()
    assert (name, rest) == ("prototypes", [])
    rows = torch.from_numpy(task["image_features"])
    np.testing.assert_allclose(TAU * rows @ prototypes.T, head.logits(rows), atol=1e-4)
    assert fitted("clip-adapter-both", task).prior(rows).keys() == {"prior_logits"}


def test_learned_ratios_start_at_a_half_and_differ_by_image(task, monkeypatch):
    rows, text = (task[f"{x}_features"].astype(np.float64) for x in ("image", "text"))
    monkeypatch.setattr(clip_adapter, "RATE", 0.0)
    start = fitted("clip-adapter-blend", task).ratios(torch.from_numpy(task["image_features"]))
    for ratio in start:
        np.testing.assert_array_equal(ratio, np.full((328, 1), 0.5))
    monkeypatch.undo()
    head = fitted("clip-adapter-blend", task)
    found = head.ratios(torch.from_numpy(task["image_features"]))
    for ratio, expected in zip(found, expected_ratios(head, rows, text), strict=True):
        np.testing.assert_allclose(ratio, expected, atol=1e-5)
        assert np.ptp(expected) > 0.01
        assert abs(expected.mean() - 0.5) > 0.01
        assert 0 < expected.min() < expected.max() < 1


def test_learned_ratios_see_the_texts(task, short):
    head = fitted("clip-adapter-blend", task)
    rows = torch.from_numpy(task["image_features"])
    text = torch.from_numpy(task["text_features"])
    before = head.ratios(rows)
    assert not torch.equal(before[0], head.transfer(text[:2]).ratios(rows)[0])
    for mine, restricted in zip(
        before, head.restrict(torch.tensor([1, 0])).ratios(rows), strict=True
    ):
        assert torch.equal(mine, restricted)  # a part of the classes answers as before


def test_opposite_features_do_not_divide_by_zero():
    zero = dict.fromkeys(("text_down", "blend_image", "blend_text"), torch.zeros(1, 2))
    zero |= dict.fromkeys(("blend_ratio", "blend_text_ratio"), torch.zeros(1))
    down, up = torch.tensor([[-1.0, 0.0]]), torch.tensor([[1.0], [0.0]])
    text = torch.tensor([[-1.0, 0.0], [0.0, 1.0]])
    head = BlendedHead(
        text=text, mean_text=text.mean(0), logit_scale=TAU, down=down, up=up,
        **{**zero, "text_down": down, "text_up": up},
    )  # fmt: skip
    # Half of the row and half of its bottleneck are nothing, for image and class 0 alike.
    logits = head.logits(torch.tensor([[-1.0, 0.0], [0.0, 1.0]]))
    np.testing.assert_allclose(logits, [[0, 0], [0, TAU]], atol=1e-4)


def test_decorrelation_is_its_formula():
    rows = np.random.default_rng(0).normal(size=(7, 5)) * np.linspace(0.5, 1.5, 7)[:, None]
    expected = 0.0
    for i in range(7):
        for j in range(7):
            product = sum(rows[i, k] * rows[j, k] for k in range(5))
            expected += (product - 1) ** 2 if i == j else 0.2 * product**2
    found = unmix_clip.decorrelation(torch.from_numpy(rows))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_unmixing_sets_the_texts_of_classes_apart(task, monkeypatch):
    cosines = {}
    for alpha in (0.0, 7e-3, 7e-1):
        monkeypatch.setattr(unmix_clip, "ALPHAS", (alpha,))
        head = fitted("unmix-clip", task)
        assert head.parameters == {"alpha": alpha}
        text = head.projected_text().double().numpy()
        np.testing.assert_allclose(np.linalg.norm(text, axis=1), 1, atol=1e-6)
        cosines[alpha] = np.square((text @ text.T)[~np.eye(6, dtype=bool)]).mean()
    assert cosines[0.0] > cosines[7e-3] > 1.5 * cosines[7e-1]


def test_alpha_is_the_one_that_validates_best(task, short):
    rows, labels = (torch.from_numpy(task[f"validation_{x}"]) for x in ("features", "labels"))
    seen = []
    head = fitted("unmix-clip", task, progress=lambda done, steps: seen.append((done, steps)))
    assert seen[-1] == (30, 30)
    default = fitted("unmix-clip", without_validation(task))
    assert default.parameters == {"alpha": 7e-5}
    scores = [(h.predict(rows) == labels).double().mean() for h in (head, default)]
    assert scores[0] >= scores[1]
    assert (head.parameters == default.parameters) == (scores[0] == scores[1])
