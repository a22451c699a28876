"""Every kernel at its production configurations, compiled for GPUs that need not be here."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # 3.9 warns where it is not set

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from transclip_fast.kernels import (
    class_sums,
    energies,
    messages,
    neighbors,
    products,
    score,
    select,
    sweep,
)
from transclip_fast.kernels import top_rows as tops

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

# Types of the arguments that are no constants. Pointers, and integers marked ":16", are multiples
# of 16.
F16, F32, F64, I32, I64 = "*fp16", "*fp32", "*fp64", "*i32", "*i64"
SIZE, EVEN = "i32", "i32:16"
FLOATS = ("scores", "z", "tail", "part", "part_sums", "part_overflow", "out", "bound", "terms",
          "weights", "products", "scale", "offset", "log_prior", "message_weights", "values",
          "log_threshold", "normaliser", "x", "totals", "unlisted", "similarities",
          "features")  # fmt: skip
TYPES = {
    **{f"{name}_ptr": F32 for name in FLOATS},
    **{f"{name}_ptr": F64 for name in ("part_counts", "sums", "counts")},
    **{
        f"{name}_ptr": I32
        for name in ("candidates", "z_classes", "part_classes", "out_classes", "classes", "lengths",
                     "segments")
    },
    **{
        f"{name}_ptr": I64
        for name in ("offsets", "columns", "rows", "first", "last", "message_offsets",
                     "message_classes", "nodes", "order", "bounds", "pieces", "top", "entries",
                     "ids")
    },
    **dict.fromkeys(("unused", "floor", "prior_weight"), "fp32"),
    **dict.fromkeys(("n_slots", "width", "d", "first"), EVEN),
    **dict.fromkeys(
        ("n_rows", "n_classes", "n_segments", "base", "length", "share", "stop"), SIZE
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A kernel, its constants, how it is launched, and types of arguments that differ."""

    kernel: Any
    constants: dict[str, Any]
    options: dict[str, int]
    types: dict[str, str] = field(default_factory=dict)

    def type_of(self, name: str) -> str:
        """Type of an argument."""
        return self.types.get(name) or TYPES[name]

    def integers(self) -> list[str]:
        """Arguments that Triton specialises if they are 1."""
        names = [name for name in self.kernel.arg_names if name not in self.constants]
        return [name for name in names if self.type_of(name).startswith("i32")]


def lists(kernel, slots, *, outside=False, **constants):
    """A kernel whose rows have so many slots."""
    _, options = messages.launch(1, slots, outside=outside)
    warps = options.pop("num_warps")
    return Case(kernel, {**constants, **options}, {"num_warps": warps})


def selection(n_classes, *, terms):
    flags = dict.fromkeys(("OFFSET", "NODES"), True)
    flags |= dict.fromkeys(("PRIOR", "MESSAGES"), terms)
    constants = {**flags, **select.launch(n_classes)}
    return Case(select.select_kernel, constants, {"num_warps": constants.pop("num_warps")})


def sums(kernel, entries, **types):
    constants = {"BLOCK_DIMS": class_sums.BLOCK_DIMS, entries: class_sums.BLOCK_ENTRIES}
    return Case(kernel, constants, {"num_warps": class_sums.WARPS}, types)


def matrix_launch(target, *, split):
    """Blocks and options of products on a target."""
    name = target if target in products.LAUNCHES else TARGETS[target].backend
    return products.launch_of(name, split=split)


def fused(target, *, split):
    constants, options = matrix_launch(target, split=split)
    constants |= {"SPLIT": split, "PARTIAL_MAXIMA": score.PARTIAL_MAXIMA}
    constants |= {"LIST_ENTRIES": score.LIST_ENTRIES}
    types = {"features_ptr": F32 if split else F16, "weights_ptr": F16}
    return Case(score.score_kernel, constants, options, types)


def multiplied(target):
    types = {"features_ptr": F32, "weights_ptr": F16}
    return Case(products.product_kernel, *matrix_launch(target, split=True), types)


def nearest(target, kept=neighbors.FEWEST):
    depth, warps, stages = neighbors.LAUNCHES[TARGETS[target].backend]
    constants = {"KEPT": kept, "BLOCK_ROWS": neighbors.BLOCK_ROWS}
    constants |= {"BLOCK_COLUMNS": neighbors.BLOCK_COLUMNS, "BLOCK_DIMS": depth}
    options = {"num_warps": warps, "num_stages": stages}
    types = {"features_ptr": F16, "first": SIZE}
    return Case(neighbors.neighbors_kernel, constants, options, types)


PIECES = {"classes_ptr": I64, "part_ptr": F64, "width": SIZE}
CASES = {
    **{f"sweep, {c} slots": lists(sweep.sweep_kernel, c, CUT=False)
       for c in (16, 32, 64, 128, 256, 512, 1024)},
    **{f"sweep, {c} slots, bounded": lists(sweep.sweep_kernel, c, outside=True, CUT=False)
       for c in (16, 32, 128)},
    "sweep, fewer than its 32 slots": lists(sweep.sweep_kernel, 32, outside=True, CUT=True),
    **{f"segments, {c} slots": lists(messages.segment_kernel, c, outside=True) for c in (16, 128)},
    **{f"merged segments, {c} slots": lists(messages.merge_kernel, c, outside=True)
       for c in (16, 128)},
    **{f"energies, {c} slots": lists(energies.energy_kernel, c) for c in (16, 128)},
    **{f"select, {k} classes": selection(k, terms=False) for k in (200, 500, 1000, 2000, 21000)},
    "select, 1000 classes, with a prior and messages": selection(1000, terms=True),
    "score, lists to candidates": Case(
        score.finish_kernel, {"LIST_ENTRIES": score.LIST_ENTRIES},
        {"num_warps": score.FINISH_WARPS},
    ),
    "top rows": Case(
        tops.top_rows_kernel,
        {"BLOCK_ROWS": tops.BLOCK_ROWS, "BLOCK_COLUMNS": tops.BLOCK_COLUMNS,
         "BLOCK_TOP": tops.START_ROWS},
        {"num_warps": tops.WARPS},
    ),
    "class sums, float32": sums(class_sums.piece_kernel, "BLOCK_ENTRIES", **PIECES),
    "class sums, float16": sums(
        class_sums.piece_kernel, "BLOCK_ENTRIES", features_ptr=F16, **PIECES
    ),
    "class sums, totals": sums(class_sums.total_kernel, "BLOCK_PIECES", part_ptr=F64),
}  # fmt: skip
# On matrix units, each target with its own configuration.
PRODUCTS = {
    "neighbours": nearest,
    "neighbours, 16 of each row": partial(nearest, kept=16),
    "score": partial(fused, split=False),
    "score, float32": partial(fused, split=True),
    "products, float32": multiplied,
}


def case_of(name: str, target: str, **types: str) -> Case:
    """A case on a target, with other types of some arguments."""
    case = PRODUCTS[name](target) if name in PRODUCTS else CASES[name]
    return replace(case, types={**case.types, **types})


@dataclass(frozen=True)
class Resources:
    """What one program of a kernel takes."""

    registers: int
    stack: int  # bytes a thread
    shared: int  # bytes
    assembly: str


def resources(case: Case, target: str) -> Resources:
    """Compile a case; an argument of type "1" is specialised to that."""
    names = case.kernel.arg_names
    types = {n: "constexpr" if n in case.constants else case.type_of(n) for n in names}
    ones = {n: 1 for n, kind in types.items() if kind == "1"}
    even = [(i,) for i, n in enumerate(names) if types[n][0] == "*" or types[n].endswith(":16")]
    types = {n: "constexpr" if n in ones else kind.split(":")[0] for n, kind in types.items()}
    attributes = {place: [["tt.divisibility", 16]] for place in even}
    source = ASTSource(case.kernel, types, {**case.constants, **ones}, attributes)
    done = triton.compile(source, target=TARGETS[target], options=case.options)
    if target == "gfx942":
        text = done.asm["amdgcn"]
        registers, scratch = (  # spilled scalar registers go to lanes of vector registers
            int(re.search(rf"\.{name}:\s+(\d+)", text)[1])
            for name in ("vgpr_count", "private_segment_fixed_size")
        )
        return Resources(registers, scratch, done.metadata.shared, text)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return Resources(registers, stack, done.metadata.shared, done.asm["ptx"])
