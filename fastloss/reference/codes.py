"""From a code to its name: a code that does not exist is an error, never the last name of a table."""

from __future__ import annotations

from collections.abc import Sequence


def name_of(option: str, code: int, names: Sequence[str]) -> str:
    """The name at the place ``code`` of one of the tables of ``fastloss.tables``."""
    if not 0 <= code < len(names):
        raise ValueError(f"{option}: expected the code of one of {', '.join(map(repr, names))}, got {code}")
    return names[code]
