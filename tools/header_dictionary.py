"""Write modelopt_cli/artifact/compressed_header.txt: the preset dictionary of compressed headers.

    python tools/header_dictionary.py

It holds the headers of a small residual network, pruned, once as int8 and once as float32 with a history
of every method's default settings. It is part of the file format: once files have been released that were
written with it, another dictionary makes another format version.
"""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import modelopt_cli
from modelopt_cli.artifact import write_program
from modelopt_cli.artifact.compressed_header import inner_text
from modelopt_cli.artifact.encodings import compact
from modelopt_cli.artifact.reader import open_artifact
from modelopt_cli.checkpoint import fresh_model
from modelopt_cli.data import open_data
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.method_table import METHODS
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.program import Program
from modelopt_cli.training import TrainConfig

TARGET = Path(modelopt_cli.__file__).parent / "artifact" / "compressed_header.txt"
NETWORK, DATA = "builtin:resnet8", "synthetic:3x32x32?n=64"
KEPT = 0.1
COMMON = {"modelopt": modelopt_cli.__version__, "seed": 0, "skipped": {}, "torch": "2.13.0+cpu"}


def main() -> None:
    """Write the dictionary; what is likeliest to be referred to stands last, where it is nearest."""
    program = fresh_model(NETWORK).program
    assert program is not None
    samples = Context(data=open_data(DATA, input_spec=program.input))
    int8 = METHODS["quantize"].apply(program, QuantizeConfig(scheme="int8"), samples).program
    int8.history, program.history = (), history()
    TARGET.write_bytes(header(int8) + header(program))


def history() -> tuple[dict[str, Any], ...]:
    """An entry of training and one of each method."""
    training = {**asdict(TrainConfig()), "data": "idx:?split=train"}
    entries: list[dict[str, Any]] = [{"method": "train", "config": training, "epochs": 10, "steps": 1000}]
    for name, method in METHODS.items():
        config = PruneConfig(sparsity=0.9) if name == "prune" else method.config()
        more: dict[str, Any] = {
            "calibration": "idx:?split=train",
            "coverage": {"compressed": 10, "total": 10},
        }
        if name == "prune":
            more["target"] = {"metric": "sparsity", "reached": 0.9, "wanted": 0.9}
            more["training"] = training
        entries.append({"method": name, "config": config.as_dict(), "source_sha256": "", **more})
    return tuple({**entry, **COMMON} for entry in entries)


def header(program: Program) -> bytes:
    """The text of a compressed header, of the network with most of its weights pruned."""
    state, generator = program.state_dict(), torch.Generator().manual_seed(0)
    weights = [name for name, tensor in state.items() if name.endswith("weight") and tensor.dim() > 1]
    for name in weights:
        state[name] *= torch.rand(state[name].shape, generator=generator) < KEPT
    program.encodings = compact(program, weights)
    with tempfile.TemporaryDirectory() as folder:
        path = write_program(program, Path(folder) / "net.safetensors").path
        with open_artifact(path) as artifact:
            return inner_text(artifact.document, artifact.layout.tensors)


if __name__ == "__main__":
    main()
