"""Cases of a parametrized test: `make test` runs one for each kind, `make test-slow` the others."""

from collections.abc import Collection, Hashable, Iterable
from typing import Any

import pytest


def quick(cases: Iterable[Hashable], chosen: Collection[Hashable]) -> list[Any]:
    """Parameters for ``pytest.mark.parametrize``: all ``cases``, marked slow unless they are ``chosen``."""
    cases = list(cases)
    unknown = set(chosen) - set(cases)
    assert chosen
    assert not unknown, unknown
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)), marks=[] if case in chosen else pytest.mark.slow
        )
        for case in cases
    ]
