"""medray's own promises, as its users can check them."""

import pytest

from medray.inference.conformance_medray import check_medray


@pytest.mark.usefixtures("cluster")
def test_medray_keeps_its_own_promises() -> None:
    assert [check for check in check_medray() if not check.passed] == []
