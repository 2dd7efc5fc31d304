"""What all tests of this folder keep to."""

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def without_torch() -> Iterator[None]:
    """Fail a test that imports torch, or has it imported: its place is another."""
    there = "torch" in sys.modules
    yield
    assert there or "torch" not in sys.modules, "imports torch; see tests/networks"
