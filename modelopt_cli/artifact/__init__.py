"""The artifact: one file that is enough to run the network again. ``docs/format.md`` is its spec.

Names load on first use, so that checking an output path costs no import of torch.
"""

from typing import TYPE_CHECKING

from modelopt_cli.lazy_names import lazy_names

if TYPE_CHECKING:
    from modelopt_cli.artifact.container import TensorInfo, read_safetensors, read_safetensors_header
    from modelopt_cli.artifact.output_path import check_output, check_suffix
    from modelopt_cli.artifact.reader import (
        TensorFile,
        is_artifact,
        open_tensors,
        read_header,
        read_program,
        read_tensors,
    )
    from modelopt_cli.artifact.save import (
        Written,
        predicted_bytes,
        write_program,
        write_stream,
        write_tensors,
    )
    from modelopt_cli.artifact.stream import TensorStream
    from modelopt_cli.artifact.writer import atomic_write

_HOMES = {
    "TensorStream": "stream",
    "TensorFile": "reader",
    "TensorInfo": "container",
    "Written": "save",
    "atomic_write": "writer",
    "check_output": "output_path",
    "check_suffix": "output_path",
    "is_artifact": "reader",
    "open_tensors": "reader",
    "predicted_bytes": "save",
    "read_header": "reader",
    "read_program": "reader",
    "read_safetensors": "container",
    "read_safetensors_header": "container",
    "read_tensors": "reader",
    "write_program": "save",
    "write_stream": "save",
    "write_tensors": "save",
}

__all__ = [
    "TensorFile",
    "TensorInfo",
    "TensorStream",
    "Written",
    "atomic_write",
    "check_output",
    "check_suffix",
    "is_artifact",
    "open_tensors",
    "predicted_bytes",
    "read_header",
    "read_program",
    "read_safetensors",
    "read_safetensors_header",
    "read_tensors",
    "write_program",
    "write_stream",
    "write_tensors",
]


__getattr__ = lazy_names(__name__, _HOMES)
