"""Memory: sizes as text, what this process uses, and what is free."""

import numpy as np
import pytest
import torch

from transclip_fast import InputError, memory
from transclip_fast.memory import parse_memory, peak_bytes, reset_peak, show_bytes

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GiB", 8 << 30),
        ("8 GB", 8 << 30),
        ("8g", 8 << 30),
        ("1.5T", 3 << 39),
        ("300M", 300 << 20),
        ("12345", 12345),
        (12345, 12345),
        (np.int64(12345), 12345),
        (None, None),
    ],
)
def test_parse(text, expected):
    assert parse_memory(text) == expected


@pytest.mark.parametrize(
    "text", ["", "8 apples", "-1G", "0", 0, -5, True, 1.5, "GiB", "1e9", "0.5", "9" * 400]
)
def test_what_is_no_size(text):
    with pytest.raises(InputError, match="memory must be a size like 8GiB, got"):
        parse_memory(text)


@pytest.mark.parametrize("text", ["16", " 500", "1023", "1.5"])
def test_a_size_without_its_unit(text):
    with pytest.raises(InputError, match=f"^memory: .* did you mean {text.strip()}GiB"):
        parse_memory(text)
    assert parse_memory(f"{text}GiB") == int(float(text) * 2**30)


@pytest.mark.parametrize(
    ("number", "text"), [(5, "5 B"), (1536, "1.5 KiB"), (3 << 29, "1.5 GiB"), (10**12, "931 GiB")]
)
def test_shown(number, text):
    assert show_bytes(number) == text


def test_the_peak_begins_anew():
    block = np.ones(32 << 20)  # 256 MiB, which the system gets back
    before = peak_bytes()
    del block
    if not reset_peak():
        pytest.skip("the system does not let a process reset its peak")
    assert peak_bytes() < before - (128 << 20)


def test_a_sandbox_that_writes_no_peak(monkeypatch, tmp_path):
    """As gVisor, whose status has VmSize and VmRSS alone."""
    (tmp_path / "status").write_text("Name:\tpython3\nVmSize:\t    2000 kB\nVmRSS:\t    1000 kB\n")
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    assert memory.resident_bytes() == 1000 << 10
    assert peak_bytes() > 10 << 20  # of Python and torch


@pytest.fixture
def cgroups(monkeypatch, tmp_path):
    """Writes the groups of this process, and files of a group; returns what is free then."""
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "fs")
    monkeypatch.setattr(memory, "CGROUP_PATHS", tmp_path / "cgroup")

    def write(paths, **folders):
        (tmp_path / "cgroup").write_text(paths)
        for folder, files in folders.items():
            group = tmp_path / "fs" / folder.replace("__", "/")
            group.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (group / name).write_text(f"{text}\n")
        return memory.free_bytes(CPU)

    return write


def v2(limit, used, cache=0):
    stat = f"anon 5\nactive_file 7\ninactive_file {cache}\nunevictable 0"
    return {"memory.max": limit, "memory.current": used, "memory.stat": stat}


def v1(limit, used, cache=0):
    stat = f"cache 9\ninactive_file 1\ntotal_inactive_file {cache}"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}


ANY_MACHINE = 100 << 20  # has more than this free


def test_no_group_has_a_limit(cgroups):
    assert memory.free_bytes(CPU) > ANY_MACHINE  # no list of groups
    assert cgroups("0::/\n") > ANY_MACHINE  # no files
    assert cgroups("0::/job\n", job=v2("max", 1000)) > ANY_MACHINE
    no_limit = 9223372036854771712  # as v1 writes it
    assert cgroups("4:memory:/\n", memory=v1(no_limit, 1000)) > ANY_MACHINE


def test_memory_of_a_container(cgroups):
    assert cgroups("0::/\n", **{"": v2(5000, 1000)}) == 4000
    assert cgroups("0::/\n", **{"": v2(5000, 6000)}) == 0


def test_file_cache_is_free(cgroups):
    assert cgroups("0::/\n", **{"": v2(5000, 4900, cache=3000)}) == 3100
    assert cgroups("4:cpu,memory:/\n", memory=v1(5000, 4900, cache=2000)) == 2100


def test_a_sandbox_without_statistics(cgroups):
    files = v2(5000, 1000)
    del files["memory.stat"]
    assert cgroups("0::/\n", **{"": files}) == 4000


@pytest.mark.parametrize(
    ("inner", "outer", "root", "free"),
    [(9000, 5000, "max", 4000), (5000, 9000, "max", 4000), ("max", "max", 3000, 2000)],
)
def test_the_tightest_of_nested_groups(cgroups, inner, outer, root, free):
    folders = {"slurm__job": v2(inner, 1000), "slurm": v2(outer, 1000), "": v2(root, 1000)}
    assert cgroups("0::/slurm/job\n", **folders) == free


def test_nested_groups_of_version_1(cgroups):
    """Those of other controllers do not count; a path of the host leads to the root."""
    paths = "9:name=systemd:/\n5:cpu:/small\n4:memory:/slurm/job\n0::/\n"
    folders = {"memory__slurm": v1(6000, 1000), "memory": v1(9000, 1000), "small": v2(10, 1)}
    assert cgroups(paths, **folders) == 5000
    assert cgroups("4:memory:/docker/0a1b\n", **folders) == 8000
