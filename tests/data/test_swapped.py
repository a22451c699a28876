"""Image and text features in each other's place: what lengths prove, and names suggest."""

from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import unit
from transclip_fast import TransCLIP
from transclip_fast.errors import InputError
from transclip_fast.store.features import load_features

IMAGES, TEXTS = 23, 7


@pytest.fixture
def rows():
    """Features of the images and of the texts."""
    draw = np.random.default_rng(0)
    return unit(draw.normal(size=(IMAGES, 5))), unit(draw.normal(size=(TEXTS, 5)))


def loaded(folder, images, texts, names=("a.npy", "b.npy"), **more):
    """Features of two files, and of one for each other array."""
    np.save(folder / names[0], images)
    files = {"text_features": folder / names[1]}
    np.save(folder / names[1], texts)
    for name, array in more.items():
        files[name] = folder / f"{name}.npy"
        np.save(files[name], array)
    return load_features(folder / names[0], files)


LABELS = np.arange(IMAGES) % TEXTS
NAMES = np.array([f"name {k}" for k in range(TEXTS)])


@pytest.mark.parametrize(
    "more",
    [
        {"labels": LABELS},
        {"known_labels": LABELS},
        {"labels": np.eye(TEXTS)[LABELS]},
        {"class_names": NAMES},
        {"labels": LABELS, "class_names": NAMES},
    ],
)
def test_lengths_that_fit_the_other_way_round_only(more, rows, tmp_path):
    loaded(tmp_path, *rows, **more)
    message = (
        f"a.npy: image and text features look swapped: there are {TEXTS} and {IMAGES}, and "
        f"{' and '.join(more)} for {IMAGES} and {TEXTS}; exchange them"
    )
    with pytest.raises(InputError) as refused:
        loaded(tmp_path, *rows[::-1], **more)
    assert str(refused.value) == f"{tmp_path}/{message}"


@pytest.mark.parametrize(
    "more",
    [
        {"labels": LABELS[:TEXTS]},
        {"labels": LABELS, "class_names": np.array(["a"] * IMAGES)},  # so the labels are wrong
        {"labels": LABELS[:3]},
        {},
    ],
)
def test_lengths_that_prove_nothing(more, rows, tmp_path):
    loaded(tmp_path, *rows[::-1], **more)


def test_one_length_of_both(rows, tmp_path):
    loaded(tmp_path, rows[1], rows[1], labels=LABELS[:TEXTS], class_names=NAMES)


def test_known_labels_in_python(rows):
    message = r"^X: image and text features look swapped: there are 7 and 23, and known_labels for"
    with pytest.raises(InputError, match=message):
        TransCLIP(device="cpu").fit(rows[1], rows[0], known_labels=LABELS)


@pytest.mark.parametrize("names", [("text.npy", "images.npy"), ("classes.npy", "val_img.npy")])
def test_files_that_are_named_as_the_other(names, rows, tmp_path):
    message = (
        f"{names[0]}: is taken for 7 images, and .*{names[1]} for 23 texts; if it is the other"
    )
    with pytest.warns(UserWarning, match=message):
        loaded(tmp_path, *rows[::-1], names)


@pytest.mark.parametrize(
    "names",
    [
        ("images.npy", "text.npy"),
        ("class_a_images.npy", "text.npy"),
        ("few.npy", "imagenet_text.npy"),
        ("text.npy", "more.npy"),
    ],
)
def test_few_images_are_ordinary(names, rows, tmp_path):
    loaded(tmp_path, *rows[::-1], names)


def test_names_count_only_where_images_are_few(rows, tmp_path):
    loaded(tmp_path, *rows, ("text.npy", "images.npy"))
