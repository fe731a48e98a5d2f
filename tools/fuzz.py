"""The hostile corpus with one random seed after another: ``make fuzz ARGS="--minutes 60"``.

Each seed runs in a process of its own with bounded memory and time. A fault, or a process that dies, is
printed with its seed, kind and case, and makes the exit code 1; ``--seed N`` runs that seed again.
"""

import argparse
import contextlib
import random
import resource
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
MEMORY = 8 << 30
SECONDS = 300


def main() -> int:
    """Run seeds until the minutes are over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, help="run this one alone")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return run(given.seed)
    end, failed, count = time.monotonic() + 60 * given.minutes, False, 0
    while not count or (given.seed is None and time.monotonic() < end):
        seed = secrets.randbits(32) if given.seed is None else given.seed
        failed |= not passes(seed)
        count += 1
    print(f"{count} seeds, {'faults found' if failed else 'no fault'}")
    return int(failed)


def passes(seed: int) -> bool:
    """Run one seed in a child, and say what was wrong."""
    command = [sys.executable, __file__, "--child", "--seed", str(seed)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * SECONDS, preexec_fn=limit)
    except subprocess.TimeoutExpired as late:
        print(f"seed {seed}: hangs at {last_line(late.stdout)}", flush=True)
        return False
    if done.returncode:
        ended = f"process ended with {done.returncode} at {last_line(done.stdout)}\n{done.stderr[-2000:]}"
        faults = [line for line in done.stdout.splitlines() if line.startswith("FAULT")]
        print(f"seed {seed}: " + ("\n".join(faults) or ended), flush=True)
    return not done.returncode


def limit() -> None:
    """Bound the child's memory and processor time."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))


def last_line(text: str | bytes | None) -> str:
    """The case that was running."""
    lines = (text.decode() if isinstance(text, bytes) else text or "").splitlines()
    return lines[-1] if lines else "its start"


def run(seed: int) -> int:
    """All kinds with this seed, in this process."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "hostile")]
    from hostile_faults import faults
    from hostile_files import GENERATORS

    failed = False
    with tempfile.TemporaryDirectory() as name, contextlib.suppress(KeyboardInterrupt):
        folder, canary = Path(name) / "work", Path(name) / "canary"
        folder.mkdir()
        for kind, generate in GENERATORS.items():
            for case, data in generate(random.Random(seed), canary):
                print(f"{kind}: {case}", flush=True)
                found = faults(kind, data, folder, canary)
                if found:
                    failed = True
                    print(f"FAULT {kind}: {case}: {found}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
