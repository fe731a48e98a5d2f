"""share, weight clustering (palettization): few distinct values, so that a weight is an index of few bits."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from modelopt_cli.artifact import TensorStream, predicted_bytes
from modelopt_cli.artifact.codecs import PLAIN
from modelopt_cli.artifact.encodings import carry_over, is_plain, pruned_encoding
from modelopt_cli.artifact.lazy import described
from modelopt_cli.artifact.stream import Item, tied_names
from modelopt_cli.errors import GraphNeeded, ModeloptError, NothingCompressed
from modelopt_cli.measure.coverage import coverage
from modelopt_cli.measure.layer_status import Coverage, LayerStatus, recorded
from modelopt_cli.methods.context import Context, MethodResult, Progress, Reached, StreamResult
from modelopt_cli.methods.layer_pass import no_data
from modelopt_cli.methods.layer_selection import (
    codec_of,
    has_weight_form,
    not_named_as_weights,
    weight_labels,
)
from modelopt_cli.methods.matrices import weights_of
from modelopt_cli.methods.prune.masks import Masks
from modelopt_cli.methods.prune.target_figures import DRAFT
from modelopt_cli.methods.share.bit_allocation import BitAllocation, round_biases
from modelopt_cli.methods.share.budget import BudgetTask, Search
from modelopt_cli.methods.share.choices import NO_DATA, SCOPES
from modelopt_cli.methods.share.clustered_weight import ClusteredWeight, clusters_of
from modelopt_cli.methods.share.codebook_tuning import fine_tune
from modelopt_cli.methods.share.config import AUTO, ShareConfig
from modelopt_cli.methods.share.one_size import Weight, cluster_network, cluster_weight
from modelopt_cli.methods.share.shared_layers import keeps_zeros, refuse_more_values, select_weights
from modelopt_cli.methods.stages import Stages
from modelopt_cli.program import Encoding, Program
from modelopt_cli.program.fold import fold_batch_norms, inference_form
from modelopt_cli.program.history import history_entry
from modelopt_cli.program.quantized import Quantized
from modelopt_cli.settings import option


def apply(program: Program, config: ShareConfig, context: Context) -> MethodResult:
    """Cluster a Program's weights.

    Args:
        program: any float Program; it is not changed. Pruned weights stay zero.
        config: how many values, by what measure, or the budget to meet.
        context: calibration data, what to train with, seed, progress.

    Returns:
        The Program with clustered weights, the layers left alone with reasons, the budget reached.

    Raises:
        UsageError: nothing says how many values, a glob that matches nothing, or data are missing.
        NothingCompressed: no weight can be clustered.
        BudgetNotMet: no file meets the budget.
        DataError: the data are empty or do not fit.
    """
    run = _Run(program, config, context)
    stages = Stages(context.training)
    network = stages.once("share", run.clustered)
    if context.training is not None:
        untuned = network
        network = stages.once("tune-1", lambda: run.tuned(untuned))
    run.check(network)
    target = run.reached(network)
    network.history = (*program.history, run.history_entry(network, target))
    return MethodResult(network, run.selected.reasons, target)


class _Run:
    """One run of the method.

    Attributes:
        ready: the network in the form that is clustered.
        selected: its weights to cluster.
    """

    def __init__(self, program: Program, config: ShareConfig, context: Context) -> None:
        self.original, self.config, self.context = program, config, context
        config.require_size()
        self.ready = fold_batch_norms(inference_form(program)) if config.folds else copy.deepcopy(program)
        # Folding makes new weights, whose zeros are where they were.
        before, after = program.state_dict(), self.ready.state_dict()
        self.ready.encodings = carry_over(before, program.encodings, after, self.ready.encodings)
        weights = weights_of(self.ready)
        if not weights and any(isinstance(module, Quantized) for module in program.modules()):
            raise NothingCompressed("the network is quantized already", hint="share first, then quantize")
        self.selected = select_weights(weights, self.ready.encodings, config)
        for name in self.selected.labels:
            encoding = self.ready.encodings.get(name)
            if is_plain(encoding) and keeps_zeros(weights[name], encoding, config):
                self.ready.encodings[name] = pruned_encoding(weights[name].detach(), encoding)

    def clustered(self) -> Program:
        """The network with its weights clustered."""
        if self.config.weighting_row.needs_data and self.context.data is None:
            raise no_data(f"weighting {self.config.weighting}", option("weighting", NO_DATA))
        if self.config.automatic:
            return self._within_budget()
        network, clustered = cluster_network(self.ready, self.selected.labels, self.config, self.context)
        return _encoded(network, clustered)

    def _within_budget(self) -> Program:
        # Named, a weighting without data means that the inputs are not to be looked at.
        unweighted = self.config.weighting is not None and not self.config.weighting_row.needs_data
        data = None if unweighted else self.context.data
        choosing = self.search.choosing_data()
        context = replace(self.context, data=choosing if data is not None else None)
        allocation = BitAllocation(self.ready, self.selected.labels, context, self.config.calibration_samples)

        def make(price: float) -> Program:
            network, weights = allocation.at(price)
            for name, weight in weights.items():
                encoding = weight.encoding()
                if name in allocation.unpruned:
                    encoding = pruned_encoding(network.get_parameter(name).detach(), encoding)
                network.encodings[name] = encoding
            return round_biases(network, self.selected.labels)

        return self.search.find(allocation, make)

    @cached_property
    def search(self) -> Search:
        """The search for the network within the budget of ``auto``."""
        row, limit = self.config.budget
        full = predicted_bytes(self.original)
        search: Search = row.search(BudgetTask(limit, self.ready, self.context, self._file_bytes, full))
        return search

    def _file_bytes(self, network: Program) -> int:
        """Bytes of the file, its history included."""
        row, limit = self.config.budget
        before = network.history
        entry = self.history_entry(network, Reached(row.metric, limit, DRAFT))
        network.history = (*self.original.history, entry)
        try:
            return predicted_bytes(network, code=self.context.code)
        finally:
            network.history = before

    def tuned(self, network: Program) -> Program:
        """The network after fine-tuning."""
        clustered = {
            name: clusters_of(network.get_parameter(name).detach(), network.encodings[name])
            for name in self.selected.labels
        }
        # Training starts from the clustered values, but latent values from those before clustering.
        start = copy.deepcopy(self.ready)
        with torch.no_grad():
            for name, parameter in start.named_parameters():
                if name not in clustered:
                    parameter.copy_(network.get_parameter(name))
        pruned = {name: m for name, m in Masks.of(self.ready).masks.items() if name not in clustered}
        masks = [Masks(pruned)] if pruned else []
        tuning = self.config.tuning_row
        trained, after = fine_tune(start, clustered, self.context, tuning, "tune-1", *masks)
        trained.encodings = {n: e for n, e in network.encodings.items() if n in pruned}
        trained = _encoded(trained, after)
        return round_biases(trained, self.selected.labels) if self.config.automatic else trained

    def check(self, network: Program) -> None:
        """Check earlier promises: zeros stay zeros, and shared weights get no more values.

        Raises:
            ModeloptError: a zero is none any more.
            UsageError: a weight that was shared before has more values now.
        """
        for name, mask in Masks.of(self.ready).masks.items():
            if bool(network.get_parameter(name).detach()[~mask].any()):
                raise ModeloptError("a weight that was pruned is not zero any more", where=name)
        for name in self.selected.labels:
            before, after = self.original.get_parameter(name), network.get_parameter(name)
            refuse_more_values(name, before, after, self.original.encodings.get(name))

    def reached(self, network: Program) -> Reached | None:
        """The budget and the measured figure, for ``auto``."""
        if not self.config.automatic:
            return None
        row, limit = self.config.budget
        return Reached(row.metric, limit, self.search.reached(network), self.search.unit)

    def history_entry(self, network: Program, target: Reached | None) -> dict[str, Any]:
        """The entry for the file's history, without anything that differs from one run to the next."""
        entry = history_entry(
            self.config.method,
            self.config.as_dict(),
            seed=self.context.seed,
            origin=self.context.origin,
            skipped=self.selected.reasons,
        )
        if target is not None:
            figures = {"metric": target.metric, "wanted": target.wanted}
            entry["target"] = figures | {"reached": round(target.reached, 4)}
        if self.context.data is not None and (self.config.automatic or self.config.weighting):
            entry["calibration"] = self.context.data.name
        if (training := self.context.training) is not None:
            entry["training"] = {"data": training.train.name, **training.config.as_dict()}
        covered = coverage(network, (*self.original.history, entry), given=self.original)
        return entry | recorded(covered)


def _encoded(network: Program, clustered: Mapping[str, ClusteredWeight]) -> Program:
    """The network with the encodings of its clustered weights."""
    for name, each in clustered.items():
        network.encodings[name] = each.encoding(network.get_parameter(name).dtype)
    return network.eval()


def apply_to_state(
    state: Mapping[str, Tensor],
    config: ShareConfig,
    seed: int = 0,
    encodings: Mapping[str, Encoding] | None = None,
    progress: Progress | None = None,
    *,
    has_network: bool = False,
) -> StreamResult:
    """Cluster the weights of a state dict that has no graph.

    Args:
        state: tensors by name; they are not changed. They may stay in their file until their turn.
        config: codebooks of one size for each tensor, by a weighting that needs no data.
        seed: for starts that are drawn.
        encodings: how the tensors were stored so far; zeros of pruned tensors stay.
        progress: called with tensors done and their total.
        has_network: the tensors are those of a network that cannot be traced.

    Raises:
        UsageError: the config needs a graph.
        NothingCompressed: no tensor can be clustered.
    """
    refuse_without_graph(config, has_network)
    shapes, earlier = described(state), encodings or {}
    weights = {name: tensor for name, tensor in shapes.items() if has_weight_form(tensor)}
    selected = select_weights(weights, earlier, config, not_named_as_weights(weights))
    tied = tied_names(shapes, earlier)
    names = [name for name in state if name not in tied]

    def item(name: str) -> Item:
        tensor, encoding = state[name], earlier.get(name, PLAIN)
        if name not in selected.labels:
            return name, tensor, encoding
        weight = Weight(tensor.detach().cpu(), keeps_zeros(tensor, encoding, config))
        clustered = cluster_weight(weight, config, seed)
        values = clustered.decode(tensor.dtype)
        refuse_more_values(name, tensor, values, encoding)
        return name, values, clustered.encoding(tensor.dtype)

    def items() -> Iterator[Item]:
        for done, name in enumerate(names, 1):
            yield item(name)  # in a call of its own, so that nothing else of a tensor stays in memory
            if progress is not None:
                progress(done, len(names))

    parameters = {label: name for name, label in weight_labels(weights).items()}
    sizes = {label: weights[name].nbytes for label, name in parameters.items() if name not in tied}

    def status(label: str) -> LayerStatus:
        reason = selected.reasons.get(label, "")
        scheme = "" if reason else f"shared {config.size}"
        size, before = sizes.get(label, 0), codec_of(earlier.get(parameters[label]))
        return LayerStatus(label, "weight", not reason, scheme, reason, bytes=size, before=before)

    statuses = tuple(map(status, [*selected.labels.values(), *selected.reasons]))
    return StreamResult(TensorStream(items, tied), Coverage(statuses), selected.reasons)


def refuse_without_graph(config: ShareConfig, has_network: bool) -> None:
    """Refuse what looks at a graph or at outputs, of a module that cannot be traced or of bare tensors.

    Raises:
        GraphNeeded: names a choice that does without.
    """
    network = "" if has_network else f"name its network with {option('arch')}, or "
    if config.automatic:
        problem, hint = option("bits", AUTO), "give a number"
    elif config.weighting_row.needs_data:
        problem, hint = option("weighting", config.weighting), f"use {option('weighting', NO_DATA)}"
    elif config.scope_row.whole_network:
        scopes = " or ".join(name for name, row in SCOPES.items() if not row.whole_network)
        problem, hint = option("scope", config.scope), f"use {option('scope')} {scopes}"
    else:
        config.require_size()
        return
    raise GraphNeeded(f"{problem} needs a network that can be traced", hint=f"{network}{hint}")
