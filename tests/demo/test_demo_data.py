"""The demo's shipped data: small, held out, visibly shifted."""

import numpy as np
import pytest
from PIL import Image

from transclip_fast import InputError
from transclip_fast.demo import CLASS_NAMES, SHIFTS, data, digits, training_hashes, write_images

SHIPPED = ("digits.npz", "model.json", "vocabulary.json", "weights.safetensors")


def test_shipped_files_are_under_4_mb():
    sizes = {name: (data.FOLDER / name).stat().st_size for name in SHIPPED}
    assert all(sizes.values())
    assert sum(sizes.values()) < 4e6


def test_digits_are_many_and_of_every_class():
    images, labels = digits()
    assert images.shape == (len(labels), 8, 8)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    assert len(labels) > 850
    assert np.bincount(labels, minlength=10).min() > 70
    assert images.max() == 255


def test_no_test_image_was_trained_on():
    hashes = training_hashes()
    assert len(hashes) > 850
    assert not hashes & {data.image_hash(image) for image in digits()[0]}


def test_shipped_digits_are_the_scripts_split():
    pytest.importorskip("sklearn", reason="scikit-learn holds the training images")
    from bench.demo.train import load_splits

    splits = load_splits()
    images, labels = digits()
    np.testing.assert_array_equal(images, splits["test"].images)
    np.testing.assert_array_equal(labels, splits["test"].labels)
    seen = [*splits["training"].images, *splits["validation"].images]
    assert {data.image_hash(image) for image in seen} == training_hashes()
    captioned = {data.image_hash(image) for image in splits["captioned"].images}
    assert len(captioned) == 100
    assert captioned <= training_hashes()


@pytest.mark.parametrize("name", [name for name in SHIFTS if name != "plain"])
def test_a_shift_is_visible_and_leaves_its_argument_alone(name):
    image = data.enlarge(digits()[0][0])
    before = image.copy()
    shifted = SHIFTS[name](image)
    assert shifted.shape == (data.SIDE_PIXELS, data.SIDE_PIXELS)
    assert shifted.dtype == np.uint8
    assert np.abs(shifted.astype(float) - before).mean() > 10
    np.testing.assert_array_equal(image, before)


def test_shifts_do_what_their_names_say():
    image = data.enlarge(digits()[0][0]).astype(float)
    ink = {name: shift(image.astype(np.uint8)).astype(float) for name, shift in SHIFTS.items()}
    np.testing.assert_array_equal(ink["plain"], image)
    assert (ink["thick strokes"] >= image).all()
    assert (ink["thin strokes"] <= image).all()
    assert np.abs(np.diff(ink["blur"])).max() < np.abs(np.diff(image)).max() / 2


def test_written_images_sort_by_row_and_are_filed_by_class(tmp_path):
    images, labels = digits()
    folder = write_images(tmp_path / "new" / "images", "thick strokes")
    files = sorted(folder.rglob("*.png"), key=lambda file: file.name)
    assert [CLASS_NAMES.index(file.parent.name) for file in files] == labels.tolist()
    for row in (0, 500, len(images) - 1):
        written = np.asarray(Image.open(files[row]))
        np.testing.assert_array_equal(written, SHIFTS["thick strokes"](data.enlarge(images[row])))


def test_an_unknown_shift_is_named(tmp_path):
    with pytest.raises(InputError, match="'upside down'; choose one of plain, thick strokes"):
        write_images(tmp_path, "upside down")
