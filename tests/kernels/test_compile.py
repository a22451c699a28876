"""Every kernel at its production configurations, compiled for GPUs that need not be here."""

import importlib.metadata
import os

import pytest

pytest.importorskip("triton")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # 3.9 warns where it is not set

from tests.kernels.compiled import SHARED_LIMIT, TARGETS, resources
from transclip_fast.kernels import class_sums, energies, messages, neighbors, score, select, sweep
from transclip_fast.kernels import top_rows as confident

F16, F32, F64, I32, I64 = "*fp16", "*fp32", "*fp64", "*i32", "*i64"
SIZE, EVEN = "i32", "i32:16"
GRAPH = {"offsets": I64, "columns": I64, "weights": F32}
LISTS = {"z": F32, "z_classes": I32, "width": EVEN}
PARTS = {"part": F32, "part_others": I32, "part_elsewhere": F32, "part_pooled": F32}


def short(kernel, slots, **more):
    """A kernel of the short form with that many slots a row."""
    launch = messages.Launch.of(slots)
    constants = {"B": launch.rows, "C": launch.slots, "H": messages.ELSEWHERE}
    return kernel, {**GRAPH, **LISTS, **PARTS, **more}, constants, {"num_warps": launch.warps}


def full(kernel, n_classes, **more):
    """A kernel of the full form."""
    block, warps = messages.full_launch(n_classes)
    arguments = {**GRAPH, "z": F32, "part": F32, "n_classes": SIZE, **more}
    return kernel, arguments, {"B": block}, {"num_warps": warps}


def sweep_short(slots, cut):
    kernel, arguments, constants, options = short(
        sweep.sweep_kernel, slots, scores=F32, candidates=I32, tails=F32, n_slots=EVEN,
        least="fp32", segments=I64, out=F32, out_classes=I32, bound=F32, floor="fp32", n_rows=SIZE,
        n_classes=SIZE,
    )  # fmt: skip
    return kernel, arguments, {**constants, "CUT": cut}, options


def segments(slots):
    return short(
        messages.segment_kernel, slots, rows=I64, first=I64, last=I64, scores=F32, classes=I32,
        n_slots=EVEN, least="fp32", n_segments=SIZE,
    )  # fmt: skip


def selection(n_classes, given):
    block, warps = select.launch_of(n_classes)
    arguments = {
        "products": F32, "scale": F32, "offset": F32, "log_prior": F32, "prior_weight": "fp32",
        "starts": I64, "heard_classes": I64, "heard_weights": F32, "nodes": I64, "least": F32,
        "values": F32, "classes": I32, "tail": F32, "normaliser": F32, "first": EVEN,
        "n_classes": SIZE, "width": EVEN,
    }  # fmt: skip
    constants = {
        "SCALE": True,
        "OFFSET": True,
        "PRIOR": given,
        "MESSAGES": given,
        "NODES": True,
        "B": block,
    }
    return select.select_kernel, arguments, constants, {"num_warps": warps}


def pieces(features):
    arguments = {
        "order": I64, "values": F32, "features": features, "bounds": I64,
        "pieces": I64, "classes": I64, "part": F64, "part_counts": F64, "n_classes": SIZE,
        "width": SIZE, "length": SIZE, "d": EVEN,
    }  # fmt: skip
    constants = {"D": class_sums.DIMS, "E": class_sums.ENTRIES}
    return class_sums.piece_kernel, arguments, constants, {"num_warps": class_sums.WARPS}


def totals():
    arguments = dict.fromkeys(("part", "part_counts", "sums", "counts"), F64)
    constants = {"D": class_sums.DIMS, "E": class_sums.ENTRIES}
    options = {"num_warps": class_sums.WARPS}
    return class_sums.total_kernel, {**arguments, "pieces": I64, "d": EVEN}, constants, options


def full_sums(features):
    arguments = {
        "z": F32, "features": features, "centre": F32, "part": F64,
        "part_counts": F64, "n_rows": SIZE, "n_classes": SIZE, "d": EVEN, "share": SIZE,
    }  # fmt: skip
    constants = {"K": class_sums.CLASSES, "D": class_sums.FULL_DIMS, "R": class_sums.ROWS}
    return class_sums.full_kernel, arguments, constants, {"num_warps": class_sums.FULL_WARPS}


def most_confident():
    arguments = {
        "x": F32, "normaliser": F32, "best": I64, "first": EVEN, "n_rows": SIZE,
        "n_classes": SIZE, "share": SIZE,
    }  # fmt: skip
    constants = {"R": confident.ROWS, "B": confident.COLUMNS, "T": confident.START_ROWS}
    return confident.confident_kernel, arguments, constants, {"num_warps": confident.WARPS}


def fused(target):
    arguments = {
        "features": F16, "weights": F16, "scale": F32, "offset": F32, "least": F32, "nodes": I64,
        "entries": I64, "lengths": I32, "totals": F32, "rests": F32,
        "first": EVEN, "stop": SIZE, "n_classes": SIZE, "d": EVEN, "width": EVEN,
    }  # fmt: skip
    backend = TARGETS[target].backend
    rows, block, depth, warps, stages = score.LAUNCHES.get(target) or score.LAUNCHES[backend]
    constants = {"M": rows, "N": block, "D": depth, "G": score.GROUPS, "B": score.ROOM}
    return score.score_kernel, arguments, constants, {"num_warps": warps, "num_stages": stages}


def finish():
    arguments = {
        "entries": I64, "lengths": I32, "totals": F32, "rests": F32, "least": F32,
        "nodes": I64, "values": F32, "classes": I32, "tail": F32, "first": EVEN, "width": EVEN,
    }  # fmt: skip
    options = {"num_warps": score.FINISH_WARPS}
    constants = {"B": score.ROOM}
    return score.finish_kernel, arguments, constants, options


def nearest(target):
    depth, warps, stages = neighbors.LAUNCHES[TARGETS[target].backend]
    arguments = {
        "features": F16, "ids": I64, "similarities": F32, "first": SIZE, "stop": SIZE,
        "n_rows": SIZE, "d": EVEN,
    }  # fmt: skip
    constants = {
        "T": neighbors.KEPT, "M": neighbors.ROWS, "N": neighbors.COLUMNS, "D": depth,
    }  # fmt: skip
    return neighbors.neighbors_kernel, arguments, constants, {
        "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


CASES = {
    **{f"sweep, {c} slots": sweep_short(c, False) for c in (16, 32, 64, 128, 256, 512, 1024)},
    "sweep, fewer than its 32 slots": sweep_short(32, True),
    **{f"segments, {c} slots": segments(c) for c in (16, 128)},
    **{f"energies, {c} slots": short(energies.energy_kernel, c, segments=I64, terms=F32,
                                     n_rows=SIZE) for c in (16, 128)},
    "sweep, full": full(sweep.sweep_full_kernel, 1000, scores=F32, segments=I64, out=F32),
    "segments, full": full(messages.segment_full_kernel, 1000, first=I64, last=I64),
    "energies, full": full(energies.energy_full_kernel, 1000, segments=I64, terms=F32),
    **{f"select, {k} classes": selection(k, False) for k in (200, 500, 1000, 2000, 21000)},
    "select, 1000 classes, given prior and messages": selection(1000, True),
    "score, lists to candidates": finish(),
    "most confident": most_confident(),
    "class sums, float32": pieces(F32),
    "class sums, float16": pieces(F16),
    "class sums, totals": totals(),
    "class sums, full, float32": full_sums(F32),
    "class sums, full, float16": full_sums(F16),
}  # fmt: skip

# On matrix units, each target with its own configuration.
PRODUCTS = {"neighbours": nearest, "score": fused}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", [*CASES, *PRODUCTS])
def test_resources(case, target, record_property):
    if case in PRODUCTS:
        kernel, arguments, constants, options = PRODUCTS[case](target)
    else:
        kernel, arguments, constants, options = CASES[case]
    arguments = {name: arguments[name] for name in kernel.arg_names if name in arguments}
    found = resources(kernel, arguments, constants, target, **options)
    # Compared with limits, not between versions of the compiler.
    record_property("triton", importlib.metadata.version("triton"))
    record_property("registers", found.registers)
    record_property("shared", found.shared)
    assert found.spilled == 0
    assert found.shared <= SHARED_LIMIT[target]
    if case in PRODUCTS and target == "sm_90":
        assert "wgmma" in found.assembly
