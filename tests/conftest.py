import os
from collections.abc import Generator
from typing import Any

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, pytest.TestReport]:
    """Where MODELOPT_REQUIRE_ASSETS is set, a test that misses its assets fails instead of being skipped."""
    report: pytest.TestReport = yield
    if report.skipped and item.get_closest_marker("assets") and os.environ.get("MODELOPT_REQUIRE_ASSETS"):
        report.outcome = "failed"
    return report
