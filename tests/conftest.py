import os
import signal
from collections.abc import Generator
from typing import Any

import pytest

# A shell starts what it runs in the background with SIGINT ignored, and children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, pytest.TestReport]:
    """Where MODELOPT_REQUIRE_ASSETS is set, a test that misses its assets fails instead of being skipped."""
    report: pytest.TestReport = yield
    if report.skipped and item.get_closest_marker("assets") and os.environ.get("MODELOPT_REQUIRE_ASSETS"):
        report.outcome = "failed"
    return report
