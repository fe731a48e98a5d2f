"""Training of a network that was just quantized (quantization-aware training), from its float form on."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from modelopt_cli.artifact.encodings import compact, is_shared, require_not_shared
from modelopt_cli.errors import UsageError
from modelopt_cli.methods.batches import input_batches
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.prune.masks import Masks
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.learning import qat
from modelopt_cli.methods.quantize.learning.latent_norms import identity_norms, restore_statistics
from modelopt_cli.methods.share.config import was_shared
from modelopt_cli.program import Program
from modelopt_cli.program.input_batch import Inputs
from modelopt_cli.program.quantized_recurrent import QuantizedRecurrent, renamed_weights
from modelopt_cli.settings import option
from modelopt_cli.training import TrainConfig, Trained, distributed, fit
from modelopt_cli.training.catalog import OWN_TEACHER
from modelopt_cli.training.objectives import objective, returns_losses

STAGE = "tune-1"
SLOWER, SLOWER_TWO_BITS = 10, 10 / 3
"""Divisors of the learning rate where none is given: of any network with integers, and of one with integers
of 2 bits, which knows little of its task after rounding and has more to learn."""


def require_trainable(program: Program, config: QuantizeConfig) -> None:
    """Refuse a network whose few values training would undo, and a scheme without integers.

    Raises:
        UsageError: its weights are shared, or would be cast to another type.
    """
    if config.row.float_type is not None:
        problem = "casts weights, which leaves nothing to train with"
        where = option("scheme", config.scheme)
        raise UsageError(problem, where=where, hint=f"leave out {option('epochs')}")
    require_not_shared(program.encodings)
    if was_shared(program.history):
        problem = "were shared, which training would undo"
        raise UsageError(problem, where="the weights", hint="train first, then share and quantize")


def fine_tuned(
    original: Program, floats: Program | None, quantized: Program, config: QuantizeConfig, context: Context
) -> Program:
    """A trained copy of a quantized network; weights, step sizes and, meanwhile, batch norms learn.

    Latent weights start as the float weights, and batch norms that were folded are there until they are
    folded again. The teacher is the float network, unless the settings say otherwise. The newest entry of the
    copy's history says how training went (:func:`figures_of`).

    Args:
        original: the float network; it is not changed.
        floats: the form of it that was rounded, whose layers have the names of the integer ones; without it
            training starts from the integers, with norms folded.
        quantized: the network with integers; it is not changed.
        config: how many samples to take statistics from.
        context: training, calibration data, seed.

    Raises:
        as ``modelopt_cli.training.fit``.
    """
    training = context.training
    assert training is not None
    _require_latent_forms(quantized)
    training = replace(training, config=settings_of(config, context))
    network = qat.prepare(quantized)
    if floats is not None:
        norms = identity_norms(original, floats, _batches(config, context))
        network = qat.prepare(quantized, _weights(floats, quantized), norms)
    for name, encoding in network.encodings.items():
        if is_shared(encoding):  # stored as integers, by a layer that has no latent form
            network.get_parameter(name).requires_grad_(False)
    trained = fit(
        network,
        training,
        seed=context.seed,
        stage=STAGE,
        objective=objective(training.config, original, training.task),
        callbacks=[Masks.of_state(network.state_dict(), network.encodings)],
    )
    restore_statistics(network, _batches(config, context), distributed.world(training.device).device)
    tuned = qat.convert(network, quantized)
    tuned.encodings = compact(tuned)
    tuned.history = (*quantized.history, {"method": config.method, "trained": _figures(trained)})
    return tuned.eval()


def _figures(trained: Trained) -> dict[str, Any]:
    """How training went: nothing that would differ from one run to the next."""
    losses = {"first_loss": round(trained.start, 4), "last_loss": round(trained.loss, 4)}
    return trained.figures | losses | ({} if trained.best is None else {"unit": trained.unit})


def figures_of(tuned: Program) -> dict[str, Any]:
    """How the training went that :func:`fine_tuned` ended with, for the history."""
    figures: dict[str, Any] = tuned.history[-1]["trained"]
    return figures


def _require_latent_forms(quantized: Program) -> None:
    for name, layer in quantized.named_modules():
        if isinstance(layer, QuantizedRecurrent):
            hint = f"leave it in float with {option('exclude', name)}"
            raise UsageError(
                "is a recurrent layer of integers, which cannot be trained", where=name, hint=hint
            )


def settings_of(config: QuantizeConfig, context: Context) -> TrainConfig:
    """The settings of the training that the context asks for, with what nobody said filled in."""
    training = context.training
    assert training is not None
    settings = training.config
    if settings.lr is None:
        slower = SLOWER_TWO_BITS if config.widths.least == 2 else SLOWER
        settings = replace(settings, lr=settings.peak_lr / slower)
    teaches = settings.teacher is None and not returns_losses(training.task)
    return replace(settings, teacher=OWN_TEACHER) if teaches else settings


def _batches(config: QuantizeConfig, context: Context) -> Iterator[Inputs]:
    """Batches of the calibration data or, without those, of the training data."""
    training = context.training
    assert training is not None
    data = context.data or training.train
    return input_batches(data.sample(config.calibration_samples, context.seed), context)


def _weights(floats: Program, quantized: Program) -> dict[str, Tensor]:
    """The float weights, by their names in the network with integers."""
    weights = dict(floats.named_parameters(remove_duplicate=False))
    renamed = renamed_weights(weights, quantized.state_dict())
    return {renamed.get(name, name): weight for name, weight in weights.items()}
