"""Checks of a user's arrays: what they refuse, their messages, and that arrays stay untouched."""

import warnings

import numpy as np
import pytest
import torch

from tests.conftest import unit
from tests.new_tensors import LargestTensor
from transclip_fast import InputError, TransCLIP
from transclip_fast.data import checks as inputs
from transclip_fast.data.checks import (
    as_labels,
    as_matrix,
    as_unit_rows,
)
from transclip_fast.data.priors import as_log_probabilities, as_logits


@pytest.fixture
def rows():
    """Unit rows (9, 5) float32."""
    return unit(np.random.default_rng(0).normal(size=(9, 5))).astype(np.float32)


def with_row(array, row, value):
    """A copy of `array` with `value` in (part of) one row."""
    array = array.copy()
    array[row] = value
    return array


def assert_error(call, *parts):
    """One line that starts with the array's name and contains all parts."""
    with pytest.raises(InputError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("X: ")
    for part in parts:
        assert part in message


# -- matrices


@pytest.mark.parametrize("shape", [(5,), (), (2, 3, 4), (0, 5), (5, 0)])
def test_not_a_filled_matrix(shape):
    assert_error(lambda: as_matrix(np.zeros(shape), "X"), str(shape))


def test_wrong_number_of_columns(rows):
    assert_error(lambda: as_unit_rows(rows, "X", columns=6), "5 columns", "expected 6")


@pytest.mark.parametrize(
    "values", [[["a", "b"]], np.array([[None]]), np.ones((2, 2), complex), torch.ones(2, 2) * 1j]
)
def test_not_real_numbers(values):
    assert_error(lambda: as_matrix(values, "X"), "expected")


def test_ragged_lists():
    assert_error(lambda: as_matrix([[1, 2], [3]], "X"), "rows of different lengths")


def test_masked_values_are_refused(rows):
    masked = np.ma.array(rows, mask=np.zeros(rows.shape, bool))
    np.testing.assert_array_equal(as_matrix(masked, "X").numpy(), rows)
    masked[1, 2:4] = np.ma.masked
    message = "X: has masked values (2); leave out their rows, or fill them"
    for values in (masked, [*masked]):
        assert_error(lambda values=values: as_unit_rows(values, "X"), message)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4", "longdouble"])
@pytest.mark.parametrize(
    ("value", "word"), [(np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "infinite")]
)
def test_not_finite(rows, dtype, value, word, monkeypatch):
    monkeypatch.setattr(inputs, "ROWS_PER_CHECK", 4)
    broken = with_row(with_row(rows, (6, 2), value), (8, 0), value).astype(dtype)
    assert_error(lambda: as_matrix(broken, "X"), "row 6", word)
    assert_error(lambda: as_unit_rows(broken, "X"), "row 6", word)


@pytest.mark.parametrize(
    "values",
    [
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.arange(6, dtype=">f8").reshape(2, 3),
        np.arange(6, dtype=np.longdouble).reshape(2, 3),
        np.arange(6, dtype=np.uint8).reshape(2, 3),
        np.arange(6, dtype=np.uint16).reshape(2, 3),
        np.array([(0, [0, 1, 2]), (0, [3, 4, 5])], [("id", "i1"), ("x", "f4", (3,))])["x"],
        np.arange(6)[::-1].reshape(2, 3)[:, ::-1][::-1],
        np.arange(6.0).reshape(3, 2).T.copy().T.reshape(2, 3),
        [[0, 1, 2], [3, 4, 5]],
        torch.arange(6).reshape(2, 3),
        torch.arange(6).reshape(2, 3).to(torch.bfloat16),
    ],
    ids=lambda values: str(getattr(values, "dtype", "list")),
)
def test_every_kind_of_array(values):
    assert as_matrix(values, "X").double().tolist() == [[0, 1, 2], [3, 4, 5]]


# -- unit rows


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_rows_within_the_tolerance_are_untouched(rows, dtype):
    scales = np.linspace(1 - 1.9e-3, 1 + 1.9e-3, 9)[:, None]
    given = (rows.astype(np.float64) * scales).astype(dtype)
    result = as_unit_rows(given, "X")
    assert result.dtype == torch.float32
    np.testing.assert_array_equal(result, given.astype(np.float32))


@pytest.mark.parametrize("scale", [1 - 2.1e-3, 1 + 2.1e-3, 1e-30, 1e30, 17])
def test_a_row_off_the_sphere_is_normalised_and_the_others_are_not(rows, scale, monkeypatch):
    monkeypatch.setattr(inputs, "ROWS_PER_CHECK", 4)
    given = with_row(rows, 6, rows[6] * np.float32(scale))
    before = given.copy()
    with pytest.warns(UserWarning, match=r"X: 1 of 9 rows .* \(row 6 has norm") as caught:
        result = as_unit_rows(given, "X").numpy()
    assert len(caught) == 1
    np.testing.assert_array_equal(given, before)
    np.testing.assert_allclose(result[6], unit(given[6:7].astype(np.float64))[0], rtol=2e-7)
    np.testing.assert_array_equal(np.delete(result, 6, 0), np.delete(rows, 6, 0))


def test_many_rows_off_the_sphere_warn_once(rows):
    with pytest.warns(UserWarning, match=r"X: 9 of 9 rows .*\(row 0 has norm 3\)") as caught:
        result = as_unit_rows(3 * rows, "X")
    assert len(caught) == 1
    np.testing.assert_allclose(result, rows, rtol=0, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(as_unit_rows(result, "X"), result)  # and then no more


def test_a_zero_row(rows):
    assert_error(lambda: as_unit_rows(with_row(rows, 4, 0), "X"), "row 4", "all zero")


def test_a_row_beyond_float32(rows):
    large = with_row(rows.astype(np.float64), 4, 1e300)
    assert_error(lambda: as_unit_rows(large, "X"), "row 4", "too large")


@pytest.mark.parametrize("scale", [1e-39, 1e-44, 1e-300])
def test_a_row_of_which_float32_has_few_digits_or_none(rows, scale):
    small = rows.astype(np.float64)
    small[4] *= scale
    assert_error(lambda: as_unit_rows(small, "X"), "row 4", "too small for float32")
    whole = rows.astype(np.float64) * 1e-35
    with pytest.warns(UserWarning, match="were not unit vectors"):
        np.testing.assert_allclose(as_unit_rows(whole, "X"), as_unit_rows(rows, "X"), atol=1e-6)


def test_rows_lie_aligned_and_contiguous(rows):
    shifted = np.empty(rows.size + 16, np.float32)
    for offset in range(16):
        given = shifted[offset : offset + rows.size].reshape(rows.shape)
        given[:] = rows
        result = as_unit_rows(given, "X")
        assert result.data_ptr() % 64 == 0
        np.testing.assert_array_equal(result, rows)
    for given in (np.asfortranarray(rows), torch.from_numpy(rows).T.contiguous().T):
        result = as_unit_rows(given, "X")
        assert result.is_contiguous()
        np.testing.assert_array_equal(result, rows)


# -- labels


@pytest.mark.parametrize(
    "labels",
    [
        [0, 3, 2],
        np.array([0, 3, 2], np.uint8),
        np.array([0.0, 3.0, 2.0]),
        torch.tensor([0, 3, 2], dtype=torch.int32),
        torch.tensor([0.0, 3.0, 2.0]),
        np.array([[0], [3], [2]]),
        np.eye(4)[[0, 3, 2]],
        np.eye(4)[[0, 3, 2]] == 1,
    ],
)
def test_labels(labels):
    result = as_labels(labels, "X", rows=3, n_classes=4)
    assert result.dtype == torch.int64
    assert result.tolist() == [0, 3, 2]


@pytest.mark.parametrize(
    ("labels", "parts"),
    [
        ([0, 1], ["expected 3 labels"]),
        ([[0, 1, 2]], ["expected 3 labels"]),
        ([0, -1, 7], ["row 1", "label -1", "0 .. 3"]),
        ([0, 1, 4], ["row 2", "label 4", "0 .. 3"]),
        ([0, 0.5, 1], ["row 1", "whole numbers"]),
        ([0, 1, np.nan], ["row 2", "whole numbers"]),
        ([0, np.inf, 1], ["row 1"]),
        (["a", "b", "c"], ["expected numbers", "; give labels as positions in the list of cl"]),
        (np.ma.array([0, 3, 2], mask=[0, 0, 1]), ["has masked values (1); leave out their rows"]),
        ([0, np.ma.masked, 2], ["has masked values (1)"]),
        (np.eye(5)[[0, 3, 2]], ["one-hot of 5 classes, there are 4"]),
        (np.eye(3)[[0, 1, 2]], ["one-hot of 3 classes, there are 4"]),
        ([True, False, True], ["a mask of true and false"]),
        (torch.tensor([[True], [False], [True]]), ["a mask of true and false"]),
    ],
)
def test_wrong_labels(labels, parts):
    assert_error(lambda: as_labels(labels, "X", rows=3, n_classes=4), *parts)


def test_labels_of_a_number_of_classes_that_others_know():
    assert as_labels(np.eye(5)[[0, 3, 2]], "X", rows=3, n_classes=None).tolist() == [0, 3, 2]
    assert_error(lambda: as_labels([0, -1], "X", rows=2, n_classes=None), "row 1", "label -1")


# -- priors


def test_probabilities_are_normalised_and_zero_is_minus_infinity():
    prior = np.array([[0.2, 0.8, 0.0], [0.501, 0.25, 0.25]])
    before = prior.copy()
    result = as_log_probabilities(prior, "X", rows=2)
    assert result.dtype == torch.float32
    with np.errstate(divide="ignore"):
        expected = np.log(prior / prior.sum(1, keepdims=True))
    np.testing.assert_allclose(result, expected, atol=2e-7)
    assert result[0, 2] == -np.inf
    np.testing.assert_array_equal(prior, before)


def test_the_logarithm_needs_no_second_table_in_float64():
    prior = np.full((5000, 4), 0.25)
    with LargestTensor(torch.float64, prior) as largest:
        as_log_probabilities(prior, "X", rows=5000)
    assert 0 < largest.bytes < prior.nbytes


@pytest.mark.parametrize(
    ("prior", "parts"),
    [
        ([[0.5, 0.5], [1.2, -0.2]], ["row 1", "negative"]),
        ([[0.5, 0.5], [0.5, 0.52]], ["row 1", "sums to 1.02"]),
        ([[0.5, 0.5], [0.0, 0.0]], ["row 1", "sums to 0"]),
        ([[0.5, 0.5], [np.nan, 1]], ["row 1", "NaN"]),
        ([[0.5, 0.5]], ["1 rows, expected 2"]),
    ],
)
def test_wrong_probabilities(prior, parts):
    assert_error(lambda: as_log_probabilities(prior, "X", rows=2), *parts)


def test_logits_lose_their_normaliser():
    logits = np.array([[1e4, 1e4 + 1, 1e4 - 2], [0, -300, 5]])
    result = as_logits(logits, "X", rows=2).numpy()
    shifted = logits - logits.max(1, keepdims=True)
    expected = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    np.testing.assert_allclose(result, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("logits", "parts"),
    [([[1.0, 2.0]], ["1 rows, expected 2"]), ([[1, 2], [3, np.inf]], ["row 1", "infinite"])],
)
def test_wrong_logits(logits, parts):
    assert_error(lambda: as_logits(logits, "X", rows=2), *parts)


def test_float8_rows():
    rows = torch.eye(4).to(torch.float8_e4m3fn)
    assert torch.equal(inputs.as_unit_rows(rows, "X"), torch.eye(4))


def test_logits_that_seem_to_be_none(rows):
    cosines = rows @ rows.T
    probabilities = torch.from_numpy(100 * cosines).softmax(1).numpy()
    with pytest.warns(UserWarning, match="logits: all rows are >= 0 and sum to 1: are these prob"):
        found = as_logits(probabilities, "logits", rows=9)
    torch.testing.assert_close(found, torch.from_numpy(probabilities).log_softmax(1))
    with pytest.warns(UserWarning, match=r"logits: all values are within -1 .. 1: are these cos"):
        as_logits(cosines * 0.99, "logits", rows=9)
    as_logits(cosines * 2, "logits", rows=9)
    as_logits(np.full((9, 4), 0.25), "logits", rows=9)  # of no opinion


def test_sparse_tensors(rows):
    sparse = torch.from_numpy(rows).to_sparse()
    for check in (as_matrix, as_unit_rows):
        with pytest.raises(InputError, match=r"^X: is a sparse tensor; give a dense one"):
            check(sparse, "X")
    with pytest.raises(InputError, match=r"^X: is a sparse tensor"):
        TransCLIP(device="cpu").fit(sparse, rows[:3])
    with pytest.raises(InputError, match=r"^text_features: is a sparse tensor"):
        TransCLIP(device="cpu").fit(rows, sparse)


@pytest.mark.filterwarnings("ignore:.*(nested tensors|quantize)")
@pytest.mark.parametrize("kind", ["nested", "quantized", "meta"])
def test_tensors_without_plain_entries(rows, kind):
    tensor = torch.from_numpy(rows)
    made = {
        "nested": lambda: torch.nested.nested_tensor([tensor[0], tensor[1]]),
        "quantized": lambda: torch.quantize_per_tensor(tensor, 0.01, 0, torch.qint8),
        "meta": lambda: tensor.to("meta"),
    }[kind]()
    with pytest.raises(InputError, match=f"^X: is a {kind} tensor"):
        as_unit_rows(made, "X")


def test_a_list_of_tensors_that_numpy_cannot_read(rows):
    with pytest.raises(InputError, match=r"^X: expected an array \(Got unsupported ScalarType BF"):
        as_unit_rows([torch.from_numpy(row).bfloat16() for row in rows], "X")
