"""share: a Program in, a Program of few distinct values out."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from modelopt_cli.artifact import predicted_bytes
from modelopt_cli.artifact.encodings import carry_over, pruned_encoding
from modelopt_cli.data import Data
from modelopt_cli.errors import ModeloptError, NothingCompressed, UsageError
from modelopt_cli.methods.context import Context, Reached, Result
from modelopt_cli.methods.matrices import weights_of
from modelopt_cli.methods.prune.masks import Masks
from modelopt_cli.methods.prune.targets import DRAFT
from modelopt_cli.methods.share.bit_allocation import Rated, rounded_bias
from modelopt_cli.methods.share.budget import Drop, for_bytes, for_drop, split
from modelopt_cli.methods.share.clustered_weight import Shared, shared_of
from modelopt_cli.methods.share.codebook_tuning import fine_tune
from modelopt_cli.methods.share.config import ShareConfig
from modelopt_cli.methods.share.one_size import share_weights
from modelopt_cli.methods.share.shared_layers import Chosen, choose, require_no_more
from modelopt_cli.methods.stages import Stages
from modelopt_cli.program import Program
from modelopt_cli.program.coverage import coverage, recorded
from modelopt_cli.program.fold import fold_batch_norms, inference_form
from modelopt_cli.program.quantized import Quantized


def apply(program: Program, config: ShareConfig, context: Context) -> Result:
    """Share a Program's weights.

    Args:
        program: any float Program; it is not changed. Pruned weights stay zero.
        config: how many values, by what measure, or the budget to meet.
        context: calibration data, what to train with, seed, progress.

    Returns:
        The Program with shared weights, the layers left alone with reasons, the budget reached.

    Raises:
        UsageError: nothing says how many values, a glob that matches nothing, or data are missing.
        NothingCompressed: nothing can be shared.
        BudgetNotMet: no file meets the budget.
        DataError: the data are empty or do not fit.
    """
    work = _Work(program, config, context)
    stages = Stages(context.training)
    made = stages.once("share", work.shared)
    if context.training is not None:
        made = stages.once("tune-1", lambda: work.tuned(made))
    work.check(made)
    target = work.reached(made)
    made.history = (*program.history, work.entry(made, target))
    return Result(made, work.chosen.reasons, target)


class _Work:
    """One run of the method.

    Attributes:
        ready: the network in the form that is shared.
        chosen: which of its weights are.
    """

    def __init__(self, program: Program, config: ShareConfig, context: Context) -> None:
        self.given, self.config, self.context = program, config, context
        if not config.automatic:
            config.size  # noqa: B018 -- raises where nothing says how large the tables are
        self.ready = fold_batch_norms(inference_form(program)) if config.folds else copy.deepcopy(program)
        # Folding makes new weights, whose zeros are where they were.
        before, after = program.state_dict(), self.ready.state_dict()
        self.ready.encodings = carry_over(before, program.encodings, after, self.ready.encodings)
        weights = weights_of(self.ready)
        if not weights and any(isinstance(module, Quantized) for module in program.modules()):
            raise NothingCompressed("the network is quantized already", hint="share first, then quantize")
        self.chosen = choose(weights, self.ready.encodings, config)

    def shared(self) -> Program:
        """The network with its weights shared."""
        if self.config.automatic:
            return self._within_budget()
        names = self.chosen.layers
        network, found = share_weights(self.ready, names, self.config, self.context)
        return _stored(network, found)

    def _within_budget(self) -> Program:
        samples, context = self.config.calibration_samples, self._rating_context()
        metric, wanted = self.config.target
        if metric == "max_drop":
            choosing, _ = self._parts
            context = replace(context, data=choosing if context.data is not None else None)
        rated = Rated(self.ready, self.chosen.layers, context, samples)

        def make(price: float) -> Program:
            network, found = rated.at(price)
            for name, scalar in found.items():
                network.encodings[name] = scalar.encoding()
                if name in rated.free:
                    network.encodings[name] = pruned_encoding(
                        network.get_parameter(name).detach(), network.encodings[name]
                    )
            return _rounded_biases(network, self.chosen)

        if metric == "max_drop":
            chosen, verified = (Drop.of(self.ready, part, self.context).upper for part in self._parts)
            return for_drop(rated, make, chosen, verified, wanted)
        return for_bytes(rated, make, self._size, wanted * self._full())

    def _rating_context(self) -> Context:
        """Without its data where the weighting wants none."""
        if self.config.weighting not in (None, "hessian"):
            weighting = self.config.weighting
            if weighting == "fisher":
                raise UsageError("--bits auto excludes --weighting fisher", hint="use hessian or none")
            return replace(self.context, data=None)
        if self.context.data is None and self.config.weighting == "hessian":
            raise UsageError(
                "weighting hessian needs data to calibrate on",
                hint="give --calib or --data, or use --weighting none, which needs none",
            )
        return self.context

    def _full(self) -> int:
        return predicted_bytes(self.given)

    def _size(self, program: Program) -> int:
        """Bytes of the file, its history included."""
        before = program.history
        program.history = (*self.given.history, self.entry(program, Reached(*self.config.target, DRAFT)))
        try:
            return predicted_bytes(program, code=self.context.code)
        finally:
            program.history = before

    @cached_property
    def _parts(self) -> tuple[Data, Data]:
        """Samples to choose by, and to verify on."""
        return split(self.context, self.config.target[1])

    def tuned(self, made: Program) -> Program:
        """The network after fine-tuning."""
        shared = {
            name: shared_of(made.get_parameter(name).detach(), made.encodings[name])
            for name in self.chosen.layers
        }
        start = copy.deepcopy(self.ready)
        with torch.no_grad():
            for name, parameter in start.named_parameters():
                if name not in shared:
                    parameter.copy_(made.get_parameter(name))
        held = {name: m for name, m in Masks.of(self.ready).masks.items() if name not in shared}
        others = [Masks(held)] if held else []
        network, after = fine_tune(start, shared, self.context, self.config.tune, "tune-1", *others)
        network.encodings = {n: e for n, e in made.encodings.items() if n in held}
        network = _stored(network, after)
        return _rounded_biases(network, self.chosen) if self.config.automatic else network

    def check(self, made: Program) -> None:
        """Make sure of what was promised before: zeros stay zeros, and shared weights get no more values.

        Raises:
            ModeloptError: zeros do not.
            UsageError: a weight that was shared before has more values now.
        """
        for name, mask in Masks.of(self.ready).masks.items():
            if bool(made.get_parameter(name).detach()[~mask].any()):
                raise ModeloptError("a weight that was pruned is not zero any more", where=name)
        for name in self.chosen.layers:
            before, after = self.given.get_parameter(name), made.get_parameter(name)
            require_no_more(name, before, after, self.given.encodings.get(name))

    def reached(self, made: Program) -> Reached | None:
        """The budget, and what became of it."""
        if not self.config.automatic:
            return None
        metric, wanted = self.config.target
        if metric == "max_drop":
            return Reached(metric, wanted, Drop.of(self.ready, self._parts[1], self.context).upper(made))
        return Reached(metric, wanted, self._size(made) / self._full())

    def entry(self, made: Program, target: Reached | None) -> dict[str, Any]:
        """What the history says: nothing that would differ from one run to the next."""
        entry: dict[str, Any] = {
            "method": "share",
            "config": self.config.as_dict(),
            "seed": self.context.seed,
            "torch": str(torch.__version__),
            "skipped": self.chosen.reasons,
            **self.context.origin,
        }
        if target is not None:
            figures = {"metric": target.metric, "wanted": target.wanted}
            entry["target"] = figures | {"reached": round(target.reached, 4)}
        if self.context.data is not None and (self.config.automatic or self.config.weighting):
            entry["calibration"] = self.context.data.name
        if (training := self.context.training) is not None:
            entry["training"] = {"data": training.train.name, **training.config.as_dict()}
        return entry | recorded(coverage(made, (*self.given.history, entry), given=self.given))


def _stored(network: Program, found: Mapping[str, Shared]) -> Program:
    """The network with the encodings of its shared weights."""
    for name, shared in found.items():
        network.encodings[name] = shared.encoding(network.get_parameter(name).dtype)
    return network.eval()


def _rounded_biases(network: Program, chosen: Chosen) -> Program:
    """The network with the biases of its shared layers on few levels: they take ten bits each, not 32."""
    for name in chosen.layers:
        bias = network.get_submodule(name.rpartition(".")[0])._parameters.get("bias")
        if name.endswith(".weight") and isinstance(bias, Tensor) and bias.dtype == torch.float32:
            values, encoding = rounded_bias(bias.detach())
            with torch.no_grad():
                bias.copy_(values)
            network.encodings[f"{name.removesuffix('weight')}bias"] = encoding
    return network
