"""Data that are read with a file of the network's own folder, such as its tokenizer."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode

from modelopt_cli.api.request import EvalRequest, Measuring, Request
from modelopt_cli.checkpoint.sources import folder_of
from modelopt_cli.data.data_spec import parse_spec
from modelopt_cli.data.source import Samples

Asked = TypeVar("Asked", bound=Measuring)


def with_own_folder(request: Asked) -> Asked:
    """The request with data that name the folder of its network where they need one and name none.

    Raises:
        DataError: a data spec is malformed.
    """
    folder = next(_folders(request), None)
    if folder is None:
        return request
    changed: dict[str, Any] = {"data": _naming(request.data, folder)}
    if isinstance(request, Request):
        changed["calibration"] = _naming(request.calibration, folder)
        if (asked := request.training) is not None:
            train, val = _naming(asked.train, folder) or asked.train, _naming(asked.val, folder)
            changed["training"] = replace(asked, train=train, val=val)
    return replace(request, **changed)


def _folders(request: Measuring) -> Iterator[str]:
    """The folders of the networks of a request."""
    if request.arch is not None and (folder := folder_of(request.arch)) is not None:
        yield folder
    if isinstance(request, Request):
        further = [path for path, _ in request.student.also] if request.student is not None else []
        paths = [request.source, *further, *([request.student.spec] if request.student is not None else [])]
    else:
        paths = list(request.paths) if isinstance(request, EvalRequest) else []
    yield from (str(path) for path in paths if path is not None and Path(path).is_dir())


def _naming(samples: Samples | None, folder: str) -> Samples | None:
    if not isinstance(samples, str):
        return samples
    spec = parse_spec(samples)
    option = spec.row.of_network
    if not option or option in spec.options:
        return samples
    return f"{samples}{'&' if '?' in samples else '?'}{urlencode({option: folder}, safe='/')}"
