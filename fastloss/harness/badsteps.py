"""Steps that would harm the model: a loss or gradient that is not finite, or far above those of the steps before."""

from __future__ import annotations

import math
import statistics
from typing import Any

WINDOW = 128  # good steps that a new one is compared with
FEWEST = 32  # with fewer behind it no step is a spike
MOST_IN_A_ROW = 10  # skipped; with one more the run is beyond help


class Watch:
    """Judges each step before its update. ``state`` is plain JSON: in the checkpoint, so that a resumed run judges alike.

    A loss or gradient norm is a spike above the mean of the last WINDOW good steps' plus ``spike`` of their
    standard deviations; 0 looks for none. Both may be of any sign, and a window of one value judges nothing.
    """

    def __init__(
        self, spike: float = 0.0, *, skip: bool = False, state: dict[str, Any] | None = None
    ) -> None:
        self.spike, self.skip = spike, skip
        self.state: dict[str, Any] = {} if state is None else state
        for key, start in (("loss", []), ("gradient norm", []), ("skipped", 0), ("in_a_row", 0)):
            self.state.setdefault(key, start)

    def judge(self, loss: float, norm: float) -> str:
        """What is wrong with a step, or nothing."""
        values = {"loss": loss, "gradient norm": norm}
        said = ", ".join(f"{name} {value:.6g}" for name, value in values.items())
        if all(map(math.isfinite, values.values())):
            above = [self._above(name, value) for name, value in values.items()]
            if not any(above):
                for name, value in values.items():
                    self.state[name] = [*self.state[name], value][-WINDOW:]
                self.state["in_a_row"] = 0
                return ""
            said = f"{said}: " + ", ".join(filter(None, above))
        self.state["in_a_row"] += 1
        return said

    def _above(self, name: str, value: float) -> str:
        before = self.state[name]
        if not self.spike or len(before) < FEWEST:
            return ""
        mean, deviation = statistics.fmean(before), statistics.pstdev(before)
        limit = mean + self.spike * deviation
        if deviation == 0 or value <= limit:
            return ""
        return f"{name} above {limit:.6g}, the mean {mean:.6g} and {self.spike:g} deviations of {len(before)} steps"

    def stops(self, step: int, why: str) -> FloatingPointError | None:
        """The error that ends the run, or None where the step is skipped."""
        many = self.state["in_a_row"] > MOST_IN_A_ROW
        if self.skip and not many:
            self.state["skipped"] += 1
            return None
        because = f", the {MOST_IN_A_ROW + 1}th bad step in a row" if self.skip else ""
        return FloatingPointError(
            f"step {step}: {why}: stopped before the update{because}; the last checkpoint is intact"
        )
