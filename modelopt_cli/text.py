"""Text from untrusted files, made fit for one line of a terminal or a report."""

import unicodedata

# Controls, direction overrides, lone surrogates, line separators; private and unassigned characters, which
# a terminal may show as anything.
_ESCAPED = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def printable(text: str) -> str:
    """``text`` on one line, with everything that could move a terminal's cursor written as an escape."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(char) if unicodedata.category(char) in _ESCAPED else char for char in text)


def _escape(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")
