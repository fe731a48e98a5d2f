"""The evaluation as a Markdown table, for a pull request or a CI summary."""

import re

from modelopt_cli.measure import Evaluation
from modelopt_cli.report.rows import footer, gate_lines, headings, rows

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$&!@])")


def markdown_text(evaluation: Evaluation) -> str:
    """A table with one column for each model, then the gates and the conditions as a list."""
    titles = [
        f"{_literal(name)} (baseline)"
        if i == evaluation.baseline and len(evaluation.models) > 1
        else _literal(name)
        for i, name in enumerate(headings(evaluation))
    ]
    lines = [_line(["", *titles]), _line(["---", *("---:" for _ in titles)])]
    lines += [_line([row.label, *row.cells]) for row in rows(evaluation)]
    lines.append("")
    lines += [f"- {_literal(line)}" for _, line in gate_lines(evaluation)]
    lines += [f"- {_literal(line)}" for line in footer(evaluation)]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _literal(text: str) -> str:
    """``text`` so that Markdown shows it as it is: a file name can hold anything."""
    return _SPECIAL.sub(r"\\\1", text)
