"""Texts from the shell: networks of Hugging Face folders and one's own, judged, quantized and read again."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

tokenizers = pytest.importorskip("tokenizers", reason="the optional package tokenizers is not installed")

Run = Callable[..., Any]
QUIET = ("--latency-runs", "0", "-q", "--json")
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *(f"w{number}" for number in range(16))]
NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(20, 16), nn.Linear(16, 2)

    def forward(self, input_ids):
        return self.head(self.words(input_ids).mean(1))

def make():
    return Net()
"""


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tokenizer, sentences that hold w3 or not, and a network of our own."""
    monkeypatch.chdir(tmp_path)
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    (tmp_path / "bert").mkdir()
    made.save(str(tmp_path / "bert" / "tokenizer.json"))
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS[5:], k=draw.randint(2, 6))) for _ in range(32)]
    rows = (f"{text},{'good' if 'w3' in text.split() else 'bad'}" for text in texts)
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *rows]))
    (tmp_path / "net.py").write_text(NET)
    torch.manual_seed(0)
    state = {"words": nn.Embedding(20, 16), "head": nn.Linear(16, 2)}
    torch.save(nn.ModuleDict(state).state_dict(), tmp_path / "net.pth")
    return tmp_path


OWN = ("net.pth", "--arch", "net.py:make", "--input-shape", "input_ids=8:int64")


def test_a_network_of_ones_own(there: Path, modelopt: Run) -> None:
    data = ("--data", "text:a.csv?tokenizer=bert", *QUIET)
    made = modelopt("quantize", *OWN, *data, "--scheme", "int8-dynamic", "-o", "q.safetensors")
    assert made.code == 0, made.err
    judged = json.loads(modelopt("eval", "q.safetensors", *data).out)
    assert judged["task"] == "text (recorded)"
    assert judged["models"][0]["samples"] == 32


def test_a_tokenizer_that_does_not_fit_is_known_before_the_work(there: Path, modelopt: Run) -> None:
    """The largest number is in the last text alone, which a rehearsal on a few would not meet."""
    vocab = json.loads((there / "bert" / "tokenizer.json").read_text())
    vocab["model"]["vocab"]["w99"] = 20
    (there / "bert" / "tokenizer.json").write_text(json.dumps(vocab))
    (there / "a.csv").write_text((there / "a.csv").read_text() + "\nw99,good")
    done = modelopt("quantize", *OWN, "--data", "text:a.csv?tokenizer=bert", *QUIET, "-o", "q.safetensors")
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert "a.csv line 34" in done.err
    assert "holds index 20, outside the 20 rows of the network's embedding, 0 to 19" in done.err
    assert not (there / "q.safetensors").exists()


BAD = {
    "no tokenizer": ("text:a.csv", 2, "no tokenizer is given; add ?tokenizer=FOLDER"),
    "no file": ("text:b.csv?tokenizer=bert", 2, "b.csv: no such file"),
    "no column": ("text:a.csv?tokenizer=bert&text=txt", 2, "has no columns called 'txt'"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input(kind: str, there: Path, modelopt: Run) -> None:
    data, code, words = BAD[kind]
    done = modelopt("quantize", *OWN, "--data", data, *QUIET, "-o", "q.safetensors")
    assert (done.code, done.err.count("\n")) == (code, 1), done.err
    assert words in done.err
    assert not (there / "q.safetensors").exists()


WITHOUT = "import sys; sys.modules['transformers'] = None; from modelopt_cli.cli.main import run; run()"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic"])
def test_a_hugging_face_folder(scheme: str, there: Path, modelopt: Run, environ: dict[str, str]) -> None:
    """Its own tokenizer is taken, its task and classes are known, and the file needs no transformers."""
    transformers = pytest.importorskip("transformers", reason="the optional package is not installed")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, id2label={0: "bad", 1: "good"},
    )  # fmt: skip
    network = transformers.BertForSequenceClassification(config).eval()
    network.save_pretrained(there / "bert")
    made = modelopt(
        "quantize", "bert", "--scheme", scheme, "--data", "text:a.csv", *QUIET, "-o", "q.safetensors"
    )
    assert made.code == 0, made.err
    before, after = json.loads(made.out)["evaluation"]["models"]

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(there / "bert" / "tokenizer.json"), pad_token="[PAD]"
    )
    rows = [line.split(",") for line in (there / "a.csv").read_text().splitlines()[1:]]
    with torch.no_grad():
        logits = network(**tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")).logits
    right = [
        label == ("bad", "good")[int(row.argmax())] for row, (_, label) in zip(logits, rows, strict=True)
    ]
    assert before["metrics"]["top1"] == pytest.approx(100 * sum(right) / len(right))
    assert after["fidelity"]["snr_db"]["logits"] > 20

    command = [
        sys.executable,
        "-c",
        WITHOUT,
        "eval",
        "q.safetensors",
        "--data",
        "text:a.csv?tokenizer=bert",
        *QUIET,
    ]
    again = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["models"][0]["metrics"]["top1"] == after["metrics"]["top1"]
