"""``--arch``: from a spec to something that builds the network and knows what it eats."""

import copy
import dataclasses
import difflib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from modelopt_cli.checkpoint.arch_spec import ArchSpec, parse_spec
from modelopt_cli.checkpoint.builtin import BUILTINS
from modelopt_cli.checkpoint.fingerprint import torchvision_inputs
from modelopt_cli.errors import ArchitectureError, EnvironmentFailure, a_or_an
from modelopt_cli.program.input_spec import InputSpec, Interpolation, Preprocess
from modelopt_cli.text import first_line, short
from modelopt_cli.user_code import call, load_callable

_IMAGENET_CLASSES = 1000
_INTERPOLATIONS: dict[str, Interpolation] = {
    "nearest": "nearest", "bilinear": "bilinear", "bicubic": "bicubic"
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A network that can be built.

    Attributes:
        spec: the ``--arch`` value that names it.
        build: makes it with fresh random weights.
        input: shape and preprocessing of a sample, or None where nothing says so.
        own: whether the code is ours or a library's; the user's own code may initialise as it likes.
        num_classes: number of logits where the spec implies it.
        published_classes: number of logits of its published weights, if there are any.
        assumed: one line for each option that its published weights need and the spec does not say.
    """

    spec: str
    build: Callable[[], nn.Module]
    input: InputSpec | None
    own: bool = False
    num_classes: int | None = None
    published_classes: int | None = None
    assumed: tuple[str, ...] = ()

    @property
    def source_of_input(self) -> str:
        """Who says what its input is."""
        return f"published for {self.spec}, assumed" if self.published else f"set by {self.spec}"

    @property
    def published(self) -> bool:
        """True if ``input`` is that of published weights; a file may have been trained with another."""
        return self.spec.startswith(("torchvision:", "timm:"))

    @property
    def labels(self) -> tuple[str, ...] | None:
        """ImageNet's class names for a torchvision network of 1000 classes, else None.

        They come from torchvision, whose import takes a second: hence not stored.
        """
        if not self.spec.startswith("torchvision:") or self.num_classes != _IMAGENET_CLASSES:
            return None
        from torchvision import models

        return tuple(models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


def resolve(spec: str, input_spec: InputSpec | None = None) -> Architecture:
    """The architecture a spec names.

    Args:
        spec: ``torchvision:NAME``, ``timm:NAME``, ``builtin:NAME``, ``FILE.py:CALLABLE`` or
            ``package.module:CALLABLE``, with ``?name=value&name=value`` for its arguments.
        input_spec: what the user says a sample looks like; wins over what the architecture implies.

    Raises:
        ArchitectureError: unknown, malformed, or the user's code failed.
        EnvironmentFailure: timm is asked for and not installed.
    """
    parsed = parse_spec(spec)
    sources: dict[str, Callable[[ArchSpec], Architecture]] = {
        "torchvision": _torchvision,
        "timm": _timm,
        "builtin": _builtin,
    }
    found = sources.get(parsed.source, _user)(parsed)
    return found if input_spec is None else dataclasses.replace(found, input=input_spec)


def _user(spec: ArchSpec) -> Architecture:
    """A network of the user's own code, or a copy of one that it holds ready; nothing says what it takes."""
    target = load_callable(spec.place, spec.name, ArchitectureError)

    def build() -> nn.Module:
        make = (lambda **_: copy.deepcopy(target)) if isinstance(target, nn.Module) else target
        built = call(make, spec.options, spec.text, ArchitectureError, "building it failed")
        _require_module(built, spec)
        return built  # type: ignore[no-any-return]

    return Architecture(spec.text, build, None)


def _require_module(built: Any, spec: ArchSpec) -> None:
    if not isinstance(built, nn.Module):
        raise ArchitectureError(
            f"{spec.name} returned {a_or_an(type(built).__name__)}, not a torch.nn.Module",
            where=short(spec.text),
        )
    for name, tensor in (*built.named_parameters(), *built.named_buffers()):
        if is_lazy(tensor):
            raise ArchitectureError(
                f"{spec.name} returned a network whose {short(name)} has no shape yet",
                where=short(spec.text),
                hint="run it once on a sample before returning it, or use layers that are not lazy",
            )


def _torchvision(spec: ArchSpec) -> Architecture:
    inputs = torchvision_inputs()
    _require_known(spec, inputs)
    options, assumed = dict(spec.options), list[str]()
    if spec.name in ("googlenet", "inception_v3"):
        # The published weights, and what was fine-tuned from them, expect TensorFlow's value range.
        if "transform_input" not in options:
            assumed.append(_transform_note(spec.text))
        options.setdefault("transform_input", True)
        options.setdefault("init_weights", True)  # else torchvision warns

    def build() -> nn.Module:
        from torchvision import models

        return _construct(spec, lambda: models.get_model(spec.name, weights=None, **options))

    return Architecture(
        spec.text,
        build,
        _torchvision_input(spec, inputs[spec.name]),
        own=True,
        num_classes=_class_count(spec, _IMAGENET_CLASSES),
        published_classes=_IMAGENET_CLASSES,
        assumed=tuple(assumed),
    )


def _transform_note(spec: str) -> str:
    option = f"{spec}{'&' if '?' in spec else '?'}transform_input=false"
    return (
        "transform_input=true is assumed, as its published weights need it; "
        f"trained without them, give --arch '{option}'"
    )


def published_top1(spec: str) -> float | None:
    """The lowest top-1 on ImageNet, in percent, that torchvision states for an architecture's weights."""
    parsed = parse_spec(spec)
    if parsed.source != "torchvision":
        return None
    from torchvision import models

    found = [
        w.meta["_metrics"].get("ImageNet-1K", {}).get("acc@1") for w in models.get_model_weights(parsed.name)
    ]
    return min((value for value in found if value is not None), default=None)


def _torchvision_input(spec: ArchSpec, published: tuple[InputSpec, ...]) -> InputSpec:
    """The input of the first published weights; of those for the image size, where that can vary."""
    if not spec.name.startswith("vit_"):
        return published[0]
    size = spec.options.get("image_size", 224)
    if not isinstance(size, int):
        raise ArchitectureError("image_size must be a whole number", where=short(spec.text))
    match = next((entry for entry in published if entry.shape[-1] == size), None)
    if match is not None:
        return match
    preprocess = published[0].preprocess
    assert preprocess is not None
    return InputSpec((3, size, size), dataclasses.replace(preprocess, resize=size, crop=size))


def _builtin(spec: ArchSpec) -> Architecture:
    _require_known(spec, BUILTINS)
    builtin = BUILTINS[spec.name]
    for name, value in spec.options.items():
        kinds: tuple[type, ...] = (int, float) if name == "width" else (int,)
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < 1 << 20:  # type: ignore[operator]
            raise ArchitectureError(f"{name} must be a positive number", where=short(spec.text))
    channels = spec.options.get("in_channels", builtin.channels)
    assert isinstance(channels, int)
    preprocess = None
    if channels in (1, 3):
        size = (builtin.size, builtin.size)
        preprocess = Preprocess(resize=size, mean=(0.0,) * channels, std=(1.0,) * channels, channels=channels)
    return Architecture(
        spec.text,
        lambda: _construct(spec, lambda: builtin.make(**spec.options)),
        InputSpec((channels, builtin.size, builtin.size), preprocess),
        own=True,
        num_classes=_class_count(spec, 10),
    )


def _timm(spec: ArchSpec) -> Architecture:
    try:
        import timm
    except ImportError as error:
        raise EnvironmentFailure(
            f"{short(spec.text)} needs the optional package timm ({first_line(error)})",
            hint="pip install 'modelopt-cli[timm]'",
        ) from error
    if not timm.is_model(spec.name):
        _require_known(spec, timm.list_models())
    config = timm.get_pretrained_cfg(spec.name)
    return Architecture(
        spec.text,
        lambda: _construct(spec, lambda: timm.create_model(spec.name, pretrained=False, **spec.options)),
        _timm_input(config) if config is not None else None,
        num_classes=_class_count(spec, getattr(config, "num_classes", None)),
        published_classes=getattr(config, "num_classes", None),
    )


def _timm_input(config: Any) -> InputSpec | None:
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


def _class_count(spec: ArchSpec, default: int | None) -> int | None:
    value = spec.options.get("num_classes", default)
    return value if isinstance(value, int) else None


def _require_known(spec: ArchSpec, names: Collection[str]) -> None:
    if spec.name in names:
        return
    near = difflib.get_close_matches(spec.name, names, 1, 0.5)
    raise ArchitectureError(
        f"{spec.source} has no network '{short(spec.name)}'",
        hint=f"did you mean {spec.source}:{near[0]}?" if near else f"for example {spec.source}:{min(names)}",
    )


def _construct(spec: ArchSpec, make: Callable[[], Any]) -> nn.Module:
    """Call a library's constructor; what it says about its arguments becomes ours."""
    try:
        module = make()
    except Exception as error:  # any library code, any arguments
        raise ArchitectureError(f"cannot be built: {first_line(error)}", where=short(spec.text)) from error
    assert isinstance(module, nn.Module)
    return module


class SkipInit(torch.overrides.TorchFunctionMode):
    """Leaves parameters uninitialised while a network is built whose every parameter is then loaded.

    Drawing 138 million random numbers for VGG-16 takes two seconds, only to be overwritten.
    """

    _SKIPPED = frozenset(
        {
            torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.erfinv_, torch.Tensor.clamp_,
            torch.Tensor.mul_, torch.Tensor.add_, torch.Tensor.fill_, torch.Tensor.zero_,
            torch.nn.init.kaiming_uniform_, torch.nn.init.kaiming_normal_, torch.nn.init.normal_,
            torch.nn.init.uniform_, torch.nn.init.constant_,
        }
    )  # fmt: skip

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return the tensor untouched where a parameter would be filled."""
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")
        if func in self._SKIPPED and isinstance(target, nn.Parameter):
            return target
        return func(*args, **kwargs)
