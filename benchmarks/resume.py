"""Kill a fine-tuning at five random steps, resume it each time, and compare the bytes of the file.

    make assets && python -m benchmarks.resume CHECKPOINT [--seed N] [--kills N] [--epochs N]

The command is that of a user: pruning with growing masks while it trains on Fashion-MNIST. It is killed with
SIGKILL, which no program can handle, at steps drawn from ``--seed``; each time it goes on from the last
state, which is saved every 20 steps and after every epoch. It runs once more without any of that.
"""

import argparse
import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from modelopt_cli.errors import ArtifactError
from modelopt_cli.training.state import read_state

ROOT = Path(__file__).parent.parent
TRAIN = "idx:assets/fashion-mnist?split=train"
SAVE_EVERY = 20
STEPS = -(-60_000 // 128)
"""Of an epoch."""


def command(checkpoint: Path, output: Path, epochs: int) -> list[str]:
    """Everything but ``--resume``."""
    what = ["--structure", "unstructured", "--sparsity", "0.8", "--schedule", "gradual"]
    how = ["--train", TRAIN, "--augment", "cifar", "--epochs", str(epochs), "--lr", "0.05", "--amp"]
    where = ["--save-every", str(SAVE_EVERY), "--threads", "1", "--no-eval", "-q", "-o", str(output)]
    return [sys.executable, "-m", "modelopt_cli", "prune", str(checkpoint.absolute()), *what, *how, *where]


def step_of(run: Path) -> int:
    """Step of the run's last state, or 0 before there is one."""
    try:
        return int(read_state(run / "state.safetensors").about["state"]["place"]["step"])
    except ArtifactError:
        return 0


def kill_at(step: int, argv: list[str], run: Path, wait: float) -> int:
    """Run until the first state from ``step`` on, wait, and kill; returns the step it goes on from."""
    child = subprocess.Popen(argv, cwd=ROOT)
    while step_of(run) < step:
        if child.poll() is not None:
            raise RuntimeError(f"ended with exit code {child.returncode} before step {step}")
        time.sleep(0.02)
    time.sleep(wait)
    child.kill()
    if child.wait() != -signal.SIGKILL:
        raise RuntimeError("was done before it could be killed")
    return step_of(run)


def main() -> None:
    """Print the steps and both digests; exit code 1 if they differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=1)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    last = options.epochs * STEPS - 2 * SAVE_EVERY
    steps = sorted(draw.sample(range(1, last), options.kills))
    digests = []
    with tempfile.TemporaryDirectory() as folder:
        killed, whole = Path(folder, "killed.safetensors"), Path(folder, "whole.safetensors")
        for number, step in enumerate(steps):
            argv = command(options.checkpoint, killed, options.epochs) + ["--resume"] * (number > 0)
            reached = kill_at(step, argv, killed.with_suffix(".run"), draw.uniform(0, 1))
            print(f"killed after step {step}, goes on from {reached}", flush=True)
        again = [*command(options.checkpoint, killed, options.epochs), "--resume"]
        for argv in (again, command(options.checkpoint, whole, options.epochs)):
            subprocess.run(argv, cwd=ROOT, check=True)
        for path in (killed, whole):
            digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
            print(f"{path.stem:7} {digests[-1]}")
    sys.exit(digests[0] != digests[1])


if __name__ == "__main__":
    main()
