"""Progress is told on stderr in lines where it is no terminal, and on request only."""

import io

from rich.console import Console

from mobiquant.progress import bars, by_width


def lines(**settings):
    stream = io.StringIO()
    with bars(Console(file=stream, width=80), **settings) as report:
        for done in range(31):
            report("work", done, 30)
    return stream.getvalue().splitlines()


def test_a_line_is_written_at_each_tenth():
    assert lines(lines=True) == [f"work: {done}/30" for done in range(3, 31, 3)]


def test_nothing_is_written_unasked():
    assert not lines()


def test_a_note_stands_behind_the_line():
    stream = io.StringIO()
    with bars(Console(file=stream, width=80), lines=True) as report:
        report("work", 1, 1, by_width({3: 0.25, 2: 1.5}))
    assert stream.getvalue() == "work: 1/1 2b:1.5 3b:0.25\n"
