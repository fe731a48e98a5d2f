import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

# A shell starts what it runs in the background with SIGINT ignored, and children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What the tests have imported by now stays, so that the garbage collector need not look at it again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, pytest.TestReport]:
    """Where MODELOPT_REQUIRE_ASSETS is set, a test that misses its assets fails instead of being skipped."""
    report: pytest.TestReport = yield
    if report.skipped and item.get_closest_marker("assets") and os.environ.get("MODELOPT_REQUIRE_ASSETS"):
        report.outcome = "failed"
    return report


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch computes on one thread: sums are always added in one order, and small maps are not waited for."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


TOGETHER = 300
"""Seconds that two processes may take."""


@pytest.fixture
def torchrun() -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Runs a script or ``-m MODULE`` of this checkout in two processes of one thread each."""

    def run(*argv: object, restarts: int = 0, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["--max-restarts", str(restarts), *map(str, argv)]
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, cwd=cwd, env=env, text=True, **pipes) as child:
            try:
                out, err = child.communicate(timeout=TOGETHER)
            except BaseException:
                child.terminate()  # not kill: it then ends the two processes, which killing would leave
                raise
        return subprocess.CompletedProcess(command, child.returncode, out, err)

    return run
