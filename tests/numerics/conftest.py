"""The native kernels at each level that this CPU has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fireflyer.numerics.native.library import LEVELS, Library, library


@pytest.fixture(params=LEVELS)
def native(request: pytest.FixtureRequest) -> Iterator[Library]:
    found = library()
    if found is None:
        pytest.skip("the native kernels are not built: make native")
    best = found.level
    if found.set_level(request.param) != request.param:
        found.set_level(best)
        pytest.skip(f"this CPU has no {request.param}")
    yield found
    found.set_level(best)
