"""Libraries that cannot be imported: which one it is, and the command that repairs it."""

from __future__ import annotations

from contextlib import suppress
from importlib import metadata

DISTRIBUTIONS = {  # of each library that may be broken, by the name it is imported by
    "torch": "torch",
    "torchvision": "torchvision",
    "open_clip": "open_clip_torch",
    "faiss": "faiss-cpu",
    "numba": "numba",
}
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def broken_library(error: BaseException) -> str | None:
    """The library whose import ended in this error, the innermost one; None if none did."""
    if isinstance(error, ModuleNotFoundError) and error.name in DISTRIBUTIONS:
        return error.name
    found, traceback = None, error.__traceback__
    while traceback is not None:
        frame, traceback = traceback.tb_frame, traceback.tb_next
        library = str(frame.f_globals.get("__name__")).partition(".")[0]
        if frame.f_code.co_name == "<module>" and library in DISTRIBUTIONS:
            found = library
    return found


def describe_broken(library: str, error: BaseException, distribution: str | None = None) -> str:
    """
    One line: a library cannot be imported, why, and the command that repairs it.

    `distribution` is the one that has the library here, by default its usual one.
    """
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    repair = _repair(library, error, distribution or DISTRIBUTIONS[library])
    return f"{library}: cannot be imported ({reason}); {repair}"


def _repair(library: str, error: BaseException, distribution: str) -> str:
    missing = str(error.name).partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if missing not in ("", library):
        return f"install what it needs: pip install {DISTRIBUTIONS.get(missing, missing)}"
    if library not in ("torch", "torchvision"):
        return f"reinstall it: pip install --force-reinstall --no-deps {distribution}"
    index = ""
    with suppress(metadata.PackageNotFoundError):
        if metadata.version("torch").endswith("+cpu"):
            index = f" --index-url {CPU_INDEX} (without the index if that changes nothing)"
    return (
        "torch and torchvision must come from one index: "
        f"pip install --force-reinstall torch torchvision{index}"
    )
