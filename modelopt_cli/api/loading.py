"""From a path to a network that runs."""

from pathlib import Path

from torch import Tensor, nn

from modelopt_cli.api.arguments import naming_arguments
from modelopt_cli.api.opening import ModelFile, known_input
from modelopt_cli.artifact.reader import program_in, tensors_in
from modelopt_cli.checkpoint import Opened, open_header, read_state, require_network
from modelopt_cli.errors import ArchitectureError, ArtifactError, CaptureError
from modelopt_cli.kernels import prepare
from modelopt_cli.measure.evaluated_model import is_quantized
from modelopt_cli.program import InputSpec, Program


@naming_arguments()
def load(
    path: str | Path,
    *,
    arch: str | None = None,
    input_spec: InputSpec | None = None,
    device: str = "cpu",
) -> Program:
    """Open a checkpoint or an artifact as a Program, ready to run.

    Args:
        path: a modelopt file, or any checkpoint whose network is recognised or named.
        arch: the architecture, as ``--arch`` takes it.
        input_spec: shape and preprocessing of one sample, where the architecture does not imply it.
        device: "cpu" or a CUDA device.

    Returns:
        A callable on float tensors ``(N, *program.input.shape)``, with ``.graph``, ``.history``
        and ``.input``.

    Raises:
        InputError: the file, the architecture or the network cannot be used.
        EnvironmentFailure: the device is not there.
    """
    opened = _opened(path, arch, input_spec)
    if opened.program is None:
        hint = f"{opened.untraced}; or load_network(path, arch=...) gives it as a module"
        raise CaptureError("has no graph", where=str(path), hint=hint)
    return prepare(opened.program, device)


@naming_arguments()
def load_network(
    path: str | Path,
    *,
    arch: str | None = None,
    input_spec: InputSpec | None = None,
    device: str = "cpu",
) -> nn.Module:
    """As ``load``, but a network that cannot be traced is returned as the module it is."""
    opened = _opened(path, arch, input_spec)
    if opened.program is not None:
        return prepare(opened.program, device)
    assert opened.module is not None
    return opened.module.to(device).eval()


@naming_arguments()
def load_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The weights of a checkpoint or an artifact, decoded, as an ordinary state dict.

    It needs no architecture: this is the way back from a file that was made without one, to be loaded
    with ``network.load_state_dict(modelopt_cli.load_state_dict(path))``.

    Args:
        path: a modelopt file, or a checkpoint of any kind.

    Returns:
        CPU tensors by the names and of the types that they had, in their order. Tied weights are there under
        all their names, and share their memory. Of a file with a graph, the names are those of its Program.

    Raises:
        CheckpointError, ArtifactError: the file cannot be read, or its layers compute in int8, so that they
            have no weights in float.
        EnvironmentFailure: it cannot be opened.
    """
    if (header := open_header(path)) is None:
        return dict(read_state(path).state)
    if header.document.program is not None and is_quantized(program_in(header)):
        hint = "load(path) gives the network that computes with them"
        raise ArtifactError(
            "its layers compute in int8 and have no float weights", where=str(path), hint=hint
        )
    return dict(tensors_in(header).state)


def _opened(path: str | Path, arch: str | None, input_spec: InputSpec | None) -> Opened:
    file = ModelFile.of(path)
    opened = file.open(arch, input_spec or known_input([file], arch, None, None))
    try:
        require_network(opened, path)
    except ArchitectureError as error:
        hint = f"{error.hint}; or load_state_dict(path) gives its tensors"
        raise ArchitectureError(error.message, where=error.where, hint=hint) from error
    return opened
