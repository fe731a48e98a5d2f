"""Architectures of Hugging Face's transformers, built from small random configurations."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.networks.network import Network, images, prepared
from modelopt_cli.program import InputSpec
from modelopt_cli.program.input_batch import make_inputs

CALIBRATION = 32
"""Samples to calibrate on: what is read of one token of each has few values."""
TOKENS = 200
"""Size of the vocabulary."""
WIDTHS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
TEXT = {**WIDTHS, "vocab_size": TOKENS, "max_position_embeddings": 64}
VISION = {**WIDTHS, "image_size": 64, "patch_size": 8}
SPEECH = {**WIDTHS, "vocab_size": 32, "conv_dim": (32,) * 7, "num_conv_pos_embeddings": 16}
SEQUENCE_PAIR = {
    "vocab_size": TOKENS,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
}
RESNET = {"embedding_size": 16, "hidden_sizes": (16, 32, 48, 64), "depths": (1, 1, 1, 1)}
SWIN = {
    "embed_dim": 24,
    "depths": (1, 1, 2, 1),
    "num_heads": (2, 2, 4, 4),
    "window_size": 2,
    "image_size": 64,
}
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def _inputs(**shapes: tuple[int, ...]) -> InputSpec:
    """Inputs by name: those of one size are integers, except audio."""
    first, *others = (
        InputSpec(shape, name=name, dtype="int64" if name.endswith(("ids", "mask")) else "float32")
        for name, shape in shapes.items()
    )
    return InputSpec(first.shape, dtype=first.dtype, name=first.name, others=tuple(others))


IDS = _inputs(input_ids=(24,), attention_mask=(24,))
PAIR = _inputs(input_ids=(24,), decoder_input_ids=(12,))
IMAGE = _inputs(pixel_values=(3, 64, 64))
AUDIO = _inputs(input_values=(4000,))
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """A class of transformers, its inputs, its configuration, and those of its parts."""

    model: str
    input: InputSpec
    config: Config
    parts: Mapping[str, tuple[str, Config]] = field(default_factory=dict)


NETWORKS: dict[str, Row] = {
    "BERT": Row("BertForSequenceClassification", IDS, TEXT),
    "DistilBERT": Row(
        "DistilBertForSequenceClassification",
        IDS,
        {"vocab_size": TOKENS, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128},
    ),
    "RoBERTa": Row("RobertaForSequenceClassification", IDS, TEXT),
    "ALBERT": Row("AlbertForSequenceClassification", IDS, {**TEXT, "embedding_size": 32}),
    "DeBERTa": Row(
        "DebertaV2ForSequenceClassification",
        IDS,
        {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
    ),
    "ELECTRA": Row("ElectraForSequenceClassification", IDS, {**TEXT, "embedding_size": 32}),
    "MPNet": Row("MPNetForSequenceClassification", IDS, TEXT),
    "GPT-2": Row("GPT2LMHeadModel", IDS, {"vocab_size": TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4}),
    "OPT": Row("OPTForCausalLM", IDS, {**TEXT, "ffn_dim": 128, "word_embed_proj_dim": 64}),
    "Llama": Row("LlamaForCausalLM", IDS, {**TEXT, "num_key_value_heads": 2}),
    "T5": Row(
        "T5ForConditionalGeneration",
        PAIR,
        {"vocab_size": TOKENS, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
    ),
    "BART": Row("BartForConditionalGeneration", PAIR, {**SEQUENCE_PAIR, "max_position_embeddings": 64}),
    "ViT": Row("ViTForImageClassification", IMAGE, VISION),
    "DeiT": Row("DeiTForImageClassification", IMAGE, VISION),
    "Swin": Row("SwinForImageClassification", IMAGE, SWIN),
    "ConvNeXt": Row(
        "ConvNextForImageClassification", IMAGE, {"hidden_sizes": (16, 32, 48, 64), "depths": (1, 1, 2, 1)}
    ),
    "SegFormer": Row(
        "SegformerForSemanticSegmentation",
        IMAGE,
        {
            "hidden_sizes": (16, 32, 48, 64),
            "depths": (1, 1, 1, 1),
            "decoder_hidden_size": 64,
            "num_labels": 8,
        },
    ),
    "DETR": Row(
        "DetrForObjectDetection",
        IMAGE,
        {**{k: v for k, v in SEQUENCE_PAIR.items() if k != "vocab_size"}, "num_queries": 10},
        {"backbone_config": ("ResNetConfig", {**RESNET, "out_features": ["stage4"]})},
    ),
    "YOLOS": Row(
        "YolosForObjectDetection", IMAGE, {**VISION, "image_size": [64, 64], "num_detection_tokens": 10}
    ),
    "CLIP": Row(
        "CLIPModel",
        _inputs(input_ids=(24,), pixel_values=(3, 64, 64), attention_mask=(24,)),
        {"projection_dim": 32},
        {"text_config": ("CLIPTextConfig", TEXT), "vision_config": ("CLIPVisionConfig", VISION)},
    ),
    "Whisper": Row(
        "WhisperForConditionalGeneration",
        _inputs(input_features=(80, 200), decoder_input_ids=(12,)),
        {**SEQUENCE_PAIR, "max_source_positions": 100, "max_target_positions": 32, "pad_token_id": 0},
    ),
    "Wav2Vec2": Row("Wav2Vec2ForCTC", AUDIO, SPEECH),
    "HuBERT": Row("HubertForCTC", AUDIO, SPEECH),
    "Mask2Former": Row(
        "Mask2FormerForUniversalSegmentation",
        IMAGE,
        {
            **{"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "num_attention_heads": 4},
            **{"encoder_feedforward_dim": 64, "dim_feedforward": 64, "num_queries": 10},
            **{"encoder_layers": 2, "decoder_layers": 3, "num_labels": 8},
        },
        {"backbone_config": ("SwinConfig", {**SWIN, "out_features": STAGES})},
    ),
    "Depth-Anything": Row(
        "DepthAnythingForDepthEstimation",
        _inputs(pixel_values=(3, 56, 56)),
        {
            **{"patch_size": 14, "reassemble_hidden_size": 64, "neck_hidden_sizes": [16, 32, 48, 64]},
            **{"fusion_hidden_size": 32, "head_hidden_size": 16},
        },
        {
            "backbone_config": (
                "Dinov2Config",
                {
                    **{"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4},
                    **{"image_size": 56, "patch_size": 14, "reshape_hidden_states": False},
                    "out_features": STAGES,
                },
            )
        },
    ),
}


def names() -> list[str]:
    """The architectures."""
    return list(NETWORKS)


def build(name: str, kind: str | None) -> Network:
    """The network with random weights."""
    import transformers

    row = NETWORKS[name]
    model_class = getattr(transformers, row.model)
    parts = {part: getattr(transformers, cls)(**config) for part, (cls, config) in row.parts.items()}
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**row.config, **parts)).eval()

    def batch(count: int, seed: int) -> Any:
        return make_inputs(row.input, lambda each: _values(each, count, seed))

    return prepared(Network(row.model, model, row.input, batch, calibration=CALIBRATION))


def _values(spec: InputSpec, count: int, seed: int) -> Tensor:
    """Images, audio, token ids, or a mask that leaves out a fifth of each other sample."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, *spec.shape)
    if spec.name == "pixel_values":
        return images(count, spec.shape[-1], seed)
    if spec.name == "attention_mask":
        mask = torch.ones(shape, dtype=torch.int64)
        mask[1::2, -(spec.shape[0] // 5) :] = 0
        return mask
    if spec.name.endswith("ids"):
        return torch.randint(3, TOKENS, shape, generator=generator)
    noise = torch.randn(shape, generator=generator)
    return 0.3 * (noise + noise.roll(1, -1) + noise.roll(2, -1))
