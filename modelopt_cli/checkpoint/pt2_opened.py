"""A ``.pt2`` file as an opened model: its own graph, and what is known of a library's network."""

import dataclasses
from collections.abc import Callable

from modelopt_cli.checkpoint.arch import Architecture
from modelopt_cli.checkpoint.opened import Opened
from modelopt_cli.checkpoint.state_file import StateFile
from modelopt_cli.errors import CaptureError
from modelopt_cli.program.input_spec import InputSpec


def open_exported(
    file: StateFile,
    architecture: Architecture | None,
    input_spec: InputSpec | None,
    adapt: Callable[[InputSpec], InputSpec | None] | None,
) -> tuple[Opened | None, str]:
    """The network of a ``.pt2`` file from its graph.

    Args:
        file: its contents.
        architecture: the network that has the names and shapes of its weights, or None. Where it takes the
            same input, its preprocessing and its classes are taken.
        input_spec: what a sample looks like; wins.
        adapt: what to make of the input otherwise.

    Returns:
        None where a Program cannot hold the graph, with a line that says why, or where there is none.

    Raises:
        CheckpointError: the graph is malformed, or asks for too much.
    """
    if file.exported is None:
        return None, ""
    from modelopt_cli.checkpoint.pt2_network import read_program  # captures, which takes a second to import

    try:
        program, notes = read_program(file.exported, file.path)
    except CaptureError as error:
        return None, f"its graph was left aside: {error}"
    implied = architecture.input if architecture is not None else None
    fits = implied is not None and not program.input.others and program.input.fits(implied.shape)
    known = input_spec
    if known is None:
        known = implied if fits else program.input
        known = adapt(known) if adapt is not None and known is not None else known
    if known is not None:
        program.input = program.input.with_samples_of(known)
    notes = [*file.notes, "read from its own graph", *notes]
    named = dataclasses.replace(architecture, input=program.input) if architecture and fits else None
    if named is not None:
        notes.append(f"recognised as {named.spec}")
        program.labels, program.arch = named.labels, named.spec
    state = dict(program.state_dict())
    return Opened(state, False, file.sha256, program, architecture=named, notes=notes), ""
