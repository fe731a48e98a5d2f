"""The JSON schema of recipes, made from the options of the commands."""

from typing import Any

from modelopt_cli.cli.recipe.commands import Commands
from modelopt_cli.settings import Field, fraction

_FILE = {"type": "string", "minLength": 1}


def recipe_schema(commands: Commands) -> dict[str, Any]:
    """A schema (draft 2020-12) by which an editor can complete and check a recipe."""
    steps = [*commands.steps]
    shared = {name: field for verb in (*steps, "eval") for name, field in commands.shared(verb).items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "modelopt recipe",
        "type": "object",
        "required": ["steps"],
        "additionalProperties": False,
        "properties": {
            "checkpoint": {"description": "Checkpoint that the first step starts from.", **_FILE},
            "output": {"description": "The file that the last step writes.", **_FILE},
            "steps": {
                "type": "array",
                "minItems": 1,
                "items": {"anyOf": [{"enum": steps}, *(_step(verb, commands.own(verb)) for verb in steps)]},
            },
            **_properties(shared),
        },
    }


def _step(verb: str, fields: dict[str, Field]) -> dict[str, Any]:
    """A mapping from one verb to its options."""
    options = {"type": ["object", "null"], "additionalProperties": False, "properties": _properties(fields)}
    return {
        "type": "object",
        "required": [verb],
        "additionalProperties": False,
        "properties": {verb: options},
    }


def _properties(fields: dict[str, Field]) -> dict[str, Any]:
    """The options by their names with dashes, older names included."""
    return {
        name: _property(field) | ({"deprecated": True} if f"--{name}" in field.older else {})
        for name, field in fields.items()
    }


def _property(field: Field) -> dict[str, Any]:
    value = _value(field)
    if field.several:
        value = {"anyOf": [value, {"type": "array", "items": value, "minItems": 1}]}
    initial = {"default": field.initial} if isinstance(field.initial, bool | int | float | str) else {}
    return {"description": field.setting.help, **initial, **value}


def _value(field: Field) -> dict[str, Any]:
    """One value of an option."""
    setting = field.setting
    if field.type is bool:
        return {"type": "boolean"}
    if setting.choices is not None:
        patterns = [
            row.spelling.pattern for row in setting.choices.values() if getattr(row, "spelling", None)
        ]
        named = {"enum": [*setting.choices]}
        spelled = [{"type": "string", "pattern": f"^(?:{pattern})$"} for pattern in patterns]
        return {"anyOf": [named, *spelled]} if spelled else named
    bounds = {
        "minimum": setting.least,
        "exclusiveMinimum": setting.above,
        "maximum": setting.most,
        "exclusiveMaximum": setting.below,
    }
    limits = {name: limit for name, limit in bounds.items() if limit is not None}
    if field.type is int and setting.parse is None:
        return {"type": "integer", **limits}
    if field.type is float and setting.parse in (None, fraction):
        numeric = {"type": "number", **limits}
        percentage = {"type": "string", "pattern": "%$"}
        return {"anyOf": [numeric, percentage]} if setting.parse is fraction else numeric
    return {"type": ["string", "number"]}  # checked by the command; 224 is a size, too
