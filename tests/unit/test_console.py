"""What a run shows: plain lines, the frames of the live screen at any size, and texts that try to break out."""

from __future__ import annotations

import io
import random
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from oatlite.metrics.console import PlainConsole, clean, open_console
from oatlite.metrics.curves import LABEL_WIDTH, plot
from oatlite.metrics.live import LiveConsole
from oatlite.metrics.records import make_record
from oatlite.metrics.screen import ScreenState, final_frame, frame
from oatlite.metrics.summary import History

HOSTILE = "\x1b[2J\x1b]0;owned\x07 [bold]not bold[/bold] \r\n\t\u202egnitirw \ud800 \x9b31m"
BRAILLE = re.compile("[\u2801-\u28ff]")


class Terminal(io.StringIO):
    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


def step(number: int, **metrics: Any) -> dict[str, Any]:
    perf = {"step_s": 7.25, "tokens_per_s": 1234.0, "learn_s": 4.0}
    return make_record("step", step=number, policy_version=number, reward=number * 0.1, perf=perf, **metrics)


def evaluation(number: int) -> dict[str, Any]:
    return make_record("eval", step=number, win_rate=0.5 + number / 100, gold_score=1.0 - number / 100)


def pair(text: str = "text") -> dict[str, Any]:
    return {"prompt": f"P {text}", "chosen": f"C {text}", "rejected": f"R {text}", "win_probability": 0.87}


# Untrusted text


@given(st.text())
def test_clean_text_holds_nothing_that_a_terminal_acts_on(text: str) -> None:
    assert not any(ord(char) < 32 or 127 <= ord(char) < 160 for char in clean(text))
    assert len(clean(text)) == len(text)


def test_clean_keeps_what_can_be_read() -> None:
    assert clean("ünï 圧縮 [bold]\n🎉") == "ünï 圧縮 [bold] 🎉"
    assert "\x1b" not in clean(HOSTILE)
    assert "\u202e" not in clean(HOSTILE)


# Plain lines


def plain() -> tuple[PlainConsole, io.StringIO]:
    stream = io.StringIO()
    return PlainConsole(title="t", total_steps=10, stream=stream), stream


def test_plain_lines_tell_stages_until_the_first_step() -> None:
    console, stream = plain()
    console.stage("actor 0", "generate")
    console.record(step(1))
    console.stage("actor 0", "score")
    console.stage("actor 0", "restarting", "signal 9")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert "actor 0    generate" in lines[0]
    assert "step 1/10  reward 0.1  7.2 s  1,234 tok/s" in lines[1]
    assert "restarting: signal 9" in lines[2]


def test_plain_lines_end_with_the_summary() -> None:
    console, stream = plain()
    with console:
        for number in (0, 10):
            console.record(evaluation(number))
        console.close({"steps": 10, "run_dir": "runs/x"})
    text = stream.getvalue()
    assert "50.0% -> 60.0%  (+10.0 points)" in text
    assert text.count("done:") == 1, "closing twice says it once"
    assert "runs/x" in text


def test_a_run_without_rollouts_is_told_by_what_it_has() -> None:
    stream = io.StringIO()
    console = PlainConsole(title="t", total_steps=2, stream=stream)
    for number, accuracy in ((0, 0.5), (2, 0.75)):
        console.record(make_record("eval", step=number, accuracy=accuracy, loss=0.7 - accuracy / 10))
        console.record(make_record("step", step=number + 1, accuracy=0.1, loss=0.6))
    console.close({"steps": 2})
    text = stream.getvalue()
    assert "evaluation at step 2  loss 0.625  acc 0.75" in text
    assert re.search(r"accuracy +50\.0% -> 75\.0%  \(\+25\.0 points\)", text) and "oracle queries" not in text
    state = ScreenState(title="t", total_steps=2, history=console.history)
    shown = frame(state, 80, 24).plain
    assert "accuracy  75.0%" in shown and "loss  0.6" in shown and "win rate" not in shown


def test_without_a_summary_nothing_is_claimed() -> None:
    console, stream = plain()
    with console:
        console.record(step(1))
    assert "done" not in stream.getvalue()


def test_plain_lines_are_one_line_each_whatever_the_text() -> None:
    console, stream = plain()
    console.note(HOSTILE)
    console.stage("actor 0", HOSTILE, HOSTILE)
    console.pair(pair(HOSTILE))
    assert stream.getvalue().count("\n") == 2
    assert "\x1b" not in stream.getvalue()


def test_a_stream_that_cannot_hold_a_character_or_is_gone_ends_nothing() -> None:
    raw = io.BytesIO()
    console = PlainConsole(title="t", total_steps=None, stream=io.TextIOWrapper(raw, encoding="ascii"))
    console.note("圧縮 done")
    assert b"?? done" in raw.getvalue()
    closed = io.StringIO()
    closed.close()
    PlainConsole(title="t", total_steps=None, stream=closed).note("nobody reads this")


@pytest.mark.parametrize(
    ("ui", "stream", "term", "expected"),
    [
        ("auto", Terminal(), "xterm", LiveConsole),
        ("auto", Terminal(), "dumb", PlainConsole),
        ("auto", io.StringIO(), "xterm", PlainConsole),
        ("plain", Terminal(), "xterm", PlainConsole),
        ("live", io.StringIO(), "dumb", LiveConsole),
    ],
)
def test_the_screen_is_for_terminals(
    monkeypatch: pytest.MonkeyPatch, ui: Any, stream: io.StringIO, term: str, expected: type
) -> None:
    monkeypatch.setenv("TERM", term)
    with open_console(ui, title="t", total_steps=3, stream=stream) as console:
        assert type(console) is expected


# The screen


def filled(*, num_actors: int = 1, steps: int = 20, text: str = "some words of a response " * 8) -> ScreenState:
    state = ScreenState(title=f"run {text[:20]}", total_steps=32, history=History(), elapsed_s=75.0, step_s=7.0)
    noise = random.Random(0)
    for number in range(steps + 1):
        state.history.add(step(number, gold_score=noise.random()))
        if number % 8 == 0:
            state.history.add(evaluation(number))
    for index in range(num_actors):
        state.set_stage(f"learner {index}", "learn", f"micro-step {index} of 4")
        state.set_stage(f"actor {index}", "generate", text)
    state.pair = pair(text)
    state.notes.extend(["first note", f"second note {text}"])
    return state


@pytest.mark.parametrize("num_actors", [1, 8])
@pytest.mark.parametrize("text", ["some words " * 30, "圧縮ライブラリ" * 60, HOSTILE * 9, ""])
@pytest.mark.parametrize(("width", "height"), [(80, 24), (60, 18), (120, 40), (250, 70), (40, 10), (20, 5)])
def test_every_frame_fits_its_terminal(width: int, height: int, text: str, num_actors: int) -> None:
    lines = frame(filled(num_actors=num_actors, text=clean(text)), width, height).plain.split("\n")
    assert len(lines) == height
    assert max(cell_len(line) for line in lines) <= width


@pytest.mark.parametrize(("width", "height"), [(80, 24), (60, 18), (120, 40)])
def test_a_usual_frame_shows_everything(width: int, height: int) -> None:
    text = frame(filled(), width, height).plain
    for words in (
        "step 20/32",
        "1:15",
        "learner 0",
        "actor 0",
        "win rate",
        "66.0%",
        "reward",
        "gold score",
        "chosen 87%",
    ):
        assert words in text
    for words in ("P some", "C some", "R some", "note"):
        assert words in text
    assert len(BRAILLE.findall(text)) > 20


@pytest.mark.parametrize(("width", "height"), [(80, 24), (60, 18), (20, 5)])
def test_a_frame_of_a_run_that_has_only_begun(width: int, height: int) -> None:
    state = ScreenState(title="t", total_steps=None, history=History())
    assert len(frame(state, width, height).plain.split("\n")) == height
    assert "oatlite" in frame(state, width, height).plain
    assert final_frame(state, width).plain == "t"


def test_many_processes_are_counted_when_they_do_not_fit() -> None:
    assert "and 14 more" in frame(filled(num_actors=8), 60, 18).plain


def test_the_stage_clock_starts_anew_with_each_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    state = ScreenState(title="t", total_steps=None, history=History())
    state.set_stage("actor 0", "generate", "")
    now = 142.0
    state.set_stage("actor 0", "generate", "half")
    assert "generate  42 s" in frame(state, 80, 24).plain
    state.set_stage("actor 0", "score", "")
    assert "score  0 s" in frame(state, 80, 24).plain


def test_the_live_screen_draws_leaves_and_lets_no_escape_through() -> None:
    stream = Terminal()
    with LiveConsole(title="the title", total_steps=32, stream=stream) as console:
        console.stage("actor 0", "generate", HOSTILE)
        for number in (0, 8):
            console.record(step(number))
            console.record(evaluation(number))
        console.pair(pair(HOSTILE))
        console.note(HOSTILE)
        console._live.refresh()
        console.close({"steps": 8})
    text = stream.getvalue()
    assert "\x1b[?1049h" in text, "on the alternate screen"
    assert text.rindex("\x1b[?1049l") > text.rindex("\x1b[?1049h"), "and back"
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "with its cursor"
    after = text[text.rindex("\x1b[?1049l") :]
    assert "win rate" in after
    assert "done: 8 steps" in after
    for escape in ("\x1b[2J", "\x1b]0;", "\x9b", "\u202e"):
        assert escape not in text
    assert "[bold]not bold[/bold]" in text
    assert not console._thread.is_alive()


def test_a_terminal_that_goes_away_ends_nothing() -> None:
    stream = Terminal()
    console = LiveConsole(title="t", total_steps=None, stream=stream)
    stream.close()
    console.record(step(1))
    console.close({"steps": 1})
    assert not console._thread.is_alive()


# Curves


def test_a_curve_has_its_values_on_the_axis_and_its_dots_where_they_belong() -> None:
    lines = plot([(0, 0.0), (10, 1.0)], width=LABEL_WIDTH + 10, height=5, last_step=20)
    assert [line[:LABEL_WIDTH].strip() for line in lines] == ["1.05", "", "0.5", "", "-0.05"]
    cells = [line[LABEL_WIDTH:] for line in lines]
    assert BRAILLE.search(cells[-1][:1]), "it begins at the bottom left"
    assert BRAILLE.search(cells[0][4:5]), "it has come half the way, up to the top"
    assert not any(BRAILLE.search(line[5:]) for line in cells), "the rest of the run is still empty"


def test_a_curve_has_no_gaps() -> None:
    lines = plot([(0, 0.0), (1, 5.0), (2, -5.0)], width=LABEL_WIDTH + 4, height=8)
    assert all(BRAILLE.search(line) for line in lines)


@given(
    st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=300),
    st.integers(1, 100),
    st.integers(1, 30),
    st.integers(0, 500),
)
def test_any_curve_fits(values: list[float], width: int, height: int, last_step: int) -> None:
    lines = plot(list(enumerate(values)), width=width, height=height, last_step=last_step)
    assert len(lines) == height
    assert max(map(len, lines)) <= max(width, LABEL_WIDTH + 1)
    assert BRAILLE.search("".join(lines))


def test_an_empty_curve_says_so() -> None:
    assert "waiting for data" in "".join(plot([], width=30, height=4))
