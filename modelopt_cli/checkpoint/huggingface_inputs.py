"""Inputs of a network of transformers, from its signature, and their sizes, from the folder's files."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

from modelopt_cli.checkpoint.folder import json_object
from modelopt_cli.errors import UsageError
from modelopt_cli.program.input_spec import InputSpec, Interpolation, Preprocess

LONGEST = 512
"""Most tokens of a sample where nobody says more: some configurations allow a million."""
_DECODED = 32
_RATE, _SIDE = 16_000, 224
_RESAMPLING: dict[int, Interpolation] = {0: "nearest", 2: "bilinear", 3: "bicubic"}
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
# Their table of positions begins after that of the padding.
_AFTER_PADDING = frozenset(
    {
        "camembert", "data2vec-text", "esm", "ibert", "lilt", "longformer", "mpnet", "roberta",
        "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
    }
)  # fmt: skip


class Sizes:
    """The sizes that a folder's files say.

    Args:
        config: transformers' configuration.
        folder: with what there is of ``tokenizer_config.json`` and ``preprocessor_config.json``.
        length: tokens of a sample, where the user says so.
    """

    def __init__(self, config: Any, folder: Path, length: int | None) -> None:
        self.config = config
        self._folder = folder
        self._length = length

    def file(self, name: str) -> Mapping[str, Any]:
        """A file of the folder as a JSON object; empty where it is not there."""
        path = self._folder / name
        return json_object(path) if path.is_file() else {}

    def find(self, *names: str, part: str = "") -> Any:
        """The first of these fields that the configuration or a part of it has."""
        for config in (self.config, getattr(self.config, part, None) if part else None):
            for name in names:
                if (value := getattr(config, name, None)) is not None:
                    return value
        return None

    @property
    def tokens(self) -> int:
        """Tokens of a sample."""
        if self._length is not None:
            return self._length
        positions = self.find(*_POSITIONS, part="text_config") or LONGEST
        if self.config.model_type in _AFTER_PADDING:
            positions -= (self.find("pad_token_id") or 0) + 1
        said = [
            self.file("tokenizer_config.json").get("model_max_length"),
            self.file("sentence_bert_config.json").get("max_seq_length"),
        ]
        return max(1, min([positions, LONGEST, *(int(n) for n in said if _is_size(n))]))

    @property
    def image(self) -> InputSpec:
        """An image, with the preprocessing that the folder says."""
        channels = self.find("num_channels", "num_image_channels", part="vision_config")
        channels = channels if channels in (1, 3) else 3
        said = self.file("preprocessor_config.json")
        preprocess = _preprocess(said, channels) if said else None
        if preprocess is not None and (size := preprocess.crop or preprocess.resize) is not None:
            height, width = size if isinstance(size, tuple) else (int(size), int(size))
            return InputSpec((channels, height, width), preprocess)
        size = self.find("image_size", part="vision_config") or _SIDE
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return InputSpec((channels, height, width))


def _is_size(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value) and value >= 1


def _side(size: Any) -> int | tuple[int, int] | None:
    """A size as the files say it: a short side, or height and width."""
    if isinstance(size, int):
        return size
    if not isinstance(size, Mapping):
        return None
    height, width = size.get("height"), size.get("width")
    if isinstance(height, int) and isinstance(width, int):
        return height, width
    short = size.get("shortest_edge")
    if not isinstance(short, int):
        return None
    return (short, short) if "longest_edge" in size else short


def _preprocess(said: Mapping[str, Any], channels: int) -> Preprocess | None:
    """The steps of ``preprocessor_config.json``; None where they are none of ours."""
    interpolation = _RESAMPLING.get(said.get("resample", 2))
    resize, crop = _side(said.get("size")), _side(said.get("crop_size"))
    scales = math.isclose(said.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-3)
    if interpolation is None or not scales or said.get("do_rescale") is False:
        return None
    crop = crop[0] if isinstance(crop, tuple) and crop[0] == crop[1] else crop
    if not said.get("do_center_crop", crop is not None):
        crop = None
    part = said.get("crop_pct")
    if crop is None and isinstance(resize, int):
        # A short side alone stands for a square; ConvNeXt's are cut out of a larger image.
        crop, resize = resize, round(resize / part) if _is_share(part) and resize < 384 else (resize, resize)
    try:
        return Preprocess(
            resize=resize if said.get("do_resize", True) else None,
            crop=crop if isinstance(crop, int) and not isinstance(resize, tuple) else None,
            interpolation=interpolation,
            channels=channels,
            **_normalization(said, channels),
        )
    except UsageError:
        return None


def _is_share(value: Any) -> TypeGuard[float]:
    return isinstance(value, float) and 0 < value <= 1


def _normalization(said: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """Mean and deviation of each channel, where they are used."""
    if said.get("do_normalize", "image_mean" in said) is False:
        return {}
    parts = {"mean": said.get("image_mean"), "std": said.get("image_std")}
    values = {
        name: tuple(map(float, part if isinstance(part, list) else [part] * channels))
        for name, part in parts.items()
        if part is not None
    }
    return {name: part * channels if len(part) == 1 else part for name, part in values.items()}


def _tokens(sizes: Sizes) -> InputSpec:
    return InputSpec((sizes.tokens,), dtype="int64")


def _decoded(sizes: Sizes) -> InputSpec | None:
    if not sizes.config.is_encoder_decoder:
        return None
    most = sizes.find("max_target_positions") or _DECODED
    return InputSpec((min(sizes.tokens, most, _DECODED),), dtype="int64")


def _types(sizes: Sizes) -> InputSpec | None:
    return _tokens(sizes) if (sizes.find("type_vocab_size", part="text_config") or 0) > 1 else None


def _images(sizes: Sizes) -> InputSpec:
    frames = sizes.find("num_frames")
    image = sizes.image
    return InputSpec((frames, *image.shape)) if isinstance(frames, int) and frames > 1 else image


def _sound(sizes: Sizes) -> InputSpec:
    """A second of sound; or the spectrogram of a network that takes one by the same name."""
    frames, bins = sizes.find("max_length"), sizes.find("num_mel_bins")
    if isinstance(frames, int) and isinstance(bins, int):
        return InputSpec((frames, bins))
    return InputSpec((sizes.file("preprocessor_config.json").get("sampling_rate", _RATE),))


def _spectrogram(sizes: Sizes) -> InputSpec | None:
    positions, bins = sizes.find("max_source_positions"), sizes.find("num_mel_bins")
    if not isinstance(positions, int) or not isinstance(bins, int):
        return None
    return InputSpec((bins, 2 * positions))


_MAKERS: dict[str, Callable[[Sizes], InputSpec | None]] = {
    "input_ids": _tokens,
    "pixel_values": _images,
    "input_values": _sound,
    "input_features": _spectrogram,
    "attention_mask": _tokens,
    "token_type_ids": _types,
    "decoder_input_ids": _decoded,
}
"""The form of an input; None where a network of these sizes does without it, or nothing tells."""
_OF_TEXTS = frozenset({"attention_mask", "token_type_ids"})
_MAIN = frozenset({"input_ids", "pixel_values", "input_values", "input_features"})


def takes_pictures_too(config: Any) -> bool:
    """True of a network of texts and pictures, such as CLIP."""
    return hasattr(config, "text_config") and hasattr(config, "vision_config")


def input_of(cls: Any, config: Any, folder: Path, length: int | None) -> InputSpec | None:
    """The inputs of a class of transformers, in the order of its ``forward``.

    Args:
        cls: the class.
        config: its configuration.
        folder: of the network, whose files say more.
        length: tokens of a sample, where the user says so.

    Returns:
        None where nothing tells what an input looks like that it cannot do without.
    """
    parameters = inspect.signature(cls.forward).parameters
    main = {cls.main_input_name}
    if takes_pictures_too(config):
        main |= _MAIN & parameters.keys()
    wanted = main | {"decoder_input_ids"} | (_OF_TEXTS if "input_ids" in main else set())
    sizes = Sizes(config, folder, length)
    made = {name: _MAKERS[name](sizes) for name in parameters if name in wanted and name in _MAKERS}
    described = [replace(spec, name=name) for name, spec in made.items() if spec is not None]
    needed = {
        name
        for name, each in parameters.items()
        if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD and name != "self"
    }
    if not (main | needed) <= {spec.name for spec in described}:
        return None
    return replace(described[0], others=tuple(described[1:]))
