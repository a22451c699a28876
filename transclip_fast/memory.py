"""Memory of this process and of a device: sizes as text, use, peak and what is free."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from transclip_fast.errors import InputError

STATUS = Path("/proc/self/status")
CGROUP = Path("/sys/fs/cgroup")
CGROUP_PATHS = Path("/proc/self/cgroup")  # the groups of this process
# Limit, use, and the field of memory.stat that counts the file cache to be reclaimed first.
CGROUP_V2 = ("memory.max", "memory.current", "inactive_file")
CGROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_memory(value: str | int | None) -> int | None:
    """
    Bytes of "8GiB", "500 MB" or a number.

    K, M, G and T are powers of 1024, with or without "iB" or "B".

    Raises
    ------
    InputError
        Something else, nothing at all, or a text without a unit that is too few bytes to be meant.
    """
    if value is None:
        return None
    if isinstance(value, int | np.integer) and not isinstance(value, bool) and value > 0:
        return int(value)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", str(value), re.IGNORECASE)
    size = float(match[1]) * UNITS[match[2].upper()] if match is not None else 0.0
    if not isinstance(value, str) or not 1 <= size < 2**63:
        raise InputError(f"memory must be a size like 8GiB, got {value!r:.60}")
    if not value.strip()[-1].isalpha() and size < UNITS["K"]:
        raise InputError(
            f"memory: {value.strip()} is so many bytes; did you mean {value.strip()}GiB?"
        )
    return int(size)


def show_bytes(number: float) -> str:
    """A size as text, "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} TiB"


def resident_bytes() -> int:
    """Resident memory of this process, now."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    return _status("VmHWM")


def reset_peak() -> bool:
    """Let `peak_bytes` begin anew; False where the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    """A size in the status of this process; its peak where a sandbox does not write that field."""
    found = STATUS.read_text().partition(f"{field}:")[2].split()
    return 1024 * int(found[0] if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def free_bytes(device: torch.device) -> int:
    """Free memory of a device; on the CPU including the file cache that is reclaimed first."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    available = Path("/proc/meminfo").read_text().partition("MemAvailable:")[2]
    return min([1024 * int(available.split()[0]), *_free_in_cgroups()])


def _free_in_cgroups() -> Iterator[int]:
    """Free memory of each cgroup with a limit that this process is in, as `free_bytes`."""
    lines = CGROUP_PATHS.read_text().splitlines() if CGROUP_PATHS.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, (limit, used, cache) = CGROUP, CGROUP_V2
        elif "memory" in controllers.split(","):
            root, (limit, used, cache) = CGROUP / "memory", CGROUP_V1
        else:
            continue
        group = Path(path.lstrip("/"))
        for folder in (root / group, *(root / parent for parent in group.parents)):
            # In a container the path may be the host's, and the container's group is the root.
            file = folder / limit
            most = file.read_text().strip() if file.exists() else "max"
            if most != "max":
                taken = int((folder / used).read_text()) - _statistic(folder, cache)
                yield max(0, int(most) - taken)


def _statistic(folder: Path, field: str) -> int:
    """A number of memory.stat; 0 where a sandbox has no such file."""
    file = folder / "memory.stat"
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) for line in lines if line.split()[0] == field), 0)


def limit_of(device: torch.device, memory: int | None, processes: int = 1) -> int:
    """
    Most bytes that the process may use, or its part of a GPU: `memory`, else what is free.

    On a CPU that is shared by `processes` of this machine.
    """
    if memory is not None:
        return memory
    if device.type != "cpu":
        return free_bytes(device)
    return free_bytes(device) // processes + resident_bytes()
