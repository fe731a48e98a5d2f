"""Messages name the argument in Python and the flag on the command line, made by ``option`` in both cases."""

import ast
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import modelopt_cli as mo
from modelopt_cli.api import arguments, given_models
from modelopt_cli.cli import main as command_line
from modelopt_cli.errors import ModeloptError

SOURCE = Path(mo.__file__).parent
VERBS = (mo.quantize, mo.prune, mo.share, mo.distill, mo.train, mo.evaluate, mo.load)
FLAG = re.compile(r"(?<![\w-])--[a-z{]")
ROW = "help of a row, which is written to --help and docs/"
ALLOWED = {
    "demo.py": (r".*", "shell commands that the demonstration shows and runs"),
    "option_names.py": (
        r"--((no-)?\{\}|no-eval|force|resume|set)",
        "makes the flag of an argument, and names it again",
    ),
    "settings.py": (r"--no-(\{\})?", "makes the opposite of a flag, and knows it"),
    "methods/layer_selection.py": (r"(not )?matched by --(in|ex)clude", "recorded in files, alike for both"),
    "measure/config.py": (r".*`--(confident|data|latency-runs)`.*", ROW),
    "methods/prune/schedules.py": (r"--rounds times a part, .*", ROW),
    "methods/prune/structures.py": (r"rows of --block neighbouring input weights", ROW),
    "methods/share/choices.py": (r"a codebook for every --group output channels", ROW),
    "methods/share/config.py": (r"Budget of --bits .*", "title of a group of options in --help"),
    "report/figure_rows.py": (r".*`--(data|latency-batch-size)`.*", ROW),
}
"""Texts with a flag in them that no ``option`` makes: by module, their pattern and why."""


@functools.cache
def trees() -> tuple[tuple[str, ast.Module], ...]:
    """Every module outside the command line, by its path in the package."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).as_posix()
        if not name.startswith("cli/"):
            found.append((name, ast.parse(path.read_text("utf-8"))))
    return tuple(found)


def texts(node: ast.AST) -> Iterator[str]:
    """Strings that are no docstrings and stand outside ``Setting(...)``, what an f-string inserts as {}."""
    match node:
        case ast.Expr(value=ast.Constant(value=str())) | ast.Call(func=ast.Name("Setting")):
            return
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr(values=parts):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)
            for part in parts:
                if isinstance(part, ast.FormattedValue):
                    yield from texts(part.value)
        case _:
            for child in ast.iter_child_nodes(node):
                yield from texts(child)


def named() -> set[str]:
    """Every name that is handed to ``option`` as a literal."""
    calls = (node for _, tree in trees() for node in ast.walk(tree) if isinstance(node, ast.Call))
    return {
        call.args[0].value
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id == "option"
        if isinstance(call.args[0], ast.Constant) and isinstance(call.args[0].value, str)
    }


@pytest.mark.slow
def test_no_message_outside_the_command_line_writes_a_flag():
    flags = [(name, text) for name, tree in trees() for text in texts(tree) if FLAG.search(text)]
    unknown = [
        f"{name}: {text}"
        for name, text in flags
        if name not in ALLOWED or not re.fullmatch(ALLOWED[name][0], text)
    ]
    assert unknown == []
    assert {name for name, _ in flags} == ALLOWED.keys(), "an exception that nothing needs any more"


def test_every_option_in_a_message_is_an_argument_and_a_flag():
    taken = {name for verb in VERBS for name in inspect.signature(verb).parameters}
    commands = command_line.build().commands.values()
    flags = {spelling for each in commands for p in each.params for spelling in p.opts + p.secondary_opts}
    names = named()
    assert len(names) > 40
    assert names - taken == {"target_model"}, "Python takes the models to compare as a list"
    assert {name for name in names - {"evaluate"} if f"--{name.replace('_', '-')}" not in flags} == set()
    assert "--no-eval" in flags


NET: dict[str, Any] = {"arch": "net.py:make", "input_shape": (1, 8, 8)}
LENET = "builtin:lenet5"
TO = ["-o", "o.safetensors"]
GIVEN = ["net.pth", "--arch", "net.py:make", "--input-shape", "1x8x8"]
CASES: dict[str, tuple[Callable[[], Any], list[str], str, str]] = {
    "value": (
        lambda: mo.quantize("net.pth", scheme="int9", **NET),
        ["quantize", *GIVEN, "--scheme", "int9"],
        "scheme: ", "--scheme: ",
    ),
    "conflict": (
        lambda: mo.share("net.pth", bits=4, centroids=4, **NET),
        ["share", *GIVEN, "--bits", "4", "--centroids", "4"],
        "bits and centroids exclude", "--bits and --centroids exclude",
    ),
    "no architecture": (
        lambda: mo.quantize("odd.pth", scheme="int8"),
        ["quantize", "odd.pth", "--scheme", "int8"],
        "name its network with arch,", "name its network with --arch,",
    ),
    "bad architecture": (
        lambda: mo.load("net.pth", arch="nowhere"),
        ["prune", "net.pth", "--arch", "nowhere", "--flops", "0.5"],
        "arch 'nowhere' is none of", "--arch 'nowhere' is none of",
    ),
    "no shape": (
        lambda: mo.prune("net.pth", flops=0.5, arch="net.py:make"),
        ["prune", "net.pth", "--arch", "net.py:make", "--flops", "0.5"],
        "input_shape='3x224x224'", "--input-shape 3x224x224",
    ),
    "no data": (
        lambda: mo.quantize("net.pth", scheme="int8", **NET),
        ["quantize", *GIVEN, "--scheme", "int8"],
        "give data, or use scheme int8-dynamic", "give --data, or use --scheme int8-dynamic",
    ),
    "output exists": (
        lambda: mo.quantize("net.pth", scheme="int8-weight", output="there.safetensors", **NET),
        ["quantize", *GIVEN, "--scheme", "int8-weight", "-o", "there.safetensors"],
        "replace it with force=True", "replace it with --force",
    ),
    "gate without figures": (
        lambda: mo.quantize(
            "net.pth", scheme="int8-weight", min_ratio=2.0, evaluate=False, output="o.safetensors", **NET
        ),
        ["quantize", *GIVEN, "--scheme", "int8-weight", "--min-ratio", "2", "--no-eval", *TO],
        "leave out evaluate=False or", "leave out --no-eval or",
    ),
    "device": (
        lambda: mo.quantize("net.pth", scheme="int8-weight", device="cuda:99", **NET),
        ["quantize", *GIVEN, "--scheme", "int8-weight", "--device", "cuda:99", *TO],
        "device='cuda:99': ", "--device cuda:99: ",
    ),
    "nothing to train on": (
        lambda: mo.train(arch=LENET),
        ["train", "--arch", LENET],
        "train", "--train",
    ),
    "unmatched layers": (
        lambda: mo.quantize("net.pth", scheme="int8-weight", exclude=["nothing*"], **NET),
        ["quantize", *GIVEN, "--scheme", "int8-weight", "--exclude", "nothing*", *TO],
        "exclude 'nothing*' matches no", "--exclude 'nothing*' matches no",
    ),
    "student": (
        lambda: mo.distill("net.pth", student=LENET, student_arch="x", train="digits", **NET),
        ["distill", *GIVEN, "--student", LENET, "--student-arch", "x", "--train", "digits"],
        "student_arch: has no meaning", "--student-arch: has no meaning",
    ),
    "budget": (
        lambda: mo.share("net.pth", bits="auto", **NET),
        ["share", *GIVEN, "--bits", "auto"],
        "bits='auto' needs a budget", "--bits auto needs a budget",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "words", "argument", "flag"), CASES.values(), ids=CASES)
def test_an_error_names_the_argument_in_python_and_the_flag_on_the_command_line(
    call, words, argument, flag, here, modelopt, monkeypatch
):
    # Messages are made right; none is rewritten.
    monkeypatch.setattr(arguments, "in_python", str)
    monkeypatch.setattr(given_models, "in_python", str)
    Path("there.safetensors").touch()
    torch.save({"odd.weight": torch.ones(2, 2)}, "odd.pth")
    with pytest.raises(ModeloptError) as caught:
        call()
    assert argument in str(caught.value)
    assert not FLAG.search(str(caught.value))
    outcome = modelopt(*words)
    assert outcome.code in (2, 3), outcome.err
    assert flag in outcome.err
