"""Selection of the layers to compress, and the reason for every layer that is left out."""

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Protocol

from torch import Tensor

from modelopt_cli.artifact import TensorFile
from modelopt_cli.artifact.encodings import is_plain
from modelopt_cli.artifact.lazy import described
from modelopt_cli.errors import NothingCompressed, UsageError
from modelopt_cli.measure.layer_status import Coverage, LayerStatus
from modelopt_cli.program import Encoding
from modelopt_cli.program.weighted import weight_label
from modelopt_cli.settings import option


class SelectionSettings(Protocol):
    """The settings by which layers are chosen; the config of every method has them."""

    @property
    def include(self) -> tuple[str, ...]: ...
    @property
    def exclude(self) -> tuple[str, ...]: ...
    @property
    def skip_first(self) -> bool: ...
    @property
    def skip_last(self) -> bool: ...


def select_layers(
    names: Iterable[str], config: SelectionSettings, unable: Iterable[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """Apply the globs and the first/last switches.

    Args:
        names: layers that could be compressed, in graph order.
        config: the globs and switches.
        unable: other layers of the network; a glob may name them, though it changes nothing.

    Returns:
        The chosen names, and a reason for each name that was not chosen.

    Raises:
        UsageError: a glob matches no layer.
    """
    ordered = list(names)
    known = dict.fromkeys((*ordered, *unable))
    for name, globs in (("include", config.include), ("exclude", config.exclude)):
        for glob in globs:
            if not any(fnmatchcase(name, glob) for name in known):
                raise UsageError(
                    f"{option(name)} {glob!r} matches no layer", hint=_suggestion(glob, list(known))
                )
    skipped: dict[str, str] = {}
    for i, name in enumerate(ordered):
        if config.include and not any(fnmatchcase(name, g) for g in config.include):
            skipped[name] = "not matched by --include"
        elif any(fnmatchcase(name, g) for g in config.exclude):
            skipped[name] = "matched by --exclude"
        elif config.skip_first and i == 0:
            skipped[name] = "first layer"
        elif config.skip_last and i == len(ordered) - 1:
            skipped[name] = "last layer"
    return [name for name in ordered if name not in skipped], skipped


def nothing_done(done: str, reasons: Mapping[str, str], setting: str) -> NothingCompressed:
    """The error that says why not one layer could be compressed.

    Args:
        done: what was to be done with layers, such as ``shared``.
        reasons: by layer, of which the first is named; empty where no layer has weights.
        setting: of the method, which decides what it takes besides the choice of layers.
    """
    for name, reason in reasons.items():
        options = f"{option('include')}, {option('exclude')} and {option(setting)}"
        problem = f"no layer can be {done} ({name}: {reason})"
        return NothingCompressed(problem, hint=f"nothing was written; see {options}")
    return NothingCompressed(
        f"there is no layer with weights that could be {done}", hint="nothing was written"
    )


def weight_labels(parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """The label of each weight in reports: its layer, or its full name where a layer has several weights."""
    layers = {name: weight_label(name) for name in parameters}
    several = Counter(layers.values())
    return {name: name if several[layer] > 1 else layer for name, layer in layers.items()}


def is_weight_name(name: str) -> bool:
    """True for the name of a weight: ``conv.weight``, ``attn.in_proj_weight``, ``lstm.weight_ih_l0``."""
    leaf = name.rpartition(".")[2]
    return leaf.endswith("weight") or leaf.startswith(("weight_ih", "weight_hh"))


def not_named_as_weights(state: Mapping[str, Tensor]) -> dict[str, str]:
    """The reason to leave out each tensor that has the form of a weight but not the name of one."""
    shaped = (name for name, tensor in state.items() if has_weight_form(tensor))
    return {name: "not called a weight" for name in shaped if not is_weight_name(name)}


def has_weight_form(tensor: Tensor) -> bool:
    """True for a tensor that could be a weight: floating point, two or more dimensions, not empty."""
    return tensor.dim() > 1 and tensor.is_floating_point() and tensor.numel() > 0


def codec_of(encoding: Encoding | None) -> str:
    """The codec that stores a tensor; an empty string for plain storage."""
    return "" if encoding is None or is_plain(encoding) else encoding.codec


def tensor_coverage(file: TensorFile) -> Coverage:
    """Coverage of the weights of an artifact that has no graph, as it stores them."""
    shapes = described(file.state)
    weights = {
        name: tensor
        for name, tensor in shapes.items()
        if name not in file.tied and has_weight_form(tensor) and is_weight_name(name)
    }
    reasons = {name: reason for entry in file.history for name, reason in entry.get("skipped", {}).items()}
    layers = []
    for name, label in weight_labels(weights).items():
        encoding, size = file.encodings.get(name), weights[name].nbytes
        if encoding is None:
            reason = reasons.get(label, "not selected")
            layers.append(LayerStatus(label, "weight", False, reason=reason, bytes=size))
        else:
            layers.append(LayerStatus(label, "weight", True, encoding.codec, bytes=size))
    return Coverage(tuple(layers))


def _suggestion(glob: str, names: list[str]) -> str:
    close = difflib.get_close_matches(glob, names, n=1, cutoff=0.0)
    return f"the nearest layer is {close[0]!r}" if close else "the network has no such layers"
