"""The commands as functions on paths, modules and Programs."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from modelopt_cli import artifact
from modelopt_cli.api.arguments import configured
from modelopt_cli.api.call import Call, path_of, weighted
from modelopt_cli.api.evaluating import evaluate_files
from modelopt_cli.api.given_models import Model, Workspace, several
from modelopt_cli.api.keywords import (
    HIDDEN,
    MEASURING,
    AnyPath,
    Calibrating,
    Fitting,
    Learning,
    Output,
    Writing,
)
from modelopt_cli.api.request import EvalRequest, Student, TrainingRequest
from modelopt_cli.api.result import Measured, Result
from modelopt_cli.api.signatures import Instead, public
from modelopt_cli.artifact.coding import PLAIN_CODE, Code, require_code
from modelopt_cli.errors import UsageError
from modelopt_cli.measure.config import Gates
from modelopt_cli.methods.distill.config import DistillConfig
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.share.config import ShareConfig
from modelopt_cli.program import Program
from modelopt_cli.training.config import FineTuneConfig, IntegerTuneConfig, TrainConfig

_TUNED: dict[str, type[Any]] = {
    "training": FineTuneConfig,
    "fitting": Fitting,
    "writing": Writing,
    **MEASURING,
}
_TRAINING = {"training": TrainingRequest}


@configured(
    {
        "calibrating": Calibrating,
        "config": QuantizeConfig,
        **_TUNED,
        "training": IntegerTuneConfig,
    },
    HIDDEN,
    _TRAINING,
)
def quantize(configs: dict[str, Any], model: Model, output: Output = None) -> Result:
    """Quantize a network, and train it with its integers where there are epochs.

    Args:
        model: a path, an ``nn.Module`` or a Program; it is not changed.
        output: the file to write; without one, the result alone has the network.

    Returns:
        The result; ``result.program`` is the network, ready to run, and ``str(result)`` the table.

    Raises:
        InputError: the model, the data or an option cannot be used.
        NothingCompressed: not one layer could be quantized.

    Example:
        >>> result = mo.quantize(model, calibration=loader, scheme="int8")
        >>> logits = result.program(batch)
    """
    judged = configs["writing"].evaluate is not False and configs["given"].data is not None
    configs["config"], configs["gates"] = _limits(configs["config"], configs["gates"], judged)
    with Workspace() as space:
        return Call(configs, space).execute("quantize", model, output)


def _limits(config: QuantizeConfig, gates: Gates, judged: bool) -> tuple[QuantizeConfig, Gates]:
    """Limits as the budget where precisions are chosen, and as gates unless nothing judges such a result."""
    wanted: dict[str, Any] = {}
    for name in ("max_drop", "min_ratio", "min_speedup"):
        own = getattr(config, name)
        wanted[name] = getattr(gates, name) if own is None else own
    budget = wanted if config.automatic else dict.fromkeys(wanted)
    if config.automatic and not judged:
        return replace(config, **budget), replace(gates, **dict.fromkeys(wanted), confident=False)
    return replace(config, **budget), replace(gates, **wanted)


@configured({"calibrating": Calibrating, "config": PruneConfig, **_TUNED}, HIDDEN, _TRAINING)
def prune(configs: dict[str, Any], model: Model, output: Output = None) -> Result:
    """Prune a network, and fine-tune it on the way where there are epochs.

    Args:
        model: a path, an ``nn.Module`` or a Program; it is not changed.
        output: the file to write; without one, the result alone has the network.

    Returns:
        The result; ``result.program`` is the network, ready to run, and ``str(result)`` the table.

    Raises:
        InputError: the model, the data or an option cannot be used.
        GateNotMet: the target cannot be reached, or nothing can be pruned.

    Example:
        >>> result = mo.prune(model, flops=0.5, example_inputs=batch)
        >>> result.target.metric
        'flops'
    """
    with Workspace() as space:
        return Call(configs, space).execute("prune", model, output)


@configured({"calibrating": Calibrating, "config": ShareConfig, **_TUNED}, HIDDEN, _TRAINING)
def share(configs: dict[str, Any], model: Model, output: Output = None) -> Result:
    """Cluster the weights of a network (palettization), and fine-tune it where there are epochs.

    Args:
        model: a path, an ``nn.Module`` or a Program; it is not changed.
        output: the file to write; without one, the result alone has the network.

    Returns:
        The result; ``result.program`` is the network, ready to run, and ``str(result)`` the table.

    Raises:
        InputError: the model, the data or an option cannot be used.
        GateNotMet: the budget cannot be met, or nothing can be shared.

    Example:
        >>> result = mo.share(model, bits=4, example_inputs=batch)
        >>> len(result.state_dict()["1.weight"].unique()) <= 16
        True
    """
    config, gates = configs["config"], configs["gates"]
    if config.max_drop is not None and configs["given"].data is not None and gates.max_drop is None:
        configs["gates"] = replace(gates, max_drop=config.max_drop)  # what was wanted is held against data
    with Workspace() as space:
        return Call(configs, space).execute("share", model, output)


@configured(
    {
        "learning": Learning,
        "config": DistillConfig,
        "fitting": Fitting,
        "training": TrainConfig,
        "writing": Writing,
        **MEASURING,
    },
    (*HIDDEN, "distill_weight"),
    _TRAINING,
)
def distill(configs: dict[str, Any], teacher: Model, output: Output = None) -> Result:
    """Teach a student what a teacher knows.

    Args:
        teacher: a path, an ``nn.Module`` or a Program; it is not changed.
        output: the file to write; without one, the result alone has the student.

    Returns:
        The result; ``result.program`` is the student, ready to run, and ``str(result)`` the table.

    Raises:
        InputError: a model, the data or an option cannot be used.

    Example:
        >>> result = mo.distill(model, student="width:0.5", train=loader, epochs=5)
        >>> student = result.program
    """
    learning: Learning = configs["learning"]
    with Workspace() as space:
        call = Call(configs, space)
        student = learning.student
        if not isinstance(student, Student):
            train = call.samples(configs["fitting"].train, "train")
            also = [weighted(each) for each in several(learning.also)]
            if student is None:
                raise UsageError(
                    "nothing says what is to learn", where="student", hint='give e.g. "width:0.5"'
                )
            if not isinstance(student, str):
                student = str(call.file(student, train, "student"))
            student = Student(
                student,
                learning.student_arch,
                [(call.file(model, train, "also"), weight) for model, weight in also],
                learning.resize_for_teacher,
                learning.compare_scratch,
                path_of(learning.cache),
            )
        return call.execute("distill", teacher, output, "teacher", student=student)


@configured(
    {"fitting": Fitting, "training": TrainConfig, "writing": Writing, **MEASURING},
    (*HIDDEN, "code", "teacher", "distill_weight", "temperature"),
    _TRAINING,
)
def train(configs: dict[str, Any], model: Model | None = None, output: Output = None) -> Result:
    """Train a network, from scratch or from a checkpoint.

    Args:
        model: a path, an ``nn.Module`` or a Program, which is not changed; None starts from random weights of
            ``arch``.
        output: the file to write; without one, the result alone has the network.

    Returns:
        The result; ``result.program`` is the network, ready to run, and ``str(result)`` the table.

    Raises:
        InputError: the model, the data or an option cannot be used.

    Example:
        >>> result = mo.train(arch="builtin:lenet300", train="digits?split=train", epochs=1)
        >>> result.trained.epochs
        1
    """
    with Workspace() as space:
        return Call(configs, space).execute("train", model, output)


@configured(MEASURING, ("sample",))
def evaluate(configs: dict[str, Any], models: Model | Iterable[Model]) -> Measured:
    """Measure networks side by side: size, accuracy and speed.

    Args:
        models: one or several paths, modules or Programs; the first is what the others are compared with,
            unless ``baseline`` is the index of another.

    Returns:
        The figures; ``str()`` of them is the table.

    Raises:
        InputError: a model or the data cannot be used.

    Example:
        >>> table = mo.evaluate(["base.safetensors", "int8.safetensors"], data=loader, latency_runs=0)
        >>> [model.accuracy.samples for model in table.models]
        [32, 32]
    """
    with Workspace() as space:
        call = Call(configs, space)
        measuring = call.measuring()
        paths = [call.file(model, measuring["data"], "models") for model in several(models)]
        with space.telling_why():
            evaluation = space.renamed(evaluate_files(EvalRequest(paths=paths, **measuring)))
        assert evaluation is not None
        return evaluation


@public()
def save(
    model: Annotated[Program | Result, Instead("quantize, prune, share or load it first")],
    path: AnyPath,
    *,
    code: Code | None = None,
    force: bool = False,
) -> artifact.Written:
    """Write a network as an artifact, which :func:`load` opens without anything else.

    Args:
        model: a Program, or the result of a verb.
        path: the file to write; an existing one only with ``force``.
        code: coding of the file; by default that of the method whose result it is, else ``plain``.
        force: replace an existing file.

    Returns:
        The path, length in bytes and SHA-256 of the file.

    Raises:
        UsageError: the model is neither, or the result of a dry run, which has no network.
        OutputError: the path must not be written to.

    Example:
        >>> written = mo.save(result.program, "small.safetensors")
        >>> written.path.name
        'small.safetensors'
    """
    content = model.content if isinstance(model, Result) else model
    chosen: Code = code or (model.code if isinstance(model, Result) else PLAIN_CODE)
    if content is None:
        raise UsageError("has no network", where="model", hint="of a dry run nothing is kept")
    require_code(chosen)
    path = Path(path)
    artifact.check_suffix(path)
    artifact.check_output(path, force)
    if isinstance(content, Program):
        return artifact.write_program(content, path, force=force, code=chosen)
    return artifact.write_tensors(
        content.state,
        content.encodings,
        path,
        history=content.history,
        arch=content.arch,
        input_spec=content.input,
        labels=content.labels,
        force=force,
        code=chosen,
    )
