"""The evaluation as CSV: one line for each model, raw numbers, an empty field where there is none."""

import csv
import io

from modelopt_cli.measure import Evaluation
from modelopt_cli.report.figures import exported
from modelopt_cli.text import printable


def csv_text(evaluation: Evaluation) -> str:
    """One column for each figure that JSON holds; those that compare are empty for the baseline."""
    comparisons = {comparison.model: comparison for comparison in evaluation.comparisons}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "baseline", *(name for name, _ in exported())])
    for i, model in enumerate(evaluation.models):
        figures = [figure.value(model, comparisons.get(i)) for _, figure in exported()]
        # One record is one line, for tools that split at line breaks.
        writer.writerow([printable(model.path), str(i == evaluation.baseline).lower(), *figures])
    return text.getvalue()
