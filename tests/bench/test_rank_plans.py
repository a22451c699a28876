"""The plan of several processes beside what was measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.common import RESULTS
from bench.rank_tables import projection, sent_entries
from bench.tables import clean_lines, newest
from transclip_fast import TransCLIP
from transclip_fast.cli.plan import core_seconds, plan_of_size
from transclip_fast.cli.traffic import Traffic
from transclip_fast.solver.layout import Layout, Size
from transclip_fast.solver.parameters import Parameters

CPU = torch.device("cpu")
BYTES_FACTOR, TIME_FACTOR = 1.5, 1.25  # within which a prediction has to hold
SHAPE = ("queries", "classes", "dim")
(SHARED,) = newest("ranks", *SHAPE, folder=RESULTS)
ONE_SOLVE = Parameters(class_cost=True)  # as `bench.speed.ranks` solves
ARMS = {name: arm for name, arm in SHARED["arms"].items() if name.isdecimal()}
CPUS = {line["machine"]["cpu"] for line in clean_lines("ranks", RESULTS)}
VNNI = "avx512_vnni"  # without which no time is told


def of_each_cpu(name, *identity):
    """The newest lines of each CPU: core time differs between them."""
    for cpu in sorted(CPUS):
        yield from newest(
            name,
            *identity,
            folder=RESULTS,
            shown=lambda line, cpu=cpu: (
                line["machine"]["cpu"] == cpu
                and VNNI in line["machine"].get("instructions", [VNNI])  # older lines all had it
            ),
        )


TIMED = [
    (int(name), arm["median"])
    for row in of_each_cpu("ranks", *SHAPE)
    for name, arm in row["arms"].items()
    if name.isdecimal()
]
STREAMED = [
    (row, size)
    for row in of_each_cpu("stream", "classes", "dim", "present", "published")
    for size in row["sizes"]
    if not row.get("present") or row["published"]  # else most classes are left out
]


def planned(ranks):
    shape = [SHARED[name] for name in SHAPE]
    return plan_of_size(
        shape, TransCLIP(memory="16GiB", device="cpu", class_cost=ONE_SOLVE.class_cost), None, ranks
    )


@pytest.mark.parametrize("name", ARMS)
def test_memory_and_bytes_are_bounds_of_what_was_measured(name):
    plan, arm = planned(int(name)), ARMS[name]
    assert sum(plan.layout.bytes(plan.size, CPU).values()) >= arm["peak_bytes"]
    sent = Traffic.of(plan.size, plan.layout, ONE_SOLVE).by_all["all"]
    assert sent >= arm["sent_bytes"]
    entries = replace(ONE_SOLVE, rank=sent_entries(SHARED))
    usual = Traffic.of(plan.size, plan.layout, entries)
    assert usual.by_all["all"] <= BYTES_FACTOR * arm["sent_bytes"]
    assert usual.by_all["all"] >= arm["sent_bytes"] / BYTES_FACTOR


def holds(predicted, measured):
    fast, slow = predicted
    return fast / TIME_FACTOR <= measured <= slow * TIME_FACTOR


@pytest.mark.parametrize(("ranks", "measured"), TIMED)
def test_core_time_of_processes_holds(ranks, measured):
    plan = planned(ranks)
    assert holds(core_seconds(plan.size, plan.layout, Parameters(), CPU), measured)


@pytest.mark.parametrize(("row", "measured"), STREAMED)
def test_core_time_of_a_process_holds(row, measured):
    queries = row["queries"][row["sizes"].index(measured)]
    size = Size(queries, row["classes"], row["dim"])
    layout = Layout(measured["truncation"]["candidates"], held=measured["held"])
    found = core_seconds(size, layout, Parameters(), CPU)
    passes = measured["read_bytes"] / measured["feature_bytes"]
    solves = round(passes / measured["planned_passes"])  # two where a class cost is decided
    seconds = row["machine"]["cores"] * measured["seconds"] / solves
    assert found is None or holds(found, seconds)
    assert found is not None or queries < 50_000


def test_no_time_is_told_where_nothing_was_measured():
    shape, layout = Size(10**6, 1000, 512, ranks=4), Layout(32, held=True)
    fast, slow = core_seconds(shape, layout, Parameters(), CPU)
    assert 0 < fast < slow
    assert core_seconds(shape, layout, Parameters(), torch.device("cuda")) is None
    assert core_seconds(shape, layout, Parameters(inner_iter=1), CPU) is None
    assert core_seconds(shape, Layout(None, held=True), Parameters(), CPU) is None
    for size in (Size(10**6, 1000, 768), Size(10**6, 100, 512), Size(10**8, 1000, 512)):
        assert core_seconds(size, layout, Parameters(), CPU) is None


def test_the_projection_is_for_memory_that_suffices():
    head, _, *lines = projection(RESULTS).splitlines()
    limits = [float(cell.split("GiB")[0]) for cell in head.split("|")[2:-1]]
    cells = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in lines}
    used = [float(cell.split()[0]) for cell in cells["memory of the GPU"]]
    assert all(0 < x <= limit for x, limit in zip(used, limits, strict=True))
    assert set(cells["images"]) == {" 15,625,216 "}
