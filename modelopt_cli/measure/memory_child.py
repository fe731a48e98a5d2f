"""The process that loads one file, runs it once and says how much memory that took.

One JSON job on standard input, one JSON answer on standard output's last line. Linux' ``VmHWM`` is read
rather than ``ru_maxrss``: the latter starts, across ``exec``, from the peak of the parent process.
"""

import json
import resource
import sys
from pathlib import Path

import torch
import torchvision  # noqa: F401  an architecture may need it; its own memory is not the model's

from modelopt_cli.measure.latency import sample_input
from modelopt_cli.measure.memory import Job
from modelopt_cli.program.spec import InputSpec

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def main() -> int:
    """Read a job, do it, answer; errors go to standard error as one line."""
    raw = json.loads(sys.stdin.read())
    job = Job(raw["path"], raw["arch"], tuple(raw["shape"]), raw["batch_size"], raw["threads"])
    try:
        answer = json.dumps({"peak_bytes": measure_here(job)})
    except Exception as error:  # whatever it is, the parent reports it and goes on
        sys.stderr.write(" ".join(str(error).split()) or type(error).__name__)
        return 1
    sys.stdout.write(f"\n{answer}\n")  # on a line of its own, whatever the user's code printed before
    return 0


def measure_here(job: Job) -> int:
    """Do the job in this process and return what it added to the resident size at its peak, in bytes."""
    from modelopt_cli import api

    if job.threads is not None:
        torch.set_num_threads(job.threads)
    before = _start()
    model = api.load_network(job.path, arch=job.arch, input=InputSpec(job.shape))
    model.eval()
    with torch.inference_mode():
        model(sample_input(job.shape, job.batch_size))
    return max(0, _peak() - before)


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
