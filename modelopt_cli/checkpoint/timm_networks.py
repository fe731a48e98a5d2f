"""timm's networks, where that package is installed."""

import importlib.util
from collections.abc import Mapping
from typing import Any

from modelopt_cli.checkpoint.arch import (
    Architecture,
    ArchitectureSource,
    ArchSpec,
    class_count,
    construct,
    require_known,
)
from modelopt_cli.checkpoint.tensor_names import Shape
from modelopt_cli.checkpoint.timm_fingerprint import known_networks, network_names
from modelopt_cli.errors import EnvironmentFailure
from modelopt_cli.program.input_spec import InputSpec, Interpolation, Preprocess
from modelopt_cli.text import first_line, short

_INTERPOLATIONS: dict[str, Interpolation] = {
    "nearest": "nearest", "bilinear": "bilinear", "bicubic": "bicubic"
}  # fmt: skip


def _resolve(spec: ArchSpec) -> Architecture:
    try:
        import timm
    except ImportError as error:
        raise EnvironmentFailure(
            f"{short(spec.text)} needs the optional package timm ({first_line(error)})",
            hint="pip install 'modelopt-cli[timm]'",
        ) from error
    if not timm.is_model(spec.name):
        require_known(spec, timm.list_models())
    config = timm.get_pretrained_cfg(spec.name)
    options: dict[str, Any] = dict(spec.options)
    return Architecture(
        spec.text,
        lambda: construct(spec, lambda: timm.create_model(spec.name, pretrained=False, **options)),
        _input(config) if config is not None else None,
        num_classes=class_count(spec, getattr(config, "num_classes", None)),
        published=True,
        published_classes=getattr(config, "num_classes", None),
    )


def _input(config: Any) -> InputSpec | None:
    """timm's own evaluation transform: resize to size / crop_pct, then crop."""
    channels, height, width = config.input_size
    interpolation = _INTERPOLATIONS.get(config.interpolation)
    if height != width or channels not in (1, 3) or interpolation is None:
        return InputSpec((channels, height, width))
    return InputSpec(
        (channels, height, width),
        Preprocess(
            resize=int(height / config.crop_pct),
            crop=height,
            interpolation=interpolation,
            mean=tuple(config.mean),
            std=tuple(config.std),
            channels=channels,
        ),
    )


def _recognise(shapes: Mapping[str, Shape]) -> list[str]:
    """Specs of the networks that have these tensors; none where timm is not there to build them."""
    if importlib.util.find_spec("timm") is None:
        return []
    return [
        f"timm:{name}" if classes is None else f"timm:{name}?num_classes={classes}"
        for name, classes in known_networks(shapes)
    ]


TIMM = ArchitectureSource(
    "timm:NAME", _resolve, names=network_names, recognise=_recognise, channels_option="in_chans"
)
