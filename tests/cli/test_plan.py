"""`plan`: its figures, and that `solve` keeps to them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from tests.conftest import balanced
from transclip_fast import InputError, TransCLIP, build_graph, memory
from transclip_fast.cli.plan import plan_of as plan_of_problem
from transclip_fast.cli.plan import plan_of_size
from transclip_fast.data.feature_rows import Rows
from transclip_fast.ranks import Ranks
from transclip_fast.solver.problem import Problem, Settings

DENSE = "plan: every class of each image (dense), features in memory, exact neighbours, at most "


def plan_of(succeeds, *command):
    return json.loads(succeeds("plan", *command, "--json"))


def test_of_sizes(succeeds):
    shape = ("--queries", 50_000, "--classes", 300, "--dim", 64)
    found = plan_of(succeeds, *shape)
    assert found["size"]["n_rows"] == 50_000
    assert found["layout"] == {"candidates": 128, "held": True}
    assert found["passes"] == 25
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert list(stages) == ["load", "graph", "solve", "write"]
    assert stages["load"]["disk"] == 3 * 2 * 50_000 * 64
    assert stages["graph"]["disk"] == 12 * 3 * 50_000
    assert stages["solve"]["disk"] == 2 * 50_000 * 64 + 11 * 40 * 50_000
    assert stages["solve"]["work"] == 12 * 2 * 50_000 * 300 * 64
    assert found["graph"] == "faiss"
    assert found["peak"] == max(stage["host"] for stage in found["stages"]) <= found["limit"]
    text = succeeds("plan", *shape)
    assert "50,000 rows, 300 classes, 64 dimensions, 3 neighbours" in text
    assert "3 neighbours\n" in text
    assert (
        "plan: the 128 likeliest classes of each image (sparse), features in memory, neighbours "
        "searched by FAISS, at most "
    ) in text


def test_streamed_features_are_read_in_every_pass(succeeds):
    shape = ("--queries", 2_000_000, "--classes", 100, "--dim", 512, "--graph", "somewhere")
    found = plan_of(succeeds, *shape, "--candidates", 32, "--max-iter", 2, "--memory", "4GiB")
    assert found["layout"] == {"candidates": 32, "held": False}
    assert found["passes"] == 9
    text = succeeds("plan", *shape, "--candidates", 32, "--max-iter", 2, "--memory", "4GiB")
    assert ", features read 9 times, given neighbours, at most " in text
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert list(stages) == ["load", "solve", "write"]
    rows = 2 * 2_000_000 * 512
    assert stages["solve"]["disk"] == 9 * rows + 3 * 40 * 2_000_000
    assert found["graph"] == "given"


def test_runs_of_gamma_and_given_priors_count(save, arrays, succeeds):
    plain = plan_of(succeeds, save(arrays))
    features, labels = arrays["image_features"], arrays["labels"]
    rows = balanced(labels, 3)
    shots = {"support_features": features[rows], "support_labels": labels[rows]}
    held_out = {"validation_features": features[20:30], "validation_labels": labels[20:30]}
    few_shot = plan_of(succeeds, save(arrays | shots | held_out))
    assert (plain["passes"], few_shot["passes"]) == (25, 4 * 24 + 2)
    assert few_shot["stages"][2]["work"] == 4 * plain["stages"][2]["work"]
    assert plan_of(succeeds, save(arrays | shots), "--gamma", 0.02)["passes"] == 25
    assert plan_of(succeeds, save(arrays | shots))["passes"] == 25  # by default one gamma
    prior = {"prior": np.full((77, 6), 1 / 6, np.float32)}
    given = plan_of(succeeds, save(arrays | prior))
    assert given["passes"] == 24
    assert given["stages"][0]["host"] == plain["stages"][0]["host"] + 16 * 77 * 6


def test_a_graph_that_solve_would_refuse(save, arrays, done, refused, tmp_path):
    features = save(arrays)
    done("graph", save({"image_features": arrays["image_features"][:70]}, "x.npz"), "--out",
         tmp_path / "graph")  # fmt: skip
    message = refused("plan", features, "--graph", tmp_path / "graph")
    assert "graph: has 70 rows, the features have 77; build it again" in message
    assert "is not a graph folder" in refused("plan", features, "--graph", tmp_path / "none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--search", "cuvs"), "search 'cuvs' needs rows that a GPU holds, with device='cuda'"),
        (("--index", "none.index"), "none.index: no such file"),
        (("--search", "exact", "--index", "Flat"), "search 'exact' uses no FAISS index"),
    ],
)
def test_a_search_that_solve_would_refuse(options, message, save, arrays, refused, tmp_path):
    features, shape = save(arrays), ("--queries", 50_000, "--classes", 3, "--dim", 64)
    assert message in refused("plan", features, *options)
    assert message in refused("plan", *shape, *options)
    assert message in refused("solve", features, *options, "--out", tmp_path / "result")


def test_a_search_that_solve_would_refuse_on_ranks(succeeds, refused):
    shape = ("--queries", 50_000, "--classes", 3, "--dim", 64)
    for options, message in (
        (("--search", "cuvs", *GPU), "search 'cuvs' is for one process"),
        (("--index", "Flat"), "'Flat' is trained in one process"),
    ):
        succeeds("plan", *shape, *options)  # cuVS may be where that GPU is
        assert message in refused("plan", *shape, *options, "--ranks", 2)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("labels", np.zeros(5, int), "expected 77 labels, one a row"),
        ("labels", np.full(77, 6), "row 0 has label 6, outside -1 .. 5"),
        ("class_names", np.array(["cat", "dog"]), "2 names for 6 classes; give one name a class"),
    ],
)
def test_labels_and_names_that_solve_would_refuse(
    name, values, message, save, arrays, refused, tmp_path
):
    features, file = save(arrays), tmp_path / "given.npy"
    np.save(file, values)
    command = (features, f"--{name.replace('_', '-')}", file)
    lines = refused("plan", *command), refused("solve", *command, "--out", tmp_path / "result")
    assert lines[0] == lines[1]
    assert message in lines[0]


def test_of_features_is_what_solve_does(save, arrays, succeeds, tmp_path):
    arrays["image_features"] = np.tile(arrays["image_features"], (3, 1))
    del arrays["labels"]
    command = (save(arrays), "--assignments", "sparse", "--candidates", 5)
    found = plan_of(succeeds, *command)
    summary = json.loads(succeeds("solve", *command, "--out", tmp_path / "result", "--json"))
    assert summary["truncation"]["candidates"] == found["layout"]["candidates"] == 5
    assert summary["memory"]["allowed"] > summary["memory"]["planned"]


def test_solve_says_it_first(save, arrays, succeeds, tmp_path):
    file = save(arrays)
    line, classes = succeeds("plan", file).splitlines()[-2:]
    first, second = succeeds("solve", file, "--out", tmp_path / "result").splitlines()[:2]
    assert first.startswith(DENSE)
    assert line.startswith(first.partition(" at most")[0])
    assert second == classes
    assert classes == (
        "plan: by 77 images, zero-shot uses about 6 of 6 classes: no charge for a class in use "
        "(--class-cost)"
    )


def test_the_memory_of_a_search_counts(refused, succeeds):
    shape = ("--queries", 2_000_000, "--classes", 4, "--dim", 512)
    message = refused("plan", *shape, "--memory", "4GiB")
    assert "memory: searching the neighbours of 2,000,000 rows needs 4.23 GiB" in message
    assert "what fits: --memory 5GiB, or --graph with neighbours" in message
    assert plan_of(succeeds, *shape, "--memory", "5GiB")["peak"] <= 5 << 30


def test_processes_of_a_machine_share_its_memory(monkeypatch):
    """`run` plans before it encodes, with the same part of it as the solve."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: 16 << 30)
    monkeypatch.setattr(memory, "resident_bytes", lambda: 1 << 30)
    shape, model = (2_000_000, 4, 512), TransCLIP(device="cpu")
    assert plan_of_size(shape, model, "faiss").limit == 17 << 30
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr("transclip_fast.cli.plan.current_ranks", lambda: Ranks(0, 4))
    assert plan_of_size(shape, model, "faiss", 4).limit == 5 << 30
    with pytest.raises(InputError, match=r"searching the neighbours .* there are 5 GiB"):
        plan_of_size((12_000_000, 4, 512), model, "faiss", 4)


def test_a_plan_has_the_limit_of_its_layout(problem, monkeypatch):
    """That of all processes, though less is free when the plan is made."""
    features, prototypes, _ = problem()
    model = TransCLIP(device="cpu")
    checked = Problem.check(features, prototypes, logit_scale=model.logit_scale)
    settings = Settings.resolve(model, checked)
    assert settings.limit > 0
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1)
    monkeypatch.setattr(memory, "resident_bytes", lambda: 1)
    agreed = replace(settings, limit=3 << 30)
    assert plan_of_problem(checked, agreed, "exact").limit == 3 << 30


@pytest.mark.parametrize("command", ["plan", "solve"])
def test_what_does_not_fit_is_refused(command, save, arrays, refused, tmp_path):
    args = [command, save(arrays), "--memory", "100MiB"]
    message = refused(*args, *(("--out", tmp_path / "result") if command == "solve" else ()))
    assert "memory: 77 rows and 6 classes, dense, need" in message
    assert "there are 100 MiB" in message


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((), "plan needs FEATURES, or --queries, --classes and --dim"),
        (("--queries", 5, "--dim", 3), "plan needs FEATURES, or --queries"),
        (("none.npz",), "none.npz: no such file"),
        (("none.npz", "--queries", 5), "not both"),
        (("--queries", 5, "--classes", 3, "--dim", 3, "--memory", "lots"), "a size like 8GiB"),
        (("--queries", 5, "--classes", 3, "--dim", 3, "--memory", "16"), "did you mean 16GiB?"),
        (("--queries", 5, "--classes", 3, "--dim", 3, "--candidates", 0), "candidates must be"),
    ],
)
def test_bad_input(args, expected, refused):
    assert expected in refused("plan", *args)


@pytest.mark.parametrize(
    ("text", "rows"),
    [("50,000", 50_000), ("50_000", 50_000), ("50k", 50_000), ("0.25M", 250_000), ("7", 7)],
)
def test_numbers_as_people_write_them(text, rows, succeeds):
    shape = ("--queries", text, "--classes", "3", "--dim", "64")
    assert plan_of(succeeds, *shape)["size"]["n_rows"] == rows


@pytest.mark.parametrize("text", ["ten", "0", "-5", "1.5", "10 M", "1e7", "10MB", "nan", "", "٣"])
def test_what_is_no_number(text, cli):
    ran = cli("plan", "--queries", text, "--classes", 3, "--dim", 3)
    assert (ran.code, ran.out) == (2, "")
    assert "is no number of them; write 10000000, 10,000,000 or 10M" in ran.err.splitlines()[-1]


def test_the_gpu_has_a_column_where_one_computes(succeeds):
    shape = ("plan", "--queries", "9", "--classes", "3", "--dim", "64")
    assert "on GPU" not in succeeds(*shape, "--device", "cpu")
    assert "on GPU" in succeeds(*shape, *GPU)


def test_warnings_are_a_line_and_name_the_file(save, arrays, cli):
    file = save(arrays | {"text_features": 3 * arrays["text_features"]})
    ran = cli("plan", file)
    assert ran.code == 0
    assert ran.err.startswith(f"warning: {file}: text_features: ")
    assert ran.err.count("\n") == 1


def test_errors_about_the_queries_name_the_file(save, arrays, refused):
    words = np.full(arrays["image_features"].shape, "a")
    file = save(arrays | {"image_features": words})
    assert f"error: {file}: image_features: expected numbers" in refused("plan", file)


def test_the_class_cost_may_read_once_more(succeeds):
    shape = ("--queries", 2_000_000, "--classes", 100, "--dim", 512, "--memory", "16GiB")
    assert plan_of(succeeds, *shape)["passes"] == 25
    assert plan_of(succeeds, *shape, "--class-cost", "off")["passes"] == 24


@pytest.mark.parametrize("class_cost", [False, True])
@pytest.mark.parametrize("labelled", [(), ("support",), ("support", "validation")])
def test_passes_are_those_of_a_fit(labelled, class_cost, problem, monkeypatch):
    features, prototypes, labels = problem(n=2000)
    arrays = {"text_features": prototypes}
    for name in labelled:
        rows = balanced(labels, 2)
        arrays |= {f"{name}_features": features[rows], f"{name}_labels": labels[rows]}
    read = []

    class CountedRows(Rows):
        def __init__(self, *inputs, **options):
            super().__init__(*inputs, **options)
            self.on_read = read.append

    monkeypatch.setattr("transclip_fast.solver.problem.Rows", CountedRows)
    model = TransCLIP(device="cpu", max_iter=1, class_cost=class_cost)
    checked = Problem.check(features, logit_scale=model.logit_scale, **arrays)
    settings = Settings.resolve(model, checked)
    model.fit_problem(checked, settings, build_graph(features))
    passes = round(sum(read) / len(features))  # sums read a few rows twice
    assert plan_of_problem(checked, settings, None).passes == passes


def test_few_shots_that_auto_may_charge_count(save, arrays, succeeds):
    rows = balanced(arrays["labels"], 2)[:-1]  # uneven shots have no gamma
    features, labels = arrays["image_features"][rows], arrays["labels"][rows]
    shots = {"support_features": features, "support_labels": labels}
    assert plan_of(succeeds, save(arrays | shots))["passes"] == 24 + 2 + 1


def test_a_rank_needs_as_many_candidates(succeeds):
    shape = ("--queries", 50_000, "--classes", 1000, "--dim", 64)
    assert plan_of(succeeds, *shape, "--rank", 300)["layout"]["candidates"] == 300


MANY = ("--queries", 10**9, "--classes", 21_000, "--dim", 1024, "--graph", "none")
GPU = ("--device", "cuda:1", "--memory", "200GiB")  # not here


def test_the_memory_of_a_gpu_is_not_that_of_its_host(succeeds):
    """Python alone takes more of the host than this GPU has."""
    shape = ("--queries", 1000, "--classes", 10, "--dim", 64)
    found = plan_of(succeeds, *shape, "--device", "cuda", "--memory", "800MiB")
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert stages["load"]["host"] > found["limit"]
    assert stages["load"]["device"] == 0
    assert found["peak"] == max(stage["device"] for stage in found["stages"]) > 0


def test_faiss_searches_on_the_host_of_a_gpu(succeeds):
    shape = ("--queries", 4_000_000, "--classes", 10, "--dim", 512)
    options = ("--search", "faiss", "--device", "cuda", "--memory", "24GiB")
    load, graph, solve, _ = plan_of(succeeds, *shape, *options)["stages"]
    index = 4 * 512 * 4_000_000  # float32, of the rows that the GPU holds
    assert graph["device"] == 0 < solve["device"]
    assert graph["host"] > load["host"] + index


def test_of_ranks(succeeds):
    shape = ("--queries", 200_000, "--classes", 1000, "--dim", 512, "--device", "cpu")
    alone, shared = (plan_of(succeeds, *shape, "--graph", "g", "--ranks", x) for x in (1, 4))
    assert alone["traffic"] is None
    assert shared["size"]["ranks"] == 4
    work = [plan["stages"][1]["work"] for plan in (alone, shared)]
    assert work[0] / 4 <= work[1] < work[0] / 3.5
    text = succeeds("plan", *shape, "--graph", "g", "--ranks", 4, "--network", "2GB/s")
    assert "4 ranks of at most 51,200 rows, assumed to be neighbours of 153,600 rows" in text
    (sent,) = (line for line in text.splitlines() if line.startswith("all "))
    assert float(sent.split()[-2]) == pytest.approx(
        shared["traffic"]["by_rank"]["all"] / 2e9, rel=1e-2
    )
    searched, whole = (plan_of(succeeds, *shape, "--ranks", x)["stages"][1] for x in (4, 1))
    assert whole["work"] / 4 <= searched["work"] < whole["work"] / 3.5
    assert searched["host"] < whole["host"] - 200_000 * 512


def test_of_gpus_of_another_machine(succeeds, refused):
    found = plan_of(succeeds, *MANY, *GPU, "--ranks", 64)
    solve = found["stages"][1]
    assert 0 < solve["device"] <= found["limit"] == 200 << 30
    assert found["core_seconds"] is None
    text = succeeds("plan", *MANY, *GPU, "--ranks", 64)
    assert "computing: not predicted" in text
    message = refused("plan", *MANY, *GPU, "--ranks", 16)
    assert "share the rows among" in message
    number = int(message.partition("share the rows among ")[2].split()[0])
    assert plan_of(succeeds, *MANY, *GPU, "--ranks", number)["peak"] <= 200 << 30
    assert "solve fewer rows" in refused("plan", *MANY, "--device", "cuda", "--memory", "9GiB")


def test_ranks_of_features(save, arrays, succeeds, refused):
    file = save(arrays)
    alone, shared = (plan_of(succeeds, file, "--ranks", ranks) for ranks in (1, 2))
    # Every process has the whole file, and the labels of all rows.
    assert alone["stages"][0]["host"] < shared["stages"][0]["host"] < alone["peak"] + 77 * 40
    assert shared["traffic"]["by_all"]["step"] > 0
    assert shared["outlook"] == alone["outlook"]
    assert "--network: one process sends nothing" in refused("plan", file, "--network", "1GB/s")
    for rate in ("1GB", "fast", "0GB/s", "-1GB/s", "nanGB/s"):
        message = refused("plan", file, "--ranks", 2, "--network", rate)
        assert "expected a rate like 25GB/s" in message
