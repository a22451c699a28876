"""Bytes that processes sharing a solve would send with rows placed in other orders.

Consecutive rows, as they are placed, beside rows sorted by zero-shot label and by nearest list of
the search's k-means. One process solves the problem; the share of neighbours that other processes
own, and what these would send of z in a sweep, are counted from its graph and from z at the end.
The made problem is that of `bench.speed.ranks`. Oxford Pets (`TRANSCLIP_GOLDEN`) come class by
class, as in their file, and in random order. Bytes, no times: other load changes nothing.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench.accuracy.golden import problems
from bench.common import command_line, print_table, record
from bench.speed.stream import write_problem
from transclip_fast import TransCLIP
from transclip_fast.data.feature_rows import Rows
from transclip_fast.graph.affinity import affinity
from transclip_fast.graph.centres import kmeans_centres, nearest_centres
from transclip_fast.graph.neighbor_graph import NeighborGraph
from transclip_fast.ops.exchange import Partition
from transclip_fast.ranks import Ranks
from transclip_fast.store.features import load_features

RANKS = (2, 4)
PETS = "oxford_pets_vitb32"


def compare(features: np.ndarray, prototypes: np.ndarray, graph: NeighborGraph | None) -> Any:
    """Solve a problem; remote neighbours and bytes of a sweep by number of ranks and placement."""
    model = TransCLIP(device="cpu").fit(features, text_features=prototypes, graph=graph)
    rows = Rows(features, held=True)
    lists = nearest_centres(rows, kmeans_centres(rows), 1)[:, 0].numpy()
    z = model.label_distributions_
    # Dense rows travel whole, of lists the entries in use: a class and its z.
    row_bytes = 4 * z.shape[1] if isinstance(z, np.ndarray) else 8 * np.diff(z.indptr)
    orders = {
        "consecutive": np.arange(len(features)),
        "label": np.argsort(model.zero_shot_labels_, kind="stable"),
        "list": np.argsort(lists, kind="stable"),
    }
    sizes = np.broadcast_to(row_bytes, len(features))
    return {
        "queries": len(features),
        "classes": len(prototypes),
        "dim": features.shape[1],
        "ranks": {
            str(ranks): {name: sent(model.graph_, sizes, x, ranks) for name, x in orders.items()}
            for ranks in RANKS
        },
    }


def sent(
    graph: NeighborGraph, row_bytes: np.ndarray, order: np.ndarray, ranks: int
) -> dict[str, float]:
    """Remote neighbours and bytes of a sweep where ranks own consecutive rows of `order` (N,)."""
    partition = Partition(len(order), Ranks(0, ranks))
    firsts = [partition.first_row(rank) for rank in range(1, ranks)]
    owners = np.empty(len(order), np.int64)
    owners[order] = np.searchsorted(firsts, np.arange(len(order)), side="right")
    edges = affinity(graph)
    receivers = np.repeat(owners, edges.offsets.diff().numpy())  # rank of the row, of each edge
    columns = edges.columns.numpy()
    remote = owners[columns] != receivers
    # A row travels once to each rank that needs it.
    halo = np.unique(columns[remote] * ranks + receivers[remote]) // ranks
    return {
        "remote": float(remote.mean()),
        "halo_rows": len(halo),
        "sweep_bytes": int(row_bytes[halo].sum()),
    }


def made(queries: int, classes: int, dim: int) -> Any:
    """The comparison on a made problem, with its graph."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "problem"
        write_problem(queries, classes, dim, 0, place)
        features = np.asarray(load_features(place).get("image_features")).astype(np.float32)
        names = ("prototypes", "neighbors", "similarities")
        prototypes, *lists = (np.load(place / f"{name}.npy") for name in names)
    return compare(features, prototypes, NeighborGraph(*lists))


def main(arguments: list[str] | None = None) -> int:
    """Record and print the comparisons, and return the exit code."""
    parser = command_line(__spec__, __doc__, queries=200_000, classes=1000, dim=512)
    rows = {"made": made(**vars(parser.parse_args(arguments)))}
    (pets,) = (problem for problem in problems() if problem.name == PETS)
    shuffled = np.random.default_rng(0).permutation(len(pets.features))
    for name, order in (("random", shuffled), ("by class", np.arange(len(shuffled)))):
        features = pets.features[order].astype(np.float32)
        rows[f"pets, {name}"] = compare(features, pets.prototypes, None)
    lines = []
    for case, row in rows.items():
        record("placement", {"case": case, **row})
        for ranks, placed in row["ranks"].items():
            shares = [f"{found['remote']:.3f}" for found in placed.values()]
            sizes = [f"{found['sweep_bytes'] / 1e6:.2f}" for found in placed.values()]
            lines.append([case, ranks, *shares, *sizes])
    head = [f"{what} {name}" for what in ("remote", "MB") for name in placed]
    print_table(["case", "ranks", *head], lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
