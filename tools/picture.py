"""Draw the table of `modelopt eval` as docs/table.svg, the picture in the README."""

import argparse
from pathlib import Path

from modelopt_cli import api, report

TARGET = Path(__file__).parents[1] / "docs" / "table.svg"


def main() -> None:
    """Evaluate the files that are named, the first as the baseline, and draw what comes out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--data", default="digits")
    given = parser.parse_args()
    evaluation = api.evaluate(given.checkpoints, data=given.data)
    names = " ".join(path.name for path in given.checkpoints)
    TARGET.write_text(report.to_svg(evaluation, title=f"modelopt eval {names} --data {given.data}"))


if __name__ == "__main__":
    main()
