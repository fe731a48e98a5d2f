"""Write docs/cli.md and the tables of choices in docs/ from the declarations; with --check, only compare."""

import sys
from pathlib import Path
from typing import Any

from tables import filled_pages

from modelopt_cli.cli.groups import signature_of
from modelopt_cli.cli.main import build

DOCS = Path(__file__).parents[1] / "docs"

INTRODUCTION = """\
# The command line

<!-- Made by tools/docs.py (`make docs`); edits are lost. -->

The result goes to stdout, everything else to stderr. Where stdout is no terminal it is plain text at full
width. `NO_COLOR` and `FORCE_COLOR` are respected. `modelopt COMMAND --help` prints the options that matter,
`modelopt COMMAND --help-all` all that follow, and `modelopt --help-all` those of all commands.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | a gate was not met: accuracy, size, speed, coverage |
| 2 | usage, configuration or input file |
| 3 | environment: space, memory, permission, a missing optional package |
| 4 | a bug of ours; `--debug` shows the traceback |
| 130, 143, 141 | SIGINT, SIGTERM, closed pipe |

An error is one line on stderr: what, which file or layer, what to do next. Gates are judged on the file that
was written; it stays when one is not met, so go by the exit code, not by the file.

With `--json` stdout has one JSON object, whatever happens: the result, whose `evaluation.gates` say which
gate was missed; or, where there is none, `{"schema_version": 1, "error": {...}}` with the keys `exit` (the
exit code), `what`, `where` (the file, layer or option) and `hint` (the next step), each a text or null, and
`notes`, a list: how to go on, say.

A fraction `F` may be written as a percentage: `--sparsity 30%`. `modelopt help COMMAND` is
`modelopt COMMAND --help`.

Options that were renamed work under their old names for one version, with a note on stderr.

## Environment variables

Every option can be set by a variable `MODELOPT_COMMAND_OPTION`, in capitals and with underscores:
`MODELOPT_QUANTIZE_SCHEME=int8-weight`, `MODELOPT_PRUNE_SKIP_LAST=true`. For these options of all commands one
variable without the command is enough, too: SHARED. The command line goes before the variable with
the command, and that before the one without it. Several values are separated by spaces, with quotes as in a
shell. The steps of a recipe take none: a recipe does the same everywhere.

## Shell completion

`modelopt --install-completion` sets up bash, zsh, fish or PowerShell; `modelopt --show-completion` prints
what it writes. Completed are commands, options, choices and, for `--include` and `--exclude`, the names of
layers in a safetensors file.
"""


def render() -> str:
    """The whole page."""
    group = build()
    context = group.make_context("modelopt", ["--help"], resilient_parsing=True)
    introduction = INTRODUCTION.replace("SHARED", shared_variables(group))
    return "\n".join([introduction, *(section(context, group.commands[name]) for name in group.commands)])


def shared_variables(group: Any) -> str:
    """The variables that need no command, in Markdown."""
    names = {}
    for command in group.commands.values():
        signature = signature_of(command)
        for field in signature.fields.values():
            names |= dict.fromkeys(signature.variables(field)[1:])
    return ", ".join(f"`{name}`" for name in sorted(names))


def section(parent: Any, command: Any) -> str:
    """One command: its purpose, its example, its options."""
    context = command.make_context(command.name, [], parent=parent, resilient_parsing=True)
    summary, *examples = command.help.strip().split("\n\n")
    lines = [f"## modelopt {command.name}", "", summary, ""]
    for example in examples:
        lines += [f"    {' '.join(example.removeprefix('Example:').split())}", ""]
    for title, records in command.sections(context, everything=True).items():
        if title != "Options":  # nothing but --help
            lines += [f"**{title}**", ""]
            lines += [f"- `{option}`: {' '.join(text.split())}" for option, text in records]
            lines += [""]
    return "\n".join(lines)


def main() -> int:
    """Write the page and the tables, or compare."""
    pages = {DOCS / "cli.md": render(), **filled_pages(DOCS)}
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.name} is out of date; run: make docs", file=sys.stderr)
        return int(bool(stale))
    for path in stale:
        path.write_text(pages[path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
