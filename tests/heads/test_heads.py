"""Every head against its formula, written plainly in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.accuracy import heads as bench_heads
from bench.rivals.plain_heads import fit as fit_plainly
from tests.conftest import unit
from tests.heads.shots import TAU, fitted, logits_of, without_validation
from tests.kernels.pretend_gpu import PretendGpu
from tests.ordered_sums import OrderedSums
from transclip_fast import InputError, TransCLIP
from transclip_fast.data.labelled_rows import LabelledRows
from transclip_fast.data.patches import PatchedRows
from transclip_fast.heads import (
    HEADS,
    base,
    clip_adapter,
    ensemble,
    fit_head,
    linear_probe,
    tip_adapter,
    unmix_clip,
)
from transclip_fast.heads.task import HeadTask

ADAPTERS = ("clip-adapter", "clip-adapter-text", "clip-adapter-both", "clip-adapter-blend")
DRAWN = (*ADAPTERS, "unmix-clip")  # start at random weights
TRAINED = ("tip-adapter-f", *DRAWN, "taskres", "linear-probe")
BOUND = ("prompt-ensemble", "tip-adapter", "tip-adapter-f", "taskres", "linear-probe")


def right(logits, arrays):
    return 100 * (logits.argmax(1) == arrays["labels"]).mean()


@pytest.mark.parametrize("name", HEADS)
def test_as_good_as_the_plain_fit(name, task, monkeypatch):
    # The plain fit stops when the loss stands still: 200 steps of a single batch are too few, and
    # a falling rate goes half as far as the 500 steps of its constant rate.
    monkeypatch.setattr(clip_adapter, "EPOCHS", 600)
    monkeypatch.setattr(unmix_clip, "EPOCHS", 1000)
    head, plain = logits_of(fitted(name, task), task), fit_plainly(name, task)
    assert abs(right(head, task) - right(plain, task)) <= 1
    if name in TRAINED:
        zero_shot = right(TAU * task["image_features"] @ task["text_features"].T, task)
        assert right(head, task) > zero_shot + 5


@pytest.mark.parametrize("name", ["prompt-ensemble", "tip-adapter"])  # without training
def test_arrays_on_a_gpu(name, task):
    with PretendGpu():
        there = {key: torch.from_numpy(array).to("cuda") for key, array in task.items()}
        head = fitted(name, there)
    expected = fitted(name, task)
    np.testing.assert_array_equal(logits_of(head, task), logits_of(expected, task))


def test_patches_on_a_gpu():
    rows, patches = torch.eye(3), torch.ones(3, 2, 3)
    expected = PatchedRows(rows, patches, "patches")[:]
    with PretendGpu():
        found = PatchedRows(rows, patches.to("cuda"), "patches")[:]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["tip-adapter", "taskres", "linear-probe"])
def test_within_a_point_of_the_plain_fit_on_pets(name, golden_dir):
    arrays = bench_heads.load(golden_dir / "oxford_pets_vitb32.npz")
    arrays["image_features"] = arrays["image_features"].astype(np.float32)
    head, plain = logits_of(fitted(name, arrays), arrays), fit_plainly(name, arrays)
    assert abs(right(head, arrays) - right(plain, arrays)) <= 1


def test_tip_adapter_is_its_formula(task):
    arrays = without_validation(task)
    head = fitted("tip-adapter", arrays)
    assert head.parameters == {"alpha": 1.17, "beta": 1.0}
    rows, keys, text = (
        arrays[f"{n}_features"].astype(np.float64) for n in ("image", "support", "text")
    )
    cached = np.exp(-1.0 * (1 - rows @ keys.T)) @ np.eye(6)[arrays["support_labels"]]
    expected = TAU * rows @ text.T + 1.17 * cached
    np.testing.assert_allclose(logits_of(head, arrays), expected, atol=1e-4)


def test_tip_adapter_finds_the_best_of_its_grid(task):
    head = fitted("tip-adapter", task)
    rows, keys, text = (task[f"{n}_features"] for n in ("validation", "support", "text"))
    one_hot = np.eye(6)[task["support_labels"]]
    scores = {}
    for beta in tip_adapter.BETAS:
        cached = np.exp(-beta * (1 - rows @ keys.T)) @ one_hot
        for alpha in tip_adapter.ALPHAS:
            logits = TAU * rows @ text.T + alpha * cached
            scores[alpha, beta] = (logits.argmax(1) == task["validation_labels"]).mean()
    chosen = head.parameters["alpha"], head.parameters["beta"]
    assert scores[chosen] == max(scores.values()) > min(scores.values())


def test_linear_probe_is_the_minimum(task):
    logits = logits_of(fitted("linear-probe", task), task)
    np.testing.assert_allclose(logits, fit_plainly("linear-probe", task), atol=0.05)


def test_linear_probe_holds_where_zero_shot_is_sure(task):
    kept = task["support_labels"] != 2
    rows, labels = task["support_features"][kept], task["support_labels"][kept]
    text, shots = torch.from_numpy(task["text_features"]), map(torch.from_numpy, (rows, labels))
    with OrderedSums():
        found = linear_probe.constraints(HeadTask(text, LabelledRows(*shots), None, TAU, 0, None))
    logits = TAU * rows.astype(np.float64) @ task["text_features"].T
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = np.array([p[labels == k, k].mean() if k != 2 else np.nan for k in range(6)])
    expected[2] = np.nanmean(expected)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert found.max() > 1.5 * found.min()


@pytest.mark.parametrize("name", TRAINED)
def test_training_lowers_the_loss_of_the_shots(name, task):
    rows, labels = (torch.from_numpy(task[f"support_{n}"]) for n in ("features", "labels"))
    before = TAU * rows @ torch.from_numpy(task["text_features"]).T
    loss = torch.nn.functional.cross_entropy
    assert loss(fitted(name, task).logits(rows), labels) < 0.7 * loss(before, labels)


@pytest.mark.parametrize(
    "name", ["prompt-ensemble", "clip-adapter-text", "taskres", "linear-probe"]
)
def test_prototypes_are_unit_rows(name, task):
    prototypes = fitted(name, task).prior(torch.empty(0, 33))["prototypes"]
    np.testing.assert_allclose(prototypes.norm(dim=1), 1, atol=1e-6)


def test_prompt_ensemble_is_the_unit_mean(task):
    draw = np.random.default_rng(0)
    prompts = [unit(task["text_features"] + 0.05 * draw.normal(size=(6, 33))) for _ in range(3)]
    expected = unit(np.mean(prompts, 0))
    for given in (prompts, np.stack(prompts), torch.tensor(np.stack(prompts))):
        np.testing.assert_allclose(ensemble(given).numpy(), expected, atol=1e-6)
    head = fit_head("prompt-ensemble", prompts)
    np.testing.assert_allclose(
        logits_of(head, task), TAU * task["image_features"] @ expected.T, atol=1e-3
    )


def test_one_template_stays_as_it_is(task):
    text = task["text_features"]
    for given in (text, text[None], [text], text.tolist()):
        np.testing.assert_array_equal(ensemble(given).numpy(), text)


def test_templates_of_different_shapes(task):
    text = task["text_features"]
    with pytest.raises(InputError, match=r"text_features: templates have different shapes"):
        ensemble([text, text[:5]])


@pytest.mark.parametrize("name", HEADS)
def test_the_same_seed_gives_the_same_head(name, task, short):
    heads = [fitted(name, task, seed=seed) for seed in (3, 3, 4)]
    first, same, other = (logits_of(head, task) for head in heads)
    np.testing.assert_array_equal(first, same)
    assert (first != other).any() or name not in DRAWN


@pytest.mark.parametrize("name", ["taskres", "tip-adapter-f"])
def test_batches_are_shuffled_by_the_seed(name, task, short, monkeypatch):
    monkeypatch.setattr("transclip_fast.heads.training.BATCH_ROWS", 16)
    heads = [fitted(name, task, seed=seed) for seed in (3, 3, 4)]
    first, same, other = (logits_of(head, task) for head in heads)
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()


@pytest.mark.parametrize("name", HEADS)
def test_restricted_to_some_classes(name, task, short):
    head = fitted(name, task)
    classes = torch.tensor([4, 0, 3])
    restricted = logits_of(head.restrict(classes), task)
    np.testing.assert_allclose(restricted, logits_of(head, task)[:, classes], atol=1e-4)


@pytest.mark.parametrize("name", BOUND[1:])
def test_other_heads_are_bound_to_their_classes(name, task, short):
    head = fitted(name, task)
    with pytest.raises(InputError, match="bound to the classes"):
        head.transfer(head.text)


@pytest.mark.parametrize("name", HEADS)
def test_a_class_without_shots(name, task):
    kept = task["support_labels"] != 2
    arrays = {
        **task,
        **{f"support_{n}": task[f"support_{n}"][kept] for n in ("features", "labels")},
    }
    logits = logits_of(fitted(name, arrays), task)
    assert np.isfinite(logits).all()
    assert right(logits, task) > 50


@pytest.mark.parametrize("name", HEADS)
def test_arrays_are_not_modified_and_blocks_do_not_matter(name, task, short, monkeypatch):
    before = {key: array.copy() for key, array in task.items()}
    whole = logits_of(fitted(name, task), task)
    monkeypatch.setattr(base, "BLOCK_ROWS", 50)
    head = fitted(name, task)
    np.testing.assert_allclose(logits_of(head, task), whole, atol=1e-4)
    rows = torch.from_numpy(task["image_features"])
    np.testing.assert_array_equal(head.predict(rows), head.logits(rows).argmax(1))
    for key, array in before.items():
        np.testing.assert_array_equal(task[key], array)


@pytest.mark.parametrize("name", HEADS)
def test_below_transclip(name, task, short):
    head = fitted(name, task)
    rows = torch.from_numpy(task["image_features"])
    given = TransCLIP(device="cpu").fit(rows, task["text_features"], **head.prior(rows))
    same = TransCLIP(device="cpu").fit(rows, prior_logits=head.logits(rows))
    np.testing.assert_allclose(given.label_distributions_, same.label_distributions_, atol=2e-4)
    assert given.kl_weight_ == 1


@pytest.mark.parametrize("name", HEADS)
def test_features_are_checked_as_those_of_a_fit(name, task, short):
    head, rows = fitted(name, task), task["image_features"]
    expected = logits_of(head, task)
    for dtype in (np.float32, np.float64):
        np.testing.assert_array_equal(head.logits(rows.astype(dtype)), expected)
    np.testing.assert_array_equal(head.predict(rows), expected.argmax(1))
    assert head.logits(rows.astype(np.float16)).dtype == torch.float32
    for use in (head.logits, head.predict, head.labels_and_prior):
        with pytest.warns(UserWarning, match="^features: .* rows were not unit vectors"):
            found = use(10 * rows)
        if use == head.logits:
            np.testing.assert_allclose(found, expected, atol=1e-3)
    with pytest.raises(InputError, match="^features: has 32 columns, expected 33"):
        head.logits(rows[:, :32])
    with pytest.raises(InputError, match="^features: row 3 contains NaN"):
        head.predict(np.where(np.arange(len(rows))[:, None] == 3, np.nan, rows))


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("made_inside", [False, True])
def test_fitted_in_inference_mode(name, made_inside, task, short):
    """What people have around an encoder changes nothing."""
    expected = logits_of(fitted(name, task), task)
    with torch.inference_mode():
        made = {key: torch.from_numpy(array).clone() for key, array in task.items()}
        head = fitted(name, made if made_inside else task)
        inside = head.logits(task["image_features"]).numpy()
    for found in (inside, logits_of(head, task)):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", HEADS)
def test_autocast_and_another_default_type_change_nothing(name, task, short):
    expected = logits_of(fitted(name, task), task)
    with torch.autocast("cpu"):
        head = fitted(name, task)
        inside = head.logits(task["image_features"])
    assert inside.dtype == torch.float32
    for found in (inside.numpy(), logits_of(head, task)):
        np.testing.assert_array_equal(found, expected)
    try:
        for dtype in (torch.float16, torch.float64):
            torch.set_default_dtype(dtype)
            np.testing.assert_array_equal(logits_of(fitted(name, task), task), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", HEADS)
def test_what_is_written_to_the_arrays_later_changes_no_head(name, task, short):
    made = {key: torch.from_numpy(array).clone() for key, array in task.items()}  # aligned
    head = fitted(name, made)
    expected = logits_of(head, task)
    for tensor in made.values():
        tensor.zero_()
    np.testing.assert_array_equal(logits_of(head, task), expected)


@pytest.mark.parametrize("name", HEADS)
def test_rows_with_patches_are_refused(name, task, short):
    head, rows = fitted(name, task), torch.from_numpy(task["image_features"])
    patched = rows[:, None].repeat(1, 3, 1)
    for features in (patched, PatchedRows(rows, patched[:, 1:], "features")):
        for use in (head.logits, head.predict):
            with pytest.raises(InputError, match="^features: have patches, .* does not take"):
                use(features)


def test_other_logit_scales(task, short):
    for name in HEADS:
        head = fitted(name, without_validation(task), logit_scale=30.0)
        assert head.logit_scale == 30.0
    text = fit_head("prompt-ensemble", task["text_features"], logit_scale=30.0)
    np.testing.assert_allclose(
        logits_of(text, task), 30 * task["image_features"] @ task["text_features"].T, atol=1e-4
    )


def test_progress_reaches_its_end(task, short):
    for name in TRAINED:
        seen = []
        fitted(name, task, progress=lambda done, of, seen=seen: seen.append((done, of)))
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        assert seen[-1][0] == seen[-1][1] or name == "linear-probe"


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("nonsense", {}, "head 'nonsense' is not known; choose one of prompt-ensemble"),
        ("taskres", {"support_features": None, "support_labels": None}, "taskres needs shots"),
        ("taskres", {"support_labels": None}, "come together"),
        ("taskres", {"support_labels": np.full(48, 6)}, "support_labels: row 0 has label 6"),
        ("taskres", {"support_features": np.ones((48, 32))}, "has 32 columns, expected 33"),
        ("tip-adapter", {"validation_labels": np.zeros(3)}, "validation_labels: expected 24"),
        ("tip-adapter", {"text_features": np.ones(6)}, "text_features: expected a non-empty"),
        (
            "tip-adapter",
            {"text_features": np.zeros((0, 6, 33))},
            "text_features: holds no template",
        ),
    ],
)
def test_what_cannot_be_fitted(name, change, expected, task):
    with pytest.raises(InputError, match=expected):
        fitted(name, {**task, **change})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("logit_scale", scale) for scale in (float("nan"), float("inf"), -1.0, "100", None)),
        *(("seed", seed) for seed in (None, "a", 1.5, -1)),
    ],
)
def test_numbers_out_of_range(setting, value, task):
    with pytest.raises(InputError, match=f"^{setting} must be a .*number >= 0, got"):
        fitted("clip-adapter", task, **{setting: value})
