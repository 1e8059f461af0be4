"""Progress is told on stderr in lines where it is no terminal, and on request only."""

import io

from rich.console import Console

from mobiquant.progress import bars, by_width, left


def lines(**settings):
    stream = io.StringIO()
    with bars(Console(file=stream, width=80), **settings) as report:
        for done in range(31):
            report("work", done, 30)
    return stream.getvalue().splitlines()


def test_a_line_is_written_at_each_tenth():
    assert lines(lines=True) == [f"work: {done}/30" for done in range(3, 31, 3)]


def test_lines_tell_the_time_that_is_left_since_the_first_report():
    stream, times = io.StringIO(), iter(range(0, 100000, 30))
    with bars(Console(file=stream, width=80), lines=True, clock=lambda: float(next(times))) as report:
        for done in (4, 10, 20):
            report("work", done, 20, "note")
    # the clock is read at every report and once more for a line: the 6 steps took 60 seconds by it
    assert stream.getvalue().splitlines() == ["work: 4/20 note", "work: 10/20 note (100 s left)", "work: 20/20 note"]
    assert [left(seconds) for seconds in (0.4, 1, 119, 121)] == ["", "1 s left", "119 s left", "2 min left"]


def test_what_passes_before_the_first_step_is_no_step():
    stream, now = io.StringIO(), [0.0]
    with bars(Console(file=stream, width=80), lines=True, clock=lambda: now[0]) as report:
        for seconds, done in ((0, 0), (500, 1), (510, 2)):
            now[0] = float(seconds)
            report("work", done, 10, "" if done else "compiling")
    assert stream.getvalue().splitlines() == ["work: 1/10", "work: 2/10 (80 s left)"]


def test_nothing_is_written_unasked():
    assert not lines()


def test_a_note_stands_behind_the_line():
    stream = io.StringIO()
    with bars(Console(file=stream, width=80), lines=True) as report:
        report("work", 1, 1, by_width({3: 0.25, 2: 1.5}))
    assert stream.getvalue() == "work: 1/1 2b:1.5 3b:0.25\n"
