"""A function of your own: ``module:function``, ``module:function@interface``, or ``module:providers`` that gives a dict."""

from __future__ import annotations

import importlib

from fastloss.conformance.check import INTERFACES
from fastloss.conformance.providers.interface import Missing, Provider


def function(name: str) -> Provider:
    """The interface is the part after ``@``, else the function's own name, else cross_entropy."""
    path, _, interface = name.partition("@")
    module, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise Missing(f"provider {name!r}: {error}") from None
    if isinstance(found, dict):
        if unknown := sorted(set(found) - set(INTERFACES)):
            raise Missing(f"provider {name!r}: expected interfaces of {', '.join(INTERFACES)}, got {unknown}")
        return Provider(name, "", found)
    interface = interface or (attribute if attribute in INTERFACES else "cross_entropy")
    if interface not in INTERFACES:
        raise Missing(
            f"provider {name!r}: expected an interface of {', '.join(INTERFACES)}, got {interface!r}"
        )
    return Provider(name, "", {interface: found})
