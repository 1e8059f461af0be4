"""Budgets that follow load, on simulated servers and a clock that the tests move."""

import math
from collections import Counter
from dataclasses import FrozenInstanceError, replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobiquant.config import InputError
from mobiquant.serving.controller import METRICS, STEPS, Goal, Memory, mean_since, start, step

PERIOD = 0.5
GOAL = Goal("per_token", target=1.5)
GOALS = st.sampled_from([GOAL, replace(GOAL, floor=2.2, ceiling=5), replace(GOAL, steps=(), settle=0, hold=0.1, longest=0.1)])
OBSERVED = st.one_of(st.none(), st.floats(), st.floats(0, 4), st.sampled_from([0.0, 1.05, 1.5, 1e308, math.inf, math.nan]))
# most pauses are those of a caller that reads twice a second; a clock may be set back
PAUSES = st.one_of(st.just(PERIOD), st.floats(0, 20), st.floats(-100, 0))
HISTORIES = st.lists(st.tuples(PAUSES, OBSERVED), max_size=80)


def per_token(bits, load):
    """Time of a token, 1 at 8 bits without load; the unit of load is a hundredth of what 8 bits can serve."""
    return (0.4 + 0.6 * bits / 8) * max(1, load * bits / 800) if load else None


def simulate(load, seconds, goal=GOAL, measure=per_token):
    """Time, bits read from then on and the observation before, for each observation under `load(time)`."""
    memory, trace = start(goal, 0), []
    for i in range(1, round(seconds / PERIOD) + 1):
        now = i * PERIOD
        observed = measure(memory.bits, load(now))
        memory = step(goal, memory, now, observed)
        trace.append((now, memory.bits, observed))
    return trace


def changes(trace, bits=8):
    """Times and budgets where another budget than before was set."""
    found = []
    for now, after, _ in trace:
        if after != bits:
            found.append((now, after))
        bits = after
    return found


def per_minute(trace, since=0):
    """The most changes in a whole minute that begins at `since` seconds or later."""
    return max(Counter(int(now // 60) for now, _ in changes(trace) if now >= since).values(), default=0)


def follow(goal, history, memory=None):
    """States and times from zero on: that of the start, or another, and that after each `(pause, observation)`."""
    memory, now = memory or start(goal, 0), 0.0
    states = [(memory, now)]
    for pause, observed in history:
        now += pause
        memory = step(goal, memory, now, observed)
        states.append((memory, now))
    return states


@pytest.mark.parametrize("load, bits", [(120, 8), (200, 6), (400, 4), (500, 3), (700, 2.5), (1000, 2)])
def test_a_load_that_stays_lowers_bits_until_the_target_holds(load, bits):
    trace = simulate(lambda now: load if now > 5 else 50, 120)
    assert all(b == 8 for now, b, _ in trace if now <= 5)
    assert all(b == bits and observed <= GOAL.target for now, b, observed in trace if now > 8)
    assert len(changes(trace)) <= 3


def test_a_load_too_high_for_the_floor_stays_there():
    trace = simulate(lambda now: 5000, 60)
    assert trace[-1][2] > GOAL.target
    assert [bits for _, bits in changes(trace)] == [2]


@pytest.mark.parametrize("length", [0.5, 3, 20])
@pytest.mark.parametrize("load", [200, 600, 2000])
def test_after_a_spike_the_ceiling_is_back_soon(length, load):
    trace = simulate(lambda now: load if 5 < now <= 5 + length else 50, 70)
    assert min(bits for _, bits, _ in trace) < 8
    last, bits = changes(trace)[-1]
    # nothing failed, so each step takes the shortest wait
    assert bits == 8 and last - 5 - length <= 5 * GOAL.hold
    up = [b for now, b, _ in trace if now > 5 + length]
    assert all(STEPS.index(b) - STEPS.index(a) in (0, 1) for a, b in pairwise(up))


@pytest.mark.parametrize("rest", [0, 50])
@pytest.mark.parametrize("load", [200, 600, 2000])
@pytest.mark.parametrize("period, first, later", [(4, 4, 0), (20, 12, 10), (30, 12, 10)])
def test_a_load_that_comes_and_goes_does_not_make_bits_flap(period, first, later, load, rest):
    trace = simulate(lambda now: load if now % period < period / 2 else rest, 300)
    assert 1 <= per_minute(trace) <= first
    assert per_minute(trace, since=60) <= later


@pytest.mark.parametrize("load, between", [(157, {6, 8}), (260, {4, 6})])
def test_a_load_between_two_steps_is_tried_ever_more_seldom(load, between):
    low = min(between)
    trace = simulate(lambda now: load, 240)
    tries = [now for now, bits in changes(trace)[1:] if bits == max(between) and now > 1]
    waits = [b - a for a, b in pairwise(tries)]
    assert waits == sorted(waits) and waits[-1] >= GOAL.longest
    late = [row for row in trace if row[0] >= 60]
    assert {bits for _, bits, _ in late} == between
    assert per_minute(trace, since=60) <= 10
    assert sum(bits == low for _, bits, _ in late) > 0.9 * len(late)
    # a longer wait tries less
    patient = simulate(lambda now: load, 600, replace(GOAL, longest=60))
    assert per_minute(patient, since=180) <= 2


def test_without_the_back_off_such_a_load_would_flap():
    # what the bounds above are worth
    assert per_minute(simulate(lambda now: 260, 240, replace(GOAL, longest=GOAL.hold))) > 30


@pytest.mark.parametrize("arrivals", [12, 16, 20, 25])
def test_a_queue_is_kept_short_and_empties(arrivals):
    waiting = 0.0

    def queue(bits, load):
        nonlocal waiting
        waiting = max(0.0, waiting + (load - 80 / (bits + 1)) * PERIOD)
        return waiting

    goal = Goal("queue", target=8)
    trace = simulate(lambda now: arrivals if now <= 120 else 2, 150, goal, queue)
    # 8 bits serve 9 a second: left alone, the queue would be 360 and more
    assert max(observed for *_, observed in trace) < 4 * goal.target
    assert trace[-1][1] == 8
    assert per_minute(trace) <= 24


def test_an_idle_server_returns_to_the_ceiling():
    trace = simulate(lambda now: 2000 if now <= 20 else 0, 60)
    assert [row[1] for row in trace if row[0] == 20] == [2]
    assert trace[-1][1:] == (8, None)
    assert changes(trace)[-1][0] <= 50


@given(HISTORIES, st.floats(0, PERIOD))
def test_from_any_state_the_ceiling_is_back_within_30_s(history, pause):
    memory, now = follow(GOAL, history)[-1]
    gone = now
    now += pause
    while (memory := step(GOAL, memory, now, 0.5)).bits < 8:
        now += PERIOD
        assert now - gone <= 30


def test_the_longest_way_back_is_what_the_module_says():
    lowest = Memory(bits=2, changed=0, rising=False, calm=0, hold=GOAL.longest)
    states = follow(GOAL, [(PERIOD, None)] * 80, lowest)
    assert [now for (before, _), (after, now) in pairwise(states) if after.bits > before.bits] == [12, 18, 21, 23, 25]
    assert states[-1][0].bits == 8


@given(GOALS, HISTORIES)
def test_bits_are_always_an_allowed_budget(goal, history):
    budgets = goal.budgets
    assert budgets[0] == goal.floor and budgets[-1] == goal.ceiling
    for memory, _ in follow(goal, history):
        assert memory.bits in budgets
        assert goal.hold <= memory.hold <= goal.longest


@given(GOALS, HISTORIES)
def test_only_comfort_raises_and_only_a_miss_lowers(goal, history):
    states = follow(goal, history)
    for ((before, _), (after, now)), (pause, observed) in zip(pairwise(states), history, strict=True):
        if observed is not None and not observed < goal.comfort * goal.target:
            assert after.bits <= before.bits
        if observed is None or not observed > goal.target:
            assert after.bits >= before.bits
        if pause < 0:
            assert after.bits <= before.bits
        if after.bits > before.bits:
            assert goal.budgets.index(after.bits) == goal.budgets.index(before.bits) + 1
            assert now - before.calm >= goal.hold


@given(HISTORIES, st.floats(0, 1.5), st.floats(1.5, 100, exclude_min=True))
def test_a_worse_observation_never_gives_more_bits(history, better, worse):
    memory, now = follow(GOAL, history)[-1]
    assert step(GOAL, memory, now + PERIOD, worse).bits <= step(GOAL, memory, now + PERIOD, better).bits
    assert step(GOAL, memory, now + PERIOD, 2 * worse).bits <= step(GOAL, memory, now + PERIOD, worse).bits


@pytest.mark.parametrize(
    "observed, bits", [(1.5, 8), (1.51, 6), (2.9, 6), (3.0, 4), (4.5, 3), (9, 2), (1e300, 2), (math.inf, 2)]
)
def test_the_first_miss_lowers_by_a_step_for_each_multiple_of_the_target(observed, bits):
    assert step(GOAL, start(GOAL, 100), 100, observed).bits == bits


def test_a_lower_budget_settles_before_the_next():
    memory = step(GOAL, start(GOAL, 0), 10, 2)
    assert step(GOAL, memory, 10.9, 2).bits == 6
    assert step(GOAL, memory, 11, 2).bits == 4
    # a raise is taken back at once
    raised = step(GOAL, memory, 12, 0)
    assert raised.bits == 8 and step(GOAL, raised, 12.1, 2).bits == 6


def test_comfort_must_not_be_broken():
    memory = step(GOAL, start(GOAL, 0), 10, 2)
    memory = step(GOAL, memory, 11.9, 1.2)
    assert step(GOAL, memory, 13.8, 0).bits == 6
    assert step(GOAL, memory, 13.9, 0).bits == 8


def test_a_raise_that_lasted_is_no_failure():
    lowered = replace(start(GOAL, 0), bits=6, hold=8.0)
    raised = step(GOAL, lowered, 8, 0)
    assert (raised.bits, raised.hold) == (8, 4)
    assert step(GOAL, raised, 20, 2).hold == GOAL.longest
    assert step(GOAL, raised, 20.1, 2).hold == GOAL.hold


@pytest.mark.parametrize("nothing", [math.nan, -1.0, -math.inf])
def test_what_is_no_observation_changes_nothing(nothing):
    memory = step(GOAL, start(GOAL, 0), 10, 2)
    assert step(GOAL, memory, 60, nothing) is memory
    assert step(GOAL, memory, 60, None).bits == 8


def test_a_clock_that_was_set_back_stops_nothing_for_long():
    memory = step(GOAL, start(GOAL, 1000), 1000, 2)
    back = step(GOAL, memory, 10, 0)
    assert back.bits == 6
    assert step(GOAL, back, 12, 0).bits == 8
    assert step(GOAL, back, 12, 2).bits == 4


def test_another_goal_takes_over_the_state():
    memory = start(GOAL, 0)
    assert step(replace(GOAL, ceiling=5), memory, 1, 0).bits == 5
    memory = replace(memory, bits=2.5)
    assert step(replace(GOAL, floor=3), memory, 1, 1.2).bits == 3
    assert step(replace(GOAL, steps=()), memory, 1, 1.2).bits == 2


def test_budgets_are_the_ends_and_the_steps_between():
    assert GOAL.budgets == STEPS
    assert Goal("queue", 4, floor=2.2, ceiling=5).budgets == (2.2, 2.5, 3, 4, 5)
    assert Goal("queue", 4, floor=3, ceiling=4, steps=(9, 3.5, 3.2, 3.5, 1, math.nan)).budgets == (3, 3.2, 3.5, 4)


def test_settings_and_state_are_frozen():
    for frozen in (GOAL, start(GOAL, 0)):
        with pytest.raises(FrozenInstanceError):
            frozen.hold = 1
    assert [Goal(metric, 1).metric for metric in METRICS] == list(METRICS)


@pytest.mark.parametrize(
    "bad, sentence",
    [
        ({"metric": "speed"}, "the metric 'speed' is unknown: choose first_token, per_token or queue"),
        ({"target": 0}, "a target of 0 cannot be met: give a finite number above 0"),
        ({"target": -0.5}, "a target of -0.5 cannot be met"),
        ({"target": math.nan}, "a target of nan cannot be met"),
        ({"target": math.inf}, "a target of inf cannot be met"),
        ({"floor": 4, "ceiling": 4}, "4 to 4 bits is no range: give a floor above 0 and a ceiling above the floor"),
        ({"floor": 0}, "0 to 8 bits is no range"),
        ({"ceiling": math.nan}, "2 to nan bits is no range"),
        ({"comfort": 1}, "a comfort of 1 is not usable: give a share of the target between 0 and 1"),
        ({"hold": 0}, "waits from 0 to 12 s are not usable: give a hold above 0"),
        ({"hold": 20}, "waits from 20 to 12 s are not usable"),
        ({"settle": -1}, "a settle of -1 s is not usable: give 0 or more seconds"),
    ],
)
def test_bad_settings_are_refused(bad, sentence):
    with pytest.raises(InputError) as refused:
        Goal(**{"metric": "queue", "target": 4, **bad})
    assert str(refused.value).startswith(sentence)


@pytest.mark.parametrize(
    "before, after, mean",
    [
        ((10, 4), (16, 7), 2),
        ((0, 0), (0, 3), 0),
        ((10, 4), (10, 4), None),
        ((0, 0), (0, 0), None),
        # the server began anew, with fewer, with none, and with more than before
        ((10, 4), (3, 2), 1.5),
        ((10, 4), (0, 0), None),
        ((10, 4), (3, 6), 0.5),
        ((10, 4), (12, 3), 4),
    ],
)
def test_a_mean_between_two_readings_of_counters(before, after, mean):
    assert mean_since(before, after) == mean
