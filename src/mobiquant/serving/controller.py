"""Fewer bits under load, and back: which budget a server should read so that a promise about latency holds.

What: a `Goal` names one measured number (seconds to the first token, seconds for each further token, requests that wait),
its target, and the budgets to choose from. `step` takes the state so far, the time and the newest observation, and gives the
next state with the `bits` to read from now on. It does no I/O and has no clock: the caller reads the server's counters, say
twice a second, and passes `bits` on.

How: an observation above the target lowers the budget at once, by a step for each whole multiple of the target. It is raised
one step at a time, after the observations were comfortable for a while. A raise that had to be taken back soon makes the next
wait four times as long and each raise halves it, so a load between two steps is tried ever more seldom, and a load that comes
and goes finds the budget low.

Choice: the wait is bounded, and so is the way back. Once every observation is comfortable the ceiling is reached by waits of
at most 12, 6, 3, 2 and 2 s with the defaults, 25 s, and at most the time between two observations more for each. The price is
that a load between two steps misses its target for an observation in each `longest` seconds: make that longer where such
misses cost more than low bits do.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass, replace

from mobiquant.config import InputError

METRICS = ("first_token", "per_token", "queue")
STEPS = (2.0, 2.5, 3.0, 4.0, 6.0, 8.0)


@dataclass(frozen=True)
class Goal:
    """What must hold, and how the budget may move. Raises InputError on settings that cannot be.

    `metric`, `target`: `first_token` or `per_token` in seconds, or `queue` in requests that wait.
    `floor`, `ceiling`, `steps`: average bits of a weight; the ends are used, and every step that lies between them.
    `comfort`: share of the target below which an observation is comfortable. The step below the ceiling must be comfortable
    without load, or the ceiling is not reached again.
    `hold`, `longest`: seconds of comfort before a raise, at first and at most. A raise taken back within `longest` failed.
    `settle`: seconds that a lower budget takes to show in the metric; it is not lowered again before.
    """

    metric: str
    target: float
    floor: float = 2.0
    ceiling: float = 8.0
    steps: tuple[float, ...] = STEPS
    comfort: float = 0.7
    hold: float = 2.0
    longest: float = 12.0
    settle: float = 1.0

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise InputError(f"the metric '{self.metric}' is unknown: choose first_token, per_token or queue")
        if not 0 < self.target < math.inf:
            raise InputError(f"a target of {self.target:g} cannot be met: give a finite number above 0")
        if not 0 < self.floor < self.ceiling < math.inf:
            raise InputError(
                f"{self.floor:g} to {self.ceiling:g} bits is no range: give a floor above 0 and a ceiling above the floor"
            )
        if not 0 < self.comfort < 1:
            raise InputError(f"a comfort of {self.comfort:g} is not usable: give a share of the target between 0 and 1")
        if not 0 < self.hold <= self.longest < math.inf:
            raise InputError(
                f"waits from {self.hold:g} to {self.longest:g} s are not usable: give a hold above 0 and a longest not below it"
            )
        if not 0 <= self.settle < math.inf:
            raise InputError(f"a settle of {self.settle:g} s is not usable: give 0 or more seconds")

    @property
    def budgets(self) -> tuple[float, ...]:
        """Average bits that may be read, ascending, from the floor to the ceiling."""
        between = {bits for bits in self.steps if self.floor < bits < self.ceiling}
        return tuple(sorted({self.floor, self.ceiling} | between))


@dataclass(frozen=True)
class Memory:
    """State between two observations; times are seconds of the caller's clock.

    `bits`: the budget to read. `changed`: time of the last change, -inf before any. `rising`: whether that was a raise.
    `calm`: time of the last change or observation that was not comfortable. `hold`: seconds of comfort before the next raise.
    """

    bits: float
    changed: float
    rising: bool
    calm: float
    hold: float


def start(goal: Goal, now: float) -> Memory:
    """The state of a server that begins at the ceiling."""
    return Memory(bits=goal.ceiling, changed=-math.inf, rising=False, calm=now, hold=goal.hold)


def step(goal: Goal, memory: Memory, now: float, observed: float | None) -> Memory:
    """The state after an observation, in the unit of the metric.

    None is an idle server, and comfortable. nan and negative numbers change nothing: give nan where requests run but nothing
    was measured since the last call, such as no first token yet. The goal may be another one than in the call before: a budget
    that it does not have becomes the next lower one that it has.
    """
    if observed is not None and not observed >= 0:
        return memory
    budgets = goal.budgets
    at = max(bisect_right(budgets, memory.bits) - 1, 0)
    # where the clock was set back, waits begin anew
    memory = replace(memory, bits=budgets[at], changed=min(memory.changed, now), calm=min(memory.calm, now))
    load = 0.0 if observed is None else observed / goal.target
    if load > 1:
        return _lower(goal, memory, now, int(min(load, len(budgets))))
    if load >= goal.comfort:
        return replace(memory, calm=now)
    if at + 1 == len(budgets) or now - memory.calm < memory.hold:
        return memory
    # half of it already now: the way back must be short where this raise lasts
    return Memory(bits=budgets[at + 1], changed=now, rising=True, calm=now, hold=max(memory.hold / 2, goal.hold))


def _lower(goal: Goal, memory: Memory, now: float, count: int) -> Memory:
    """The state after an observation above the target: `count` steps down, none at the floor or while the last one settles."""
    budgets = goal.budgets
    at = budgets.index(memory.bits)
    if at == 0 or (not memory.rising and now - memory.changed < goal.settle):
        return replace(memory, calm=now)
    hold = memory.hold
    if memory.rising:
        # a raise halves the wait, so this doubles it from one failed raise to the next
        hold = min(4 * hold, goal.longest) if now - memory.changed <= goal.longest else goal.hold
    return Memory(bits=budgets[max(at - count, 0)], changed=now, rising=False, calm=now, hold=hold)


def mean_since(before: tuple[float, float], after: tuple[float, float]) -> float | None:
    """Mean of what was measured between two readings of cumulative counters `(sum, count)`; None where nothing was.

    Counters that went back were reset by a new start of the server: all that they hold is new.
    """
    if after[0] < before[0] or after[1] < before[1]:
        before = (0.0, 0.0)
    total, count = after[0] - before[0], after[1] - before[1]
    return total / count if count > 0 else None
