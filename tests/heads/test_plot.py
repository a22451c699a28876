"""PLOT against its formula in float64, its gradients, its patches, and its training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.heads.test_transport import plainly
from tests.heads.tower import DIM, NAMES, TAU, Killed, Memory, numerical, plain_text, tiny_tower
from tests.heads.tower import task as make_task
from transclip_fast import InputError
from transclip_fast.data.patches import PatchedRows
from transclip_fast.heads import SETTINGS, fit_head
from transclip_fast.heads.prompts import plot
from transclip_fast.heads.prompts.plot import Plot, fit

L = 5


@pytest.fixture(scope="module")
def tower():
    return tiny_tower()


def plain_texts(learner):
    """Unit rows (K, P, d) float64."""
    with torch.no_grad():
        return np.array(
            [
                [plain_text(learner.tower, name, context).numpy() for context in learner.contexts]
                for name in NAMES
            ]
        )


def plain_logits(rows, texts):
    """Logits (n, K) of rows (n, 1 + L, d), pair by pair."""
    logits = np.zeros((len(rows), len(texts)))
    for n, row in enumerate(rows):
        for k, prompts in enumerate(texts):
            similarities = row[1:] @ prompts.T
            logits[n, k] = TAU * (plainly(similarities) * similarities).sum()
    return logits


def test_the_formula_with_patches(tower):
    task = make_task(tower, 2, patches=L)
    learner, rows = Plot(task), task.shots.features
    assert learner.contexts.shape == (4, 2, 16)
    learner.contexts.data *= 40  # so that the prompts differ
    expected = plain_logits(rows.double().numpy(), plain_texts(learner))
    np.testing.assert_allclose(learner(rows).detach(), expected, rtol=1e-9, atol=1e-9)
    # Transport is not the mean that it is without patches.
    assert np.abs(expected - learner(rows[:, 1:].mean(1)).detach().numpy()).max() > 0.1


def test_without_patches_it_is_the_mean_over_prompts(tower):
    task = make_task(tower, 2)
    learner, rows = Plot(task), task.shots.features
    expected = TAU * rows.double().numpy() @ plain_texts(learner).mean(1).T
    np.testing.assert_allclose(learner(rows).detach(), expected, rtol=1e-9, atol=1e-9)
    one_patch = torch.stack([rows, rows], 1)  # the only transport of one feature
    texts = torch.from_numpy(plain_texts(learner))
    transported = plot.transported_logits(one_patch.double(), texts, TAU)
    np.testing.assert_allclose(transported, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("patches", [0, L])
def test_gradients_are_those_of_finite_differences(tower, monkeypatch, patches):
    task = make_task(tower, 2, patches=patches)
    learner = Plot(task)
    rows, labels = task.shots.features[:4], task.shots.labels[:4]
    transport, plans = plot.transport, []

    def noted(similarities):
        plans.append(transport(similarities))
        return plans[-1]

    monkeypatch.setattr(plot, "transport", noted)
    learner.descend(rows, labels)
    # The plans are constants of the loss: it is theirs whose differences the gradient has.
    monkeypatch.setattr(plot, "transport", lambda similarities: plans[0])
    expected = numerical(lambda: F.cross_entropy(learner(rows), labels), learner.contexts)
    torch.testing.assert_close(learner.contexts.grad, expected, rtol=1e-5, atol=1e-7)
    assert expected.abs().max() > 1e-3


def test_chunks_change_nothing(tower, monkeypatch):
    task = make_task(tower, 2, patches=L)
    whole, parts = Plot(task), Plot(task)
    whole.descend(task.shots.features, task.shots.labels)
    monkeypatch.setattr(tower, "chunk", lambda length: 5)
    parts.descend(task.shots.features, task.shots.labels)
    torch.testing.assert_close(whole.contexts.grad, parts.contexts.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("patches", [0, L])
@pytest.mark.filterwarnings("ignore:head plot. no local features")
def test_training_lowers_the_loss(tower, patches):
    task = make_task(tower, 2, patches=patches, epochs=20)
    rows, labels = task.shots.features, task.shots.labels
    before = F.cross_entropy(Plot(task)(rows), labels).item()
    head = fit(task)
    assert F.cross_entropy(head.logits(rows), labels) < 0.8 * before
    assert head.parameters == {"n_ctx": 2, "patches": patches}


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_an_interrupted_training_ends_with_the_same_weights(tower, steps):
    whole = fit(make_task(tower, 2, patches=L))
    memory = Memory(steps)
    with pytest.raises(Killed):
        fit(make_task(tower, 2, patches=L, checkpoint=memory))
    memory.steps = None
    resumed = fit(make_task(tower, 2, patches=L, checkpoint=memory))
    assert torch.equal(whole.contexts, resumed.contexts)
    assert not torch.equal(whole.contexts, Plot(make_task(tower, 2, patches=L)).contexts.detach())


def test_it_says_that_there_are_no_patches(tower):
    with pytest.warns(UserWarning, match="plot: no local features, .*`encode --local-features`"):
        head = fit(make_task(tower, 2, epochs=1))
    assert head.patches == 0


def test_prompts_that_start_from_words_differ(tower):
    contexts = Plot(make_task(tower, 2, start="a photo of a")).contexts.detach()
    assert contexts.shape == (4, 4, 16)
    words = tower.vectors(tower.tokenize(["a photo of a"])[0, 1:5])
    assert 0 < (contexts - words).abs().max() < 0.2
    assert not torch.equal(contexts[0], contexts[1])


def test_blocks_change_nothing(tower, monkeypatch):
    task = make_task(tower, 2, patches=L)
    head, rows = fit(task), task.shots.features
    whole = head.logits(rows)
    monkeypatch.setattr(plot, "BLOCK_ENTRIES", 5 * L * 3 * 4)
    assert head.block_rows == 5
    stored = PatchedRows(rows[:, 0].contiguous(), rows[:, 1:].flatten(1).half().numpy(), "x")
    seen = []
    blocks = head.logits(stored, lambda done, of: seen.append(done))
    assert seen == [5, 10, 12]
    torch.testing.assert_close(blocks, whole, rtol=0, atol=0.05)
    np.testing.assert_array_equal(head.predict(stored), blocks.argmax(1))


@pytest.mark.parametrize("patches", [0, L])
@pytest.mark.filterwarnings("ignore:head plot. no local features")
def test_some_classes_and_other_classes(tower, patches):
    task = make_task(tower, 2, patches=patches)
    head, rows = fit(task), task.shots.features
    whole, chosen = head.logits(rows), torch.tensor([2, 0])
    torch.testing.assert_close(head.restrict(chosen).logits(rows), whole[:, chosen])
    moved = head.for_classes(tower, ["elk", "zebra", "cat", "small red bee"])
    logits = moved.logits(rows)
    assert logits.shape == (12, 4)
    torch.testing.assert_close(logits[:, [2, 0]], whole[:, [0, 2]], rtol=1e-4, atol=1e-4)
    assert moved.text.shape == (4, DIM)
    assert len(head.words) == 4 * 2


@pytest.mark.filterwarnings("ignore:head plot. no local features")
def test_rows_with_and_without_patches(tower):
    with_patches, without = (make_task(tower, 2, patches=n, epochs=1) for n in (L, 0))
    head = fit(with_patches)
    with pytest.raises(InputError, match="local_features: the head plot was trained with them"):
        head.logits(without.shots.features)
    rows = with_patches.shots.features
    with pytest.warns(UserWarning, match="^features: 12 of 12 rows were not unit vectors"):
        scaled = head.logits(3 * rows.numpy())
    torch.testing.assert_close(scaled, head.logits(rows), rtol=1e-4, atol=1e-4)
    head, rows = fit(without), with_patches.shots.features
    torch.testing.assert_close(head.logits(rows), head.logits(rows[:, 0]))


def given(tower, name="plot", **changes):
    """`fit_head` of a task with patches as separate arrays."""
    task = make_task(tower, 2, patches=L, epochs=1)
    rows = task.shots.features.numpy()
    arrays = {
        "support_features": rows[:, 0],
        "support_labels": task.shots.labels,
        "support_local_features": rows[:, 1:],
        **changes,
    }
    return fit_head(name, task.text, **arrays, prompting=task.prompting, logit_scale=TAU), task


def test_by_its_name(tower):
    context, schedule = SETTINGS["plot"]
    assert (context.n_ctx, context.start, schedule.epochs) == (16, None, 50)
    head, task = given(tower)
    torch.testing.assert_close(
        head.logits(task.shots.features), fit(task).logits(task.shots.features)
    )


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("coop", {}, "support_local_features: the head coop takes none, only plot does"),
        ("plot", {"support_local_features": np.ones((11, L, DIM))}, "expected .12, L, 32., "),
        ("plot", {"support_local_features": np.ones((12, L, 9))}, "support_local_features: exp"),
        ("plot", {"support_local_features": np.ones((12, 33))}, "support_local_features: exp"),
        ("plot", {"support_local_features": np.ones((12, 0, DIM))}, "local_features: expected"),
        ("plot", {"support_local_features": np.zeros((12, L, DIM))}, "row 0 has a patch"),
        (
            "plot",
            {"support_local_features": np.full((12, L, DIM), np.nan)},
            "support_local_features: row 0 has a patch that is zero or not finite",
        ),
        ("plot", {"validation_local_features": np.ones((2, L, DIM))}, "come together"),
        (
            "plot",
            {"validation_features": np.ones((3, DIM)) / DIM**0.5, "validation_labels": range(3)},
            "give those of support and validation, or neither",
        ),
    ],
)
def test_what_cannot_be_fitted(name, changes, expected, tower):
    with pytest.raises(InputError, match=expected):
        given(tower, name, **changes)
