"""What a bar leaves in a log: whole lines, seldom, with the time that remains."""

import io
import subprocess
import sys

import pytest

from moepress import progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the bars' clock shows, to be set."""
    from tqdm import std

    before = {name: getattr(std.tqdm, name) for name in ("display", "close", "clear", "moveto")}
    now = [0.0]
    monkeypatch.setattr(std, "time", lambda: now[0])
    monkeypatch.setattr(std.tqdm, "monitor_interval", 0)
    progress.use_lines()
    yield now
    for name, method in before.items():
        setattr(std.tqdm, name, method)


def test_a_line_every_ten_seconds_and_one_at_the_end(clock):
    from tqdm import tqdm

    log = io.StringIO()
    with tqdm(total=32, initial=2, desc="quantization qesc-2.5", unit="layer", file=log) as bar:
        with tqdm(total=8, desc="experts of the layer", unit="expert", leave=False, position=1, file=log) as inner:
            for _ in range(8):
                clock[0] += 0.5
                inner.update()
        for _ in range(30):
            clock[0] += 4
            bar.update()
        bar.set_postfix_str("starved 3")
    lines = log.getvalue().splitlines()
    assert "\r" not in log.getvalue() and "\x1b" not in log.getvalue()
    assert lines[0].startswith("quantization qesc-2.5: 4 of 32 layers, 0:00:12 so far, about 0:0")
    assert lines[-1].startswith("quantization qesc-2.5: 32 of 32 layers, 0:02:04 so far")
    assert 8 <= len(lines) <= 13, "one every ten seconds of 124"
    assert not any("experts" in line for line in lines), "what ends within ten seconds is no news"


def test_a_terminal_keeps_its_bar(clock):
    from tqdm import tqdm

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    log = Terminal()
    for _ in tqdm(range(3), file=log, ascii=True):
        clock[0] += 1
    assert "\r" in log.getvalue() and "100%" in log.getvalue()


def test_a_disabled_bar_stays_silent(clock):
    from tqdm import tqdm

    log = io.StringIO()
    with tqdm(total=3, file=log, disable=True) as bar:
        clock[0] += 60
        bar.update()
        bar.clear()
    assert log.getvalue() == ""


def test_bytes_and_unknown_totals():
    state = {"n": 3 * 10**9, "total": 12 * 10**9, "unit": "B", "unit_scale": True, "elapsed": 60, "rate": None, "initial": 0}
    assert progress.line(state | {"prefix": "hashing: ", "postfix": None}) == (
        "hashing: 3.00G of 12.0G B, 0:01:00 so far, about 0:03:00 left"
    )
    state |= {"n": 7, "total": None, "unit": "round", "unit_scale": False}
    assert progress.line(state | {"prefix": "", "postfix": "x=1"}) == "7 rounds, 0:01:00 so far (x=1)"


def test_a_stages_process_writes_lines():
    program = """
import sys
from moepress import progress
progress.SECONDS = 0
progress.use_lines()
from tqdm.auto import tqdm  # as the libraries import it
for _ in tqdm(range(3), desc="steps", unit="step", mininterval=0): pass
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "\r" not in done.stderr and done.stderr.splitlines()[-1].startswith("steps: 3 of 3 steps")
