"""A network for sentence embeddings in few bits: ``python -m benchmarks.sentence_embeddings``.

all-MiniLM-L6-v2, as it is used: the mean of the hidden states over a sentence's tokens, normalised. Each form
is calibrated on 39 sentences of licences (those that look at data), and its embeddings are compared with
float32's on 39 others, and on 100 of Python's manual, which nothing was calibrated on.

    make assets && python -m benchmarks.sentence_embeddings [--runs N] [--folder DIR] [--output FILE]
"""

import argparse
import datetime
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import default_collate

import modelopt_cli as mo
from benchmarks.real import Samples, minilm
from benchmarks.rounds import shortest
from modelopt_cli.artifact import write_program
from modelopt_cli.data import open_data
from modelopt_cli.measure.environment import cpu_name
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.quantize.apply import apply
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.program import Program

ROOT = Path(__file__).parent.parent
CALIBRATION = "benchmarks.real.minilm:sentences?test=false"
TOKENS = 128
"""Length of the text whose latency is measured, at batch 1."""
_STORED: dict[str, Any] = {"scheme": "int8-weight", "weight_bits": 4}
_GROUPS = _STORED | {"group_size": 32}
_ZEROS = _GROUPS | {"asymmetric": True}
FORMS: dict[str, dict[str, Any]] = {
    "dynamic int8": {"scheme": "int8-dynamic"},
    "static int8": {"scheme": "int8"},
    "int4 weights": _STORED,
    "int4 weights, groups of 32": _GROUPS,
    "int4 weights, groups of 32, zero points": _ZEROS,
    "int4 weights, `gptq`": _STORED | {"rounding": "gptq"},
    "int4 weights, groups of 32, `gptq`": _GROUPS | {"rounding": "gptq"},
    "int4 weights, groups of 32, zero points, `gptq`": _ZEROS | {"rounding": "gptq"},
    "the same, W4A16": _ZEROS | {"rounding": "gptq", "act_bits": 16},
    "the same, W4A16, embeddings of 4 bits, too": _ZEROS
    | {"rounding": "gptq", "act_bits": 16, "edge_bits": 4},
}
"""Options of ``quantize``."""


def embeddings(network: Program, samples: Samples) -> Tensor:
    """Normalised means over the tokens of each sentence, ``(N, 384)``."""
    inputs = default_collate([inputs for inputs, _ in samples])  # type: ignore[misc]
    hidden, mask = network(**inputs)["last_hidden_state"], inputs["attention_mask"].unsqueeze(2)
    return F.normalize((hidden * mask).sum(1), dim=1)


def compressed(original: Program, options: Mapping[str, Any], path: Path) -> Program:
    """The network quantized with these options, as it comes back from its file."""
    config = QuantizeConfig(**options)
    data = open_data(CALIBRATION, input_spec=original.input, labels=False)
    result = apply(original, config, Context(data=data)).program
    write_program(result, path, force=True, code=config.code)
    return mo.load(path)


def rows(folder: Path, runs: int) -> Iterator[str]:
    """The lines of the table."""
    judged = {"39 of licences": minilm.sentences(), "100 of Python's manual": minilm.training(100)}
    original = mo.load(minilm.FOLDER)
    with torch.inference_mode():
        wanted = {name: embeddings(original, samples) for name, samples in judged.items()}
    paths = {"float32": minilm.FOLDER / "model.safetensors"}
    paths |= {name: folder / f"{number}.safetensors" for number, name in enumerate(FORMS)}
    forms = {name: compressed(original, FORMS[name], paths[name]) for name in FORMS}
    forms = {"float32": original, **forms}
    text = {entry.name: torch.ones(1, TOKENS, dtype=torch.int64) for entry in original.input.tensors}
    taken = shortest({name: partial(form, **text) for name, form in forms.items()}, runs)
    yield f"| | bytes | {' | '.join(judged)} | {TOKENS} tokens, ms |"
    yield f"|---|---|{'---|' * len(judged)}---|"
    for name, form in forms.items():
        with torch.inference_mode():
            cosines = [(embeddings(form, judged[key]) * wanted[key]).sum(1) for key in judged]
        cells = " | ".join(f"{cosine.mean():.4f}, least {cosine.min():.4f}" for cosine in cosines)
        yield f"| {name} | {paths[name].stat().st_size / 1e6:.2f} MB | {cells} | {taken[name]:.1f} |"


def main() -> None:
    """Measure, print and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "benchmarks" / "sentence_embeddings")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    lines = [
        f"{datetime.date.today()}, {cpu_name()}, torch {torch.__version__}, one thread, batch 1, "
        f"`python -m benchmarks.sentence_embeddings`, processor time of the shortest of {options.runs} "
        "rounds",
        "",
        "all-MiniLM-L6-v2: cosine of each sentence's embedding with float32's, its mean and the least.",
        "",
    ]
    for line in rows(options.folder, options.runs):
        print(line, flush=True)
        lines.append(line)
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
