"""A provider of losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastloss.conformance.check import Loss


@dataclass(frozen=True)
class Provider:
    """``functions``: by interface (``INTERFACES`` in check.py), with the options that its signature names."""

    name: str
    version: str
    functions: Mapping[str, Loss]


class Missing(Exception):
    """A provider that cannot run here, and why."""
