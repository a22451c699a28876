"""Triton's interpreter without what it does again and again."""

import pytest
from triton.runtime.interpreter import InterpretedFunction


@pytest.fixture(scope="session", autouse=True)
def language_prepared_once():
    """
    Replace the operations of Triton's language once for each module.

    The interpreter does so anew for every function that a kernel calls, for half of its time.
    """
    prepared, original = set(), InterpretedFunction.__call__

    def call(function, *arguments, **named):
        module = function.fn.__module__
        if module in prepared:
            return function.rewrite()(*arguments, **named)
        prepared.add(module)
        return original(function, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "__call__", call)
        yield
