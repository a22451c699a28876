"""`transclip-fast doctor`: installed versions, devices and known conflicts."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path

import click

from transclip_fast.cli import options, session
from transclip_fast.cli.libraries import DISTRIBUTIONS, describe_broken
from transclip_fast.errors import InputError
from transclip_fast.graph.faiss_index import (
    avx2_kernels,
    blas_kernel,
    check_products,
    old_kernel,
)


@dataclass(frozen=True)
class Finding:
    """A library, whether it works, and a line about it with the remedy."""

    subject: str
    ok: bool
    message: str


@click.command("doctor")
@options.json_option
def command(as_json: bool) -> None:
    """Check versions, devices and known conflicts; exit code 1 if something does not work.

    \b
    Example:
      transclip-fast doctor
    """
    numba = check_import("numba", DISTRIBUTIONS["numba"])
    findings = [check_torch(), check_faiss(), numba, *check_open_clip()]
    versions = session.versions()
    summary = {"versions": versions, "findings": [asdict(finding) for finding in findings]}
    lines = [f"{name} {version}" for name, version in versions.items()]
    lines += [""] + [
        f"{'ok     ' if finding.ok else 'PROBLEM'}  {finding.subject}: {finding.message}"
        for finding in findings
    ]
    session.print_summary(summary, "\n".join(lines), as_json)
    if not all(finding.ok for finding in findings):
        sys.exit(1)


def check_torch(driver: Path = Path("/proc/driver/nvidia/version")) -> Finding:
    """CUDA devices, or why torch sees none; `driver` exists if there is an NVIDIA driver."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("torch", True, f"CUDA {torch.version.cuda}: {', '.join(names)}")
    if not driver.exists():
        threads = session.counted(torch.get_num_threads(), "CPU thread")
        return Finding("torch", True, f"no GPU here, {threads}")
    if torch.version.cuda is None:
        problem = f"torch {torch.__version__} has no CUDA; install torch from PyPI's default index"
    else:
        problem = (
            f"torch for CUDA {torch.version.cuda} finds no device; is the driver too old, or the "
            "device hidden by CUDA_VISIBLE_DEVICES?"
        )
    return Finding("torch", False, f"there is an NVIDIA driver, but {problem}")


def check_faiss() -> Finding:
    """FAISS is optional, and must be installed only once; with the kernels of its products."""
    installed = {(dist.metadata["Name"] or "").lower() for dist in metadata.distributions()}
    names = sorted(name for name in installed if name.startswith("faiss"))
    if not names:
        return Finding("faiss", True, "not installed: graphs of more than 20,000 rows are slow")
    if len(names) > 1:
        message = f"{' and '.join(names)} overwrite each other; uninstall all, install one"
        return Finding("faiss", False, message)
    with avx2_kernels():
        finding = check_import("faiss", names[0])
    if not finding.ok:
        return finding
    try:
        check_products(importlib.import_module("faiss"))
    except InputError as error:
        return replace(finding, ok=False, message=str(error))
    kernel = blas_kernel()
    if kernel is None:
        return finding
    return replace(finding, message=f"{finding.message}, {old_kernel() or f'{kernel} kernels'}")


def check_import(module: str, distribution: str) -> Finding:
    """A library can be imported: one built for another torch cannot."""
    try:
        importlib.import_module(module)
        return Finding(module, True, f"{distribution} {metadata.version(distribution)}")
    except Exception as error:  # noqa: BLE001 - of other versions' parts a module raises anything
        _, _, message = describe_broken(module, error, distribution).partition(": ")
        return Finding(module, False, message)


def check_open_clip() -> Iterator[Finding]:
    """torchvision, and open_clip, which is not to blame where torchvision cannot be imported."""
    first = check_import("torchvision", DISTRIBUTIONS["torchvision"])
    yield first
    if first.ok:
        yield check_import("open_clip", DISTRIBUTIONS["open_clip"])
    else:
        yield Finding("open_clip", False, "needs torchvision; repair that first")
