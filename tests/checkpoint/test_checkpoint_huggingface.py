"""Hugging Face folders as networks, against what transformers itself makes of them."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from modelopt_cli import artifact
from modelopt_cli.checkpoint import open_model, read_state, resolve
from modelopt_cli.checkpoint.build import build_loaded
from modelopt_cli.errors import ArchitectureError, EnvironmentFailure
from modelopt_cli.program import InputSpec, Preprocess
from modelopt_cli.program.input_batch import named
from modelopt_cli.program.samples import noise

transformers = pytest.importorskip(
    "transformers", reason="the optional package transformers is not installed"
)

TEXT = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "vocab_size": 40, "max_position_embeddings": 12,
}  # fmt: skip
PICTURE = {**TEXT, "image_size": 32, "patch_size": 16, "num_labels": 4}
TOKENS = ("input_ids", "attention_mask")
NETWORKS: dict[str, tuple[dict[str, Any], str | None, tuple[str, ...], tuple[int, ...]]] = {
    "BertForSequenceClassification": (
        {**TEXT, "id2label": {0: "bad", 1: "good"}}, "text", (*TOKENS, "token_type_ids"), (12,)
    ),
    "BertModel": (TEXT, "embed", (*TOKENS, "token_type_ids"), (12,)),
    "RobertaForMaskedLM": ({**TEXT, "type_vocab_size": 1}, None, TOKENS, (10,)),
    "GPT2LMHeadModel": (
        {"vocab_size": 40, "n_positions": 12, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0,
         "eos_token_id": 0}, "language", TOKENS, (12,)
    ),
    "ViTForImageClassification": (PICTURE, "classify", ("pixel_values",), (3, 32, 32)),
    "SegformerForSemanticSegmentation": (
        {"hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4, "depths": [1] * 4,
         "decoder_hidden_size": 8, "num_labels": 5}, "segment", ("pixel_values",), (3, 224, 224)
    ),
    "Wav2Vec2ForCTC": (
        {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
         "vocab_size": 12, "conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3],
         "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2},
        "sequence?blank=0", ("input_values",), (16000,)
    ),
    "CLIPModel": (
        {"text_config": {**TEXT, "eos_token_id": 2}, "vision_config": {**PICTURE}},
        None, ("input_ids", "pixel_values", "attention_mask"), (12,)
    ),
    "T5ForConditionalGeneration": (
        {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
        None, (*TOKENS, "decoder_input_ids"), (512,)
    ),
}  # fmt: skip
QUICK = ("BertForSequenceClassification", "ViTForImageClassification")


def saved(folder: Path, name: str, config: dict[str, Any], **options: Any) -> Path:
    """A folder with a small network of random weights, as transformers writes it."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    with torch.no_grad():
        network = cls(cls.config_class(**config)).eval()
        for parameter in network.parameters():  # fresh biases are zero, which would hide a missing one
            parameter.add_(torch.randn_like(parameter) * 0.05)
    network.save_pretrained(folder, **options)
    return folder


def edited(folder: Path, **changes: Any) -> Path:
    """The folder with another configuration; a value of None leaves the entry out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "bert"
    return saved(folder, "BertForSequenceClassification", NETWORKS["BertForSequenceClassification"][0])


@pytest.fixture
def folder(bert: Path, tmp_path: Path) -> Path:
    """A copy of it to change."""
    for each in bert.iterdir():
        (tmp_path / each.name).write_bytes(each.read_bytes())
    return tmp_path


def gives_the_same(ours: nn.Module, sample: InputSpec | None, folder: Path, cls: Any) -> None:
    """The outputs are those of the network as transformers loads it."""
    assert sample is not None
    batch = named(noise(sample, 2, seed=0), sample)
    with torch.no_grad():
        found, wanted = ours(**batch), cls.from_pretrained(folder)(**batch)
    for key, value in found.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, wanted[key], atol=1e-4, rtol=1e-4)


def loads_the_same(folder: Path, cls: Any, path: Path | None = None, options: str = "") -> None:
    """The network, before it is captured, is the one that transformers loads."""
    architecture = resolve(f"hf:{folder}{options}")
    module, _ = build_loaded(architecture, dict(read_state(path or folder).state), "here")
    gives_the_same(module, architecture.input, folder, cls)


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS],
)
def test_the_class_that_the_configuration_names(name: str, tmp_path: Path) -> None:
    config, task, names, shape = NETWORKS[name]
    folder = saved(tmp_path, name, config)
    opened = open_model(folder)
    assert opened.architecture is not None
    assert opened.architecture.task == task
    assert opened.program is not None, opened.untraced
    assert tuple(each.name for each in opened.program.input.tensors) == names
    assert opened.program.input.shape == shape
    assert opened.program.labels == (("bad", "good") if name.startswith("BertFor") else None)
    gives_the_same(opened.program, opened.program.input, folder, getattr(transformers, name))


def test_shards_and_names_of_older_files(folder: Path) -> None:
    """LayerNorm's weights were once called gamma and beta; transformers renames them, and so do we."""
    state = load_file(folder / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in state.items()
    }
    assert old.keys() != state.keys()
    (folder / "model.safetensors").unlink()
    names = list(old)
    table = {}
    for part, some in {"a.safetensors": names[::2], "b.safetensors": names[1::2]}.items():
        save_file({name: old[name] for name in some}, folder / part, metadata={"format": "pt"})
        table |= dict.fromkeys(some, part)
    index = {"metadata": {}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    loads_the_same(folder, transformers.BertForSequenceClassification)


def test_weights_apart_from_the_folder(bert: Path, tmp_path: Path) -> None:
    torch.save(load_file(bert / "model.safetensors"), tmp_path / "last.pth")
    path, cls = tmp_path / "last.pth", transformers.BertForSequenceClassification
    loads_the_same(bert, cls, path, "?length=8")
    assert [each.shape for each in resolve(f"hf:{bert}?length=8").input.tensors] == [(8,)] * 3


def test_options_are_fields_of_the_configuration(bert: Path) -> None:
    assert resolve(f"hf:{bert}?num_labels=5").build().classifier.out_features == 5
    with pytest.raises(ArchitectureError, match=r"no option 'num_label'; did you mean 'num_labels'\?"):
        resolve(f"hf:{bert}?num_label=5")
    with pytest.raises(ArchitectureError, match="length must be an integer above 0"):
        resolve(f"hf:{bert}?length=0")


def test_the_preprocessing_of_pictures(tmp_path: Path) -> None:
    saved(tmp_path, "ViTForImageClassification", PICTURE)
    said = {
        "size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True,
        "resample": 3, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.3], "do_normalize": True,
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    architecture = resolve(f"hf:{tmp_path}")
    assert architecture.input is not None
    assert architecture.input.preprocess == Preprocess(36, 32, "bicubic", (0.5, 0.4, 0.3), (0.2, 0.2, 0.3), 3)


NOT_BUILT = {
    "code": ({"architectures": ["Own"], "auto_map": {"AutoModel": "own.Own"}}, "names Own .* never run"),
    "no such class": ({"architectures": ["system"]}, "names system .* no class of transformers"),
    "another's": ({"architectures": ["GPT2LMHeadModel"]}, "names GPT2LMHeadModel for model_type 'bert'"),
    "no class": ({"architectures": ["AutoModel"]}, "names AutoModel .* no class of transformers"),
    "a path": ({"architectures": ["models.bert.BertModel"]}, "no class of transformers"),
    "no list": ({"architectures": "BertModel"}, "names no class in architectures"),
    "another type": ({"model_type": "os"}, "model_type 'os', which this transformers does not know"),
    "no type": ({"model_type": None}, "which this transformers does not know"),
    "quantized": ({"quantization_config": {"quant_method": "gptq"}}, "quantized already"),
    "nonsense": ({"hidden_size": "wide"}, "cannot be used"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOT_BUILT)
def test_what_is_not_built_gives_its_tensors_and_why(kind: str, folder: Path) -> None:
    changes, words = NOT_BUILT[kind]
    (folder / "own.py").write_text(f"open({str(folder / 'it-ran')!r}, 'w'); Own = object")
    edited(folder, **changes)
    opened = open_model(folder)
    assert opened.network is None
    assert opened.notes[-1].startswith("architecture not recognised: ")
    assert "\n" not in opened.notes[-1]
    with pytest.raises(ArchitectureError, match=words):
        resolve(f"hf:{folder}")
    assert not (folder / "it-ran").exists()


def test_code_kernels_and_other_weights_that_a_folder_names_are_left_alone(folder: Path, bert: Path) -> None:
    (folder / "own.py").write_text(f"open({str(folder / 'it-ran')!r}, 'w'); Own = object")
    edited(
        folder,
        auto_map={"AutoModelForSequenceClassification": "own.Own"},
        attn_implementation="somebody/kernels",
        _attn_implementation="somebody/kernels",
    )
    assert any("never run" in note for note in resolve(f"hf:{folder}").notes)
    module, _ = build_loaded(resolve(f"hf:{folder}"), dict(read_state(folder).state), "here")
    gives_the_same(module, resolve(f"hf:{bert}").input, bert, transformers.BertForSequenceClassification)
    assert not (folder / "it-ran").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("classifier.bias"), r"1 missing \(classifier.bias\)"),
        (lambda s: s.update({"classifier.bias": torch.ones(3)}), r"'classifier.bias' is \(3,\) in the file"),
        (lambda s: s.update({"classifier.bias": torch.ones(2, dtype=torch.int8)}), "is int8 in the file"),
        (lambda s: s.update({"classifier.bias": torch.full((2,), torch.nan)}), "classifier.bias"),
    ],
    ids=["missing", "reshaped", "integers", "nan"],
)
def test_weights_that_do_not_fit(change: Any, words: str, folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception, match=words) as caught:
        open_model(folder)
    assert "\n" not in str(caught.value)


def test_without_transformers(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    opened = open_model(bert)
    assert opened.network is None
    assert "pip install 'modelopt-cli[hf]'" in opened.notes[-1]
    with pytest.raises(EnvironmentFailure, match=r"pip install 'modelopt-cli\[hf\]'"):
        resolve(f"hf:{bert}")


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError, match=r"there is no config\.json in it"):
        resolve(f"hf:{tmp_path}")


def test_a_folder_named_in_a_file_is_not_followed(bert: Path, tmp_path: Path) -> None:
    state = {"w": torch.ones(3)}
    path = tmp_path / "a.safetensors"
    artifact.write_tensors(state, {}, path, history=(), arch=f"hf:{bert}", input_spec=None)
    opened = open_model(path)
    assert opened.network is None
    assert any("made with arch=" in note for note in opened.notes)


def test_a_bar_and_the_way_to_the_network_are_back(bert: Path) -> None:
    from huggingface_hub import constants
    from transformers.utils import logging

    before = (constants.HF_HUB_OFFLINE, logging.get_verbosity(), logging.is_progress_bar_enabled())
    resolve(f"hf:{bert}")
    assert before == (constants.HF_HUB_OFFLINE, logging.get_verbosity(), logging.is_progress_bar_enabled())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 10**6}, "config.json: says num_hidden_layers 1000000, and a network has 0 to"),
        ({"num_hidden_layers": -1}, "config.json: says num_hidden_layers -1, and a network has 0 to"),
        (
            {"num_hidden_layers": 10**4},
            r"at least 1,\d+ weights, and the file has \d+; its numbers of layers",
        ),
        ({"hidden_size": 2**40}, r"at least [\d,]{10,} parameters, and the file has [\d,]+; its numbers"),
        ({"hidden_size": 20_000}, r"at least [\d,]{10,} parameters, and the file has [\d,]+; its numbers"),
        ({"vocab_size": 2**33}, r"at least [\d,]{10,} parameters, and the file has [\d,]+; its numbers"),
        ({"hidden_act": "nosuch"}, "config.json says hidden_act 'nosuch', which transformers does not know"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_configuration_beyond_its_weights(changes: dict[str, Any], said: str, folder: Path) -> None:
    """It is refused before there is a network of that size."""
    began = time.monotonic()
    with pytest.raises(ArchitectureError, match=said) as caught:
        build_loaded(resolve(f"hf:{edited(folder, **changes)}"), dict(read_state(folder).state), "here")
    assert type(caught.value) is ArchitectureError
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 30
