"""`evaluate`: a result folder against the truth."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import unit
from transclip_fast.metrics import evaluate


def table_of(folder):
    return pq.read_table(folder / "predictions.parquet")


def test_numbers(solved, arrays, succeeds):
    summary = json.loads(succeeds("evaluate", solved, "--json"))
    table, truth = table_of(solved), arrays["labels"]
    labels, zero_shot = table["label"].to_numpy(), table["zero_shot_label"].to_numpy()
    scores = evaluate(labels, zero_shot, truth)
    assert summary["accuracy"] == round(100 * (labels == truth).mean(), 4)
    assert summary["zero_shot_accuracy"] == round(100 * (zero_shot == truth).mean(), 4)
    assert summary["corrected"] == ((labels == truth) & (zero_shot != truth)).sum()
    assert summary["broken"] == ((labels != truth) & (zero_shot == truth)).sum()
    assert summary["per_class"] == [list(row) for row in scores.per_class]
    assert summary["warnings"] == []
    assert summary["known_labels"] is None


def test_labels_from_a_file(save, arrays, succeeds, refused, tmp_path):
    truth = arrays.pop("labels")
    np.save(tmp_path / "labels.npy", truth)
    result = tmp_path / "result"
    succeeds("solve", save(arrays), "--out", result)
    assert "give --labels" in refused("evaluate", result)
    given = json.loads(succeeds("evaluate", result, "--labels", tmp_path / "labels.npy", "--json"))
    right = table_of(result)["label"].to_numpy() == truth
    assert given["accuracy"] == round(100 * right.mean(), 4)


def test_rows_labelled_by_hand_are_told_apart(save, arrays, succeeds, tmp_path):
    """The accuracy of all rows counts what was given as right; that of the others does not."""
    truth = arrays.pop("labels")
    known = np.where(np.arange(77) % 3 == 0, truth, -1)
    np.save(tmp_path / "labels.npy", truth)
    result = tmp_path / "result"
    succeeds("solve", save(arrays | {"known_labels": known}), "--out", result)
    command = ("evaluate", result, "--labels", tmp_path / "labels.npy")
    table, others = table_of(result), known < 0
    before, after = (
        100 * (table[name].to_numpy()[others] == truth[others]).mean()
        for name in ("zero_shot_label", "label")
    )
    assert json.loads(succeeds(*command, "--json"))["known_labels"] == {
        "n_known": 26,
        "accuracy_of_others": pytest.approx(after, abs=1e-4),
        "zero_shot_accuracy_of_others": pytest.approx(before, abs=1e-4),
    }
    line = f"26 labels known; of the others {before:.2f} % zero-shot -> {after:.2f} %"
    assert succeeds(*command).splitlines()[2] == line


def test_text_names_the_worst_classes(save, arrays, succeeds, tmp_path):
    names = [f"name of {k}" for k in range(6)]
    file = save({**arrays, "class_names": np.array(names)})
    succeeds("solve", file, "--out", tmp_path / "result")
    out = succeeds("evaluate", tmp_path / "result")
    worst = json.loads(succeeds("evaluate", tmp_path / "result", "--json"))["per_class"][0]
    assert f"{names[worst[0]]:20}  {worst[1]:7}" in out
    assert f"{worst[3]:.2f} %" in out


def test_warns_of_classes_in_another_order(solved, cli, tmp_path):
    np.save(tmp_path / "labels.npy", (table_of(solved)["zero_shot_label"].to_numpy() + 1) % 6)
    ran = cli("evaluate", solved, "--labels", tmp_path / "labels.npy", "--json")
    assert ran.code == 0
    assert ran.err.startswith("warning: ")
    assert json.loads(ran.out)["warnings"] == [ran.err.removeprefix("warning: ").rstrip()]


def test_warnings_of_a_labels_file_are_in_the_summary(solved, cli, tmp_path):
    lines = [f"{label},0.5" for label in table_of(solved)["label"].to_pylist()]
    (tmp_path / "labels.csv").write_text("\n".join(["label,score", *lines]))
    ran = cli("evaluate", solved, "--labels", tmp_path / "labels.csv", "--json")
    assert ran.code == 0
    (message,) = json.loads(ran.out)["warnings"]
    assert ran.err == f"warning: {message}\n"
    assert message.startswith(f"{tmp_path / 'labels.csv'}: labels go to the rows in their order")


def gap_of(images, texts):
    """The distance of the means of unit rows and their cosine, in float64."""
    image, text = (unit(np.asarray(rows, np.float64)).mean(0) for rows in (images, texts))
    norms = np.linalg.norm(image) * np.linalg.norm(text)
    return {"distance": np.linalg.norm(image - text), "cosine": image @ text / norms}


@pytest.mark.parametrize("method", ["transclip", "stata"])
@pytest.mark.parametrize("streamed", [False, True])
def test_the_modality_gap(save, arrays, cli, tmp_path, method, streamed):
    """Of unit rows, whatever their scale is in the file."""
    arrays["image_features"] = 3 * arrays["image_features"]
    solve = ["solve", save(arrays), "--out", tmp_path / "result", "--method", method]
    if streamed:
        np.save(tmp_path / "rows.npy", arrays["image_features"])
        np.save(tmp_path / "texts.npy", arrays["text_features"])
        np.save(tmp_path / "labels.npy", arrays["labels"])
        solve[1] = tmp_path / "rows.npy"
        solve += ["--text-features", tmp_path / "texts.npy", "--labels", tmp_path / "labels.npy"]
    assert cli(*solve).code == 0
    expected = gap_of(arrays["image_features"], arrays["text_features"])
    gap = json.loads(cli("evaluate", tmp_path / "result", "--json").out)["modality_gap"]
    assert gap == pytest.approx(expected, abs=2e-6)
    assert "modality gap" not in cli("evaluate", tmp_path / "result").out


def test_the_gap_is_of_the_texts_that_were_solved(save, arrays, succeeds, tmp_path):
    """Of several templates, after a map."""
    texts, turn = arrays["text_features"], np.linalg.qr(np.vander(np.arange(33) / 33 + 0.5))[0]
    arrays["text_features"] = np.stack([texts, texts[:, ::-1]])
    np.save(tmp_path / "map.npy", turn)
    file = save(arrays)
    succeeds("solve", file, "--out", tmp_path / "a", "--text-map", tmp_path / "map.npy")
    mapped = (texts @ turn.T + texts[:, ::-1] @ turn.T) / 2
    gap = json.loads(succeeds("evaluate", tmp_path / "a", "--json"))["modality_gap"]
    assert gap == pytest.approx(gap_of(arrays["image_features"], mapped), abs=2e-6)


def test_no_gap_without_texts_and_no_cosine_of_a_mean_of_zero(save, arrays, succeeds, tmp_path):
    texts = arrays.pop("text_features")
    succeeds("solve", save(arrays | {"prototypes": texts}), "--out", tmp_path / "a")
    assert json.loads(succeeds("evaluate", tmp_path / "a", "--json"))["modality_gap"] is None
    texts[1::2] = -texts[::2]
    succeeds("solve", save(arrays | {"text_features": texts}), "--out", tmp_path / "b")
    gap = json.loads(succeeds("evaluate", tmp_path / "b", "--json"))["modality_gap"]
    assert gap["cosine"] is None


@pytest.mark.parametrize("gap", [[], {"distance": "x", "cosine": 0.1}, {"cosine": 0.5}])
def test_a_tampered_gap(solved, refused, gap):
    run = json.loads((solved / "run.json").read_text())
    (solved / "run.json").write_text(json.dumps(run | {"modality_gap": gap}))
    assert "run.json: " in refused("evaluate", solved)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [(np.zeros(5), "expected 77 labels"), (np.full(77, 6), "row 0 has label 6"),
     (np.full(77, 0.5), "row 0 has label 0.5")],
)  # fmt: skip
def test_bad_labels(labels, expected, solved, refused, tmp_path):
    np.save(tmp_path / "labels.npy", labels)
    message = refused("evaluate", solved, "--labels", tmp_path / "labels.npy")
    assert message.startswith(f"error: {tmp_path / 'labels.npy'}: ")
    assert expected in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.drop(["label"]), "has no column 'label'"),
        (lambda t: t.set_column(3, "label", pa.array([6] * 77)), "label: row 0 has label 6"),
        (lambda t: t.set_column(3, "label", pa.array(["cat"] * 77)), "label: expected numbers"),
    ],
)
def test_tampered_predictions(change, expected, solved, refused):
    pq.write_table(change(table_of(solved)), solved / "predictions.parquet")
    run = json.loads((solved / "run.json").read_text())
    del run["sha256"]  # as of an earlier version, or the hash alone would refuse it
    (solved / "run.json").write_text(json.dumps(run))
    message = refused("evaluate", solved)
    assert "predictions.parquet" in message
    assert expected in message


@pytest.mark.parametrize("end", [0, 3, 100, -1])
def test_truncated_predictions(end, solved, refused):
    file = solved / "predictions.parquet"
    file.write_bytes(file.read_bytes()[:end])
    assert "predictions.parquet: damaged or truncated" in refused("evaluate", solved)


def test_missing_predictions(solved, refused):
    (solved / "predictions.parquet").unlink()
    assert "predictions.parquet: no such file" in refused("evaluate", solved)


def test_predictions_that_lead_out(solved, refused, tmp_path):
    (solved / "predictions.parquet").rename(tmp_path / "elsewhere")
    (solved / "predictions.parquet").symlink_to(tmp_path / "elsewhere")
    assert "leads out of" in refused("evaluate", solved)
