"""Reading what others wrote, and finding out which network it belongs to.

opened = open_model("resnet18.pth")          # recognised from names and shapes
opened = open_model("net.pth", "net.py:make", InputSpec((3, 32, 32)))
"""

from typing import TYPE_CHECKING

from modelopt_cli.lazy_names import lazy_names

if TYPE_CHECKING:
    from modelopt_cli.checkpoint.arch import Architecture
    from modelopt_cli.checkpoint.build import build_loaded
    from modelopt_cli.checkpoint.open_path import as_built, fresh_model, load_network, open_header, open_model
    from modelopt_cli.checkpoint.opened import Opened, require_network
    from modelopt_cli.checkpoint.recognition import describe_nearest, recognise
    from modelopt_cli.checkpoint.sources import resolve
    from modelopt_cli.checkpoint.state_file import StateFile, read_state

__all__ = [
    "Architecture",
    "Opened",
    "StateFile",
    "as_built",
    "build_loaded",
    "describe_nearest",
    "fresh_model",
    "load_network",
    "open_header",
    "open_model",
    "read_state",
    "recognise",
    "require_network",
    "resolve",
]

__getattr__ = lazy_names(
    __name__,
    {
        "Architecture": "arch",
        "Opened": "opened",
        "StateFile": "state_file",
        "as_built": "open_path",
        "build_loaded": "build",
        "describe_nearest": "recognition",
        "fresh_model": "open_path",
        "load_network": "open_path",
        "open_header": "open_path",
        "open_model": "open_path",
        "read_state": "state_file",
        "recognise": "recognition",
        "require_network": "opened",
        "resolve": "sources",
    },
)
