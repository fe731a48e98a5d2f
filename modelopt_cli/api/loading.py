"""Loading: from a path to a network that runs."""

from pathlib import Path
from typing import Annotated

from torch import Tensor, nn

from modelopt_cli.api.call import shaped
from modelopt_cli.api.choosing_task import source_history
from modelopt_cli.api.keywords import ARCH, SHAPE, AnyDevice, AnyPath
from modelopt_cli.api.opening import ModelFile, known_input, overridden
from modelopt_cli.api.signatures import public
from modelopt_cli.artifact.reader import program_in, tensors_in
from modelopt_cli.checkpoint import Opened, open_header, read_state, require_network
from modelopt_cli.data import PreprocessOverrides
from modelopt_cli.errors import ArchitectureError, ArtifactError, CaptureError, UsageError
from modelopt_cli.kernels import prepare, require_device
from modelopt_cli.measure.evaluated_model import is_quantized
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.safe_names import path_in_network

Arch = Annotated[str | None, ARCH]
InputShape = Annotated[tuple[int, ...] | str | None, SHAPE]


@public()
def load(
    path: AnyPath,
    *,
    arch: Arch = None,
    input_shape: InputShape = None,
    input_spec: InputSpec | None = None,
    device: AnyDevice = "cpu",
) -> Program:
    """Open a checkpoint or an artifact as a Program, ready to run.

    Args:
        path: a modelopt file, or any checkpoint whose network is recognised or named.
        arch: the architecture of a checkpoint that is not recognised, such as ``"torchvision:resnet18"`` or
            ``"net.py:make"``.
        input_shape: shape of one sample without the batch, such as ``(3, 224, 224)`` or ``"128:int64"``,
            where the architecture does not imply it.
        input_spec: the same together with the preprocessing; give one of the two.
        device: "cpu" or a CUDA device.

    Returns:
        A callable on float tensors ``(N, *program.input.shape)``, with ``.graph``, ``.history``
        and ``.input``. Where the architecture says a task, the history does, too.

    Raises:
        InputError: the file, the architecture or the network cannot be used.
        EnvironmentFailure: the device is not there.

    Example:
        >>> program = mo.load("base.safetensors")
        >>> program(torch.rand(2, *program.input.shape)).shape
        torch.Size([2, 10])
    """
    require_device(device)
    opened = _opened(Path(path), arch, _sample(input_shape, input_spec))
    if opened.program is None:
        hint = f"{opened.untraced}; or load_network(path, arch=...) gives it as a module"
        raise CaptureError("has no graph", where=str(path), hint=hint)
    return prepare(opened.program, device)


@public()
def load_network(
    path: AnyPath,
    *,
    arch: Arch = None,
    input_shape: InputShape = None,
    input_spec: InputSpec | None = None,
    device: AnyDevice = "cpu",
) -> nn.Module:
    """Open a checkpoint or an artifact; a network that cannot be traced is the module it is.

    Args:
        path: a modelopt file, or any checkpoint whose network is recognised or named.
        arch: the architecture, as :func:`load` takes it.
        input_shape: shape of one sample without the batch, where the architecture does not imply it.
        input_spec: the same together with the preprocessing; give one of the two.
        device: "cpu" or a CUDA device.

    Returns:
        A Program, or else the module, in evaluation mode; callable on float tensors ``(N, *shape)``.

    Raises:
        InputError: the file, the architecture or the network cannot be used.
        EnvironmentFailure: the device is not there.

    Example:
        >>> network = mo.load_network("net.pth", arch="net.py:make", input_shape=(1, 8, 8))
    """
    require_device(device)
    opened = _opened(Path(path), arch, _sample(input_shape, input_spec))
    if opened.program is not None:
        return prepare(opened.program, device)
    assert opened.module is not None
    return opened.module.to(device).eval()


@public()
def load_state_dict(path: AnyPath) -> dict[str, Tensor]:
    """The weights of a checkpoint or an artifact, decoded, as an ordinary state dict.

    It needs no architecture: this is the way back from a file that was made without one, to be loaded
    with ``network.load_state_dict(modelopt_cli.load_state_dict(path))``.

    Args:
        path: a modelopt file, or a checkpoint of any kind.

    Returns:
        CPU tensors by the names and of the types that they had, in their order. Tied weights are there under
        all their names, and share their memory. After channel pruning, a weight that the network makes of
        others stands there as it was made.

    Raises:
        CheckpointError, ArtifactError: the file cannot be read, or its layers compute in int8, so that they
            have no weights in float.
        EnvironmentFailure: it cannot be opened.

    Example:
        >>> network.load_state_dict(mo.load_state_dict("net.pth"))
        <All keys matched successfully>
    """
    path = Path(path)
    if (header := open_header(path)) is None:
        return dict(read_state(path).state)
    if header.document.program is not None and is_quantized(program_in(header)):
        hint = "load(path) gives the network that computes with them"
        raise ArtifactError(
            "its layers compute in int8 and have no float weights", where=str(path), hint=hint
        )
    state = tensors_in(header).state
    if header.document.program is None:
        return dict(state)
    return {path_in_network(path): tensor for path, tensor in state.items()}


def _sample(shape: tuple[int, ...] | str | None, spec: InputSpec | None) -> InputSpec | None:
    """The input that a user describes in one of two ways."""
    if shape is None:
        return spec
    if spec is not None:
        raise UsageError("cannot be given together with input_spec", where="input_shape")
    return overridden(None, shaped(PreprocessOverrides(), shape))


def _opened(path: Path, arch: str | None, input_spec: InputSpec | None) -> Opened:
    file = ModelFile.of(path)
    opened = file.open(arch, input_spec or known_input([file], arch, None, None))
    try:
        require_network(opened, path)
    except ArchitectureError as error:
        hint = f"{error.hint}; or load_state_dict(path) gives its tensors"
        raise ArchitectureError(error.message, where=error.where, hint=hint) from error
    if opened.program is not None:
        opened.program.history = (*opened.program.history, *source_history(opened))
    return opened
