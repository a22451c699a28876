"""Memory of this process and of a device: sizes as text, use, peak and what is free."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from transclip_fast.errors import InputError

CGROUP = Path("/sys/fs/cgroup")
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
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
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
    status = Path("/proc/self/status").read_text().partition(f"{field}:")[2]
    return 1024 * int(status.split()[0])


def free_bytes(device: torch.device) -> int:
    """Free memory of a device; on the CPU including the reclaimable file cache."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    available = Path("/proc/meminfo").read_text().partition("MemAvailable:")[2]
    free = 1024 * int(available.split()[0])
    most, now = (CGROUP / name for name in ("memory.max", "memory.current"))
    if most.exists() and most.read_text().strip() != "max":  # of a container
        free = min(free, max(0, int(most.read_text()) - int(now.read_text())))
    return free


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
