"""Checks of the ways in which a fused loss is silently wrong, for any provider (docs/conformance.md).

>>> from fastloss import conformance
>>> check = conformance.find("ce: an upstream gradient of 1024")
>>> conformance.run(check, conformance.provider("fastloss:reference")).state
'pass'
"""

from fastloss.conformance.check import Check, Result
from fastloss.conformance.checks import CHECKS, find
from fastloss.conformance.providers import Provider, provider, provider_names
from fastloss.conformance.runner import run, run_all

__all__ = ["CHECKS", "Check", "Provider", "Result", "find", "provider", "provider_names", "run", "run_all"]
