"""The checks, a file per interface. A check is a row; its order is that of the table."""

from fastloss.conformance.check import Check
from fastloss.conformance.checks import advantages, cross_entropy, linear, preference, tokens

CHECKS: tuple[Check, ...] = (
    *cross_entropy.CHECKS,
    *linear.CHECKS,
    *tokens.CHECKS,
    *preference.CHECKS,
    *advantages.CHECKS,
)


def find(name: str) -> Check:
    return next(check for check in CHECKS if check.name == name)
