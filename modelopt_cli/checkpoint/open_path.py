"""``open_model``: any path the user gives, to the most that can be made of it."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modelopt_cli import artifact
from modelopt_cli.artifact.lazy import described
from modelopt_cli.artifact.reader import PARTS, Artifact, lazy_tensors, program_in
from modelopt_cli.checkpoint.arch import Architecture
from modelopt_cli.checkpoint.build import build_loaded
from modelopt_cli.checkpoint.integer_layers import restore_integer_layers
from modelopt_cli.checkpoint.opened import Opened, require_network, shape_hint
from modelopt_cli.checkpoint.pt2_opened import open_exported
from modelopt_cli.checkpoint.recognition import describe_nearest, recognise_file
from modelopt_cli.checkpoint.sources import check_found_spec, names_library, resolve
from modelopt_cli.checkpoint.state_file import StateFile, read_state, state_bytes
from modelopt_cli.checkpoint.tensor_checks import check_finite, check_range
from modelopt_cli.errors import ArchitectureError, ArtifactError, CaptureError
from modelopt_cli.kernels import prepare
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.parted import code_of
from modelopt_cli.regular import HeldFile
from modelopt_cli.settings import option
from modelopt_cli.text import short

HELD_NETWORKS: dict[str, nn.Module] = {}
"""Networks in memory whose code calls the parts in a file, by its path; see ``api.given_models``."""


def open_model(
    path: str | Path,
    arch: str | None = None,
    input_spec: InputSpec | None = None,
    adapt: Callable[[InputSpec], InputSpec | None] | None = None,
    header: Artifact | None = None,
) -> Opened:
    """Open an artifact or a checkpoint.

    An artifact gives its Program. A checkpoint's architecture is ``arch``, or recognised; its network is
    captured as a Program, or, where that cannot be, returned as a module, and ``untraced`` says why.
    A ``.pt2`` file holds its own graph. An unrecognised checkpoint gives its bare tensors.

    Args:
        path: the file or Hugging Face folder.
        arch: an ``--arch`` spec; an artifact with a graph needs none and takes none.
        input_spec: what a sample looks like; wins over what the architecture or artifact implies.
        adapt: what to make of the input that a recognised architecture implies; by default that itself.
        header: the artifact, where it is open already; see :func:`open_header`.

    Raises:
        CheckpointError, ArtifactError, ArchitectureError, EnvironmentFailure: in one line each.
    """
    path = Path(path)
    if (header := header or open_header(path)) is not None:
        return _open_artifact(header, path, arch, input_spec)
    file = read_state(path)
    if arch is not None:
        opened = _build(resolve(arch, input_spec), dict(file.state), file, list(file.notes))
    else:
        opened = _unnamed(file, input_spec, adapt)
    stored = state_bytes(described(file.state))
    return dataclasses.replace(opened, tensor_bytes=stored, file_bytes=file.file_bytes)


def _unnamed(
    file: StateFile, input_spec: InputSpec | None, adapt: Callable[[InputSpec], InputSpec | None] | None
) -> Opened:
    """Open a checkpoint without a named architecture: recognised, by its own graph, or as bare tensors."""
    notes, shapes = list(file.notes), described(file.state)
    named, why = recognise_file(file.state, shapes, file.arch)
    exported, aside = open_exported(file, named.architecture if named else None, input_spec, adapt)
    if exported is not None:
        return exported
    notes += [aside] if aside else []
    if named is None:
        check_finite(file.state, file.path, masks=True)
        check_range(file.state, file.path)
        notes += [] if aside else [f"architecture not recognised: {why or describe_nearest(shapes)}"]
        return Opened(file.state, False, file.sha256, notes=notes, unknown=why)
    architecture = named.architecture
    if input_spec is not None:
        architecture = dataclasses.replace(architecture, input=input_spec)
    elif adapt is not None and architecture.input is not None:
        architecture = dataclasses.replace(architecture, input=adapt(architecture.input))
    return _build(architecture, named.state, file, [*notes, f"recognised as {architecture.spec}"])


def open_header(path: str | Path) -> Artifact | None:
    """An artifact whose header is read and whose digest is checked; None of any other file.

    Raises:
        ArtifactError: it is damaged or from a newer version.
    """
    return Artifact(HeldFile(path, ArtifactError)) if artifact.is_artifact(path) else None


def fresh_model(arch: str, input_spec: InputSpec | None = None, seed: int = 0) -> Opened:
    """A network with random weights, as if it had been opened.

    Args:
        arch: an ``--arch`` spec.
        input_spec: what a sample looks like; wins over what the architecture implies.
        seed: of torch's random numbers; whatever else the user's own code draws from is its own affair.

    Raises:
        ArchitectureError, EnvironmentFailure: in one line each.
    """
    architecture = resolve(arch, input_spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = architecture.build().float().eval()
    program, why = _capture(module, architecture)
    network = program or module
    return Opened(
        dict(network.state_dict()),
        is_artifact=False,
        source_sha256="",
        program=program,
        module=None if program is not None else module,
        architecture=architecture,
        untraced=why,
    )


def as_built(opened: Opened) -> Opened:
    """The same weights in the module of the architecture, which may do in training what no graph does.

    Of a network in parts, its own code runs in training, too.

    Raises:
        ArchitectureError: it is a graph, and nothing says what that was made of.
    """
    if opened.program is None or code_of(opened.program) is not None:
        return opened
    if opened.architecture is None:
        raise ArchitectureError(
            "holds a graph, which computes no losses of its own",
            where=opened.path or "the network",
            hint=f"give the checkpoint that it was made of, with its {option('arch')}",
        )
    module, _ = build_loaded(opened.architecture, opened.state, opened.path)
    state = dict(module.state_dict())
    return dataclasses.replace(opened, state=state, program=None, module=module)


def load_network(
    path: str | Path,
    arch: str | None = None,
    input_spec: InputSpec | None = None,
    device: str = "cpu",
) -> Program | nn.Module:
    """The network in a file, ready to run on a device: a Program, or the module that cannot be traced.

    Args:
        path: an artifact, or a checkpoint whose network is recognised or named.
        arch: the architecture, for files that do not hold their own network.
        input_spec: shape and preprocessing of one sample; wins over what is recorded or implied.
        device: "cpu" or a CUDA device.

    Raises:
        InputError: the file, the architecture or the network cannot be used.
        EnvironmentFailure: the device is not there.
    """
    header = open_header(path)
    own = header is not None and header.document.stands_alone
    opened = open_model(path, None if own else arch, input_spec, header=header)
    network = require_network(opened, path)
    return prepare(network, device) if isinstance(network, Program) else network.to(device).eval()


def _build(
    architecture: Architecture, state: Mapping[str, torch.Tensor], file: StateFile, notes: list[str]
) -> Opened:
    module, loading = build_loaded(architecture, state, file.path)
    notes = [*notes, *architecture.notes, *loading]
    program, why = _capture(module, architecture)
    network = program or module
    return Opened(
        dict(network.state_dict()),
        is_artifact=False,
        source_sha256=file.sha256,
        program=program,
        module=None if program is not None else module,
        architecture=architecture,
        notes=notes,
        untraced=why,
    )


def _captured(opened: Opened) -> Opened:
    """The network of an artifact without a graph as a Program, with all that the file says of it.

    Where it cannot be captured, ``untraced`` says why.
    """
    module, architecture, tensors = opened.module, opened.architecture, opened.tensors
    if module is None or architecture is None or tensors is None:
        return opened
    program, why = _capture(module, architecture)
    if program is None:
        return dataclasses.replace(opened, untraced=why)
    state = dict(program.state_dict())
    program.history, program.labels = tensors.history, tensors.labels or program.labels
    program.encodings = {name: each for name, each in tensors.encodings.items() if name in state}
    return dataclasses.replace(opened, state=state, program=program, module=None, tensors=None)


def _capture(module: nn.Module, architecture: Architecture) -> tuple[Program | None, str | None]:
    """The module as a Program, or None and the reason why not; raises CaptureError for names of inputs."""
    from modelopt_cli.program.capture import capture, require_names
    from modelopt_cli.program.partition import capture_parts

    if architecture.input is None:
        return None, f"{short(architecture.spec)} does not say what its input is; {shape_hint()}"
    try:
        if architecture.input.others:  # a single one may be called anything
            require_names(module, architecture.input)
    except CaptureError as error:
        named = f"name inputs so in the data, or with {option('input_shape')}"
        raise CaptureError(error.message, where=architecture.spec, hint=f"{error.hint}: {named}") from None
    about: dict[str, Any] = {"labels": architecture.labels, "arch": architecture.spec}
    try:
        return capture(module, architecture.input, **about), None
    except CaptureError as error:
        reason = error
    with contextlib.suppress(CaptureError):  # such a network says more of itself by the first reason
        parted = capture_parts(module, architecture.input, reason, **about)
        if parted is not None:
            return parted, None
    return None, f"the network cannot be traced: {reason}"


def _open_artifact(header: Artifact, path: Path, arch: str | None, input_spec: InputSpec | None) -> Opened:
    if header.document.program is None:
        return _open_tensors(header, path, arch, input_spec)
    if not header.document.stands_alone:
        return _open_parts(header, path, arch, input_spec)
    if arch is not None:
        raise ArchitectureError("holds its own network", where=str(path), hint=f"leave {option('arch')} out")
    program = program_in(header)
    if input_spec is not None:
        program.input = program.input.with_samples_of(input_spec)
    return Opened(dict(program.state_dict()), True, header.sha256, program=program)


def _open_parts(header: Artifact, path: Path, arch: str | None, input_spec: InputSpec | None) -> Opened:
    """An artifact that holds parts of a network, whose own code has to be named or given."""
    document = header.document
    held = HELD_NETWORKS.get(str(path)) if arch is None else None
    spec = arch or (document.network if names_library(document.network) else None)
    architecture = None
    if held is not None:
        network = held
    elif spec is not None:
        if arch is None:
            check_found_spec(spec, 0, str(path))
        architecture = resolve(spec, input_spec or document.input)
        network = architecture.build().float().eval()
    else:
        # A spec found in a file never imports the user's code: that takes --arch on the command line.
        named = short(document.network) if document.network else "FILE.py:CALLABLE"
        hint = f"name that: {option('arch', named)}"
        raise ArchitectureError(f"holds {PARTS}", where=str(path), hint=hint)
    program = program_in(header, network)
    program.arch = spec or program.arch
    if input_spec is not None:
        program.input = program.input.with_samples_of(input_spec)
    state = dict(program.state_dict())
    return Opened(state, True, header.sha256, program=program, architecture=architecture)


def _open_tensors(header: Artifact, path: Path, arch: str | None, input_spec: InputSpec | None) -> Opened:
    """An artifact that holds tensors only: bare, or of a network that must be built from its spec."""
    tensors, sha256 = lazy_tensors(header), header.sha256
    spec = arch or (tensors.arch if names_library(tensors.arch) else None)
    if spec is not None and arch is None:
        sides = [side for tensor in described(tensors.state).values() for side in tensor.shape]
        check_found_spec(spec, max(sides, default=0), str(path))
    if spec is None:
        # A spec found in a file never imports the user's code: that takes --arch on the command line.
        made = f", made with {option('arch', short(tensors.arch))}" if tensors.arch else ""
        notes = [f"holds tensors without their network{made}"]
        return Opened(tensors.state, True, sha256, notes=notes, tensors=tensors)
    architecture = resolve(spec, input_spec or tensors.input)
    module, notes = build_loaded(architecture, dict(tensors.state), str(path))
    state = dict(module.state_dict())
    restore_integer_layers(module, tensors.history, tensors.encodings)
    return _captured(Opened(state, True, sha256, None, module, architecture, notes, tensors=tensors))
