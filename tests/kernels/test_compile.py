"""Every kernel compiles for every target, and takes what it may."""

import importlib.metadata
import json

import pytest

pytest.importorskip("triton")

from tests.kernels.compiled import (
    CASES,
    PRODUCTS,
    SHARED_LIMIT,
    TARGETS,
    case_of,
    resources,
)
from tests.kernels.record_resources import TABLE

STACK_BYTES = 128  # of a thread at most: a spill is no error, and differs between compilers
VERSION = importlib.metadata.version("triton")
# [registers, stack] of each case and target, for the versions that `record_resources` was run with.
RECORDED = json.loads(TABLE.read_text()).get(VERSION)
ONE_OF_EACH = {CASES[name].kernel: name for name in reversed(CASES)}.values()
INTEGERS = [(name, x) for name in ONE_OF_EACH for x in CASES[name].integers()]
INTEGERS += [(name, x) for name in PRODUCTS for x in case_of(name, "sm_90").integers()]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [*CASES, *PRODUCTS])
def test_resources(name, target):
    found = resources(case_of(name, target), target)
    assert found.shared <= SHARED_LIMIT[target]
    assert found.stack <= STACK_BYTES
    if name in PRODUCTS and target == "sm_90":
        assert "wgmma" in found.assembly
    if RECORDED is not None:
        registers, stack = RECORDED[name][target]
        assert found.stack <= stack
        assert found.registers <= 1.1 * registers


@pytest.mark.parametrize(("name", "argument"), INTEGERS)
def test_an_integer_that_is_one(name, argument):
    """Triton makes it a constant."""
    resources(case_of(name, "sm_90", **{argument: "1"}), "sm_90")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [*PRODUCTS, "class sums, float16", "class sums, totals"])
def test_any_number_of_dimensions(name, target):
    """With d no multiple of 16 loads are short and registers may spill: slow, but not wrong."""
    assert resources(case_of(name, target, d="i32"), target).shared <= SHARED_LIMIT[target]
