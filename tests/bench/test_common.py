"""Made problems look like CLIP's; measurements and recorded lines are right."""

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from bench.common import (
    BLOCK_ROWS,
    busy_cores,
    command_line,
    in_turns,
    machine_facts,
    make_problem,
    medians,
    print_table,
    ratio,
    record,
    statistics,
)

GOLDEN = os.environ.get("TRANSCLIP_GOLDEN")
BACKBONES = {"rn50": 1024, "vit-b-32": 512, "vit-l-14": 768}

# Smallest and largest allowed value, at 19 classes and at 1000.
FEW_CLASSES = {
    "image_cosine": (0.60, 0.75),
    "mean_peak": (30, 90),
    "variance_peak": (8, 55),
    "participation_ratio": (15, 50),
    "nearest_cosine": (0.87, 0.94),
    "text_cosine": (0.75, 0.87),
    "image_text_cosine": (0.19, 0.31),
    "image_text_std": (0.027, 0.045),
    "top1_mass": (0.55, 0.85),
    "top8_mass": (0.93, 0.995),
    "neighbors_agree": (0.62, 0.95),
    "zero_shot_accuracy": (0.55, 0.95),
    "neighbors_same_class": (0.5, 0.995),
}
MANY_CLASSES = FEW_CLASSES | {
    "image_cosine": (0.50, 0.70),  # more kinds of images than any one of the golden sets
    "text_cosine": (0.65, 0.80),
    "image_text_cosine": (0.15, 0.30),
    "image_text_std": (0.027, 0.05),
    "top8_mass": (0.80, 0.99),
    "neighbors_agree": (0.50, 0.80),
    "nearest_cosine": (0.85, 0.94),
}


def outside(found, ranges):
    return {
        name: value
        for name, value in found.items()
        if not ranges[name][0] <= value <= ranges[name][1]
    }


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("dim", BACKBONES.values())
def test_statistics_of_few_classes(dim, seed):
    problem = make_problem(1005, 19, dim, seed=seed)
    found = statistics(problem.features, problem.prototypes, problem.labels)
    assert found.keys() == FEW_CLASSES.keys()
    assert outside(found, FEW_CLASSES) == {}


def test_statistics_of_many_classes():
    problem = make_problem(4096, 1000, 512)
    found = statistics(problem.features, problem.prototypes, problem.labels)
    assert outside(found, MANY_CLASSES) == {}


@pytest.mark.skipif(not GOLDEN, reason="TRANSCLIP_GOLDEN names no folder of golden features")
def test_statistics_are_near_those_of_real_features():
    real, made = [], []
    for backbone, dim in BACKBONES.items():
        data = np.load(Path(GOLDEN) / f"whurs19_clip_{backbone}.npz")
        real.append(statistics(data["image_features"], data["text_features"], data["labels"]))
        problem = make_problem(1005, 19, dim)
        made.append(statistics(problem.features, problem.prototypes, problem.labels))
    near = {
        name: (min(r[name] for r in real) / 1.25, max(r[name] for r in real) * 1.25)
        for name in real[0]
    }
    assert [outside(found, FEW_CLASSES) for found in real] == [{}, {}, {}]
    assert [outside(found, near) for found in made] == [{}, {}, {}]


@pytest.mark.skipif(not GOLDEN, reason="TRANSCLIP_GOLDEN names no folder of golden features")
@pytest.mark.parametrize("name", ["oxford_pets", "dtd"])
def test_real_images_are_within_the_ranges(name):
    data = np.load(Path(GOLDEN) / f"{name}_vitb32.npz")
    features = data["test_features"].astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    assert (
        outside(statistics(features, labels=data["test_labels"], max_rows=2048), FEW_CLASSES) == {}
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_shapes_types_and_unit_rows(dtype):
    problem = make_problem(77, 33, 96, dtype=dtype)
    assert problem.features.shape == (77, 96)
    assert problem.prototypes.shape == (33, 96)
    assert problem.labels.shape == (77,)
    assert problem.labels.dtype == np.int64
    for rows in (problem.features, problem.prototypes):
        assert rows.dtype == dtype
        norms = np.linalg.norm(rows.astype(np.float64), axis=1)
        np.testing.assert_allclose(norms, 1, atol=1e-3 if dtype == np.float16 else 1e-6)


def test_a_seed_fixes_the_problem_and_another_changes_it():
    n = BLOCK_ROWS + 5  # more than one block
    first, again, other = (make_problem(n, 7, 16, seed=seed) for seed in (3, 3, 4))
    for name in ("features", "prototypes", "labels"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
        assert not np.array_equal(getattr(first, name), getattr(other, name))
    assert len(np.unique(first.features, axis=0)) == n  # no block repeats another


def test_class_sizes_have_a_heavy_tail():
    sizes = np.bincount(make_problem(50_000, 200, 8).labels, minlength=200)
    assert sizes.max() > 8 * np.median(sizes) > 8 * sizes.min() > 0


def test_arms_take_turns():
    calls = []

    def run(arm):
        calls.append(arm)
        return len(calls)

    assert in_turns(run, "abc", 2) == {"a": [1, 4], "b": [2, 5], "c": [3, 6]}
    assert calls == list("abcabc")


def test_options_have_the_type_of_their_default(capsys):
    parser = command_line(__spec__, "What it is for, 50 %.", queries=[5, 6], logit_scale=30.0)
    assert vars(parser.parse_args([])) == {"queries": [5, 6], "logit_scale": 30.0}
    found = parser.parse_args(["--queries", "7", "--logit-scale", "1"])
    assert (found.queries, found.logit_scale) == ([7], 1.0)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = capsys.readouterr().out
    assert f"usage: python -m {__name__}" in text
    assert "What it is for, 50 %." in text
    assert "--queries N [N ...]" in text


def test_columns_are_as_wide_as_their_cells(capsys):
    print_table(["arm", "s"], [["dense", "1.0"], ["gemms", "10.0"]])
    assert capsys.readouterr().out == "  arm     s\ndense   1.0\ngemms  10.0\n"


def test_busy_cores():
    """This process alone keeps one core busy."""
    done = threading.Event()
    worker = threading.Thread(target=lambda: all(not done.is_set() for _ in iter(int, 1)))
    worker.start()
    try:
        assert 0.5 < busy_cores(0.5) <= (os.cpu_count() or 1)
    finally:
        done.set()
        worker.join()


def test_medians_and_ratio():
    """Of two arms that met the same three machines; the third ran once."""
    times = {"slow": [4.0, 60.0, 10.0], "fast": [2.0, 20.0, 2.0], "once": [80.0]}
    assert medians(times) == {"slow": 10.0, "fast": 2.0, "once": 80.0}
    assert ratio(times, "slow", "fast") == 3.0
    assert ratio(times, "once", "fast") == 40.0


def test_record_appends_and_never_rewrites(tmp_path):
    folder = tmp_path / "new" / "results"
    path = record("speed", {"seconds": 1.5}, folder=folder)
    first = path.read_text()
    assert record("speed", {"seconds": 2.5}, folder=folder) == path == folder / "speed.jsonl"
    assert path.read_text().startswith(first)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["seconds"] for row in rows] == [1.5, 2.5]
    assert rows[0].keys() == {"date", "command", "machine", "seconds"}


def test_machine_facts_fit_in_json_and_name_the_essentials():
    facts = json.loads(json.dumps(machine_facts()))
    assert facts["cpu"]
    assert facts["cores"] >= 1
    assert facts["memory_gb"] > 0
    assert facts["numpy"] == np.__version__
    assert facts.keys() >= {"gpu", "python", "torch", "triton", "faiss", "commit", "dirty"}
