"""Published accuracies against ours, on a made checkout of the same shape."""

import numpy as np
import pytest
import torch

from bench import wild_tables
from bench.accuracy import published
from transclip_fast import TransCLIP

N = 77


def unit(rows):
    return rows / rows.norm(dim=-1, keepdim=True)


@pytest.fixture
def checkout(problem, tmp_path):
    """A folder with two models, half and single precision, and what a code like theirs found."""
    lines = []
    for model, dtype in (("CLIP", torch.float16), ("GeoRSCLIP", torch.float32)):
        features, prototypes, labels = problem(n=N)
        rows, texts = (torch.from_numpy(3 * x).to(dtype) for x in (features, prototypes))
        folder = tmp_path / "results/SET" / model / "RN50"
        folder.mkdir(parents=True)
        torch.save(rows, folder / "images.pt")
        torch.save(texts, folder / "texts_a_photo_of_a.pt")
        torch.save(torch.from_numpy(labels), folder / "classes.pt")
        found = TransCLIP(class_cost=False).fit(
            unit(rows).float().numpy(), text_features=unit(texts).float().numpy()
        )
        right = (found.zero_shot_labels_ == labels).sum(), (found.transduction_ == labels).sum()
        accuracies = ",".join(str(100 * number / N) for number in right)
        lines.append(f"SET,{model},RN50,a photo of a,{accuracies}\n")
    head = "dataset_name,model_name,model_architecture,text_prompt,zs,trans\n"
    for name, some in zip(published.TABLES, ([], lines), strict=True):
        (tmp_path / "results" / name).write_text("".join([head, *some]))
    return tmp_path


@pytest.fixture
def run(checkout, monkeypatch):
    rows, said = [], []
    monkeypatch.setattr(published, "record", lambda name, row: rows.append((name, row)))
    published.images.cache_clear()

    def call():
        code = published.main([str(checkout)], said.append)
        return code, rows, said

    return call


def lines_of(checkout):
    return checkout / "results" / published.TABLES[1]


def test_all_are_equal(run):
    code, ((name, row),), said = run()
    assert (code, name) == (0, "published")
    assert row["equal"] == {"zero-shot": 2, "TransCLIP": 2}
    assert (row["differing"], row["without_features"]) == ([], 0)
    assert row["float32_norms"]["compared"] == 1
    assert said[:2] == [
        "zero-shot: 2 accuracies equal, 0 differing",
        "TransCLIP: 2 accuracies equal, 0 differing",
    ]


def test_nothing_is_recorded(tmp_path):
    assert "python -m bench.accuracy.published" in wild_tables.published(tmp_path)


def test_one_image_more_is_named(run, checkout):
    file = lines_of(checkout)
    head, first, second = file.read_text().splitlines()
    before, _, percent = second.rpartition(",")
    right = round(float(percent) * N / 100)
    file.write_text(f"{head}\n{first}\n{before},{100 * (right - 1) / N}\n")
    _, ((_, row),), said = run()
    assert row["equal"] == {"zero-shot": 2, "TransCLIP": 1}
    of = "SET/GeoRSCLIP/RN50, a photo of a: TransCLIP"
    assert row["differing"] == [{"of": of, "published": right - 1, "ours": right}]
    assert said[0] == f"{of} has {right} right of 77, published {right - 1}"


def test_lines_without_features_are_counted(run, checkout):
    with lines_of(checkout).open("a") as file:
        file.write("OTHER,CLIP,RN50,a photo of a,50,60\n")
    _, ((_, row),), said = run()
    assert row["without_features"] == 1
    assert "1 published lines have no features here" in said


@pytest.mark.parametrize(
    ("line", "message"),
    [("SET,CLIP,RN50,a photo of a,50\n", "line 4: no accuracies"), ("a\n", "line 4: no accura")],
)
def test_damaged_tables_are_one_line(run, checkout, line, message):
    with lines_of(checkout).open("a") as file:
        file.write(line)
    code, rows, said = run()
    assert (code, rows) == (2, [])
    assert message in said[-1]


def test_rows_are_normalised_in_their_precision(tmp_path):
    rows = torch.from_numpy(np.random.default_rng(0).normal(size=(9, 50))).half()
    torch.save(rows, tmp_path / "images.pt")
    half = published.unit_rows(tmp_path / "images.pt", as_published=True)
    single = published.unit_rows(tmp_path / "images.pt", as_published=False)
    assert np.array_equal(half, half.astype(np.float16))
    assert not np.array_equal(half, single)
    assert np.abs(half - single).max() < 1e-3
