"""Calls in other processes."""

import numpy as np
import pytest

from bench.processes import Process, measured, run_isolated


@pytest.fixture
def touch(tmp_path, monkeypatch):
    """A module for other processes: its function touches some memory, or fails."""
    code = "def touch(mib):\n    return sum(bytearray(b'1') * (mib << 20)) // 49 >> 20\n"
    (tmp_path / "touching.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "touching:touch"


def test_the_peak_of_a_process_is_its_own(touch):
    own = np.ones(400 << 17)  # 400 MiB here must not count there
    peaks = []
    for mib in (1, 65):
        with Process() as process:
            assert process.call(touch, mib=mib) == mib
            peaks.append(process.call("bench.processes:process_memory", field="VmHWM"))
    assert 60 << 20 < peaks[1] - peaks[0] < 80 << 20
    assert peaks[0] < own.nbytes
    assert run_isolated(touch, mib=3) == 3


def test_measured_memory_is_beyond_what_was_resident():
    held = bytearray(b"1") * (100 << 20)
    result, seconds, peak = measured(lambda: sum(bytearray(b"1") * (65 << 20)) // 49 >> 20)
    assert (result, seconds > 0, len(held)) == (65, True, 100 << 20)
    assert 60 << 20 < peak < 80 << 20


def test_run_isolated_passes_on_what_went_wrong(touch):
    with pytest.raises(RuntimeError, match=r"touching:touch ended with 1:(.|\n)*TypeError"):
        run_isolated(touch, mib="none")


def test_a_process_makes_one_call_after_another(touch):
    with Process() as process:
        own = process.call("os:getpid")
        assert process.call(touch, mib=2) == 2
        assert process.call("os:getpid") == own


def test_threads_of_a_process():
    with Process(threads=1) as process:
        assert process.call("torch:get_num_threads") == 1


def test_a_process_that_has_ended_is_reported(touch):
    process = Process()
    with pytest.raises(RuntimeError, match="TypeError"):
        process.call(touch, mib="none")
    with pytest.raises(RuntimeError, match="touching:touch ended with 1"):
        process.call(touch, mib=1)
    process.close()
