"""Compiling kernels for GPUs that are not here, and what the compiler says of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Resources:
    """What one program of a kernel takes."""

    registers: int
    spilled: int  # bytes a thread
    shared: int  # bytes
    assembly: str


def resources(kernel, arguments, constants, target, **options):
    """
    Compile a jitted function.

    `arguments` names the type of every argument that is no constant; pointers and the integers
    whose type is followed by ":16" are multiples of 16.
    """
    names = kernel.arg_names
    types = {n: arguments[n].split(":")[0] if n in arguments else "constexpr" for n in names}
    aligned = [
        (i,) for i, n in enumerate(names) if arguments.get(n, "").startswith("*")
        or arguments.get(n, "").endswith(":16")
    ]  # fmt: skip
    attributes = {place: [["tt.divisibility", 16]] for place in aligned}
    source = ASTSource(kernel, types, constants, attributes)
    done = triton.compile(source, target=TARGETS[target], options=options)
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
