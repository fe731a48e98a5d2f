"""The sensitivities of a network's layers in words: which layer breaks it first, and why."""

from modelopt_cli.measure.output_comparison import LIMIT_DB
from modelopt_cli.methods.quantize.sensitivity.layer_sensitivity import (
    LayerSensitivity,
    QuantizeSensitivity,
)
from modelopt_cli.methods.quantize.sensitivity.rounding_reasons import HARMLESS_DB, REASONS
from modelopt_cli.option_names import option
from modelopt_cli.text import listing


def sentences(found: QuantizeSensitivity) -> list[str]:
    """Lines that say which layer loses most, which compute nothing, and what can be done."""
    lines = [f"{layer.name} is dead: {_why(layer)}" for layer in found.dead]
    if found.breaking:
        first, others = found.breaking[0], [layer.name for layer in found.breaking[1:]]
        lines.append(
            f"{first.name} breaks the network first: rounded to {_loss(first)}, less than "
            f"{found.least_db:g} dB. {_reason(first)}"
        )
        if others:
            lines.append(f"so {'does' if len(others) == 1 else 'do'} {listing(others)}")
        names = " ".join(option("exclude", layer.name) for layer in found.breaking[:3])
        lines.append(f"to leave {'it' if not others else 'them'} in float: {names}")
        return lines
    worst = min(found.layers, key=lambda layer: layer.int8.snr_db)
    if worst.int8.snr_db >= LIMIT_DB:
        lines.append("no layer alone loses anything: the outputs stay equal")
        return lines
    lines.append(
        f"no layer alone takes the outputs below {found.least_db:g} dB; most is lost by {worst.name}: "
        f"rounded to {_loss(worst)}. {_reason(worst)}"
    )
    return lines


def _loss(layer: LayerSensitivity) -> str:
    loss = layer.int8
    return f"{loss.precision} alone it leaves {loss.snr_db:.1f} dB"


def _reason(layer: LayerSensitivity) -> str:
    if layer.reason is None:
        little = f"Above {HARMLESS_DB:g} dB there is nothing to explain"
        return little if layer.int8.snr_db > HARMLESS_DB else "Why is not known"
    return f"Reason: {layer.reason.kind}, since {REASONS[layer.reason.kind]}: {_why(layer)}"


def _why(layer: LayerSensitivity) -> str:
    return "" if layer.reason is None else layer.reason.text
