"""The task that an architecture says travels with the Program, and into the file that is written of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import modelopt_cli as mo
from modelopt_cli.api.choosing_task import SOURCE_TASK, choose_task
from modelopt_cli.api.opening import ModelFile
from modelopt_cli.checkpoint import Opened, open_model
from modelopt_cli.checkpoint.builtin import LeNet300


def perplexity(model: Any, data: str) -> float:
    row = mo.evaluate(model, data=data, latency_runs=0).as_dict()["models"][0]
    return float(row["metrics"]["perplexity"])


@pytest.mark.slow
def test_a_language_network_is_measured_alike_by_path_program_and_file(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 5, "n_positions": 6, "n_embd": 8, "n_layer": 1, "n_head": 2}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    folder = tmp_path / "gpt"
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    vocabulary = {word: place for place, word in enumerate(["a", "b", "c", "d", "<unk>"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    text = tmp_path / "text.txt"
    text.write_text("a b c d a b\nb b a d c c\n")
    program = mo.load(folder)
    written = mo.save(program, tmp_path / "gpt.safetensors").path
    found = [perplexity(model, f"text:{text}?tokenizer={folder}") for model in (folder, program, written)]
    assert found == [pytest.approx(found[0], rel=1e-6)] * 3


@pytest.mark.parametrize("task", ["language", "text", "segment", "sequence?blank=0"])
def test_the_task_is_that_of_the_architecture(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, opening = tmp_path / "net.pth", ModelFile.open
    torch.save(LeNet300(width=0.05).state_dict(), checkpoint)

    def open_for_task(*args: Any, **options: Any) -> Opened:
        opened = opening(*args, **options)
        known = opened.architecture
        return opened if known is None else replace(opened, architecture=replace(known, task=task))

    monkeypatch.setattr(ModelFile, "open", open_for_task)
    spec = "builtin:lenet300?width=0.05"
    program = mo.load(checkpoint, arch=spec)
    written = mo.save(program, tmp_path / "net.safetensors").path
    chosen = choose_task(None, None, [open_model(written)], [])
    assert (chosen.spec.text, chosen.origin) == (task, f"of {spec}")
    again = mo.load(written)
    assert [entry[SOURCE_TASK] for entry in again.history] == [task]  # once, however often it is loaded


def test_a_network_of_no_known_task_has_no_history(tmp_path: Path) -> None:
    torch.save(LeNet300(width=0.05).state_dict(), tmp_path / "net.pth")
    assert mo.load(tmp_path / "net.pth", arch="builtin:lenet300?width=0.05").history == ()
