"""all-MiniLM-L6-v2 keeps its sentence embeddings in few bits, on sentences that it was not calibrated on."""

from pathlib import Path

import pytest
import torch

import modelopt_cli as mo
from benchmarks.real import minilm
from benchmarks.sentence_embeddings import FORMS, compressed, embeddings
from modelopt_cli.program import Program

pytestmark = [pytest.mark.assets, pytest.mark.slow]


@pytest.fixture(scope="module")
def original() -> Program:
    pytest.importorskip("transformers")
    if not minilm.FOLDER.exists():
        pytest.skip(f"{minilm.FOLDER} is not there; run: make assets")
    return mo.load(minilm.FOLDER)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("form", "least"),
    [
        ("dynamic int8", 0.99),
        ("static int8", 0.98),
        ("int4 weights, groups of 32, zero points", 0.97),
        ("int4 weights, groups of 32, zero points, `gptq`", 0.99),
    ],
)
def test_mean_cosine_with_the_float_embedding(
    form: str, least: float, original: Program, tmp_path: Path
) -> None:
    again = compressed(original, FORMS[form], tmp_path / "net.safetensors")
    wanted, found = (embeddings(network, minilm.sentences()) for network in (original, again))
    assert (wanted * found).sum(1).mean() >= least
