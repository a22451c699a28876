"""CoCoOp against its formula in float64, its gradients, and its training."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.heads.tower import (
    DIM,
    NAMES,
    TAU,
    WIDTH,
    Killed,
    Memory,
    numerical,
    plain_text,
    tiny_tower,
)
from tests.heads.tower import task as make_task
from transclip_fast import InputError, TransCLIP
from transclip_fast.heads import SETTINGS, fit_head
from transclip_fast.heads.prompts.cocoop import TENSORS, CoCoOp, fit, shifted_contexts
from transclip_fast.heads.prompts.context import nearest_words


@pytest.fixture(scope="module")
def tower():
    return tiny_tower()


@pytest.fixture
def learner(tower):
    return CoCoOp(make_task(tower, 2))


def plain_logits(learner, rows):
    """Logits (n, K) float64, image by image and class by class."""
    d = {name: getattr(learner, name).detach() for name in TENSORS}
    logits = []
    for row in rows.double():
        hidden = (d["down"] @ row + d["down_bias"]).clamp_min(0)
        context = d["context"] + d["up"] @ hidden + d["up_bias"]
        texts = torch.stack([plain_text(learner.reader.tower, name, context) for name in NAMES])
        logits.append(TAU * texts @ row)
    return torch.stack(logits)


def test_the_formula(learner):
    rows = make_task(learner.reader.tower, 2).shots.features
    assert learner.down.shape == (DIM // 16, DIM)
    assert learner.up.shape == (WIDTH, DIM // 16)
    expected = plain_logits(learner, rows)
    torch.testing.assert_close(learner(rows).detach(), expected, rtol=1e-9, atol=1e-9)
    shifted = shifted_contexts(learner, rows.double())
    assert (shifted[0] - shifted[1]).abs().max() > 0.01  # images differ


def test_gradients_are_those_of_finite_differences(tower):
    task = make_task(tower, 2)
    learner = CoCoOp(task)
    rows, labels = task.shots.features[:3], task.shots.labels[:3]
    loss = learner.descend(rows, labels)
    assert loss == pytest.approx(float(F.cross_entropy(plain_logits(learner, rows), labels)))
    for name, parameter in learner.named_parameters():
        if name == "context":
            expected = numerical(lambda: F.cross_entropy(learner(rows), labels), parameter)
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-7)
        else:  # along some directions, as there are many
            draw = torch.Generator().manual_seed(0)
            for _ in range(4):
                way = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
                length = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
                start = parameter.data.clone()

                def moved(start=start, way=way, length=length, parameter=parameter):
                    parameter.data = start + length * way
                    return F.cross_entropy(learner(rows), labels)

                expected = float(numerical(moved, length))
                parameter.data = start
                along = float((parameter.grad * way).sum())
                assert along == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("images", [1, 2, 5])
def test_gradients_of_a_batch_in_parts(tower, monkeypatch, images):
    task = make_task(tower, 2)
    whole, parts = CoCoOp(task), CoCoOp(task)
    rows, labels = task.shots.features, task.shots.labels
    first = whole.descend(rows, labels)
    seen = []
    forward = CoCoOp.forward

    def counted(self, rows):
        seen.append(len(rows))
        return forward(self, rows)

    monkeypatch.setattr(CoCoOp, "forward", counted)
    monkeypatch.setattr(tower, "chunk", lambda length: images * len(NAMES))
    assert parts.descend(rows, labels) == pytest.approx(first, rel=1e-12)
    assert seen == [images] * (12 // images) + [12 % images] * bool(12 % images)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-13)


def test_one_image_and_more_classes_than_fit(tower, monkeypatch):
    task = make_task(tower, 2)
    whole, parts = CoCoOp(task), CoCoOp(task)
    whole.descend(task.shots.features, task.shots.labels)
    monkeypatch.setattr(tower, "chunk", lambda length: 2)
    parts.descend(task.shots.features, task.shots.labels)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-13)


def test_training_lowers_the_loss(tower):
    task = make_task(tower, 2, epochs=20)
    rows, labels = task.shots.features, task.shots.labels
    before = F.cross_entropy(CoCoOp(task)(rows), labels).item()
    head = fit(task)
    assert F.cross_entropy(head.logits(rows), labels) < 0.8 * before


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_an_interrupted_training_ends_with_the_same_weights(tower, steps):
    whole = fit(make_task(tower, 2))
    memory = Memory(steps)
    with pytest.raises(Killed):
        fit(make_task(tower, 2, checkpoint=memory))
    memory.steps = None
    resumed = fit(make_task(tower, 2, checkpoint=memory))
    for name in TENSORS:
        assert torch.equal(getattr(whole, name), getattr(resumed, name)), name
    begun = CoCoOp(make_task(tower, 2))
    assert not torch.equal(begun.up.detach(), whole.up)


def test_seeds(tower):
    first, same, other = (fit(make_task(tower, 2, seed=seed)) for seed in (3, 3, 4))
    rows = make_task(tower, 2).shots.features
    np.testing.assert_array_equal(first.logits(rows), same.logits(rows))
    assert (first.logits(rows) != other.logits(rows)).any()


def test_the_head_is_what_was_learned(tower, monkeypatch):
    task = make_task(tower, 2)
    learner = CoCoOp(task)
    rows = task.shots.features
    learner.descend(rows, task.shots.labels)
    head = learner.head()
    expected = learner(rows).detach().float()
    torch.testing.assert_close(head.logits(rows), expected, rtol=1e-5, atol=1e-5)
    assert head.block_rows > 12
    monkeypatch.setattr(tower, "chunk", lambda length: 3 * 5)
    seen = []
    blocks = head.logits(rows, lambda done, of: seen.append((done, of)))
    assert seen == [(5, 12), (10, 12), (12, 12)]
    torch.testing.assert_close(blocks, expected, rtol=1e-5, atol=1e-5)
    labels, prior = head.labels_and_prior(rows)
    np.testing.assert_array_equal(labels, expected.argmax(1))
    np.testing.assert_array_equal(prior["prior_logits"], blocks)
    assert head.words == nearest_words(tower, learner.context)
    with torch.no_grad():
        plain = torch.stack([plain_text(tower, name, learner.context) for name in NAMES])
    torch.testing.assert_close(head.text, plain.float(), rtol=1e-5, atol=1e-5)


def test_some_classes_and_other_classes(tower):
    task = make_task(tower, 2)
    head, rows = fit(task), task.shots.features
    chosen = torch.tensor([2, 0])
    whole = head.logits(rows)
    torch.testing.assert_close(head.restrict(chosen).logits(rows), whole[:, chosen])
    assert len(head.restrict(chosen).text) == 2
    moved = head.for_classes(tower, ["elk", "zebra", "cat", "small red bee"])
    logits = moved.logits(rows)
    assert logits.shape == (12, 4)
    torch.testing.assert_close(logits[:, [2, 0]], whole[:, [0, 2]], rtol=1e-5, atol=1e-5)
    assert len(moved.text) == 4


def test_below_transclip(tower):
    task = make_task(tower, 2)
    head = fit(task)
    model = TransCLIP(device="cpu").fit(task.shots.features, **head.prior(task.shots.features))
    assert model.label_distributions_.shape == (12, 3)


def test_by_its_name_with_the_published_settings(tower):
    context, schedule = SETTINGS["cocoop"]
    assert (context.n_ctx, context.start, schedule.batch_size) == (4, "a photo of a", 4)
    task = make_task(tower, 2, start="a photo of a")
    rows = task.shots
    head = fit_head(
        "cocoop", task.text, rows.features, rows.labels, logit_scale=TAU, prompting=task.prompting
    )
    assert head.parameters == {"n_ctx": 4}
    torch.testing.assert_close(head.logits(rows.features), fit(task).logits(rows.features))


def test_a_head_without_its_tower(tower):
    task = make_task(tower, 2)
    head, rows = fit(task), task.shots.features
    bare = replace(head, reader=None)
    with pytest.raises(InputError, match="the head cocoop runs a text tower for every image"):
        bare.logits(rows)
    found = bare.for_classes(tower, NAMES).logits(rows)
    np.testing.assert_array_equal(found, head.logits(rows))
