"""Sources that wrap a Dataset object: torchvision's, and the user's own."""

import inspect
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler
from torch.utils.data.dataloader import default_collate

from modelopt_cli.data.batch_samples import BatchStream, has_label, own_collate, pair, put_together
from modelopt_cli.data.data_kinds import Options
from modelopt_cli.data.data_spec import DataSpec, option_texts
from modelopt_cli.data.raw_inputs import RawInputs
from modelopt_cli.data.source import Raw, Source, Stream, is_sized
from modelopt_cli.data.targets import RawTarget, raw_target
from modelopt_cli.errors import DataError
from modelopt_cli.option_types import is_of_type
from modelopt_cli.settings import did_you_mean
from modelopt_cli.text import typed_line
from modelopt_cli.user_code import call, load_callable, user_code

_END = object()
_DEFAULT_SPLIT = {"ImageNet": "val", "Imagenette": "val", "Places365": "val"}


class TorchvisionSource(Source):
    """Dataset of ``torchvision.datasets``, which yields PIL images and integer labels."""

    def __init__(self, name: str, dataset: Any) -> None:
        self.name = name
        self.dataset = dataset
        self.num_classes = _count_classes(dataset)
        self.class_names = _names_of_classes(dataset)
        if len(dataset) == 0:
            raise DataError("holds no samples", where=name)
        image = self.load(0)[0]
        self.channels = 1 if isinstance(image, Image.Image) and image.mode in ("1", "L", "LA") else 3

    def __len__(self) -> int:
        return len(self.dataset)

    def load(self, index: int) -> tuple[Raw, RawTarget]:
        """The image as the dataset decodes it."""
        with user_code("cannot be read", self.where(index), DataError):
            image, label = self.dataset[index]
        if not isinstance(image, Image.Image):
            raise DataError(f"yields {type(image).__name__}, not images", where=self.name)
        return image, raw_target(label)


class DatasetSource(Source):
    """The user's map-style dataset of ``(inputs, target)``, or of inputs alone; see ``pair``."""

    ready = True

    def __init__(self, name: str, target: str, options: Options, dataset: Any, collate: Any = None) -> None:
        self.name = name
        self.target = target
        self.options = options
        self.dataset = dataset
        self.own_collate = collate
        self.collates = collate is not None
        self.num_classes = _count_classes(dataset)
        self.class_names = _names_of_classes(dataset)
        self.labelled = _labelled(self, self.item(0))

    def __len__(self) -> int:
        return len(self.dataset)

    def item(self, index: int) -> Any:
        """The item as the dataset gives it."""
        with user_code("cannot be read", self.where(index), DataError):
            return self.dataset[index]

    def together(self, items: list[Any]) -> list[tuple[RawInputs, RawTarget]]:
        """See :class:`Source`."""
        return _together(self, items)

    def load(self, index: int) -> tuple[Raw, RawTarget]:
        """The sample as the dataset gives it."""
        item = self.item(index)
        return self.together([item])[0] if self.collates else pair(item, self.where(index))

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker cannot import a module that was loaded from a path, so it calls the callable again.
        return {k: v for k, v in self.__dict__.items() if k not in ("dataset", "own_collate")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.dataset, self.own_collate = _call(self.target, self.options, self.name)


class DatasetStream(Stream):
    """The user's iterable-style dataset of ``(inputs, target)``, or of inputs alone; see ``pair``."""

    def __init__(self, name: str, dataset: Any, collate: Any = None) -> None:
        self.name = name
        self.dataset = dataset
        self.own_collate = collate
        self.collates = collate is not None
        self.sized = is_sized(dataset)
        self.num_classes = _count_classes(dataset)
        self.class_names = _names_of_classes(dataset)
        first = next(self.items(), _END)
        self.labelled = first is _END or _labelled(self, first)

    def together(self, items: list[Any]) -> list[tuple[RawInputs, RawTarget]]:
        """See :class:`Stream`."""
        return _together(self, items)

    def __iter__(self) -> Iterator[tuple[RawInputs, RawTarget]]:
        for index, item in enumerate(self.items()):
            yield self.together([item])[0] if self.collates else pair(item, self.where(index))

    def items(self) -> Iterator[Any]:
        """The items as the dataset gives them."""
        with user_code("cannot be read", self.name, DataError):
            items = iter(self.dataset)
        for index in itertools.count():
            # Not around the yield: what the consumer prints or raises is not the user's code.
            with user_code("cannot be read", self.where(index), DataError):
                item = next(items, _END)
            if item is _END:
                return
            yield item


def open_torchvision(spec: DataSpec) -> Source:
    """``torchvision:NAME@ROOT``: the test (or validation) split unless an option says otherwise."""
    from torchvision import datasets

    name, _, root = spec.target.partition("@")
    known = [n for n in datasets.__all__ if inspect.isclass(getattr(datasets, n)) and n != "VisionDataset"]
    if name not in known:
        raise DataError(
            f"torchvision has no dataset called {name!r}",
            where=spec.text,
            hint=did_you_mean(name, known) or f"write {spec.row.form}",
        )
    cls = getattr(datasets, name)
    options = _torchvision_options(spec, name, root, inspect.signature(cls).parameters)
    try:
        dataset = cls(**options)
    except Exception as error:
        raise DataError(
            f"cannot be opened ({typed_line(error)})", where=spec.text, hint="modelopt never downloads data"
        ) from error
    return TorchvisionSource(spec.text, dataset)


def _torchvision_options(spec: DataSpec, name: str, root: str, parameters: Any) -> dict[str, Any]:
    options: dict[str, Any] = _as_wanted(spec, parameters)
    for key in options:
        if key == "download":
            raise DataError("modelopt never downloads data", where=spec.text, hint="fetch it first")
        if key not in parameters or "transform" in key or key in ("root", "loader"):
            hint = did_you_mean(key, parameters) or f"see torchvision.datasets.{name}"
            raise DataError(f"{name} has no option {key!r}", where=spec.text, hint=hint)
    if "root" in parameters:
        if not root:
            raise DataError("names no folder", where=spec.text, hint=f"write torchvision:{name}@ROOT")
        options["root"] = root
    if "download" in parameters:
        options["download"] = False
    if "train" in parameters:
        options.setdefault("train", False)
    elif "split" in parameters:
        options.setdefault("split", _DEFAULT_SPLIT.get(name, "test"))
    return options


def _as_wanted(spec: DataSpec, parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """Options for a function with these parameters: as they are written where it wants a text."""
    written = option_texts(spec)
    return {
        key: written[key] if key in parameters and _is_text(parameters[key]) else value
        for key, value in spec.options.items()
    }


def _is_text(parameter: inspect.Parameter) -> bool:
    """True of a parameter that is a text by its annotation, or by its default where it has none."""
    if parameter.annotation is parameter.empty:
        return isinstance(parameter.default, str)
    try:
        return is_of_type("", parameter.annotation) and not is_of_type(0, parameter.annotation)
    except TypeError:  # annotations that are no types
        return False


def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    """Parameters of the user's function, as far as they are known."""
    try:
        return inspect.signature(function, eval_str=True).parameters
    except Exception:  # names in its annotations may mean anything
        return {}


def open_callable(spec: DataSpec) -> Source | Stream:
    """``FILE.py:CALLABLE?key=value``: calls it and wraps the Dataset it returns."""
    options = _as_wanted(spec, _parameters(_loaded(spec.target)))
    dataset, collate = _call(spec.target, options, spec.text)
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        with user_code("has no length that can be used", spec.text, DataError):
            size = len(dataset)
        if size == 0:
            raise DataError("returned a dataset with no samples", where=spec.text)
        return DatasetSource(spec.text, spec.target, options, dataset, collate)
    if isinstance(dataset, DataLoader):
        return BatchStream(spec.text, dataset)
    if hasattr(dataset, "__iter__") and not hasattr(dataset, "__next__"):
        return DatasetStream(spec.text, dataset, collate)
    raise DataError(
        f"returned {type(dataset).__name__}, not a Dataset",
        where=spec.text,
        hint="return an object with __getitem__ and __len__, or with __iter__ that can start again",
    )


def _call(target: str, options: Options, name: str) -> tuple[Any, Any]:
    """The dataset that the user's callable returns, and what puts its items together, or None."""
    function = _loaded(target)
    made = call(function, options, name, DataError, "calling it failed")
    dataset, collate = of_loader(made) if isinstance(made, DataLoader) else (made, None)
    if dataset is None:
        return made, None
    return dataset, collate or own_collate(dataset, function)


def _loaded(target: str) -> Any:
    place, _, name = target.rpartition(":")
    return load_callable(place, name, DataError)


def of_loader(loader: Any) -> tuple[Any, Any]:
    """The dataset of a DataLoader, None where its order counts, and its own ``collate_fn`` or None."""
    in_any_order = type(loader.sampler) in (SequentialSampler, RandomSampler)
    if not in_any_order or type(loader.batch_sampler) is not BatchSampler or not is_sized(loader.dataset):
        return None, None
    return loader.dataset, None if loader.collate_fn is default_collate else loader.collate_fn


def _together(source: Any, items: list[Any]) -> list[tuple[RawInputs, RawTarget]]:
    samples = put_together(source.own_collate, items, source.name)
    return [pair((inputs,) if label is None else (inputs, label), source.name) for inputs, label in samples]


def _labelled(source: Any, item: Any) -> bool:
    """True if an item has a label."""
    if source.collates:
        ((_, label),) = put_together(source.own_collate, [item], source.name)
        return label is not None
    return has_label(item)


def _names_of_classes(dataset: Any) -> tuple[str, ...] | None:
    """Class names from a dataset's ``classes``: names, or tuples of synonyms, the usual one first."""
    classes = getattr(dataset, "classes", None)
    if not isinstance(classes, list | tuple) or not classes:
        return None
    names = [each[0] if isinstance(each, tuple) and each else each for each in classes]
    return tuple(names) if all(isinstance(name, str) for name in names) else None


def _count_classes(dataset: Any) -> int | None:
    for attribute in ("num_classes", "classes"):
        value = getattr(dataset, attribute, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, list | tuple) and value:
            return len(value)
    return None
