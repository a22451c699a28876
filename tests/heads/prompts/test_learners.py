"""CoOp and ProGrad against their formulas, and their training against interruption."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.heads.prompts.conftest import DIM, NAMES
from transclip_fast.data.labelled_rows import LabelledRows
from transclip_fast.errors import InputError
from transclip_fast.heads import fit_head
from transclip_fast.heads import text_tower as tower_module
from transclip_fast.heads.prompts import ContextSettings, Prompting, Schedule, learning
from transclip_fast.heads.prompts.coop import CoOp
from transclip_fast.heads.prompts.learning import train
from transclip_fast.heads.prompts.prograd import ProGrad, aligned
from transclip_fast.heads.task import HeadTask

TAU = 10.0
SETTINGS = [
    ContextSettings(n_ctx=3, class_specific=specific, position=position)
    for specific in (False, True)
    for position in ("end", "middle", "front")
]


def unit_rows(n, seed, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, DIM, generator=draw, dtype=torch.float64), dim=1).to(dtype)


def task_of(tower, *, context=SETTINGS[0], dtype=torch.float32, **more):
    """A task of 4 classes with 3 shots and 2 validation rows each."""
    labels = torch.arange(4).repeat(5)
    rows = unit_rows(20, 1, dtype)
    given = {
        "text": unit_rows(4, 2, dtype),
        "shots": LabelledRows(rows[:12], labels[:12]),
        "validation": LabelledRows(rows[12:], labels[12:]),
        "logit_scale": TAU,
        "seed": 3,
        "progress": lambda done, of, **figures: None,
        "prompting": Prompting(tower, NAMES, context, Schedule(epochs=3, batch_size=5)),
    }
    return HeadTask(**{**given, **more})


def plain_prototypes(tower, context, settings):
    """Equations 2 and 4 of Zhou et al. 2022, word by word, through a CLIP's own layers."""
    model, encode = tower.backbone.model, tower.backbone.tokenizer.encode
    table, n_ctx = model.token_embedding.weight, settings.n_ctx
    found = []
    for k, name in enumerate(NAMES):
        vectors = context[k] if settings.class_specific else context
        named, stop = table[encode(name)], table[encode(".")]
        start, end = table[49406:49407], table[49407:49408]
        half = n_ctx // 2
        parts = {
            "end": [vectors, named],
            "middle": [vectors[:half], named, vectors[half:]],
            "front": [named, vectors],
        }[settings.position]
        sequence = torch.cat([start, *parts, stop, end])
        length = len(sequence)
        x = (sequence + model.positional_embedding[:length])[None]
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
        found.append(x[0, -1] @ model.text_projection)
    return F.normalize(torch.stack(found), dim=1)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_coop_is_its_formula(tower64, settings):
    task = task_of(tower64, context=settings, dtype=torch.float64)
    learner = CoOp(task)
    assert learner.context.shape == ((4, 3, 16) if settings.class_specific else (3, 16))
    rows = task.shots.features
    prototypes = plain_prototypes(tower64, learner.context, settings)
    torch.testing.assert_close(learner(rows), TAU * rows @ prototypes.T)


@pytest.mark.parametrize("each_prompt_alone", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gradients_are_finite_differences(tower64, settings, each_prompt_alone, monkeypatch):
    if each_prompt_alone:
        monkeypatch.setattr(tower_module, "ACTIVATION_BYTES", 1)
    task = task_of(tower64, context=settings, dtype=torch.float64)
    learner = CoOp(task)
    rows, labels = task.shots.features, task.shots.labels
    loss = learner.descend(rows, labels)
    assert loss == pytest.approx(F.cross_entropy(learner(rows), labels).item())
    gradient, start = learner.context.grad.clone(), learner.context.detach().clone()
    draw = torch.Generator().manual_seed(0)
    for _ in range(4):
        direction = torch.randn(start.shape, generator=draw, dtype=torch.float64)
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                learner.context.copy_(start + step * direction)
                values.append(float(F.cross_entropy(learner(rows), labels)))
        difference = (values[0] - values[1]) / 2e-5
        assert difference == pytest.approx(float((gradient * direction).sum()), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("settings", SETTINGS[:2] + SETTINGS[3:4], ids=str)
def test_prograd_is_its_formula(tower64, settings):
    task = task_of(tower64, context=settings, dtype=torch.float64)
    rows, labels = task.shots.features, task.shots.labels
    means = F.normalize(torch.stack([rows[labels == k].mean(0) for k in range(4)]), dim=1)
    conflicts = []
    for turn in range(4):  # zero-shot right, and wrong in three ways
        learner = ProGrad(replace(task, text=means.roll(turn, 0)))
        learner.descend(rows, labels)
        found = learner.context.grad.numpy().ravel()
        logits = learner(rows)
        zero_shot = (TAU * rows @ means.roll(turn, 0).T).softmax(1)
        kl = (zero_shot * (zero_shot.log() - logits.log_softmax(1))).sum(1).mean()
        ce = -logits.log_softmax(1)[torch.arange(len(labels)), labels].mean()
        (general,) = torch.autograd.grad(kl, learner.context, retain_graph=True)
        (domain,) = torch.autograd.grad(ce, learner.context)
        g, d = general.numpy().ravel(), domain.numpy().ravel()
        expected = d if d @ g >= 0 else d - (d @ g) / (g @ g) * g
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-15)
        assert found @ g >= -1e-12
        conflicts.append(d @ g < 0)
    assert any(conflicts[1:])
    assert not conflicts[0]


def test_prograd_in_chunks(tower64, monkeypatch):
    """Both gradients come from prompts that are encoded again."""
    task = task_of(tower64, dtype=torch.float64)
    found = []
    for size in (tower_module.ACTIVATION_BYTES, 1):
        monkeypatch.setattr(tower_module, "ACTIVATION_BYTES", size)
        learner = ProGrad(task)
        learner.descend(task.shots.features, task.shots.labels)
        found.append(learner.context.grad)
    torch.testing.assert_close(*found)


def test_projection_by_hand():
    def projected(gradient, direction):
        return aligned(torch.tensor(gradient), torch.tensor(direction)).tolist()

    assert projected([1.0, 2.0], [3.0, 0.0]) == [1.0, 2.0]  # along
    assert projected([-1.0, 2.0], [3.0, 0.0]) == [0.0, 2.0]  # against
    assert projected([-1.0, 0.0], [3.0, 0.0]) == [0.0, 0.0]  # opposite
    assert projected([1.0, 2.0], [0.0, 0.0]) == [1.0, 2.0]  # nothing to say


def plain_training(tower, task, epochs, size):
    """Stochastic gradient descent written out: rates, momentum, decay."""
    learner = CoOp(task)
    context, momentum = learner.context.detach().clone(), 0
    n = len(task.shots)
    for epoch in range(epochs):
        rate = 1e-5 if epoch == 0 else 0.002 * (1 + math.cos(math.pi * epoch / epochs)) / 2
        order = np.random.default_rng([task.seed, epoch]).permutation(n)
        for start in range(0, n, size):
            rows = torch.from_numpy(order[start : start + size])
            leaf = context.clone().requires_grad_()
            prototypes = plain_prototypes(tower, leaf, task.prompting.context)
            logits = TAU * task.shots.features[rows] @ prototypes.T
            loss = F.cross_entropy(logits, task.shots.labels[rows])
            (gradient,) = torch.autograd.grad(loss, leaf)
            momentum = 0.9 * momentum + gradient + 5e-4 * context
            context = context - rate * momentum
    return context


def test_training_is_gradient_descent(tower64):
    task = task_of(tower64, dtype=torch.float64, validation=None)
    learner = CoOp(task)
    train(learner, task)
    torch.testing.assert_close(learner.context.detach(), plain_training(tower64, task, 3, 5))


@pytest.mark.parametrize(("shots", "epochs"), [(1, 50), (2, 100), (4, 100), (8, 200), (16, 200)])
def test_published_epochs(shots, epochs):
    assert Schedule().of(shots) == epochs
    assert Schedule(epochs=7).of(shots) == 7


class Kept:
    """A checkpoint in memory, which is cut off after some steps."""

    def __init__(self, stop=None):
        self.state, self.stop, self.asked = None, stop, 0

    def load(self):
        return self.state

    def keep(self, state):
        self.state = {name: array.copy() for name, array in state().items()}
        self.asked += 1
        if self.asked == self.stop:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", [CoOp, ProGrad])
@pytest.mark.parametrize("stops", [(1,), (4,), (2, 3), (9,)])
def test_an_interrupted_training_ends_with_the_same_weights(tower, kind, stops):
    def trained(task):
        learner = kind(task)
        train(learner, task)
        return learner.context.detach()

    whole = trained(task_of(tower))
    kept = Kept()
    task = task_of(tower)
    task = replace(task, prompting=replace(task.prompting, checkpoint=kept))
    for stop in stops:
        kept.stop, kept.asked = stop, 0
        with pytest.raises(KeyboardInterrupt):
            trained(task)
    assert int(kept.state["step"]) == sum(stops)
    kept.stop, kept.asked = None, 0
    assert torch.equal(trained(task), whole)
    assert kept.asked == 9 - sum(stops)


def test_a_training_that_goes_on_keeps_its_threads(tower, monkeypatch):
    monkeypatch.setattr(learning, "SINGLE_THREAD_SIZE", 0)
    kept, seen = Kept(stop=2), []
    task = task_of(tower)
    task = replace(task, prompting=replace(task.prompting, checkpoint=kept))
    descend = CoOp.descend
    monkeypatch.setattr(
        CoOp, "descend", lambda *args: seen.append(torch.get_num_threads()) or descend(*args)
    )
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(KeyboardInterrupt):
            train(CoOp(task), task)
        torch.set_num_threads(3)
        train(CoOp(task), task)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == [2] * 9


def test_small_towers_train_on_one_thread(tower, monkeypatch):
    seen, descend, before = [], CoOp.descend, torch.get_num_threads()
    monkeypatch.setattr(
        CoOp, "descend", lambda *args: seen.append(torch.get_num_threads()) or descend(*args)
    )
    torch.set_num_threads(2)
    try:
        fitted(tower)
    finally:
        torch.set_num_threads(before)
    assert seen == [1] * 9


def test_progress_tells_loss_and_validation(tower):
    reported = []
    task = task_of(tower, progress=lambda done, of, **figures: reported.append((done, of, figures)))
    learner = CoOp(task)
    train(learner, task)
    assert [entry[:2] for entry in reported] == [(step + 1, 9) for step in range(9)]
    assert reported[0][2].keys() == {"loss"}
    held_out = task.validation
    right = 100 * (learner(held_out.features).argmax(1) == held_out.labels).double().mean()
    assert reported[-1][2]["validation"] == f"{right:.2f} %"


def fitted(tower, name="coop", **more):
    task = task_of(tower)
    shots, held_out = task.shots, task.validation
    prompting = replace(task.prompting, **more.pop("prompting", {}))
    arguments = {"logit_scale": TAU, "seed": 3, "prompting": prompting}
    return fit_head(
        name,
        task.text,
        shots.features,
        shots.labels,
        validation_features=held_out.features,
        validation_labels=held_out.labels,
        **{**arguments, **more},
    )


@pytest.mark.parametrize("name", ["coop", "prograd"])
@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[4]], ids=str)
def test_the_head_is_what_was_trained(tower, name, settings):
    task = task_of(tower, context=settings)
    head = fitted(tower, name, prompting={"context": settings})
    learner = {"coop": CoOp, "prograd": ProGrad}[name](task)
    train(learner, task)
    rows = task.validation.features
    torch.testing.assert_close(head.logits(rows), learner(rows).detach())
    assert torch.equal(head.context, learner.context)
    assert head.prior(rows)["prototypes"] is head.text
    assert len(head.words) == head.context[..., 0].numel()
    classes = torch.tensor([2, 0])
    part = head.restrict(classes)
    torch.testing.assert_close(part.logits(rows), head.logits(rows)[:, classes])
    if settings.class_specific:
        assert torch.equal(part.context, head.context[classes])
        assert part.words == [*head.words[6:9], *head.words[0:3]]


def test_a_shared_context_around_other_classes(tower):
    head = fitted(tower)
    same = head.for_classes(tower, NAMES)
    torch.testing.assert_close(same.text, head.text, atol=1e-6, rtol=0)
    moved = head.for_classes(tower, ["bird", "cat"])
    torch.testing.assert_close(moved.text[1], head.text[0], atol=1e-6, rtol=0)
    specific = fitted(tower, prompting={"context": SETTINGS[4]})
    with pytest.raises(InputError, match="bound to the classes it was trained on"):
        specific.for_classes(tower, NAMES)


def test_seeds(tower):
    first, again, other = fitted(tower), fitted(tower), fitted(tower, seed=4)
    assert torch.equal(first.text, again.text)
    assert not torch.equal(first.text, other.text)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"prompting": {"class_names": NAMES[:3]}}, "class_names: 3 names for 4 classes"),
        ({"prompting": {"context": ContextSettings(position="up")}}, "choose one of end"),
        ({"logit_scale": 3e38}, r"the loss is \w+ after \d+ steps; train with a lower rate"),
    ],
)
def test_what_cannot_be_trained(tower, change, expected):
    with pytest.raises(InputError, match=expected):
        fitted(tower, **change)


def test_no_tower():
    with pytest.raises(InputError, match="learned through a text tower: give prompting"):
        fit_head("coop", unit_rows(4, 2), unit_rows(4, 1), torch.arange(4))
