"""Compress a sharded checkpoint of several gigabytes: seconds and memory, next to copying it.

    python -m benchmarks.streaming [NAME ...] [--gigabytes 4] [--folder build/benchmarks/streaming]

The checkpoint is a Hugging Face folder of random weights in the shapes of a transformer, layers in float32
and bfloat16 in turn, in shards of 512 MB. Every command runs in a process of its own on one thread, with the
files in the page cache; copying ends with the copy on disk, as writing an artifact does. Peak memory is the
largest resident set of the process. Results go to benchmarks/streaming.md.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from modelopt_cli.measure.environment import cpu_name

HOW = ["--no-eval", "--threads", "1", "-q", "-o"]
COMMANDS = {
    "cp": ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*'],
    "quantize --scheme int8-weight": ["quantize", "--scheme", "int8-weight", *HOW],
    "share --bits 4": ["share", "--bits", "4", *HOW],
}
"""By name, without the checkpoint and the output, which :func:`argv` puts in."""

RESULT = Path(__file__).with_suffix(".md")
SHARD = 512_000_000
WIDTH, HIDDEN, VOCABULARY = 4096, 11008, 32000


def shapes() -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """Names, shapes and types of a transformer's tensors, without end."""
    yield "model.embed_tokens.weight", (VOCABULARY, WIDTH), torch.bfloat16
    yield "lm_head.weight", (VOCABULARY, WIDTH), torch.bfloat16
    layer = 0
    while True:
        dtype = torch.bfloat16 if layer % 2 else torch.float32
        prefix = f"model.layers.{layer}"
        for name in "qkvo":
            yield f"{prefix}.self_attn.{name}_proj.weight", (WIDTH, WIDTH), dtype
        for name in ("gate", "up"):
            yield f"{prefix}.mlp.{name}_proj.weight", (HIDDEN, WIDTH), dtype
        yield f"{prefix}.mlp.down_proj.weight", (WIDTH, HIDDEN), dtype
        yield f"{prefix}.input_layernorm.weight", (WIDTH,), dtype
        layer += 1


def make(folder: Path, size: int) -> None:
    """Write a folder of ``size`` bytes or a little less."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    homes: dict[str, str] = {}
    written = 0

    def flush() -> None:
        name = f"model-{len(set(homes.values())) + 1:05}.safetensors"
        save_file(shard, folder / name)
        homes.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape, dtype in shapes():
        tensor = torch.randn(shape, generator=generator).mul_(0.02).to(dtype)
        written += tensor.nbytes
        if written > size:
            break
        if sum(each.nbytes for each in shard.values()) + tensor.nbytes > SHARD:
            flush()
        shard[name] = tensor
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))


@dataclass(frozen=True)
class Run:
    """Cost of one command; ``peak`` in KiB."""

    bytes_out: int
    seconds: float
    processor: float
    peak: int | None


def argv(command: list[str], source: Path, output: Path) -> list[str]:
    """A whole command line: the shell's, or one of modelopt's."""
    if command[0] == "sh":
        return [*command, str(source), str(output)]
    return [sys.executable, "-m", "modelopt_cli", command[0], str(source), *command[1:], str(output)]


def run(command: list[str], source: Path, output: Path) -> Run:
    """Run a command and look at what it took; its output is removed."""
    started = time.perf_counter()
    child = subprocess.Popen(argv(command, source, output), env={**os.environ, "OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if child.returncode:
        raise SystemExit(f"failed: {command}")
    size = size_of(output)
    shutil.rmtree(output) if output.is_dir() else output.unlink()
    # That of cp is below this process's own, so it is not known.
    peak = usage.ru_maxrss if command[0] != "sh" else None
    return Run(size, seconds, usage.ru_utime + usage.ru_stime, peak)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


def table(size: int, shards: int, runs: dict[str, Run]) -> str:
    """Markdown."""
    lines = [
        f"{datetime.date.today()}, {cpu_name()}, torch {torch.__version__}, one thread: a folder of "
        f"{size / 1e9:.2f} GB in {shards} shards, float32 and bfloat16",
        "",
        "| command | output, GB | seconds | MB/s of input | processor, s | peak resident memory, MB |",
        "|---|---|---|---|---|---|",
    ]
    for name, each in runs.items():
        speed = f"{each.seconds:.1f} | {size / each.seconds / 1e6:.0f} | {each.processor:.1f}"
        peak = "" if each.peak is None else f"{each.peak * 1024 / 1e6:.0f}"
        lines.append(f"| {name} | {each.bytes_out / 1e9:.2f} | {speed} | {peak} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make the folder, run the commands, write the table, remove everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=list(COMMANDS), metavar="NAME", help=", ".join(COMMANDS))
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--folder", type=Path, default=Path("build/benchmarks/streaming"))
    options = parser.parse_args()
    source, output = options.folder / "checkpoint", options.folder / "output"
    try:
        # In a process of its own: the peak that the system reports of a child is at least its parent's.
        maker = multiprocessing.get_context("spawn").Process(
            target=make, args=(source, int(options.gigabytes * 1e9))
        )
        maker.start()
        maker.join()
        runs = {name: run(COMMANDS[name], source, output) for name in options.names}
        text = table(size_of(source), len(list(source.glob("*.safetensors"))), runs)
    finally:
        shutil.rmtree(options.folder)
    print(text)
    RESULT.write_text(text)


if __name__ == "__main__":
    main()
