"""The process that opens one file, runs it once and says how long and how much memory that took.

One JSON job on standard input, one JSON result on standard output's last line. Linux' ``VmHWM`` is read
rather than ``ru_maxrss``: the latter starts, across ``exec``, from the peak of the parent process.
"""

import contextlib
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torchvision  # noqa: F401  an architecture may need it; its import is not the model's cost

from modelopt_cli.checkpoint import load_network, open_model, resolve
from modelopt_cli.checkpoint.folder import named_in
from modelopt_cli.errors import ModeloptError
from modelopt_cli.measure.latency import sample_input
from modelopt_cli.measure.load_time import Job
from modelopt_cli.program.input_batch import call
from modelopt_cli.program.samples import tokens_of

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
_REPETITIONS = 5
_ENOUGH_S = 1.0  # what takes longer is not worth repeating


def main() -> int:
    """Read a job, do it, print the result; errors go to standard error as one line."""
    job = Job.from_json(sys.stdin.read())
    try:
        result = json.dumps(measure_here(job))
    except Exception as error:  # whatever it is, the parent reports it and goes on
        sys.stderr.write(" ".join(str(error).split()) or type(error).__name__)
        return 1
    sys.stdout.write(f"\n{result}\n")  # on a line of its own, whatever the user's code printed before
    return 0


def measure_here(job: Job) -> dict[str, float | None]:
    """Do the job in this process: ``seconds``, and ``peak_bytes`` that it added to the resident size."""
    _prepare(job)
    before = _start()
    opened, seconds = _timed(job)
    peak: int | None = None
    if job.input is not None:
        with torch.inference_mode():
            below = tokens_of(opened.modules())
            call(opened, sample_input(job.input, job.batch_size, device=job.device, below=below))
        peak = max(0, _peak() - before)
    times = [seconds]
    while len(times) < _REPETITIONS and sum(times) < _ENOUGH_S:
        del opened  # never two at once
        opened, seconds = _timed(job)
        times.append(seconds)
    return {"seconds": statistics.median(times), "peak_bytes": peak}


def _prepare(job: Job) -> None:
    """Do what any process has to do once, whatever it opens."""
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    if job.arch is not None:
        resolve(job.arch)  # imports the library or the user's module that has it
    elif job.input is not None and (named := _named(Path(job.path))) is not None:
        with contextlib.suppress(ModeloptError):  # where it is no good, opening the file says so
            resolve(named)
    if job.device != "cpu":
        torch.zeros(1, device=job.device)


def _named(path: Path) -> str | None:
    """The architecture that a Hugging Face folder names, such as a class of transformers."""
    return named_in(path) if path.is_dir() else None


def _timed(job: Job) -> tuple[Any, float]:
    """The network or the tensors, and the seconds it took to get them."""
    start = time.perf_counter()
    if job.input is None:
        opened: Any = None
        for _ in open_model(job.path).state.values():
            pass  # one after the other: where tensors are decoded on demand, that is now
    else:
        opened = load_network(job.path, job.arch, job.input, job.device)
        opened.eval()
    if job.device != "cpu":
        torch.cuda.synchronize(job.device)
    return opened, time.perf_counter() - start


def _start() -> int:
    """Forget the peak of the imports and return the resident size."""
    try:
        _RESET.write_text("5")  # resets VmHWM (proc(5))
        return _status("VmRSS")
    except OSError:
        return _peak()


def _peak() -> int:
    try:
        return _status("VmHWM")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"no {field} in {_STATUS}")


if __name__ == "__main__":
    sys.exit(main())
