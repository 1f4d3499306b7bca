"""The monitor: what it reads, what it draws, what its keys do, and what it is as a process."""

import asyncio
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.color import ColorSystem

import events
import fake_run
import tui

ROOT = Path(__file__).parents[1]
REAL = ROOT / "tests" / "run" / "events.jsonl"  # a run of the default, as the trainer wrote it
sys.path.append(str(ROOT / "bench"))
SIZES = [(220, 60), (160, 45), (120, 40), (80, 24), (60, 16), (40, 12), (20, 5)]


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Logs by name: the real one, a longer text, and one in the middle of a rollout."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "sudoku").mkdir()
    shutil.copy(REAL, folder / "sudoku")
    fake_run.write(folder / "gsm8k")
    fake_run.write(folder / "live", until=5)
    return folder


def load(path: Path, **options) -> tui.Log:
    log = tui.Log(path / "events.jsonl" if path.is_dir() else path, patience=0, **options)
    while log.poll():
        pass
    return log


def live(runs: Path) -> tui.Log:
    """A run whose last event is a second old, for ever."""
    log = load(runs / "live")
    log.clock = lambda: events.stamp(log.history.recent[-1]) + 1
    return log


def lines(*events: dict) -> bytes:
    return b"".join(
        fake_run.encode({"ts": 1.76e9 + q} | event, q) for q, event in enumerate(events)
    )


META = dict(e="meta", v=1, run="r", T=4, K=2, L=8, block=4, N=2, G=2, iters=9, resume=None)


def step(it: int, **metrics) -> dict:
    m = {"reward/mean": 0.5} | metrics
    return dict(e="step", it=it, m=m, ent=[2, 1, 0.5, 0.2], sel=[2, 2, 0, 0], n=2)


def feed(*events: dict) -> tui.History:
    record = tui.History()
    for line in lines(*events).splitlines():
        record.feed(line)
    return record


def state(history: tui.History) -> str:
    """All of a history, comparable even where it holds NaN."""
    return repr(history)


def screen(logs, size, **options) -> str:
    """A screen as text, checked to fill its size."""
    rows = tui.frame(tui.View(logs if isinstance(logs, list) else [logs], **options), *size)
    check(rows, *size)
    return tui.plain(rows)


# ---- read ----------------------------------------------------------------------------------------


def test_a_torn_last_line_waits_for_its_newline(tmp_path):
    path = tmp_path / "events.jsonl"
    whole = lines(META, step(0))
    path.write_bytes(whole[:-20])
    log = load(path)
    assert log.history.meta and not log.history.series and log.history.bad == 0
    with open(path, "ab") as file:
        file.write(whole[-20:])
    log.poll()
    assert log.history.latest("reward/mean") == 0.5 and log.history.bad == 0


def test_every_split_of_the_stream_gives_the_same_state(tmp_path, runs):
    whole = (runs / "sudoku" / "events.jsonl").read_bytes()[:60000]
    path = tmp_path / "events.jsonl"
    path.write_bytes(whole)
    expected = state(load(path).history)
    for seed in range(25):
        rng = random.Random(seed)
        cuts = sorted(rng.randrange(len(whole)) for _ in range(rng.randint(1, 40)))
        path = tmp_path / str(seed)
        log = tui.Log(path)
        for start, end in zip([0, *cuts], [*cuts, len(whole)]):
            with open(path, "ab") as file:
                file.write(whole[start:end])
            log.poll()
        assert state(log.history) == expected


def test_a_hole_of_nul_bytes_is_waited_for_and_then_read(tmp_path):
    path = tmp_path / "events.jsonl"
    whole = lines(META, step(0), step(1), step(2))
    start = len(lines(META))
    path.write_bytes(whole[:start] + bytes(30) + whole[start + 30 :])
    log = tui.Log(path)
    log.poll()
    assert log.history.meta and not log.history.series
    path.write_bytes(whole)
    log.poll()
    assert log.history.done == 3 and log.history.bad == 0


def test_a_hole_that_stays_is_one_bad_line(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(lines(META) + bytes(50) + b"\n" + lines(step(0)))
    log = tui.Log(path, patience=3)
    for _ in range(5):
        log.poll()
    assert log.history.done == 1 and log.history.bad == 1


@pytest.mark.parametrize("how", ["replaced", "truncated", "regrown"])
def test_a_file_that_starts_over_is_read_from_its_start(tmp_path, how):
    path = tmp_path / "events.jsonl"
    path.write_bytes(lines(META, step(0), step(1)))
    log = load(path)
    new = lines(
        META | {"ts": 1.77e9, "run": "new"}, *map(step, range(5 if how == "regrown" else 1))
    )
    if how == "replaced":
        path.with_suffix(".new").write_bytes(new)
        os.replace(path.with_suffix(".new"), path)
    else:
        path.write_bytes(new)  # the same inode; "regrown" is longer than what was read
    log.poll()
    assert log.name == "new" and log.history.done == (5 if how == "regrown" else 1)


def test_a_missing_file_is_waited_for_and_a_deleted_one_keeps_its_state(tmp_path):
    log = tui.Log(tmp_path / "events.jsonl")
    assert not log.poll() and log.status()[0] == "waiting"
    log.path.write_bytes(lines(META, step(0)))
    log.poll()
    assert log.history.done == 1
    log.path.unlink()
    log.poll()
    assert log.history.done == 1
    log.path.mkdir()  # in the place of a disk that cannot be read for a while
    log.poll()
    assert log.history.done == 1


def test_what_is_not_a_number_arrives_and_is_news():
    run = feed(META, step(0, kl=0.1), step(1, kl="nan"), step(2, kl="nan"), step(3, kl="-inf"))
    assert math.isnan(run.series["kl"][1]) and run.series["kl"][3] == -math.inf
    assert [alert for alert in run.alerts] == [(1, "error", "kl is nan")]  # once, not every step


def test_a_resume_makes_what_came_after_it_void():
    sample = dict(e="sample", it=3, s=0, tok=["a"], rev=[0])
    run = feed(
        META,
        *map(step, range(5)),
        sample,
        dict(e="eval", it=4, m={"accuracy": 0.5}),
        dict(e="end", status="crashed"),
        META | {"resume": 2},
    )
    assert run.done == 2 and sorted(run.entropy) == [0, 1]
    assert not run.samples and not run.evals and run.end is None
    assert feed(META, *map(step, range(5)), META).done == 0


def test_unknown_events_and_keys_are_ignored_and_unusable_lines_are_counted():
    run = feed(META | {"colour": "red"}, dict(e="telepathy", it=1), step(0) | {"x": 1})
    assert run.done == 1 and run.bad == 0
    for line in (
        b"{",
        b"[]",
        b"7",
        b"",
        b"\xff\xfe",
        b'{"e":"step"}',
        b'{"e":"sample","q"}',
        b'{"e":"phase","it":"x"}',
    ):
        run.feed(line)
    assert run.bad == 8 and run.done == 1
    run.feed(lines(step(10**30)).strip())
    assert run.bad == 9
    assert feed(META | {"v": 2}).newer and not run.newer


def test_a_long_log_is_read_once_and_in_pieces(tmp_path):
    row = dict(e="denoise", it=0, b=0, s=0, H=[0.5])
    events = [row | dict(t0=i, rv=[[i, "x", 0.5]]) for i in range(18)]
    body = (lines(*events, dict(e="phase", it=i, name="update"), step(i)) for i in range(1000))
    path = tmp_path / "events.jsonl"
    path.write_bytes(lines(META) + b"".join(body))
    log, reads = tui.Log(path), []
    read = log.tail.read
    log.tail.read = lambda: reads.append(read()) or reads[-1]
    while log.poll():
        pass
    assert log.history.lines == 20001 and log.history.done == 1000
    assert sum(len(new) for _, new in reads) == 20001 and len(reads) > 2


def test_the_state_of_a_run_is_told_apart(tmp_path):
    path, ended = tmp_path / "events.jsonl", subprocess.Popen(["true"])
    ended.wait()
    here = dict(zip(("host", "boot"), events.this_machine()), pid=os.getpid())

    def status(age: float, *events: dict, **meta) -> str:
        path.write_bytes(lines(META | meta, *events))
        log = load(path, clock=lambda: 1.76e9 + len(events) + age)
        return log.status()[0]

    assert status(1, **here) == "live"
    assert status(1, **here | {"pid": ended.pid}) == "crashed"
    assert status(1, **here | {"pid": ended.pid, "host": "elsewhere"}) == "live"
    assert status(61, step(0)) == "quiet"
    assert status(61, step(0, **{"t/total": 100})) == "live"  # its steps are that long
    assert status(700, step(0)) == "dead"
    assert status(700, dict(e="end", status="stopped")) == "stopped"
    assert status(1, dict(e="end", status="finished"), META | {"resume": 1}) == "live"


def test_a_trajectory_is_the_tokens_and_when_they_were_revealed(runs):
    event = dict(it=0, s=0, tok=["a", "b", "c", ""], rev=[1, 0, 2, 3], ent=[1, 1, 1])
    sample = tui.Sample(event)

    def seen(t: int) -> list[str]:
        return [tui.Picture(sample, t).position(i, t)[0] for i in range(4)]

    assert seen(-1) == ["░", "░", "░", ""]
    assert seen(0) == ["░", "b", "░", ""]
    assert seen(1) == ["a", "b", "░", ""]
    assert seen(2) == ["a", "b", "c", ""]  # the row had ended before its last position
    assert sample.decoded == 3
    log = load(runs / "sudoku")
    logged = log.sample(24, 8)
    assert (logged.it, logged.s, logged.p, len(logged.sel)) == (24, 8, 1, 4)
    assert log.sample(24, 99) is None


def test_a_group_is_a_logged_trajectory_and_the_texts_of_the_others(runs):
    log = load(runs / "sudoku")
    sample = log.sample(24, 8)
    group = log.group(sample)
    assert [one.g for one in group] == list(range(8)) and group[0] is sample
    assert [one.s for one in group] == list(range(8, 16))
    assert len(group[5].tok) == 1 and group[5].tok[0].startswith("<answer>")


def test_the_rollout_in_progress_is_followed(runs):
    log = load(runs / "live")
    sample = log.history.live()
    assert sample.it == 5 and 0 < len(sample.ent) < 64
    assert sum(map(bool, sample.tok)) == sum(when < len(sample.ent) for when in sample.rev) > 0
    log.history.feed(lines(step(5)).strip())
    assert log.history.live() is None


def test_the_prompt_of_a_rollout_in_progress_is_shown_above_it(tmp_path):
    path = tmp_path / "events.jsonl"
    first = dict(e="denoise", it=0, b=0, t0=0, s=0, H=[1.0], rv=[[0, "42", 1.0]])
    path.write_bytes(lines(META, first | {"prompt": "What is 6 x 7?"}, first | {"t0": 1, "rv": []}))
    log = load(path, clock=lambda: 1.76e9 + 3)
    assert log.history.live().prompt == "What is 6 x 7?"
    for number in (1, 3):
        text = screen(log, (120, 40), number=number)
        assert "denoising now" in text and "Q: What is 6 x 7?" in text
    other = lines(first | {"it": 1}).strip()
    log.history.feed(other)
    assert log.history.live().prompt == ""  # of another rollout, without one


def test_a_replay_shows_a_log_at_the_pace_it_was_written(runs):
    now = [1000.0]
    log = tui.Log(runs / "sudoku" / "events.jsonl", speed=2.0, clock=lambda: now[0])
    log.poll()
    assert log.history.lines and log.history.done == 0 and log.status()[0] == "live"
    now[0] += 15.0  # 30 seconds of the run, at about 3 s a step
    log.poll()
    assert 5 <= log.history.done <= 11
    now[0] += 1000.0
    log.poll()
    assert log.history.done == 25 and log.status()[0] == "finished"


# ---- draw ----------------------------------------------------------------------------------------


def check(rows: list, width: int, height: int) -> None:
    assert len(rows) == height
    for row in rows:
        assert sum(cell_len(text) for text, _ in row) == width


LOOKS = [dict(), dict(light=True), dict(ascii=True)]
VALUES = st.lists(
    st.one_of(st.floats(-1e9, 1e9), st.just(math.nan), st.just(math.inf), st.just(0.0)), max_size=80
)


@settings(max_examples=100, deadline=None)
@given(VALUES, st.integers(1, 140), st.integers(1, 130), st.integers(2, 20), st.booleans())
def test_every_picture_fills_exactly_its_cells(values, T, w, h, log):
    positive = [abs(value) for value in values]
    check(tui.strip(positive, [1.0] + [0.0] * (T - 1), w, h, T // 2, "△", 0), w, h)
    check(tui.strip(positive, [0.5] * T, w, h, None, "▲", 16), w, h)
    its = range(5, 5 + len(values))
    curves = [tui.Curve("", its, values, "sky"), tui.Curve("a", its, values, "orange")]
    check(tui.chart(curves, log, [(3, 0.5), (9, math.nan)], 6, w, h), w, h)
    check(tui.carpet([positive, positive[:3]], [0, 1], 2.0, 1)(w, h), w, h)
    check([tui.spark(values, w)], w, 1)


TOKENS = st.lists(
    st.one_of(
        st.text(max_size=6),
        st.sampled_from(["\n", " the", "数学", "e\u0301", "🙂", "\t", "\x1b[1m", "한국어"]),
    ),
    max_size=40,
)


@settings(max_examples=100, deadline=None)
@given(TOKENS, st.integers(1, 60), st.integers(1, 12), st.integers(-1, 9), st.data())
def test_any_text_fits_its_cells(tokens, w, h, t, data):
    n = len(tokens)
    when = data.draw(st.lists(st.integers(0, 8), min_size=n, max_size=n))
    event = dict(tok=tokens, rev=when, tent=[10] * n, ent=[1.0] * 8, sel=[2, 3], adv=[1, 2])
    for live in (None, 8):
        sample = tui.Sample(event | dict(x0=[tokens, tokens]), live)
        check(tui.Picture(sample, t, guess=True).prose(w, h), w, h)
        check(tui.Picture(sample, t, guess=True).film(w, h), w, h)
        check(tui.Picture(sample, t).mosaic(8, w, h), w, h)
        text = tui.plain(tui.Picture(sample, 9).prose(w, h))
        assert all(c.isprintable() for c in text.replace("\n", ""))


@pytest.mark.parametrize("T, width", [(12, 118), (64, 120), (64, 75), (128, 90)])
def test_triangles_and_the_cursor_stand_under_their_steps(T, width):
    entropy = [0.1] * T
    for t in (0, 5, T - 1):
        entropy[t] = 3.0
    chosen = [float(t in (0, 5, T - 1)) for t in range(T)]
    rows = tui.plain(tui.strip(entropy, chosen, width, 6, 5, "▲", 0)).splitlines()
    tall = [x for x, c in enumerate(rows[0]) if c == "█"]  # the top row: only the high bars
    marks = [x for x, c in enumerate(rows[4]) if c == "▲"]
    assert len(marks) == 3 and all(x in tall for x in marks)
    cursor = rows[5].index("5")
    assert min(abs(cursor - x) for x in tall) == 0


def test_charts_of_nothing_one_point_and_a_constant_say_so_and_nan_is_marked():
    def chart(*values: float) -> str:
        curves = [tui.Curve("a", range(len(values)), values, "sky")] if values else []
        return tui.plain(tui.chart(curves, False, (), None, 60, 8))

    assert "no data" in chart()
    for values in ([1.0], [2.0] * 9):
        assert any("\u2801" <= c <= "\u28ff" for c in chart(*values))
    assert "×" in chart(1.0, 2.0, math.nan, 3.0)
    assert "×" in tui.plain([tui.spark([1.0, 2.0, math.nan, 3.0], 10)])


@pytest.mark.parametrize("scale", [1e-6, 1e-4, -1e-4, 1e-3, 1, 100, -1e4, 1e6, 1e12])
def test_the_ticks_of_a_chart_are_even_steps_whatever_their_size(scale):
    curve = tui.Curve("a", [0, 1], [1.2 * scale, 1.9 * scale], "sky")
    chart = tui.plain(tui.chart([curve], False, (), None, 60, 16))
    ticks = [float(row.split("┤")[0]) for row in chart.splitlines() if "┤" in row]
    steps = [a - b for a, b in zip(ticks, ticks[1:])]
    assert len(steps) > 2 and steps == pytest.approx([steps[0]] * len(steps)) and steps[0] > 0
    assert min(ticks) <= min(curve.values) and max(curve.values) <= max(ticks)


def test_a_step_that_no_trajectory_reached_is_no_alarm(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(lines(META, step(0) | {"ent": [2, 1, None, None]}))
    told = screen(load(path), (80, 24), number=2)
    assert "·" in told and "×" not in told


def test_text_of_several_lines_tears_no_frame(tmp_path):
    path = tmp_path / "events.jsonl"
    alert = dict(e="alert", it=0, level="warn", msg="one\ntwo")
    path.write_bytes(lines(META | {"cfg": {"prompt": "Ask:\n{prompt}"}}, step(0), alert))
    for number in range(1, 7):
        told = screen(load(path), (100, 20), number=number)
        assert told.count("\n") == 19
    assert "Ask:↵{prompt}" in told


def test_what_is_told_of_a_chart_is_the_value_and_not_its_smoothed_curve(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(
        lines(META, *(step(it, loss=float(it), **{"reward/mean": it}) for it in range(9)))
    )
    log = load(path)
    assert "at 8: 8.00" in screen(log, (80, 24), number=5, zoom=True, filter="loss")
    assert "8.00 mean" in screen(log, (120, 40))


def test_charts_lie_along_what_a_run_had_taken_when_the_iteration_began(tmp_path):
    log = load(fake_run.write(tmp_path / "run"))
    steps = range(12)
    log.history.series["compute/samples"] = {it: 128.0 * (it + 1) for it in steps if it != 4}
    view = tui.View([log], number=5, filter="grad_norm", smooth=0.0)
    (by_iteration,) = tui.curves_of(view, "grad_norm")
    tui.press(view, "u")
    assert (view.axis, view.note) == ("samples", "axis: samples")
    (by_samples,) = tui.curves_of(view, "grad_norm")
    there = [it for it in steps if it != 5]  # nobody knows what was spent before the sixth
    assert by_samples.its == [128 * it for it in there]
    assert by_samples.values == [by_iteration.values[it] for it in there]
    (evals,) = tui.curves_of(view, "eval")
    assert evals.its == [128.0 * it for it in log.history.evals]
    assert "1408" in tui.plain(tui.frame(view, 120, 40))
    tui.press(view, "u")
    assert tui.curves_of(view, "grad_norm") == []  # this log knows no updates


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["sudoku", "gsm8k", "live"])
def test_every_screen_fills_every_terminal_in_every_look(runs, name, size):
    log = live(runs) if name == "live" else load(runs / name)
    for look in LOOKS:
        for number in range(1, 7):
            screen(log, size, number=number, **look)
        screen(log, size, help=True, **look)
        screen([log, log, log], size, **look)


def test_screens_of_an_empty_log_and_of_a_run_without_samples_say_that_they_wait(tmp_path):
    path = tmp_path / "events.jsonl"
    for body in (b"", lines(META), lines(META, step(0))):
        path.write_bytes(body)
        log = load(path)
        for number in range(1, 7):
            for size in SIZES:
                screen(log, size, number=number)
    assert "no sample logged yet" in screen(log, (80, 24), number=3)


def test_ascii_screens_hold_nothing_else(runs):
    for log in (load(runs / "sudoku"), live(runs)):
        for number in range(1, 7):
            assert screen(log, (120, 40), number=number, ascii=True).isascii()
    sample = load(runs / "sudoku").sample(3, 8)
    sample.tok[2], sample.prompt = "数é", "naïve 数"
    view = tui.View([load(runs / "sudoku")], 3, 3, 8, follow=False, ascii=True)
    view.log.event = lambda *_: sample
    rows = tui.frame(view, 120, 40)
    check(rows, 120, 40)
    assert "???" in tui.plain(rows) and tui.plain(rows).isascii()


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("light", [False, True])
def test_all_words_can_be_read_in_true_colour_and_in_sixteen(runs, light):
    log = load(runs / "gsm8k")
    for number in range(1, 7):
        for text, style in sum(tui.frame(tui.View([log], number, t=30), 120, 40), []):
            if not any(c.isalnum() for c in text):
                continue
            painted = tui.paint(style, light)
            ink, ground = painted.color, painted.bgcolor
            high, low = sorted((luminance(ink.name), luminance(ground.name)), reverse=True)
            assert (high + 0.05) / (low + 0.05) > 2.5, (text, style)
            assert ink.downgrade(ColorSystem.STANDARD) != ground.downgrade(ColorSystem.STANDARD)


GOLDEN = {
    "overview": ("sudoku", (120, 40), dict()),
    "overview_80x24": ("gsm8k", (80, 24), dict()),
    "overview_40x12": ("sudoku", (40, 12), dict()),
    "live": ("live", (120, 40), dict()),
    "entropy": ("gsm8k", (120, 40), dict(number=2, it=4)),
    "film": ("sudoku", (120, 30), dict(number=3, it=2, s=8, t=8, guess=True, follow=False)),
    "trajectory": ("gsm8k", (120, 36), dict(number=3, it=9, s=1, t=20, follow=False)),
    "samples": ("gsm8k", (120, 30), dict(number=4, sort="reward")),
    "curves": ("gsm8k", (120, 40), dict(number=5)),
    "zoom": ("sudoku", (80, 24), dict(number=5, zoom=True, pick=3, it=7)),
    "ascii": ("sudoku", (100, 30), dict(ascii=True)),
    "help": ("sudoku", (100, 24), dict(help=True)),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_screens_look_as_they_did(runs, name, request):
    run, size, options = GOLDEN[name]
    log = live(runs) if run == "live" else load(runs / run)
    text = screen(log, size, **options) + "\n"
    path = Path(__file__).parent / "golden" / f"{name}.txt"
    if request.config.getoption("--update-golden"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_several_runs_are_overlaid_and_named(runs):
    logs = [load(runs / name) for name in ("sudoku", "gsm8k")]
    text = screen(logs, (120, 40))
    for name in ("sudoku-0", "gsm8k"):
        assert text.count(name) >= 4  # in the table, and at each curve
    assert "entropy/mean" in text and "reward/mean" in text


def test_the_svg_is_well_formed_holds_the_words_and_needs_no_network(runs):
    rows = tui.frame(tui.View([load(runs / "sudoku")]), 120, 40)
    text = tui.svg(rows)
    root, space = ET.fromstring(text), "{http://www.w3.org/2000/svg}"
    words = " ".join("".join(node.itertext()) for node in root.iter(f"{space}text"))
    words = words.replace("\xa0", " ")
    assert "entropy per denoising step" in words and "<answer>" in words
    assert text.count("http") == 1  # the name space


def test_no_event_of_any_shape_stops_the_monitor(tmp_path):
    junk = [None, "x", -1, 0, 3, 1e308, "nan", "inf", [], [1, "a", None], {}, {"a": 1}, True, "数"]
    junk.append([[0, "a", 1.0]])
    whole, path = REAL.read_bytes().splitlines()[:32], tmp_path / "events.jsonl"  # two iterations
    for seed in range(25):
        rng, events = random.Random(seed), []
        for event in map(json.loads, whole):
            for name in rng.sample(sorted(event), 2) if rng.random() < 0.4 else ():
                inner = event[name]
                if isinstance(inner, (dict, list)) and inner and rng.random() < 0.6:
                    inner[
                        rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
                    ] = rng.choice(junk)
                elif name != "e":
                    event[name] = rng.choice(junk)
            events.append(json.dumps(event, separators=(",", ":")))
        path.write_text("\n".join(events[: rng.choice([None, rng.randrange(len(events))])]) + "\n")
        log = load(path)
        log.clock = lambda: 1.76e9
        view = tui.View([log], guess=True)
        for view.number in range(1, 7):
            for key in ("n", "j", "right", "J", "x", "G"):
                tui.press(view, key)
            check(tui.frame(view, 120, 40), 120, 40)
        json.dumps(log.summary(), default=str)


def test_the_mosaic_has_a_line_for_each_block_and_a_cell_for_each_position(runs):
    sample = load(runs / "gsm8k").sample(9, 1)
    rows = tui.plain(tui.Picture(sample, 20).mosaic(32, 40, 4)).splitlines()
    assert [row[:5] for row in rows] == ["  0  ", " 32  ", " 64  ", " 96  "]
    cells = "".join(row[5:] for row in rows)
    assert cells == "".join("█◆·"[(t >= 20) + (t > 20)] for t in sample.rev)
    assert "positions" in screen(load(runs / "gsm8k"), (120, 40), number=3)
    assert "positions" not in screen(load(runs / "sudoku"), (120, 40), number=3)  # it has a film


@pytest.mark.parametrize(
    "seconds, text",
    [(0.9, "0s"), (27, "27s"), (245, "4m05s"), (6720, "1h52m"), (3 * 86400 + 9, "3 days")],
)
def test_durations_are_told_as_people_tell_them(seconds, text):
    assert tui.span(seconds) == text


def test_the_health_panel_ends_with_the_seconds_of_each_phase_as_far_as_they_fit(runs):
    log = load(runs / "sudoku")
    assert "update 1.9 s  rollout 1.0 s  logp 0.7 s  score 0.0 s" in screen(log, (160, 40))
    assert "update 1.9 s  rollout 1.0 s ─" in screen(log, (80, 24))


# ---- keys ----------------------------------------------------------------------------------------


def pressed(logs, *keys: str, **options) -> tui.View:
    view = tui.View(logs, **options)
    for key in keys:
        tui.press(view, key)
    return view


def test_n_goes_to_the_selected_steps_and_wraps(runs):
    log = load(runs / "gsm8k")
    sample, view, seen = log.sample(11, 0), tui.View([log], 3), []
    for _ in range(9):
        tui.press(view, "n")
        seen.append(view.t)
    assert seen == sorted(sample.sel) + [min(sample.sel)]
    assert pressed([log], "n", "N", number=3).t == max(sample.sel)


def test_at_the_first_step_all_is_hidden_and_end_reveals_everything(runs):
    log = load(runs / "gsm8k")
    sample = log.sample(11, 0)

    def masked(*keys: str) -> int:
        view = pressed([log], "3", *keys)
        return tui.plain(tui.Picture(sample, view.step(sample)).prose(100, 30)).count("░")

    counts = [masked("home"), masked("home", "shift+right"), masked("end")]
    assert counts[0] > counts[1] > counts[2] == 0


def test_moving_by_hand_stops_following_and_g_takes_it_up_again(runs):
    log = load(runs / "sudoku")
    for key in ("left", "j", "K", "space", "n", "g", "f"):
        view = pressed([log], key)
        assert not view.follow, key
        assert pressed([log], key, "G").follow
    assert pressed([log], "g").it == 0


def test_keys_reach_the_newest_alert_every_sample_and_the_iterations_of_sft(runs, tmp_path):
    path = tmp_path / "events.jsonl"
    plain = [step(it, **{"t/total": 1.0}) | {"ent": [], "sel": []} for it in range(9)]
    path.write_bytes(lines(META, *plain, dict(e="alert", it=8, level="error", msg="nan")))
    assert pressed([load(path)], "N", number=5).it == 8
    assert pressed([load(path)], "left", number=5, zoom=True).it == 7
    log = load(runs / "sudoku")
    view, seen = pressed([log], "g"), []
    while (view.it, view.s) not in seen:
        seen.append((view.it, view.s))
        tui.press(view, "j")
    assert seen == sorted((it, s) for it, of in log.history.samples.items() for s in of)


def test_every_key_works_in_every_view_with_and_without_a_run(runs, tmp_path):
    keys = "left right H L home end n N space < > up down J K g G f c x s y a t ? up escape enter"
    keys = [*keys.split(), "tab", "shift+tab", "/", "z", "backspace", "enter"]
    for logs in (
        [load(runs / "sudoku")],
        [live(runs)],
        [load(runs / "sudoku"), load(runs / "gsm8k")],
        [tui.Log(tmp_path / "nothing")],
    ):
        for number in range(1, 7):
            view = tui.View(logs, number)
            for key in keys:
                assert tui.press(view, key) == ""
            check(tui.frame(view, 80, 24), 80, 24)
    assert tui.press(tui.View(logs), "q") == "quit" and tui.press(tui.View(logs), "e") == "save"


@pytest.mark.parametrize("key", [name for entry in tui.KEYS for name in entry.keys])
def test_every_key_of_the_table_does_something_somewhere(runs, key):
    log = load(runs / "sudoku")
    log.history.alerts = [(3, "warn", "low"), (20, "warn", "high")]
    states = []
    for number in range(1, 7):
        start = dict(number=number, it=9, s=8, t=5, pick=4, zoom=number == 5, follow=False)
        for change in (start, start | dict(zoom=False), start | dict(help=True)):
            before, after = tui.View([log], **change), tui.View([log], **change)
            states.append(tui.press(after, key) or before != after)
    assert any(states)


def test_the_footer_and_the_help_name_the_keys_of_the_table(runs):
    log = load(runs / "sudoku")
    text = screen(log, (200, 50), help=True)
    assert all(entry.help in text for entry in tui.KEYS)
    for number in range(1, 7):
        footer = screen(log, (220, 50), number=number).splitlines()[-1]
        for entry in tui.KEYS:
            if entry.hint and str(number) in (entry.where or "123456"):
                assert entry.hint in footer


def test_the_filter_narrows_metrics_and_samples(runs):
    log = load(runs / "gsm8k")
    view = pressed([log], "5", "/", *"entropy", "enter")
    assert view.metrics() == ["entropy/mean", "entropy/sel"]
    everything = len(tui.View([log], 4).keys())
    view = pressed([log], "4", "/", *"9", "enter")
    assert 0 <= len(view.keys()) < everything
    assert len(pressed([log], "4", "/", "9", "escape").keys()) == everything


def test_playing_runs_through_the_steps_once(runs):
    log = load(runs / "sudoku")
    view, seen = pressed([log], "3", "space"), []
    while view.playing:
        view.play()
        seen.append(view.t)
    assert seen == list(range(12))


# ---- app -----------------------------------------------------------------------------------------


def drive(logs, size, script, **options):
    """Run the real app without a terminal; `script(app, pilot, view)` is a coroutine."""
    view = tui.View(logs, **options)

    async def main():
        app = tui.make_app(view, hz=0)
        async with app.run_test(size=size) as pilot:
            app.pump()
            await script(app, pilot, view)

    asyncio.run(main())


def whole(rows) -> str:
    return "\n".join("".join(text for text, _ in row) for row in rows)


def on_screen(app) -> str:
    """What Textual has composed, not what we meant."""
    return "\n".join(
        "".join(segment.text for segment in line) for line in app.screen._compositor.render_strips()
    )


@pytest.mark.parametrize("size", [(160, 45), (120, 40), (80, 24), (40, 12), (20, 5)])
def test_the_app_shows_every_view_at_every_size(runs, size):
    async def script(app, pilot, view):
        for key in "123456":
            await pilot.press(key)
            await pilot.pause()
            assert on_screen(app) == whole(tui.frame(view, *size))

    log = load(runs / "sudoku", clock=lambda: 1.8e9)
    drive([log], size, script)


def test_the_app_shows_what_is_appended_and_follows_a_resize(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(lines(META, step(0)))
    log = tui.Log(path, clock=lambda: 1.76e9)

    async def script(app, pilot, view):
        await pilot.pause()
        assert " 1/9" in on_screen(app)
        with open(path, "ab") as file:
            file.write(lines(step(1)))
        app.pump()
        await pilot.pause()
        assert " 2/9" in on_screen(app)
        await pilot.resize_terminal(60, 18)
        await pilot.pause(0.2)
        assert on_screen(app) == whole(tui.frame(view, 60, 18))

    drive([log], (100, 30), script)


def test_keys_reach_the_app_and_wide_characters_survive(tmp_path):
    path = tmp_path / "events.jsonl"
    tok = ["数", "学", "は", "e\u0301", " x", "한국", "。", "x"] * 4
    text = dict(e="sample", it=0, s=0, prompt="日本語の問題 " * 9, tok=tok, rev=[0, 1, 2, 3] * 8)
    path.write_bytes(lines(META, step(0), text | dict(ent=[1, 2, 3, 4], sel=[1, 2])))
    log = load(path)

    async def script(app, pilot, view):
        for key in "question_mark escape slash k escape a a t 3 left tab 3".split():
            await pilot.press(key)
            await pilot.pause()
            want = whole(tui.frame(view, 90, 20))
            assert on_screen(app).replace("\u0301", "") == want.replace("\u0301", "")
        assert view.light and not view.ascii and view.t == 2
        assert "数" in on_screen(app)

    drive([log], (90, 20), script)


# ---- process -------------------------------------------------------------------------------------


def run(*args, **env) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "tui.py"), *map(str, args)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=30,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"} | env,
    )


def test_without_a_terminal_it_prints_one_plain_frame(runs):
    done = run(runs / "sudoku", COLUMNS="100", LINES="30")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr and len(done.stdout.splitlines()) == 30
    assert "entropy per denoising step" in done.stdout
    link = ("--view", "trajectory", "--it", 3, "--sample", 8, "--step", 2, "--guess")
    done = run(runs / "sudoku", "--once", *link)
    assert done.returncode == 0 and "iteration 3, sample 8" in done.stdout


def test_it_prints_ascii_where_the_terminal_knows_nothing_else(runs):
    done = run(runs / "sudoku", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stdout.isascii() and "+-" in done.stdout


def test_exit_codes_tell_a_missing_run_from_a_newer_log(runs, tmp_path):
    done = run(tmp_path / "nope")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no such run" in done.stderr
    assert run(tmp_path).returncode == 2
    (tmp_path / "events.jsonl").write_bytes(lines(META | {"v": 2}))
    done = run(tmp_path)
    assert done.returncode == 3 and "newer" in done.stderr


def test_what_is_no_log_and_no_place_for_a_picture_is_one_line(runs, tmp_path):
    (tmp_path / "notes.jsonl").write_text("no event\n{}\n")
    for words, told in (
        ([tmp_path / "notes.jsonl", "--json"], "no event log"),
        ([tmp_path, "--list"], "no runs in"),
        ([runs / "sudoku", "--svg", tmp_path / "nowhere" / "a.svg"], "--svg"),
        ([runs / "sudoku", "--svg", tmp_path], "--svg"),
    ):
        done = run(*words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and told in done.stderr
    done = run(runs / "sudoku", "--plain", "--hz", 0)
    assert done.returncode == 2 and "--hz 0: must be above 0" in done.stderr
    for speed in ("nan", "-1"):  # would never end
        done = run(runs / "sudoku", "--plain", "--replay", speed)
        assert done.returncode == 2 and f"--replay {speed}" in done.stderr
    for name, text in (("one", "no event\n"), ("two", (runs / "live/events.jsonl").read_text())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "events.jsonl").write_text(text)
    done = run(tmp_path, "--list")
    assert done.returncode == 0 and str(tmp_path / "two") in done.stdout
    assert f"{tmp_path / 'one' / 'events.jsonl'}: no event log" in done.stderr
    (tmp_path / "two" / "events.jsonl").write_bytes(lines(META | {"v": 2}, step(0)))
    assert "/two" in run(tmp_path, "--list").stdout, "a newer one is listed all the same"
    (tmp_path / "two" / "events.jsonl").write_text("no event\n")
    assert run(tmp_path, "--list").returncode == 2


def test_scripts_get_json_a_list_lines_and_pictures(runs, tmp_path):
    state = json.loads(run(runs / "sudoku", "--json").stdout)
    assert state["status"] == "finished" and state["done"] == 25
    assert state["evals"]["25"]["n"] == 256
    listed = run(runs, "--list").stdout
    assert listed.count("finished") == 2 and str(runs / "live") in listed
    told = run(runs / "sudoku", "--plain").stdout.splitlines()
    assert sum("reward/mean" in line for line in told) == 25
    assert told[-1] == "finished after 25 steps"
    assert any("test  accuracy" in line for line in told)
    again = [META, step(0), dict(e="end", status="stopped"), META | {"resume": 1}, step(1)]
    (tmp_path / "events.jsonl").write_bytes(lines(*again, dict(e="end", status="finished")))
    told = run(tmp_path, "--plain", "--replay", 100).stdout.splitlines()
    assert told[-1] == "finished after 2 steps"
    assert run(runs / "sudoku", "--svg", tmp_path / "a.svg").returncode == 0
    assert (tmp_path / "a.svg").read_text().startswith("<svg")


def test_a_frame_needs_neither_textual_nor_torch_nor_numpy(runs):
    code = (
        f"import sys; sys.argv = ['tui.py', {str(runs / 'sudoku')!r}, '--once']\n"
        "import tui; tui.main()\n"
        "sys.exit(str({'torch', 'numpy', 'textual', 'asyncio'} & {*sys.modules} or '') or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_dumb_terminal_gets_the_plain_frame(runs):
    import monitor

    session = monitor.Session(str(runs / "sudoku"), TERM="dumb")
    session.read(15)
    session.close()
    assert b"entropy per denoising step" in session.seen and b"\x1b" not in session.seen


def test_sigterm_gives_the_terminal_back(runs):
    import monitor

    session = monitor.Session(str(runs / "sudoku"))
    session.read(15, until=b"25/25")
    assert b"\x1b[?1049h" in session.seen  # the alternate screen
    seen = session.close(signal.SIGTERM)
    assert seen.rindex(b"\x1b[?1049l") > seen.rindex(b"\x1b[?1049h") and b"\x1b[?25h" in seen
    assert b"Traceback" not in seen


@pytest.mark.slow
def test_what_the_monitor_costs_in_a_real_terminal_is_measured():
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "monitor.py"), "--json"],
        capture_output=True,
        text=True,
    )
    figures = json.loads(done.stdout)
    assert {"first frame s", "MiB", "idle cpu", "tailing KiB/s", "event to screen s"} <= set(
        figures
    )
    assert all(value >= 0 for value in figures.values())


@pytest.mark.slow
def test_trainer_and_monitor_run_side_by_side(tmp_path):
    import monitor

    if not (ROOT / "tiny" / "model.safetensors").exists():
        pytest.skip("needs the embedded model")
    out = tmp_path / "both"
    trainer = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "egspo.py"),
            "--steps",
            "2",
            "--B",
            "2",
            "--G",
            "2",
            "--no-compile",
            "--out",
            str(out),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not (out / "events.jsonl").exists() and trainer.poll() is None:
            time.sleep(0.1)
        session = monitor.Session(str(out))
        session.read(20, until=b"live")
        session.read(200, until=b"finished")
        assert trainer.wait(30) == 0
        seen = session.close()
    finally:
        trainer.kill()
    assert b"Traceback" not in seen
    log = load(out)
    assert log.status()[0] == "finished" and log.history.bad == 0 and log.history.done == 2
    sample = log.sample(1, 0)
    assert (
        len(sample.tok) == log.history.size("C")
        and sample.sel
        and len(sample.x0) == len(sample.sel)
    )
    assert max(sample.rev) <= sample.T and 0 < sample.rev.count(0) < len(sample.tok)
