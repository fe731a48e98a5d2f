"""Files that the docs name are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_modules_that_a_page_names_exist(page: Path) -> None:
    named = set(
        re.findall(r"\b(?:modelopt_cli|tests|benchmarks|tools)/[\w/]+\.py\b", page.read_text("utf-8"))
    )
    real = (
        path for path in sorted(named) if "NAME" not in path
    )  # which stands for a name of the reader's own
    assert [path for path in real if not (ROOT / path).is_file()] == []
