"""The library that is preloaded: building, arming, disarming."""

from __future__ import annotations

import ctypes
import errno
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("faults.c")
CHANGES, READS = 1, 2  # the classes of operations in faults.c


@dataclass(frozen=True)
class Fault:
    """How the nth operation fails: `mode` and classes as in faults.c, an errno."""

    classes: int
    mode: int
    error: int = 0

    @property
    def kills(self) -> bool:
        return self.mode in (3, 4)


FAULTS = {
    "ENOSPC": Fault(CHANGES, 2, errno.ENOSPC),  # and all later ones that take space
    "EIO": Fault(CHANGES, 1, errno.EIO),
    "KILL": Fault(CHANGES, 3),  # before the operation
    "TORN": Fault(CHANGES, 4),  # after it, of a write after half of it
    "READ": Fault(READS, 1, errno.EIO),  # of the operations that read
}


def compiler() -> str | None:
    """Return the C compiler, or None where there is none."""
    return shutil.which("cc")


def build(folder: Path) -> Path:
    """Compile the library into a folder; return its file."""
    file, found = folder / "libfaults.so", compiler()
    if found is None:
        raise SystemExit("the faults need a C compiler, cc")
    command = [found, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(file), str(SOURCE)]
    subprocess.run([*command, "-ldl"], check=True)  # noqa: S603
    return file


def arm(folder: Path, fault: Fault, nth: int, log: Path) -> None:
    """Let the nth operation under `folder` fail (0: none), and log the operations."""
    mode, paths = fault.mode if nth else 0, [str(path).encode() for path in (folder, log)]
    ctypes.CDLL(None).faults_arm(
        paths[0], fault.classes, mode, fault.error, ctypes.c_long(nth), paths[1]
    )


def disarm() -> None:
    """Let nothing fail any more."""
    ctypes.CDLL(None).faults_disarm()
