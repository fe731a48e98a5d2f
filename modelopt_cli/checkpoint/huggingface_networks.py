"""Hugging Face folders as networks: the class of transformers that the configuration names.

The folder is data. A class is taken only where transformers has one of that name for the folder's type of
model; what the configuration says of code beside it (``auto_map``), of kernels and of other files to load is
left out, and nothing is downloaded.
"""

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_cli.checkpoint.arch import Architecture, ArchitectureSource, ArchSpec, Value, construct
from modelopt_cli.checkpoint.build_limits import check_counts
from modelopt_cli.checkpoint.folder import CONFIG, fields_with, json_object
from modelopt_cli.checkpoint.huggingface_inputs import input_of, takes_pictures_too
from modelopt_cli.checkpoint.tensor_names import Difference
from modelopt_cli.errors import ArchitectureError, EnvironmentFailure
from modelopt_cli.settings import did_you_mean
from modelopt_cli.text import first_line, short

INSTALL = "pip install 'modelopt-cli[hf]'"

_TASKS = {
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING": "text",
    "MODEL_FOR_CAUSAL_LM_MAPPING": "language",
    "MODEL_FOR_CTC_MAPPING": "sequence",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING": "classify",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING": "classify",
    "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING": "classify",
    "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING": "segment",
    "MODEL_FOR_OBJECT_DETECTION_MAPPING": "detect",
}
"""transformers' tables of classes, and the task of theirs."""
_EMBEDS = "MODEL_MAPPING"

# What a configuration may not say: code, kernels and other files that transformers would fetch and run.
_LEFT_OUT = frozenset(
    {
        "auto_map", "custom_pipelines", "trust_remote_code", "attn_implementation", "_attn_implementation",
        "_attn_implementation_internal", "experts_implementation", "_experts_implementation",
        "use_kernels", "kernel_config", "_name_or_path", "name_or_path", "adapter_path",
    }
)  # fmt: skip
_PRETRAINED = ("use_pretrained_backbone", "pretrained")
_OVERRIDES, _SPELT = ("length",), {"num_classes": "num_labels"}
_PLAIN = {"return_dict": True, "output_attentions": False, "output_hidden_states": False, "use_cache": False}


def installed() -> bool:
    """True if transformers is there; imports nothing."""
    return importlib.util.find_spec("transformers") is not None


def _resolve(spec: ArchSpec) -> Architecture:
    folder = Path(spec.name)
    data = _configuration(folder, spec.text)
    with _quiet():
        config = _config_of(data, spec)
        cls = _class_of(data, config, spec.text)
        task, sample = _task_of(cls, config), input_of(cls, config, folder, _length(spec))

    def build() -> nn.Module:
        with _quiet():
            return construct(spec, lambda: _built(cls, _config_of(data, spec), data, spec))

    def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor] | Difference:
        with _quiet():
            return _renamed(cls, _config_of(data, spec), state, spec.text)

    return Architecture(
        spec.text,
        build,
        sample,
        num_classes=getattr(config, "num_labels", None) if task in ("text", "classify") else None,
        class_names=partial(_class_names, config, folder, task) if task is not None else None,
        task=task,
        rename=rename,
        notes=(_CODE_LEFT,) if "auto_map" in data else (),
        bounded=True,
    )


def _built(cls: Any, config: Any, data: Mapping[str, Any], spec: ArchSpec) -> Any:
    """The network of a configuration.

    Raises:
        ArchitectureError: transformers has nothing of the name that a field says, such as an activation.
    """
    try:
        return cls(config)
    except KeyError as error:
        fields = list(fields_with({**data, **spec.options}, error.args[0] if error.args else None))
        if not fields:
            raise
        problem = (
            f"{CONFIG} says {' and '.join(fields)} '{short(error.args[0])}', which transformers does not know"
        )
        raise ArchitectureError(problem, where=short(spec.text)) from error


_CODE_LEFT = (
    "the folder names code of its own (auto_map), which is never run: transformers' own class is used"
)


def _configuration(folder: Path, where: str) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        hint = "name a Hugging Face folder, which has one"
        raise ArchitectureError(f"there is no {CONFIG} in it", where=short(where), hint=hint)
    if not installed():
        raise EnvironmentFailure(f"{short(where)} needs the optional package transformers", hint=INSTALL)
    return json_object(folder / CONFIG)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers without its bars, advice and reports, and without a way to download anything."""
    try:
        from huggingface_hub import constants
        from transformers.utils import logging
    except ImportError as error:
        raise EnvironmentFailure(
            f"transformers cannot be imported ({first_line(error)})", hint=INSTALL
        ) from error
    level, bars, offline = (
        logging.get_verbosity(), logging.is_progress_bar_enabled(), constants.HF_HUB_OFFLINE
    )  # fmt: skip
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _config_of(data: Mapping[str, Any], spec: ArchSpec) -> Any:
    """transformers' configuration, of what in a file only describes the network.

    Raises:
        ArchitectureError: its type is unknown, it is quantized otherwise, or a value does not fit.
    """
    from transformers import CONFIG_MAPPING

    kind, where = data.get("model_type"), short(spec.text)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        problem = f"{CONFIG} says model_type '{short(kind)}', which this transformers does not know"
        raise ArchitectureError(problem, where=where, hint="name its network as FILE.py:CALLABLE")
    if "quantization_config" in data:
        raise ArchitectureError("its weights are quantized already", where=where, hint="give the original")
    described = _described(data)
    check_counts(described, f"{where}: {CONFIG}")
    try:
        config = CONFIG_MAPPING[kind].from_dict(described)
        for name, value in _options(spec, config).items():
            setattr(config, name, value)
    except ArchitectureError:
        raise
    except Exception as error:  # a configuration checks its values in its own ways
        problem = f"{CONFIG} cannot be used: {first_line(error)}"
        raise ArchitectureError(problem, where=where) from error
    for name, value in _PLAIN.items():
        setattr(config, name, value)
    return config


def _described(value: Any) -> Any:
    """A configuration, and those within, without what would fetch or run anything."""
    if isinstance(value, dict):
        kept = {name: _described(part) for name, part in value.items() if name not in _LEFT_OUT}
        return kept | {name: False for name in _PRETRAINED if isinstance(kept.get(name), bool)}
    return [_described(part) for part in value] if isinstance(value, list) else value


def _options(spec: ArchSpec, config: Any) -> dict[str, Value]:
    """Options of the spec that are fields of the configuration."""
    own = {_SPELT.get(name, name): v for name, v in spec.options.items() if name not in _OVERRIDES}
    for name in own:
        if not hasattr(config, name) or name in _LEFT_OUT or name.startswith("_"):
            known = [*_OVERRIDES, "num_labels", *config.to_dict()]
            hint = did_you_mean(name, known) or f"{CONFIG} has the names"
            raise ArchitectureError(f"has no option '{short(name)}'", where=short(spec.text), hint=hint)
    check_counts(own, short(spec.text))
    return own


def _length(spec: ArchSpec) -> int | None:
    length = spec.options.get("length")
    if length is not None and (not isinstance(length, int) or length < 1):
        raise ArchitectureError("length must be an integer above 0", where=short(spec.text))
    return length


def _class_of(data: Mapping[str, Any], config: Any, where: str) -> Any:
    """transformers' class of the first name in ``architectures``, made for this configuration.

    Raises:
        ArchitectureError: there is none.
    """
    import transformers

    names = data.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ArchitectureError(f"{CONFIG} names no class in architectures", where=short(where))
    name = names[0]
    # A name out of a file: looked up only where transformers itself lists it.
    found = getattr(transformers, name) if name.isidentifier() and name in dir(transformers) else None
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        made_for = getattr(found, "config_class", None)
        if made_for is not None and isinstance(config, made_for):
            return found
    own = "code of the folder, which is never run" if "auto_map" in data else "no class of transformers"
    problem = f"{CONFIG} names {short(name)} for model_type '{config.model_type}', which is {own}"
    raise ArchitectureError(problem, where=short(where), hint="name its network as FILE.py:CALLABLE")


def _task_of(cls: Any, config: Any) -> str | None:
    """The task of a class, from the table that has it; vectors are those of an encoder of texts."""
    from transformers.models.auto import modeling_auto

    for table, task in _TASKS.items():
        if _has(getattr(modeling_auto, table), cls, config):
            if task == "sequence":
                return f"sequence?blank={config.pad_token_id or 0}"
            regresses = task == "text" and getattr(config, "problem_type", None) == "regression"
            return "regress" if regresses else task
    encodes = cls.main_input_name == "input_ids" and not config.is_encoder_decoder
    encodes = encodes and not takes_pictures_too(config)
    return "embed" if encodes and _has(getattr(modeling_auto, _EMBEDS), cls, config) else None


def _has(mapping: Any, cls: Any, config: Any) -> bool:
    classes = mapping.get(type(config), ())
    return cls in (classes if isinstance(classes, tuple) else (classes,))


def _class_names(config: Any, folder: Path, task: str) -> tuple[str, ...] | None:
    """Names of the classes: a recogniser's characters, or labels that somebody gave."""
    if task.startswith("sequence"):
        return _characters(folder, config.vocab_size)
    labels = getattr(config, "id2label", None) or {}
    names = tuple(str(labels.get(number)) for number in range(len(labels)))
    if set(labels) != set(range(len(labels))) or len(set(names)) != len(names):
        return None
    return None if all(name == f"LABEL_{number}" for number, name in enumerate(names)) else names


def _characters(folder: Path, count: int) -> tuple[str, ...] | None:
    """Characters of a recogniser of speech by their ids, the word's end as a space."""
    if not (folder / "vocab.json").is_file():
        return None
    ids = {number: text for text, number in json_object(folder / "vocab.json").items()}
    names = tuple(str(ids.get(number)) for number in range(count))
    return tuple(" " if name == "|" else name for name in names) if len(set(names)) == count else None


def _renamed(
    cls: Any, config: Any, state: Mapping[str, Tensor], where: str
) -> dict[str, Tensor] | Difference:
    """The tensors of a file by the names of today's class, as transformers itself renames them."""
    try:
        loaded, report = cls.from_pretrained(
            None,
            config=config,
            state_dict=dict(state),
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # any tensors, any class
        raise ArchitectureError(
            f"the weights cannot be loaded: {first_line(error)}", where=short(where)
        ) from error
    missing, reshaped = report["missing_keys"], report["mismatched_keys"]
    if missing or reshaped:
        shapes = tuple((name, tuple(have), tuple(want)) for name, have, want in sorted(reshaped))
        return Difference(tuple(sorted(missing)), (), shapes)
    own = dict(loaded.state_dict())
    for name in own.keys() & state.keys():
        if own[name].is_floating_point() != state[name].is_floating_point():
            kind = str(state[name].dtype).removeprefix("torch.")
            problem = f"'{short(name)}' is {kind} in the file, a float in the network"
            raise ArchitectureError(problem, where=short(where))
    return own


HUGGINGFACE = ArchitectureSource("hf:FOLDER", _resolve, local=True)
