"""What must hold of every run on a hostile file, whatever the file."""

import contextlib
import io
import resource
import time
from collections.abc import Callable
from pathlib import Path

from hostile_files import DESCRIBED, MAY_BE_GOOD

from modelopt_cli.checkpoint import open_model
from modelopt_cli.cli.failures import explain
from modelopt_cli.cli.inspect import describe
from modelopt_cli.cli.main import main

SECONDS = 20
PEAK_GROWTH = 1_200_000
"""KiB."""


def faults(kind: str, data: bytes, folder: Path, canary: Path, command_line: bool = False) -> list[str]:
    """Read a file as the verbs do, and say what was not as it must be.

    Args:
        kind: of the corpus, which says whether a file must be refused.
        data: the file's bytes.
        folder: an empty folder to work in.
        canary: a file that appears if code ran.
        command_line: run two commands, too, which takes a tenth of a second each.
    """
    path, output = folder / "hostile.bin", folder / "out.safetensors"
    path.write_bytes(data)
    runs: dict[str, Callable[[], tuple[int, str]]] = {
        "describe": lambda: _explained(lambda: describe(path)),
        "open": lambda: _explained(lambda: open_model(path)),
    }
    if command_line:
        runs["inspect"] = lambda: _command("inspect", path)
        runs["quantize"] = lambda: _command(
            "quantize", path, "--scheme", "int8-weight", "--no-eval", "-o", output
        )
    found = []
    for name, run in runs.items():
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        code, said = run()
        lenient = kind in MAY_BE_GOOD or (kind in DESCRIBED and name in ("describe", "inspect"))
        if code not in ((0, 1, 2, 3) if lenient else (2, 3)):
            found.append(f"{name}: exit {code}: {said[:300]}")
        if code and output.exists():
            found.append(f"{name}: left a file")
        if code and name in ("inspect", "quantize") and not said.splitlines()[-1].startswith("error: "):
            found.append(f"{name}: does not end in one line: {said[:300]}")
        if time.monotonic() - start > SECONDS:
            found.append(f"{name}: {time.monotonic() - start:.0f} s")
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > PEAK_GROWTH:
            found.append(f"{name}: more than {PEAK_GROWTH // 1000} MB")
        output.unlink(missing_ok=True)
    leftovers = {entry.name for entry in folder.iterdir()} - {path.name}
    if leftovers:
        found.append(f"left {sorted(leftovers)}")
    if canary.exists():
        canary.unlink()
        found.append("ran code")
    return found


def _explained(read: Callable[[], object]) -> tuple[int, str]:
    try:
        read()
    except Exception as error:  # as the command line does with whatever it meets
        failure = explain(error)
        return failure.exit_code, failure.line or ""
    return 0, ""


def _command(*argv: object) -> tuple[int, str]:
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = main([str(word) for word in argv])
    return code, err.getvalue()
