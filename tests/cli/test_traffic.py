"""Bytes that ranks send, as planned and as counted."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch

from tests.conftest import balanced, make_problem, unit
from tests.ranks import on_ranks
from transclip_fast import NeighborGraph, TransCLIP
from transclip_fast.cli.session import Stages
from transclip_fast.cli.solution import Solving, solve_features
from transclip_fast.cli.traffic import Traffic
from transclip_fast.graph.build import build_graph
from transclip_fast.ops.exchange import Exchange
from transclip_fast.solver.layout import Layout, Size
from transclip_fast.solver.parameters import Parameters
from transclip_fast.store.features import load_features

pytestmark = pytest.mark.usefixtures("one_thread")

STAGES = ["load", "start", "step", "end", "write", "all"]


def all_remote(n_rows, size):
    """Rows on a circle, each a neighbour of the one at the same place of the next rank."""
    neighbors = (np.arange(n_rows)[:, None] + n_rows // size) % n_rows
    return NeighborGraph(neighbors, np.full((n_rows, 1), 0.5, np.float32))


def counted(file, out, graph, cases):
    """Bytes that this rank has sent in a solve of the file with each of the values."""
    found, init = [], Exchange.__init__

    def recorded(exchange, partition):
        init(exchange, partition)
        found.append(exchange)

    Exchange.__init__ = recorded
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for values in cases:
            model = TransCLIP(device="cpu", n_neighbors=graph.neighbors.shape[1], **values)
            features = load_features(str(file))
            solve_features(Solving(features, str(out), Stages()), model, graph)
    return [exchange.sent for exchange in found]


def planned(succeeds, file, size, values):
    """What `plan --ranks` says that all ranks send, and the one that sends most."""
    options = []
    for name, value in values.items():
        option = {True: "on", False: "off"}.get(value, value) if name == "class_cost" else value
        options += [f"--{name.replace('_', '-')}", option]
    graph = file.with_name("graph")  # a plan reads no lists
    graph.mkdir(exist_ok=True)
    (graph / "manifest.json").write_text("{}")
    words = ("plan", file, "--graph", graph, "--ranks", size, "--device", "cpu", *options)
    traffic = json.loads(succeeds(*words, "--json"))["traffic"]
    assert list(traffic["by_all"]) == list(traffic["by_rank"]) == STAGES
    return traffic["by_all"]["all"], traffic["by_rank"]["all"]


@pytest.mark.parametrize(("size", "n_rows"), [(2, 8192), (3, 7680)])
def test_planned_bytes_are_those_that_are_counted(size, n_rows, succeeds, tmp_path):
    """Where all neighbours are remote, and all classes are kept."""
    image, text, labels = make_problem(n=n_rows, k=5, d=7)
    known = np.where(np.arange(n_rows) < 5000, labels, -1)
    arrays = {"image_features": image, "text_features": text}
    logits = {"image_features": image, "prior_logits": 20 * image @ text.T}
    cases = [
        {"class_cost": False, "max_iter": 4},
        {"class_cost": True, "max_iter": 3, "inner_iter": 2},
    ]
    files = {"texts": arrays, "known": arrays | {"known_labels": known}, "logits": logits}
    for name, content in files.items():
        file = tmp_path / f"{name}.npz"
        np.savez(file, **content)
        graph = all_remote(n_rows, size)
        ranks = on_ranks(size, counted, file, tmp_path / "out", graph, cases)
        for values, sent in zip(cases, zip(*ranks, strict=True), strict=True):
            found = planned(succeeds, file, size, values | {"n_neighbors": 1})
            # Without texts there is no modality gap, a sum (d,).
            assert 0 <= found[0] - sum(sent) <= (8 * 7 * 2 * size if name == "logits" else 0), name


def test_planned_bytes_bound_what_is_counted(succeeds, tmp_path):
    """Where data decide: lists, shots, and neighbours of which some are near."""
    image, text, labels = make_problem(n=2100, k=9, noise=0.06)
    rows = balanced(labels, 4)
    shots = {"support_features": image[rows], "support_labels": labels[rows]}
    tried = {"validation_features": image[:50], "validation_labels": labels[:50]}
    file = tmp_path / "shots.npz"
    np.savez(file, image_features=image, text_features=text, **shots, **tried)
    short = {"max_iter": 2, "inner_iter": 2}
    lists = {**short, "assignments": "sparse", "rank": 3, "candidates": 5}
    cases = [short, {**lists, "class_cost": True}, {**lists, "graph_mode": "directed"}]
    graph = build_graph(image, 3)
    ranks = on_ranks(3, counted, file, tmp_path / "out", graph, cases)
    for values, sent in zip(cases, zip(*ranks, strict=True), strict=True):
        by_all, by_rank = planned(succeeds, file, 3, values)
        assert by_all / 10 < sum(sent) <= by_all
        assert max(sent) <= by_rank


def test_planned_bytes_are_those_of_two_solves(succeeds, tmp_path):
    """Where "auto" is undecided."""
    image, text, labels = make_problem(n=2048, k=9)
    image, text = image[labels < 5][:1024], unit(text - 0.5).astype(np.float32)  # texts far apart
    file, graph = tmp_path / "few.npz", all_remote(2048, 2)
    np.savez(file, image_features=np.tile(image, (2, 1)), text_features=text)
    cases = [{"max_iter": 2, "class_cost": cost} for cost in ("auto", True, False)]
    ranks = on_ranks(2, counted, file, tmp_path / "out", graph, cases)
    auto, charged, free = (sum(sent) for sent in zip(*ranks, strict=True))
    assert auto > 1.5 * max(charged, free)
    by_all, _ = planned(succeeds, file, 2, cases[0] | {"n_neighbors": 1})
    assert auto <= by_all < 1.2 * auto


@pytest.mark.parametrize("n_rows", [1, 700, 100_000, 10**9])
@pytest.mark.parametrize("size", [2, 3, 64, 100])
def test_ranks_send_together_what_all_send(n_rows, size):
    """But for bytes by which shares of rows are rounded up."""
    shape = Size(n_rows, 100, 64, ranks=size)
    traffic = Traffic.of(shape, Layout(32, held=True), Parameters())
    for name in STAGES:
        assert traffic.by_rank[name] <= traffic.by_all[name] <= size * traffic.by_rank[name]


def test_one_rank_sends_nothing(tmp_path):
    traffic = Traffic.of(Size(1000, 5, 7), Layout(None, held=True), Parameters())
    assert set(traffic.by_all.values()) == set(traffic.by_rank.values()) == {0}
    assert torch.get_num_threads() == 1
