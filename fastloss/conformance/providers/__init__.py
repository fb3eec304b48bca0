"""Who is checked: a name and, for each interface that it has, a function. A file per kind of provider."""

from __future__ import annotations

from collections.abc import Callable

from fastloss.conformance.providers import named, ours, peers, pytorch
from fastloss.conformance.providers.interface import Missing, Provider

_MAKE: dict[str, Callable[[], Provider]] = {
    "torch": pytorch.eager,
    "torch.compile": pytorch.compiled,
    "torch-linear": pytorch.linear,
    "torch-chunked": pytorch.chunked,
    "trl": peers.trl,
    "liger": peers.liger,
    "cce": peers.cut_cross_entropy,
    "quack": peers.quack,
    **{f"fastloss:{backend}": ours.of(backend) for backend in ours.BACKENDS},
}


def provider_names() -> tuple[str, ...]:
    return tuple(_MAKE)


def provider(name: str) -> Provider:
    """``fastloss`` is ``fastloss:auto``; ``module:function`` is a function of your own (docs/conformance.md).

    Raises:
        Missing: it cannot run here, and why.
    """
    name = "fastloss:auto" if name == "fastloss" else name
    if name in _MAKE:
        return _MAKE[name]()
    if ":" in name:
        return named.function(name)
    raise Missing(f"provider: expected one of {', '.join(_MAKE)} or module:function, got {name!r}")


__all__ = ["Missing", "Provider", "provider", "provider_names"]
