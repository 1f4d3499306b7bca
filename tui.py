"""What is on disk right now? A monitor for training runs: live, or after the end.

    python tui.py                     the newest run under runs/
    python tui.py RUN [RUN ...]       one run, or several to compare
    python tui.py RUN --once          one frame as plain text (the default without a terminal)

What a masked diffusion model learns is the denoising, and no reward curve shows it. So this shows
which steps were uncertain, which of them got the gradient, and how the text appeared. It reads
`events.jsonl` and writes nothing; it needs no tokenizer, no torch and no connection to the trainer,
so it works on a copy, over ssh, or while rsync is still bringing the file.

events.py reads the log. Here, top to bottom: draw (data and a size in,
lines of styled text out), screens (what a View asks for), keys (one table of them), the app.

Denoising time t counts in generation order: 0 is all masks. Entropies are in nats.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

from rich.cells import cell_len, set_cell_size  # the widths Textual goes by
from rich.color import Color, blend_rgb
from rich.segment import Segment
from rich.style import Style

from events import SCHEMA, History, Log, Sample, finite

# ==== draw ========================================================================================
# A line is a list of (text, style), a style some words: bold, italic, on, and colours by name (see
# `colour`). What draws takes the width and height it has, in cells, and the lines it returns fill
# them. Themes and terminals that have only ASCII are the business of `paint` and `frame` alone.

Line = list[tuple[str, str]]
Draw = Callable[[int, int], list[Line]]
Numbers = Sequence[float]

# fmt: off
DARK = dict(
    bg="#0f1116", fg="#d8dbe0", dim="#7c828d", line="#323742", bar="#181c25", sky="#56b4e9",
    orange="#f0a030", teal="#2fb5a0", mark="#fde725", mask="#59606d", veil="#1b1f28")
LIGHT = dict(
    bg="#fbfbf8", fg="#22262c", dim="#686e78", line="#c6cad0", bar="#eceef0", sky="#0b6fb0",
    orange="#a85800", teal="#007a68", mark="#6a1b80", mask="#8d939d", veil="#edeff1")
VIRIDIS = ("#440154", "#482475", "#414487", "#355f8d", "#2a788e", "#21918c", "#22a884", "#44bf70",
           "#7ad151", "#bddf26", "#fde725")
CURVES = ("sky", "orange", "teal", "dim", "fg", "mark")
STATUS = {"live": ("●", "teal"), "finished": ("■", "teal"), "stopped": ("▪", "sky"),
          "quiet": ("◌", "orange"), "dead": ("✖", "orange"), "crashed": ("✖", "orange"),
          "waiting": ("○", "dim")}
# fmt: on
GOING = ("live", "quiet")
BARS = "▁▂▃▄▅▆▇█"
ASCII = {code: "*" for code in range(0x2801, 0x2900)} | str.maketrans(  # braille, and:
    BARS + "╭─╮│╰╯┤━▲△◆×·░✓✗▸↵◦●■▪◌✖○", "..::||##+-+|++|=^~ox.:+->\\$*##oxo"
)


def colour(word: str, light: bool) -> str:
    """The colour a style names: one of DARK or LIGHT; sky@30, 30 % of it on the background;
    heat@30, a place in viridis. In both themes more heat is further from the background."""
    theme, (name, _, percent) = LIGHT if light else DARK, word.partition("@")
    low, high, x = theme["bg"], theme.get(name), int(percent or 100) / 100
    if name == "heat":
        place = (1 - x if light else x) * (len(VIRIDIS) - 1)
        i = min(int(place), len(VIRIDIS) - 2)
        low, high, x = VIRIDIS[i], VIRIDIS[i + 1], place - i
    ends = (Color.parse(name).get_truecolor() for name in (low, high))
    return blend_rgb(*ends, x).hex


@lru_cache(4096)
def paint(style: str, light: bool) -> Style:
    """A style in the colours of a theme, complete with foreground and background."""
    words = [w if w in ("bold", "italic", "on") else colour(w, light) for w in style.split()]
    base = Style(color=colour("fg", light), bgcolor=colour("bg", light))
    return base + Style.parse(" ".join(words))


def heat(x: float, floor: float = 0.0) -> str:
    """The colour of 0 to 1; for text, a floor leaves out the part of viridis that can't be read."""
    x = min(1.0, max(0.0, floor + (1 - floor) * x)) if math.isfinite(x) else 0.0
    return f"heat@{round(100 * x)}"


def cells(line: Line) -> int:
    return sum(len(text) if text.isascii() else cell_len(text) for text, _ in line)


def fit(line: Line, w: int) -> Line:
    """Exactly `w` cells, cut (never through a wide character) or padded; like styles joined."""
    runs = itertools.groupby(line, key=lambda part: part[1])
    segments = [Segment("".join(t for t, _ in run).replace("\n", "↵"), s) for s, run in runs]
    return [part[:2] for part in Segment.adjust_line_length(segments, w, "")]


def fill(lines: Iterable[Line], w: int, h: int, focus: int = 0) -> list[Line]:
    """Exactly `h` lines of exactly `w` cells; of more lines those around `focus`."""
    lines = list(lines)
    lines = lines[max(0, min(focus - h // 2, len(lines) - h)) :][: max(0, h)]
    return [fit(line, w) for line in lines + [[]] * (h - len(lines))]


def beside(w: int, h: int, weights: Sequence[int], *draws: Draw) -> list[Line]:
    """Draws side by side, their widths by weight."""
    ends = [w * end // sum(weights) for end in itertools.accumulate(weights, initial=0)]
    widths = [end - start for start, end in itertools.pairwise(ends)]
    blocks = [fill(draw(width, h), width, h) for width, draw in zip(widths, draws)]
    return [sum(lines, []) for lines in zip(*blocks)]


def grid(draws: Sequence[Draw], across: int, down: int, w: int, h: int) -> list[Line]:
    """As many columns and rows of equal size, filled row by row."""
    lines: list[Line] = []
    for r in range(down):
        height, row = h * (r + 1) // down - h * r // down, draws[r * across : (r + 1) * across]
        lines += fill(beside(w, height, [1] * across, *row), w, height)
    return lines


def labelled(labels: Iterable[tuple[int, object]], w: int) -> Line:
    """Labels centred at columns, the first ones first; one that would touch another is left out."""
    line = " " * w
    for x, label in labels:
        x = max(0, min(x - (len(str(label)) - 1) // 2, w - len(str(label))))
        if not line[max(0, x - 1) : x + len(str(label)) + 1].strip():
            line = (line[:x] + str(label) + line[x + len(str(label)) :])[:w]
    return [(line, "dim")]


def message(text: str) -> Draw:
    return lambda w, h: fill([[(text, "dim")]], w, h)


def panel(title: str, draw: Draw, right: str = "", hot: bool = False, foot: str = "") -> Draw:
    """A box around what draws; no box where there is no room for it. Of the foot's parts, two
    spaces apart, the first ones that fit."""
    rail, name = ("sky", "bold fg") if hot else ("line", "dim")

    def boxed(w: int, h: int) -> list[Line]:
        if w < 24 or h < 4:
            return fill(draw(w, h), w, h)
        head = f" {set_cell_size(title, min(cell_len(title), w - 6))} "
        note = f" {right} " if right and cell_len(head) + cell_len(right) < w - 10 else ""
        rest = "─" * (w - 4 - cell_len(head) - cell_len(note))
        top = [("╭─", rail), (head, name), (rest, rail), (note, "dim"), ("─╮", rail)]
        inside = fill(draw(w - 4, h - 2), w - 4, h - 2)
        sides = [[("│ ", rail), *line, (" │", rail)] for line in inside]
        told = foot
        while cell_len(told) > w - 5:
            told = told.rpartition("  ")[0]
        told = f" {told} " if told else ""
        bottom = [("╰─", rail), (told, "dim"), (f"{'─' * (w - 3 - cell_len(told))}╯", rail)]
        return [top, *sides, bottom]

    return boxed


def short(value: float, most: int = 7, forms=(".4g", ".2e", ".1e", ".0e")) -> str:
    """As the first of these formats that takes at most so many cells, else the last."""
    texts = [re.sub(r"\.?0*e\+?(-?)0?", r"e\1", f"{value:{form}}").rstrip(".") for form in forms]
    return next((text for text in texts if len(text) <= most), texts[-1])


def num(value: float | None) -> str:
    """Three digits that matter, or fewer, in at most seven cells."""
    if value is None:
        return "-"
    return short(value, 7, (".0f" if 100 <= abs(value) < 1e5 else "#.3g", ".2g", ".0e"))


def span(seconds: float) -> str:
    """27s, 4m05s, 1h52m, 3 days."""
    m, s = divmod(int(seconds), 60)
    h, m = divmod(m, 60)
    if h >= 48:
        return f"{h // 24} days"
    return f"{h}h{m:02}m" if h else f"{m}m{s:02}s" if m else f"{s}s"


def clean(text: str) -> str:
    """Text in which every character has a known width; newlines stay. A special token
    (<|endoftext|>) becomes one character."""
    if re.fullmatch(r"<\|[^|]*\|>", text):
        return "◦"
    if text.isascii() and text.isprintable():
        return text
    text = re.sub(r"[^\S\n]", " ", text.replace("\t", "    "))
    return "".join(c for c in text if c.isprintable() or c == "\n")


def nice(low: float, high: float, ticks: int) -> tuple[float, float, float]:
    """Round bounds around a range and the step between ticks; being round, they seldom move."""
    size = max(abs(low), abs(high))
    if high - low <= 1e-9 * max(size, 1e-9):  # a constant
        low, high = (low - 0.1 * size, high + 0.1 * size) if size > 1e-9 else (0.0, 1.0)
    raw = (high - low) / max(1, ticks)
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, step


def smooth(values: Iterable[float], weight: float) -> list[float]:
    """Exponential mean, without the bias of its start; gaps stay gaps."""
    out, mean, norm = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            mean, norm = weight * mean + (1 - weight) * value, weight * norm + 1 - weight
        out.append(mean / norm if math.isfinite(value) else math.nan)
    return out


def slots(n: int, w: int) -> tuple[int, list[range]]:
    """How n steps share `w` cells: cells a column, and the steps each column stands for."""
    if n <= w:
        return min(max(1, w // max(1, n)), 9), [range(i, i + 1) for i in range(n)]
    return 1, [range(c * n // w, (c + 1) * n // w) for c in range(max(1, w))]


def step_axis(n: int, left: int, w: int, t: int | None = None, every: int = 0) -> Line:
    """The denoising steps under their columns: the cursor's for sure, then the ends, then all that
    fit or every so many."""
    pitch, columns = slots(n, w - left)
    middle = left + (pitch - 1 - (pitch > 2)) // 2
    places = {i: middle + c * pitch for c, steps in enumerate(columns) for i in steps}
    wanted = (t, 0, n - 1, *range(0, n, 1 if pitch >= 3 else every or max(1, n // 8)))
    return labelled([(places[i], i) for i in wanted if i in places], w)


def strip(
    entropy: Numbers, chosen: Numbers, w: int, h: int, t: int | None, mark: str, every: int
) -> list[Line]:
    """Entropy of each denoising step as bars, marks under the chosen ones, a cursor at t.
    `chosen` is, of every step, the share of the samples that selected it."""
    left, n, bars = 7 if w > 30 else 0, max(1, len(chosen)), max(1, h - 2)
    high = nice(0, max(finite(entropy), default=1), 4)[1]
    pitch, columns = slots(n, w - left)
    wide = pitch - (pitch > 2)  # a gap between bars that are wide enough
    scale = {bars - 1: "0", 0: num(high), bars: f"K={sum(chosen):.0f}" if any(chosen) else ""}
    lines: list[Line] = [[(f"{scale.get(r, ''):>5}  "[:left], "dim")] for r in range(bars + 1)]
    for steps in columns:
        value = max(finite(entropy[i] for i in steps if i < len(entropy)), default=None)
        size = 0 if value is None else max(1, round(value / high * bars * 8))
        style = heat((value or 0) / high, 0.12) + (" on line" if t in steps else "")
        for r, line in enumerate(lines[:bars]):
            part = min(8, size - 8 * (bars - 1 - r))  # of this cell, in eighths
            line.append((f"{BARS[part - 1] * wide if part > 0 else '':<{pitch}}", style))
        if value is None:  # no sample was, or is yet, at this step
            lines[bars - 1][-1] = f"{'·' * wide:<{pitch}}", "mask"
        share = max((chosen[i] for i in steps if i < len(chosen)), default=0.0)
        text = f"{mark if share > 0 else '':^{wide}}"
        lines[bars].append((f"{text:<{pitch}}", f"mark@{round(20 + 80 * min(1.0, share))}"))
    return fill([*lines, step_axis(n, left, w, t, every)], w, h)


def bars(values: Numbers, columns, pitch, low: float, high: float, lost=("×", "orange")) -> Line:
    """A line of small bars, each the mean of a column; one that is not a number is `lost`."""
    line: Line = []
    for steps in columns:
        x = statistics.fmean([values[i] for i in steps if i < len(values)] or [math.nan])
        x = (x - low) / (high - low) if high > low else 0 * x + 0.3  # nan stays
        c, style = (BARS[max(0, min(round(7 * x), 7))], heat(x, 0.3)) if math.isfinite(x) else lost
        line.append((c * pitch, style))
    return line


def spark(values: Numbers, w: int) -> Line:
    """The last values of a metric on a scale of their own, which leaves a gap to the line above."""
    values = values[-4 * max(1, w) :]
    low, high = min(finite(values), default=0.0), max(finite(values), default=0.0)
    return fit(bars(values, slots(len(values), max(1, w))[1], 1, low, high + (high - low) / 6), w)


def carpet(data: Sequence[Numbers], its: Sequence[int], high: float, it: int | None) -> Draw:
    """Iterations down and denoising steps across; of several iterations to a line, the last."""
    T, n = max((len(row) for row in data), default=0), len(data)

    def draw(w: int, h: int) -> list[Line]:
        if not T or w < 9 or h < 2:
            return message("no data yet")(w, h)
        (pitch, columns), total, lines = slots(T, w - 7), min(h - 1, n), []
        for y in range(total):
            rows = range(y * n // total, (y + 1) * n // total)
            here = it in its[rows[0] : rows[-1] + 1]
            label = it if here else its[rows[-1]] if y % 3 == 0 else ""
            margin = f"{'▸' if here else ' '}{label:>4}  ", "bold fg" if here else "dim"
            row = data[rows[-1]]  # at some steps no trajectory may have been
            known = [[i for i in steps if finite(row[i : i + 1])] or steps for steps in columns]
            lines.append([margin, *bars(row, known, pitch, 0.0, high, ("·", "mask"))])
        return fill([*lines, step_axis(T, 7, w)], w, h)

    return draw


@dataclass
class Curve:
    """A line of a chart."""

    label: str
    its: Numbers  # or what the run had taken by then
    values: Numbers
    colour: str


DOTS = ((1, 8), (2, 16), (4, 32), (64, 128))  # the bit of each dot of a braille character
Points = Sequence[tuple[float, float]]


def dots_of(curve: Curve, x: Callable, y: Callable) -> Iterable[tuple[int, int]]:
    """The dots of a line through the means of a curve's values."""
    columns: dict[int, list[float]] = {}
    for it, value in zip(curve.its, curve.values):
        if math.isfinite(value):
            columns.setdefault(x(it), []).append(value)
    points = [(at, y(statistics.fmean(values))) for at, values in columns.items()]
    for (x0, y0), (x1, y1) in zip(points, points[1:] or points):
        n = max(abs(x1 - x0), abs(y1 - y0), 1)
        for i in range(n + 1):
            yield x0 + round((x1 - x0) * i / n), y0 + round((y1 - y0) * i / n)


def chart(
    curves: Sequence[Curve], log: bool, points: Points, cursor: float | None, w: int, h: int
) -> list[Line]:
    """Curves over iterations, named at their right ends. `points` are marked; so, on the bottom
    line, is every value that is not a number."""

    def scaled(value: float) -> float:
        return value if not log else math.log10(value) if value > 0 else math.nan

    def end(curve: Curve) -> float:
        return finite(curve.values)[-1]

    lost = [it for c in curves for it, value in zip(c.its, c.values) if not math.isfinite(value)]
    curves = [replace(c, values=[scaled(v) for v in c.values]) for c in curves if len(c.its)]
    points = [(it, scaled(value)) for it, value in points if math.isfinite(scaled(value))]
    its = [it for c in curves for it in (c.its[0], c.its[-1])] + [it for it, _ in points]
    named = sorted((c for c in curves if c.label and finite(c.values)), key=end, reverse=True)
    longest = max((cell_len(c.label) + 1 for c in named), default=0)
    left, right = (8, min(20, w // 3, longest)) if w >= 30 else (0, 0)
    if not its or w < 4 or h < 2:
        return message("no data yet")(w, h)
    shown = finite([v for c in curves for v in c.values] + [v for _, v in points])
    low, high, tick = nice(min(shown, default=0), max(shown, default=1), max(1, min(5, h // 3)))
    first, last, wide, below = min(its), max(its), max(1, w - left - right), h - 1

    def x(it: float) -> int:  # in dots, two to a cell
        return round((it - first) / ((last - first) or 1) * (2 * wide - 1))

    def y(value: float) -> int:  # in dots, four to a cell
        return round((high - value) / (high - low) * (4 * below - 1))

    canvas: dict[tuple[int, int], tuple[str, str]] = {}
    for curve in curves:
        for column, row in dots_of(curve, x, y):
            place, bit = (column // 2, row // 4), DOTS[row % 4][column % 2]
            before = ord(canvas.get(place, ("\u2800", ""))[0])
            canvas[place] = chr(before | bit), curve.colour
    canvas |= {(x(it) // 2, below - 1): ("×", "bold orange") for it in lost}
    canvas |= {(x(it) // 2, y(value) // 4): ("◆", "bold mark") for it, value in points}
    if cursor is not None and first <= cursor <= last:
        for place in [(x(cursor) // 2, row) for row in range(below)]:
            glyph, style = canvas.get(place, (" ", "dim"))
            canvas[place] = glyph, f"{style} on line"
    values = [low + i * tick for i in range(round((high - low) / tick) + 1)]
    ticks = {y(v) // 4: short(10.0 ** min(300, v) if log else v) for v in values}
    ends: dict[int, Curve] = {}  # by line, moved apart where they would collide
    for i, curve in enumerate(named):
        row = max(y(end(curve)) // 4, max(ends, default=-1) + 1)
        ends[min(row, below - len(named) + i)] = curve
    lines: list[Line] = []
    for row in range(below):
        rail = f"{ticks.get(row, ''):>7}{'┤' if row in ticks else '│'}" if left else ""
        name = [(f" {ends[row].label}", ends[row].colour)] if row in ends else []
        dots = [canvas.get((i, row), (" ", "")) for i in range(wide)]
        lines.append([(rail, "dim"), *dots, *name])
    parts = max(1, wide // 12)
    whole, marks = last > 9 or isinstance(last, int), (0, parts, *range(parts))
    at = [first + (last - first) * k / parts for k in marks]
    labels = {int(it): int(it) for it in at} if whole else {it: num(it) for it in at}
    below_it = labelled([(left + x(it) // 2, word) for it, word in labels.items()], w)
    return fill([*lines, below_it], w, h)


@dataclass
class Picture:
    """How a sample looks after step t, coloured by "step", by "entropy" or by "none"."""

    sample: Sample
    t: int
    by: str = "step"
    guess: bool = False  # whether what is still masked shows the one-step completion

    def style(self, i: int, t: int) -> str:
        """That of position i once it is revealed; what t itself revealed stands out."""
        sample = self.sample
        if sample.rev[i] == t:
            return "bold bg on mark"
        share = sample.rev[i] / max(1, sample.T - 1) if self.by == "step" else sample.tent[i] / 125
        return "fg" if self.by == "none" else heat(share, 0.5)

    def position(self, i: int, t: int) -> tuple[str, str]:
        """What is seen at position i after step t: its token, or the guess, or a hatch as wide as
        what will be there; nothing where the row had ended before."""
        sample, guess = self.sample, self.sample.guess(t) if self.guess else ()
        if sample.rev[i] <= t:
            return clean(sample.tok[i]), self.style(i, t)
        if not sample.reached(i):
            return "", ""
        if i < len(guess):
            return clean(guess[i]), "italic sky on veil"
        return re.sub(r"[^\n]", "░", clean(sample.tok[i])) or "░░", "mask on veil"

    def prose(self, w: int, h: int) -> list[Line]:
        """The completion as text."""
        lines: list[Line] = [[]]
        x = focus = 0
        for i, when in enumerate(self.sample.rev):
            body, style = self.position(i, self.t)
            if x and x + cell_len(body.split("\n")[0]) > w:
                lines.append([])
                x = 0
            for c in body:
                if c == "\n" or x + cell_len(c) > w:
                    lines.append([])
                    x = 0
                if c != "\n":
                    lines[-1].append((c, style))
                    x += cell_len(c)
            focus = len(lines) - 1 if when == self.t else focus
        return fill(lines, w, h, focus)

    def mosaic(self, size: int, w: int, h: int) -> list[Line]:
        """Every position as a cell, `size` on a line: where the text has been filled in."""
        sample, focus = self.sample, 0
        lines = [[(f"{i:>3}  ", "dim")] for i in range(0, len(sample.rev), size)]
        for i, when in enumerate(sample.rev):
            cell = ("·", "mask") if sample.reached(i) else (" ", "")
            if when <= self.t:
                cell = "◆" if when == self.t else "█", self.style(i, self.t)
            lines[i // size].append(cell)
            focus = i // size if when == self.t else focus
        return fill(lines, w, h, focus)

    @property
    def widths(self) -> list[int]:
        """The cells of each token in `film`."""
        return [max(1, cell_len(clean(token).replace("\n", "↵"))) for token in self.sample.tok]

    def film(self, w: int, h: int) -> list[Line]:
        """All steps of a short completion under one another, a column a position."""
        widths, lines = self.widths, []
        gap = " " * (sum(widths) + len(widths) + 44 <= w)
        for t in range(self.sample.steps):
            number, ground = ("bold fg on line", " on line") if t == self.t else ("dim", "")
            mark = "▲" if t in self.sample.sel else " "
            line = [(f"{t:>3} ", number), (f"{mark} ", "mark" + ground)]
            for i, size in enumerate(widths):
                body, style = self.position(i, t)
                line += [(set_cell_size(body.replace("\n", "↵"), size), style), (gap, "")]
            lines.append([*line, ("  ", ""), *self.credit(t)])
        return fill(lines, w, h, self.t)

    def credit(self, t: int) -> Line:
        """What training made of step t, if it selected it."""
        sample, line = self.sample, []
        for name, values in (("adv", sample.adv), ("guess", sample.srw), ("ratio", sample.ratio)):
            for value in [v for when, v in zip(sample.sel, values) if when == t][:1]:
                sign = "+" if name == "adv" and value > 0 else ""
                text = sign + short(value, 6, ("#.3g", ".2g", ".0e"))
                line += [(f" {name} ", "dim"), (f"{text:<7}", "bold fg")]
        return line


# ==== view ========================================================================================

VIEWS = ("overview", "entropy", "trajectory", "samples", "curves", "run")
METRICS = (  # in this order; others follow
    "reward/mean kl clip_frac loss grad_norm entropy/mean entropy/sel ratio/max zero_adv_frac "
    "len/mean trunc_frac adv/abs t/total mem/peak_gb tok_s"
).split()
NEWEST = dict(it=None, t=None, follow=True, playing=False)
VALUES = {  # of settings that are not just on or off
    "axis": ("iteration", "samples", "updates", "forwards", "tflop"),
    "colour": ("step", "entropy", "none"),
    "smooth": (0.0, 0.6, 0.8, 0.95),
    "sort": ("newest", "reward", "length"),
}


def nearest(keys: Iterable[int], wanted: int) -> int:
    return min(keys, key=lambda key: (abs(key - wanted), key))


def clamp(value: int, length: int) -> int:
    """The nearest index into so many items."""
    return max(0, min(value, length - 1))


@dataclass
class View:
    """What is looked at and how. Below the questions that screens ask are the actions of keys; an
    action gets what KEYS says for the key."""

    logs: Sequence[Log]
    number: int = 1
    it: int | None = None  # None: the newest
    s: int = 0  # sample of that iteration
    t: int | None = None  # denoising step; None: the last
    follow: bool = True
    playing: bool = False
    speed: float = 8.0  # steps a second
    colour: str = "step"
    guess: bool = False
    smooth: float = 0.8
    log_scale: bool = False
    axis: str = "iteration"  # what charts lie along
    sort: str = "newest"
    filter: str = ""
    typing: bool = False
    zoom: bool = False
    help: bool = False
    pick: int = 0  # chart of view 5, scrolled lines of view 6 and of the help
    run: int = 0  # of several
    note: str = ""
    ascii: bool = False
    light: bool = False
    kept: list = field(default_factory=list, compare=False)  # see `once`

    @property
    def log(self) -> Log:
        return self.logs[self.run]

    @property
    def history(self) -> History:
        return self.log.history

    @property
    def place(self) -> str:
        """Where keys count: the number of a view, or z in a zoomed chart, c in a comparison."""
        if self.help:
            return "?"
        compared = self.number == 1 and len(self.logs) > 1
        return "z" if self.number == 5 and self.zoom else "c" if compared else str(self.number)

    def key(self) -> tuple[int, int] | None:
        """(it, s) of the sample that is looked at: the nearest that was logged."""
        samples = self.history.samples
        if not samples:
            return None
        it = max(samples) if self.it is None else nearest(samples, self.it)
        return it, nearest(samples[it], self.s)

    def keys(self) -> list[tuple[int, int]]:
        """(it, s) of the newest 2000 samples that pass the filter, in the order asked for."""
        samples, sample = self.history.samples, self.log.sample
        keys = [(it, s) for it in sorted(samples, reverse=True) for s in sorted(samples[it])][:2000]
        if self.filter:
            words = self.filter.lower()
            keys = [k for k in keys if sample(*k) and words in "".join(sample(*k).tok).lower()]
        if self.sort != "newest":
            keys.sort(key=lambda k: -(getattr(sample(*k), self.sort, None) or 0))
        return keys

    def sample(self) -> Sample | None:
        """The rollout in progress while following, else a logged sample."""
        live = self.history.live() if self.follow and self.log.status()[0] in GOING else None
        return live or (self.log.sample(*self.key()) if self.key() else None)

    def step(self, sample: Sample) -> int:
        last = sample.steps - 1
        return last if self.t is None or sample.live else max(-1, min(self.t, last))

    def metrics(self) -> list[str]:
        """What view 5 shows: those in METRICS first; only those that match the filter."""
        logged = dict.fromkeys(name for log in self.logs for name in log.history.series)
        names = [name for name in dict.fromkeys([*METRICS, *logged]) if name in logged]
        return [name for name in names if self.filter.lower() in name.lower()]

    def once(self, w: int, h: int, draw: Draw) -> list[Line]:
        """What draws, or what it drew for the same view of the same data: charts are slow."""
        key = [w, h, vars(self) | {"logs": [log.history.edition for log in self.logs], "kept": ()}]
        if self.kept[:1] != [key]:
            self.kept = [key, draw(w, h)]
        return self.kept[1]

    def put(self, changes: dict[str, object]) -> None:
        for name, value in changes.items():
            setattr(self, name, value)

    def cycle(self, name: str) -> None:
        """Go round the values of a setting."""
        values = VALUES.get(name, (False, True))
        value = values[(values.index(getattr(self, name)) + 1) % len(values)]
        word = value if name in VALUES else "on" if value else "off"
        note = "" if name in ("help", "zoom") else f"{name.replace('_', ' ')}: {word}"
        self.put({name: value, "note": note, "pick": self.pick * (name != "help")})

    def stay(self, changes: dict[str, object] | None = None) -> Sample | None:
        """Stop following: keep what is on the screen, whatever arrives. The sample that leaves."""
        self.it, self.s = self.key() or (self.it, self.s)
        self.put({"follow": False, "playing": False} | (changes or {}))
        return self.log.sample(self.it, self.s)

    def follow_or_stay(self, _: object) -> None:
        if self.follow:
            self.stay()
        else:
            self.put(NEWEST)

    def turn(self, by: int) -> None:
        self.put(dict(number=(self.number - 1 + by) % 6 + 1, zoom=False, help=False, pick=0))

    def move_step(self, by: int) -> None:
        sample = self.stay()
        self.t = clamp(self.step(sample) + by, sample.T) if sample else None

    def move_chosen(self, by: int) -> None:
        """To the next or previous selected step, around the end."""
        sample = self.stay()
        if sample and sample.sel:
            chosen, t = sorted(sample.sel), self.step(sample)
            at = bisect_left(chosen, t + 1) if by > 0 else bisect_left(chosen, t) - 1
            self.t = chosen[at % len(chosen)]

    def move_sample(self, by: int) -> None:
        """To another line of the table in view 4; elsewhere to another sample, then iteration."""
        keys = sorted((it, s) for it, of in self.history.samples.items() for s in of)
        keys = self.keys() if self.number == 4 else keys
        self.stay()
        if keys:
            at = keys.index((self.it, self.s)) + by if (self.it, self.s) in keys else 0
            self.it, self.s = keys[clamp(at, len(keys))]

    def move_iteration(self, by: int) -> None:
        its = sorted(self.history.entropy or self.history.series.get("t/total", ())) or [0]
        at = bisect_left(its, its[-1] if self.it is None else self.it)
        self.put(dict(it=its[clamp(at + by, len(its))], follow=False, playing=False))

    def move_alert(self, by: int) -> None:
        here = self.history.it + 1 if self.it is None else self.it
        alerts = [alert for alert in self.history.alerts if (alert[0] - here) * by > 0]
        if alerts:
            it, _, text = min(alerts) if by > 0 else max(alerts)
            self.put(dict(it=it, note=f"it {it}: {text}", follow=False))

    def move_chart(self, by: int) -> None:
        self.pick = clamp(self.pick + by, len(self.metrics()))

    def move_run(self, by: int) -> None:
        self.run = clamp(self.run + by, len(self.logs))

    def scroll(self, by: int) -> None:
        self.pick = max(0, self.pick + by)

    def play_or_pause(self, _: object) -> None:
        playing, sample = self.playing, self.stay()
        self.playing = not playing and sample is not None
        if self.playing and self.step(sample) >= sample.T - 1:
            self.t = -1

    def play(self) -> None:
        """One step of the playback."""
        sample = self.sample()
        last = sample.T - 1 if sample else 0
        self.t = min((-1 if self.t is None else self.t) + 1, last)
        self.playing = self.t < last

    def change_speed(self, factor: float) -> None:
        self.speed = max(1.0, min(64.0, self.speed * factor))
        self.note = f"{self.speed:g} steps a second"

    def type_filter(self, key: str) -> None:
        """A key while the filter is being typed."""
        self.typing = key not in ("escape", "enter")
        letter = {"space": " "}.get(key, key if len(key) == 1 else "")
        typed = self.filter[:-1] if key == "backspace" else self.filter + letter
        self.filter = "" if key == "escape" else typed

    def ask_app(self, wish: str) -> str:
        """What is not the view's to do."""
        return wish


# ==== screens =====================================================================================


def bar(parts: Iterable[Line], w: int) -> Line:
    """As many of these parts as fit on a line with its own ground."""
    line: Line = []
    for part in parts:
        line += part if cells(line + part) <= w else []
    return [(text, f"{style or 'fg'} on bar") for text, style in fit(line, w)]


def header(view: View, w: int) -> Line:
    """State, name, progress and pace on one line."""
    history, latest, (state, age) = view.history, view.history.latest, view.log.status()
    sign, colour = STATUS.get(state, STATUS["finished"])
    silence = f" {span(age)} ago" if state in GOING and age >= 5 else ""
    parts = [[(f" {sign} {state}", f"bold {colour}"), (silence, "dim")]]
    parts.append([(f"  {clean(view.log.name)}", "bold fg")])
    if iters := history.size("iters"):
        size = max(0, min(18, w // 6 - 4))
        full = round(size * min(1.0, history.done / iters))
        rail = [("  " + "━" * full, "sky"), ("─" * (size - full), "line")]
        parts.append([*rail, (f" {history.done}/{iters}", "fg")])
    if state in GOING:
        live, left = history.live(), latest("eta_s")
        parts.append([(f"  ETA {span(left)}", "fg")] if finite([left or math.nan]) else [])
        rolling = f" {live.steps}/{live.T}" if live and history.phase == "rollout" else ""
        parts.append([(f"  {history.phase}{rolling}", "mark")])
    if history.evals:
        parts.append([("  eval ", "dim"), (f"{history.accuracy:.1%}", "fg")])
    for name, unit in (("t/total", "s/it"), ("tok_s", "tok/s"), ("mem/peak_gb", "GB")):
        parts += [[(f"  {num(latest(name))} {unit}", "dim")]] * (name in history.series)
    model = Path(str(history.meta.get("model", ""))).name
    parts.append([(clean(f"  {model} {history.meta.get('task', '')}"), "dim")])
    return bar(parts, w)


def strip_panel(view: View, sample: Sample | None) -> Draw:
    """Entropy per step: of the rollout in progress, of one sample, or of an iteration's batch."""
    history, t, mark, share = view.history, view.t, "▲", []
    if sample and sample.live:
        entropy, t, mark, K = sample.ent, sample.steps - 1, "△", history.size("K")
        known = [i for i, h in enumerate(entropy) if math.isfinite(h)]
        sel = sorted(known, key=lambda i: -entropy[i])[:K]
        what = f"{sample.it}, {'rolling' if t + 1 < sample.T else 'rolled'} out"
        right = f"△ top {K} so far"
    elif sample and (view.number == 3 or not view.follow):
        entropy, sel, t = sample.ent, sample.sel, view.step(sample)
        what, right = f"{sample.it}, sample {sample.s}", "▲ gets the gradient"
    elif history.entropy:
        it = max(history.entropy) if view.it is None else nearest(history.entropy, view.it)
        entropy, share, sel = history.entropy[it], history.share[it], ()
        what = f"{it}, mean of {history.rows}"
        right = "▲ chosen, strong: by many"
    else:
        return panel("entropy", message("waiting for the first rollout"))
    T = history.size("T") or len(entropy) or 1
    every = T * history.size("block") // (history.size("C") or 1) % T  # steps of one of many blocks
    chosen = share or [float(i in sel) for i in range(T)]
    title = f"entropy per denoising step · iteration {what}"
    return panel(title, lambda w, h: strip(entropy, chosen, w, h, t, mark, every), right)


def curves_of(view: View, name: str) -> list[Curve]:
    """One metric, smoothed: of one run, or of each of several by name."""
    curves = []
    for log, colour in zip(view.logs, itertools.cycle(CURVES)):
        series = log.history.series.get(name, {})
        if name == "eval":
            series = {it: e["accuracy"] for it, e in log.history.evals.items()}
        series = log.history.along(view.axis, series)
        values = smooth(series.values(), view.smooth * (not name.startswith("eval")))
        if values:
            label = f"{num([*series.values()][-1])} {clean(log.name)}" * (len(view.logs) > 1)
            curves.append(Curve(label, list(series), values, colour))
    return curves


def curve_panel(view: View, name: str, hot: bool = False) -> Draw:
    """One metric over iterations, or what they took; zoomed with a cursor and the values there."""
    history, curves, cursor = view.history, curves_of(view, name), None
    right = num(history.accuracy if name == "eval" else history.latest(name))
    if view.zoom and curves:
        at = () if view.it is None else history.along(view.axis, {view.it: 0})
        cursor = next(iter(at), curves[-1].its[-1])
        exact = curves_of(replace(view, smooth=0.0), name)
        at = [c.values[min(bisect_left(c.its, cursor), len(c.its) - 1)] for c in exact]
        right = f"at {cursor}: {'   '.join(map(num, at))}"
    return panel(name, lambda w, h: chart(curves, view.log_scale, (), cursor, w, h), right, hot=hot)


def reward_panel(view: View) -> Draw:
    """The reward and its parts over iterations, evaluations marked."""
    history, curves = view.history, []
    parts = [name for name in history.series if re.fullmatch("reward/(?!mean|std).*", name)]
    for name, colour in zip(["reward/mean", *parts[:2]], CURVES):
        for curve in curves_of(view, name):
            label = f"{num(history.latest(name))} {name[7:]}"
            curves.insert(0, replace(curve, colour=colour, label=label))
    evals = {it: e["accuracy"] for it, e in history.evals.items()}
    points = list(history.along(view.axis, evals).items())
    right = f"◆ evaluation {num(history.accuracy)}" if points else ""
    return panel("reward", lambda w, h: chart(curves, view.log_scale, points, None, w, h), right)


def metric_lines(history: History, w: int, h: int) -> list[Line]:
    """One metric a line: name, last value, how it went. The last alert below."""
    lines = []
    others = [name for name in history.series if not name.startswith(("reward/", "t/", "eta"))]
    names = [name for name in dict.fromkeys(METRICS + others) if name in history.series]
    for name in names[: h - bool(history.alerts)]:
        last, values = history.latest(name), list(history.series[name].values())
        value = f"{num(last):>7}  ", "bold fg" if math.isfinite(last) else "bold orange"
        lines.append([(f"{name[:13]:<13} ", "dim"), value, *spark(values, max(0, w - 23))])
    for it, _, text in history.alerts[-1:]:
        lines.append([(f"! it {it} {clean(text)}", "orange")])
    return lines or message("waiting for the first update")(w, 1)


def phases(history: History) -> str:
    """How long each phase of the last step took, the longest first."""
    names = [name for name in history.series if re.match("t/(?!total)", name)]
    seconds = sorted(((history.latest(name), name[2:]) for name in names), reverse=True)
    return "  ".join(f"{name} {s:.1f} s" for s, name in seconds)


def caption(sample: Sample, t: int, w: int, most: int) -> list[Line]:
    """Which sample this is, how it ended, and the prompt in `most` lines at most."""
    sign = {True: "✓ ", False: "✗ "}.get(sample.ok, "")
    entropy = num(sample.ent[t]) if 0 <= t < len(sample.ent) else "-"
    tokens = f"{sum(when <= t for when in sample.rev)}/{sample.decoded} tokens"
    reward = "" if sample.reward is None else f"{sign}reward {num(sample.reward)}  "
    head = [
        (f"it {sample.it} · prompt {sample.p} · sample {sample.s}  ", "bold fg"),
        (reward, "teal" if sample.ok else "orange"),
        (f"step {t}/{sample.T - 1}  {'mean ' * sample.live}H {entropy}  {tokens}", "dim"),
    ]
    question, n = f"Q: {clean(sample.prompt)}".replace("\n", " "), max(1, w)
    if len(question) > n * most > 0:  # the puzzle itself often comes last
        question = question[: n * (most - 1)] + f"... {question[4 - n :]}"
    starts = range(0, min(len(question), n * most) if sample.prompt else 0, n)
    return [head, *([(question[i : i + n], "italic dim")] for i in starts)]


def trajectory(view: View, sample: Sample | None, w: int, h: int) -> list[Line]:
    """One completion as it was denoised: a film of all steps if it is short; else where (mosaic)
    and what (prose) had been filled in after the step under the cursor."""
    if sample is None:
        return panel("denoising", message("no sample logged yet"))(w, h)
    picture = Picture(sample, view.step(sample), view.colour, view.guess)
    t, short = picture.t, sum(picture.widths) + 10 <= w

    def draw(w: int, h: int) -> list[Line]:
        lines = caption(sample, t, w, max(0, min(2 + (h > 18), h - 4)))
        if short and h > len(lines) + 3:
            return lines + picture.film(w, h - len(lines))
        if t in sample.sel and h > 6:
            hint = "   x shows the guess" if sample.guess(t) and not view.guess else ""
            lines.append([("▲ chosen  ", "bold mark"), *picture.credit(t), (hint, "dim")])
        elif h > 8:
            lines.append([])
        return lines + picture.prose(w, max(1, h - len(lines)))

    block = view.history.size("block") or 32
    size = block if 2 * block + 18 <= w else 32  # a line a block, if there is room
    left = 0 if short or w < 100 else max(24, 9 + size)
    positions = panel("positions", lambda w, h: picture.mosaic(size, w, h))
    text = panel(f"denoising{' now' * sample.live}", draw, f"colour: {view.colour}")
    return beside(w, h, (left, w - left), positions, text)


def overview(view: View, w: int, h: int) -> list[Line]:
    history = view.history
    if view.place == "c":
        return comparison(view, w, h)
    if w < 60 or h < 14:  # one line per fact
        lines = metric_lines(history, w, h - bool(history.entropy))
        for entropy in list(history.entropy.values())[-1:]:
            lines.insert(0, [("entropy by step  ", "dim"), *spark(entropy, w - 17)])
        return lines
    sample = view.sample()
    top = 7 if h < 36 else max(8, h // 5)
    bottom = 0 if h < 28 else max(11, (h - top) * 14 // 25)
    weights = (5, 3) if w >= 100 else (1, 1)
    health = panel("health", lambda w, h: metric_lines(history, w, h), foot=phases(history))
    lines = strip_panel(view, sample)(w, top)
    lines += view.once(
        w, h - top - bottom, lambda w, h: beside(w, h, weights, reward_panel(view), health)
    )
    return lines + (trajectory(view, sample, w, bottom) if bottom else [])


def run_line(log: Log, name: str) -> str:
    """A run in a line: for the comparison and for --list."""
    history, (state, age) = log.history, log.status()
    reward, accuracy = num(history.latest("reward/mean")), num(history.accuracy)
    progress = f"{state:<9} {history.done:>6}/{history.size('iters'):<6}"
    return f"{progress} reward {reward:>6}  eval {accuracy:>6}  {span(age):>8} ago  {name}"


def comparison(view: View, w: int, h: int) -> list[Line]:
    """Several runs over one another: how an ablation is watched."""
    top, across, table = min(len(view.logs) + 2, max(3, h // 3)), 1 + (w >= 100), []
    for i, (log, colour) in enumerate(zip(view.logs, itertools.cycle(CURVES))):
        sign, style = ("▸ ", "bold fg") if i == view.run else ("  ", "dim")
        table.append([(sign, "fg"), ("█", colour), (f" {run_line(log, clean(log.name))}", style)])
    lines = panel("runs", lambda w, h: table[max(0, view.run - h + 1) :])(w, top)
    names = ["reward/mean", "entropy/mean", "eval", "entropy/sel"][: 2 * across]
    return lines + grid([curve_panel(view, name) for name in names], across, 2, w, h - top)


def entropy_view(view: View, w: int, h: int) -> list[Line]:
    """Every iteration's entropies as a line of colours; beside them, which steps were selected."""
    history, its = view.history, sorted(view.history.entropy)
    it = max(its, default=None) if view.it is None else view.it
    below = 0 if h < 20 else min(11, h // 4)

    def draw(w: int, h: int) -> list[Line]:
        data, shares = [history.entropy[i] for i in its], [history.share[i] for i in its]
        high = max((value for row in data for value in finite(row)), default=0.0) or 1.0
        title, range_ = "entropy · iteration down, denoising step across", f"0 to {num(high)} nats"
        entropies = panel(title, carpet(data, its, high, it), range_)
        selected = panel("selected steps", carpet(shares, its, 1.0, it), "share")
        return beside(w, h, (5, 3) if w >= 100 else (1,), entropies, selected)

    lines = view.once(w, h - below, draw)
    return lines + (strip_panel(view, None)(w, below) if below else [])


def trajectory_view(view: View, w: int, h: int) -> list[Line]:
    sample, top = view.sample(), max(5, min(11, h // 3)) if h >= 14 else 0
    lines = strip_panel(view, sample)(w, top) if top else []
    return lines + trajectory(view, sample, w, h - top)


def sample_line(sample: Sample, here: bool) -> Line:
    sign = {True: "✓", False: "✗"}.get(sample.ok, "")
    adv = num(statistics.fmean(finite(sample.adv))) if finite(sample.adv) else "-"
    parts = " ".join(f"{name} {num(part)}" for name, part in sample.rw.items() if name != "reward")
    words = " ".join("".join(map(clean, sample.tok)).split())
    cursor, style = ("▸ ", "bold fg") if here else ("  ", "dim")
    what = f"{cursor}{sample.it:>5} {sample.p:>6} {sample.g:>3} "
    reward = f"{sign:>1} {num(sample.reward):>7}", "teal" if sample.ok else "orange"
    return [(what, style), reward, (f" {adv:>7} {sample.length:>4}  {parts}  {words}", style)]


def samples_view(view: View, w: int, h: int) -> list[Line]:
    """A table of the logged samples, and the group of the one under the cursor side by side."""
    log, keys, here = view.log, view.keys(), view.key()
    sample, below = log.sample(*here) if here else None, h * 2 // 5 if h >= 16 else 0

    def table(w: int, h: int) -> list[Line]:
        at = keys.index(here) if here in keys else 0
        shown = keys[max(0, min(at - h // 2, len(keys) - h + 1)) :][: h - 1]
        known = [one for one in (log.sample(*key) for key in shown) if one]
        lines = [sample_line(one, (one.it, one.s) == here) for one in known]
        return [[(f"  {'it':>5} {'prompt':>6} {'g':>3}    reward     adv  len", "dim")], *lines]

    def member(one: Sample) -> Draw:
        picture = Picture(one, one.T, view.colour)
        title = f"sample {one.s} · reward {num(one.reward)}"
        return panel(title, picture.prose, hot=one is sample)

    draw = table if keys else message("no sample")
    lines = panel("samples", draw, f"{len(keys)} by {view.sort}")(w, h - below)
    if not below or sample is None:
        return lines
    group = log.group(sample)
    shown = group[max(0, group.index(sample) - 3) :][: max(1, min(4, w // 30))]
    return lines + grid([member(one) for one in shown], len(shown), 1, w, below)


def curves_view(view: View, w: int, h: int) -> list[Line]:
    names = view.metrics()
    if not names:
        text = "no metric matches" if view.filter else "waiting for the first update"
        return panel("curves", message(text))(w, h)
    pick = min(view.pick, len(names) - 1)

    def page(w: int, h: int) -> list[Line]:
        across, down = max(1, min(3, w // 38)), max(1, min(3, h // 7))
        if view.zoom:
            return curve_panel(view, names[pick], hot=True)(w, h)
        first = pick - pick % (across * down)
        shown = names[first : first + across * down]
        draws = [curve_panel(view, name, hot=name == names[pick]) for name in shown]
        return grid(draws, across, down, w, h)

    return view.once(w, h, page)


def run_view(view: View, w: int, h: int) -> list[Line]:
    """Where the run is, how far, how fast and with which settings; its alerts and last events."""
    history, below, wide, told = view.history, h * 2 // 5, w >= 80, view.log.summary()
    facts = {
        "state": f"{told['status']}, last event {span(told['age_s'])} ago",
        "error": told["error"],
        "steps": f"{history.done} of {history.size('iters')}",
        "last step": phases(history),
        **{name: told[name] for name in ("model", "task", "sizes", "command", "git")},
        "machine": f"{told['host']}, process {told['pid']}",
        "log": f"{told['log']}: {history.lines} lines, {history.bad} unreadable",
        "checkpoint": told["checkpoint"],
    }
    for it, _, e in history.evaluations[-3 - len(history.tests) :]:
        interval = f"({e['lo']:.1%} to {e['hi']:.1%}) " if "lo" in e and "hi" in e else ""
        share = f"{e['accuracy']:.1%} {interval}of {e['n']} {e['split']}"
        facts[f"{e['split'] or 'eval'} at {it}"] = share

    def table(facts: object, skip: int) -> Draw:
        known = facts.items() if isinstance(facts, dict) else ()
        pairs = [(name, clean(str(value))) for name, value in known if value not in (None, "")]
        lines = [[(f"{name:<13} ", "dim"), (value, "fg")] for name, value in pairs]
        return lambda w, h: lines[skip:]

    alerts = [f"it {it:>4} {level:<5} {clean(text)}" for it, level, text in history.alerts[::-1]]
    news = [[(text, "orange")] for text in alerts[: below // 2]]
    tail = [[(clean(line.decode(errors="replace")), "dim")] for line in reversed(history.recent)]
    left = panel("run", table(facts, 0 if wide else view.pick))
    right = panel("config", table(history.meta.get("cfg"), view.pick))
    last = panel(f"alerts ({len(alerts)}) and the last events", lambda w, h: news + tail)
    return beside(w, h - below, (5, 3) if wide else (1,), left, right) + last(w, below)


# ==== keys ========================================================================================


@dataclass(frozen=True)
class Key:
    """Keys that do one thing, where they do it, and what the footer and the help say of it."""

    label: str  # keys with the same label share a line of the help
    keys: dict[str, object]  # what each passes to the action
    action: Callable[[View, object], str | None]
    help: str
    hint: str = ""
    where: str = ""  # places of View; "" is everywhere


# fmt: off
FAR = 10**9
ACROSS = {"left": -1, "h": -1, "shift+left": -10, "H": -10, "home": -FAR, "0": -FAR,
          "right": 1, "l": 1, "shift+right": 10, "L": 10, "end": FAR, "$": FAR}
DOWN = {"up": -1, "k": -1, "down": 1, "j": 1}
PAGE = {"pageup": -1, "K": -1, "pagedown": 1, "J": 1}
ROW = {key: 3 * by for key, by in DOWN.items()}
NEXT = {"n": 1, "N": -1}
OTHER_VIEW = {str(n): dict(number=n, zoom=False, help=False, pick=0) for n in range(1, 7)}
FILTER = dict(typing=True, filter="", pick=0)
CLEAR = dict(help=False, zoom=False, filter="")
V = View

KEYS = (
    Key("1-6, tab", OTHER_VIEW, V.put, ", ".join(VIEWS)),
    Key("1-6, tab", {"tab": 1, "shift+tab": -1}, V.turn, "tab goes round"),
    Key("left right, h l", ACROSS, V.move_step, "denoising step", "h/l step", "12346c"),
    Key("left right, h l", ACROSS, V.move_chart, "chart in 5", "", "5"),
    Key("left right, h l", ACROSS, V.move_iteration, "iteration if zoomed", "h/l iteration", "z"),
    Key("shift, H L", {}, V.put, "ten of them; home end, 0 $: first and last of them"),
    Key("n N", NEXT, V.move_chosen, "next and previous selected step", "n chosen", "134c"),
    Key("n N", NEXT, V.move_alert, "alert in 2, 5 and 6", "n alert", "256z"),
    Key("space, < >", {"space": 0}, V.play_or_pause, "play the denoising", "space play", "1234c"),
    Key("space, < >", {"<": 0.5, ">": 2.0}, V.change_speed, "slower, faster"),
    Key("up down, k j", DOWN, V.move_sample, "sample", "j/k sample", "134"),
    Key("up down, k j", DOWN, V.move_iteration, "iteration in 2", "j/k iteration", "2z"),
    Key("up down, k j", ROW, V.move_chart, "chart in 5", "j/k chart", "5"),
    Key("up down, k j", DOWN, V.scroll, "scrolling in 6 and here", "j/k scroll", "6?"),
    Key("up down, k j", DOWN, V.move_run, "run when comparing", "j/k run", "c"),
    Key("PgUp PgDn, K J", PAGE, V.move_iteration, "iteration"),
    Key("g G", {"g": dict(it=0, s=0)}, V.stay, "first iteration"),
    Key("g G", {"G": NEWEST}, V.put, "newest, and follow"),
    Key("x", {"x": "guess"}, V.cycle, "the guess scored at a selected step", "x guess", "134c"),
    Key("c", {"c": "colour"}, V.cycle, "colour of tokens: step, entropy, none"),
    Key("s", {"s": "sort"}, V.cycle, "order of the table in 4", "s sort", "4"),
    Key("s", {"s": "smooth"}, V.cycle, "else smoothing 0, .6, .8, .95", "s smooth", "12356zc?"),
    Key("y, u", {"y": "log_scale"}, V.cycle, "logarithmic charts"),
    Key("y, u", {"u": "axis"}, V.cycle, "along iterations, samples, updates, passes, TFLOP"),
    Key("/, esc", {"/": FILTER}, V.put, "filter samples in 4", "/ filter", "4"),
    Key("/, esc", {"/": FILTER | {"number": 5}}, V.put, "else metrics", "/ filter", "12356zc?"),
    Key("/, esc", {"escape": CLEAR}, V.put, "clear and back"),
    Key("enter", {"enter": "zoom"}, V.cycle, "zoom a chart", "enter zoom", "5z"),
    Key("enter", {"enter": dict(number=3)}, V.stay, "open a sample", "enter open", "12346c"),
    Key("a, t", {"a": "ascii", "t": "light"}, V.cycle, "nothing but ASCII; dark or light"),
    Key("e", {"e": "save"}, V.ask_app, "save this screen beside the log as svg and text"),
    Key("f", {"f": 0}, V.follow_or_stay, "follow the newest; a manual move stops it", "f follow"),
    Key("?, q, ctrl+c", {"?": "help"}, V.cycle, "this help", "? help"),
    Key("?, q, ctrl+c", {"q": "quit"}, V.ask_app, "quit (the trainer never notices)", "q quit"),
)
# fmt: on


def press(view: View, key: str) -> str:
    """What a key does to the view; returns "quit" or "save" for what is not the view's to do."""
    view.note = ""
    if view.typing:
        view.type_filter(key)
        return ""
    for entry in KEYS:
        if key in entry.keys and (not entry.where or view.place in entry.where):
            wish = entry.action(view, entry.keys[key])
            return wish if entry.action is View.ask_app else ""
    return ""


def footer(view: View, w: int) -> Line:
    """What is being typed, or what there is to say, or the keys of this place, if they fit."""
    if view.typing or view.filter:
        rest = "_" if view.typing else "  esc clears"
        return bar([[(f" /{view.filter}", "bold fg"), (rest, "dim")]], w)
    if view.note:
        return bar([[(f" {view.note}", "orange")]], w)
    names = [f"{i} {name}" for i, name in enumerate(VIEWS, 1)]
    names = names if w >= 90 else [f"1-6 {VIEWS[view.number - 1]}"]
    hints = [key.hint for key in KEYS if key.hint and view.place in (key.where or view.place)]
    hot, parts = (VIEWS[view.number - 1], "follow" if view.follow else ""), []
    for key, word in (hint.split(" ", 1) for hint in names + hints):
        style = "bold fg" if word in hot else "dim"
        parts.append([(f" {key} ", "bold orange"), (f"{word} ", style)])
    return bar(parts, w)


def help_view(view: View, w: int, h: int) -> list[Line]:
    words: dict[str, list[str]] = {}
    for key in KEYS:
        words.setdefault(key.label, []).append(key.help)
    lines = [[(f"{label:<16} ", "bold orange"), ("; ".join(words[label]), "")] for label in words]
    return panel("keys", lambda w, h: lines[view.pick :])(w, h)


SCREENS = (overview, entropy_view, trajectory_view, samples_view, curves_view, run_view)


def frame(view: View, w: int, h: int) -> list[Line]:
    """The whole terminal: exactly `h` lines of `w` cells."""
    if w < 20 or h < 5:
        return message("needs 20x5")(w, h)
    screen = help_view if view.help else SCREENS[view.number - 1]
    lines = [header(view, w), *fill(screen(view, w, h - 2), w, h - 2), footer(view, w)]
    if view.ascii:
        narrow = partial(re.sub, "[^ -~]", lambda c: "?" * cell_len(c[0]))
        return [[(narrow(text.translate(ASCII)), style) for text, style in line] for line in lines]
    return lines


def plain(lines: Iterable[Line]) -> str:
    return "\n".join("".join(text for text, _ in line).rstrip() for line in lines)


def svg(lines: Sequence[Line], light: bool = False) -> str:
    """A screen as a picture, by Rich; without the font that its template loads from the web."""
    from rich.console import CONSOLE_SVG_FORMAT, Console
    from rich.segment import SegmentLines

    def segments(line: Line) -> list[Segment]:  # a braille dot is not as wide in every font
        pieces = [(c, style) for text, style in line for c in re.findall("[⠀-⣿]|[^⠀-⣿]+", text)]
        return [Segment(text, paint(style, light)) for text, style in pieces]

    page = Console(record=True, width=max(map(cells, lines), default=1), file=io.StringIO())
    page.print(SegmentLines(map(segments, lines), new_lines=True), end="")
    code = re.sub(r"@font-face {{.*?}}|<!--.*?-->", "", CONSOLE_SVG_FORMAT, flags=re.S)
    code = code.replace("<svg", '<svg xml:space="preserve"').replace("{char_height}px", "21.2px")
    code = code.replace("Fira Code", "DejaVu Sans Mono, Menlo, Consolas")
    text = page.export_svg(title="tui.py", code_format=code, font_aspect_ratio=0.638)
    return re.sub(r'clip-path="[^"]*-line-\d+\)"', "", text)  # uncut and at 21.2px, bars touch


def save(view: View, w: int, h: int) -> str:
    """Write the screen beside the log as svg and text; returns what to tell."""
    lines = frame(view, w, h)
    path = view.log.path.with_name(f"screen-{time.strftime('%Y%m%d-%H%M%S')}.svg")
    try:
        path.write_text(svg(lines, view.light), encoding="utf-8")
        path.with_suffix(".txt").write_text(plain(lines) + "\n", encoding="utf-8")
    except OSError as error:
        return f"not saved: {error}"
    return f"saved {path} and .txt"


# ==== app =========================================================================================


def make_app(view: View, hz: float = 4.0):
    """The Textual app. With hz 0 it reads only when somebody calls its `pump`."""
    from textual import events
    from textual.app import App, ComposeResult
    from textual.binding import Binding
    from textual.geometry import Region
    from textual.strip import Strip
    from textual.widget import Widget

    class Slice(Widget):
        """Some columns of the screen. Textual repaints a line of a widget from its left edge on, so
        narrow widgets are what keeps the output small where only a few cells differ."""

        lines: Sequence[Strip] = ()

        def render_line(self, y: int) -> Strip:
            return self.lines[y] if y < len(self.lines) else Strip([])

        def show(self, lines: Sequence[Strip], width: int) -> None:
            """Repaint the lines that differ."""
            before, self.lines = self.lines, lines
            changed = [y for y, (a, b) in enumerate(zip(before, lines)) if a is not b and a != b]
            if self.styles.width.value != width or len(before) != len(lines):
                self.styles.width = width
                self.refresh()
            elif changed:
                self.refresh(*(Region(0, y, width, 1) for y in changed))

    def splits(line: Strip, x: int) -> bool:
        """Whether a wide character stands on both sides of column x."""
        return line.crop(0, x).text + line.crop(x).text != line.text

    def painted(light: bool, *line: tuple[str, str]) -> Strip:
        return Strip([Segment(text, paint(style, light)) for text, style in line])

    class Monitor(App):
        """Keys and time change the view and the logs; `draw` shows them."""

        CSS = "Screen { layout: horizontal; overflow: hidden; } Slice { height: 100%; width: 1; }"
        ENABLE_COMMAND_PALETTE = False
        BINDINGS = [
            Binding("ctrl+c", "quit", priority=True),
            *(Binding(k, f"press('{k}')", priority=True) for k in ("tab", "shift+tab")),
        ]
        told: list[tuple] = []  # what `news` was when the frame was drawn
        kept: dict[tuple, Strip] = {}  # by line and theme
        drawn = stepped = 0.0

        def compose(self) -> ComposeResult:
            yield from (Slice() for _ in range(6))

        def on_mount(self) -> None:
            if hz:
                self.set_interval(1 / hz, self.pump)
                self.player = self.set_interval(1 / 64, self.advance, pause=True)

        def on_resize(self, event: events.Resize) -> None:
            self.call_next(self.draw)  # after Textual has taken the new size in

        def draw(self) -> None:
            self.told, self.drawn = self.news(), time.monotonic()
            keys = [(view.light, *line) for line in frame(view, *self.size)]
            self.kept = {key: self.kept.get(key) or painted(*key) for key in keys}
            lines, slices = [self.kept[key] for key in keys], list(self.query(Slice))
            wide = [line for line in lines if any(cell_len(c) > 1 for c in set(line.text))]
            ends = [0]
            for i in range(1, len(slices) + 1):
                end = max(ends[-1], self.size.width * i // len(slices))
                while end > ends[-1] and any(splits(line, end) for line in wide):
                    end -= 1
                ends.append(end)
            columns = zip(*(line.divide(ends[1:]) for line in lines))
            for one, start, end, column in zip(slices, ends, ends[1:], columns):
                one.show(column, end - start)

        def news(self) -> list[tuple]:
            """What makes a new frame necessary, keys apart: events, the state, growing silence."""
            states = [(log.history.lines, *log.status()) for log in view.logs]
            return [(n, s, int(age) if age >= 5 and s in GOING else 0) for n, s, age in states]

        def pump(self) -> None:
            """Read what is new, for 40 ms at most, and show it; go on at once if there is more."""
            behind = any([log.poll() for log in view.logs])
            hurry = behind and time.monotonic() < self.drawn + 0.5
            if not hurry and self.told != self.news():
                self.draw()
            if behind and hz:
                self.set_timer(0.01, self.pump)

        def advance(self) -> None:
            if not view.playing:
                self.player.pause()
            elif time.monotonic() - self.stepped >= 1 / view.speed:
                self.stepped = time.monotonic()
                view.play()
                self.draw()

        def action_press(self, key: str) -> None:
            wish = press(view, key)
            if wish == "quit":
                self.exit()
            elif wish == "save":
                view.note = save(view, *self.size)
            elif view.playing and hz:
                self.player.resume()
            self.draw()

        def on_key(self, event: events.Key) -> None:
            printable = event.is_printable and event.character != " "
            self.action_press(event.character if printable else event.key)

    return Monitor()


# ==== command line ================================================================================


def find(name: str | None) -> Path:
    """The log that a run folder, a file, or nothing (the newest under runs/) stands for."""
    if name is None:
        logs = sorted(Path("runs").glob("*/events.jsonl"), key=lambda path: path.stat().st_mtime)
        if not logs:
            raise FileNotFoundError("no run in runs/: start `python egspo.py` or name a run folder")
        return logs[-1]
    path = Path(name)
    if not path.exists():
        raise FileNotFoundError(f"no such run: {name} (a run folder or its events.jsonl)")
    return path / "events.jsonl" if path.is_dir() else path


def print_lines(log: Log, hz: float) -> None:
    """Print a line for each iteration, evaluation and alert, until the run has ended."""
    told: set[tuple] = set()
    while True:
        behind, history = log.poll(), log.history
        names = [name for name in METRICS if name in history.series][:8]
        lines = {(it, 2, f"{level}  {text}") for it, level, text in history.alerts}
        for it, split, e in history.evaluations:
            lines.add((it, 0, f"{split}  accuracy {e['accuracy']:.1%} of {e['n']}"))
        for it in history.series.get("t/total", history.entropy):
            lines.add((it, 1, "  ".join(f"{n} {num(history.series[n].get(it))}" for n in names)))
        for it, _, text in sorted(lines - told):
            print(f"it {it:>5}  {text}", flush=True)
        told |= lines
        if not behind and not log.waiting and log.status()[0] not in (*GOING, "waiting"):
            return print(f"{log.status()[0]} after {history.done} steps", flush=True)
        time.sleep(0 if behind else 1 / hz)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="python tui.py [RUN ...] [options]",
        description="Watch a training run, look at one that is over, compare several.",
        epilog="Exit codes: 0 fine, 2 no such run, 3 the log is newer than this program.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26, width=100),
    )
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="folder or events.jsonl (default: newest in runs/)")
    add = parser.add_argument_group("instead of the live screen").add_argument
    add("--once", action="store_true", help="print one frame (the default without a terminal)")
    add("--plain", action="store_true", help="print a line per iteration, like tail -f")
    add("--json", action="store_true", help="print the last state as JSON")
    add("--list", action="store_true", help="print all runs of the folder RUN (default: runs/)")
    add("--svg", metavar="FILE", type=Path, help="write one frame as a picture")
    add("--serve", nargs="?", type=int, const=8000, metavar="PORT", help="show it in a browser")
    add = parser.add_argument_group("what to show first").add_argument
    add("--view", default="1", choices=[*VIEWS, *"123456"], metavar="VIEW", help=", ".join(VIEWS))
    add("--it", type=int, metavar="N", help="this iteration ...")
    add("--sample", type=int, metavar="N", help="... this sample of it ...")
    add("--step", type=int, metavar="N", help="... and this denoising step")
    add("--guess", action="store_true", help="the one-step completions, like key x")
    add = parser.add_argument_group("how").add_argument
    add("--replay", type=float, default=0.0, metavar="SPEED", help="a log as if being written")
    add("--hz", type=float, default=4.0, metavar="N", help="looks at the log a second (default: 4)")
    add("--ascii", action="store_true", help="nothing but ASCII")
    add("--light", action="store_true", help="for a light terminal (default: as COLORFGBG says)")
    args = parser.parse_args()
    if not 0 < args.hz < math.inf:
        parser.error(f"--hz {args.hz:g}: must be above 0")
    if not 0 <= args.replay < math.inf:
        parser.error(f"--replay {args.replay:g}: must be at least 0")
    return args


def serve(port: int) -> int:
    """The monitor in a browser, a process of its own for each that looks."""
    try:
        from textual_serve.server import Server
    except ModuleNotFoundError:
        print("--serve needs one more package: pip install textual-serve", file=sys.stderr)
        return 2
    command = shlex.join([sys.executable, __file__, *sys.argv[1:]])
    Server(command, "127.0.0.1", port, title="tui.py").serve()
    return 0


def first_view(args: argparse.Namespace, logs: Sequence[Log]) -> View:
    """What the command line asks to see."""
    number = VIEWS.index(args.view) + 1 if args.view in VIEWS else int(args.view)
    view = View(logs, number, args.it, args.sample or 0, args.step, guess=args.guess)
    view.follow = args.it is args.sample is args.step is None
    view.light = args.light or os.environ.get("COLORFGBG", "").endswith(";15")
    view.ascii = args.ascii or not (sys.stdout.encoding or "").lower().startswith("utf")
    return view


def main() -> int:
    args = arguments()
    sys.stdout.reconfigure(errors="replace")
    served = "TEXTUAL_DRIVER" in os.environ  # a browser is at the other end
    dumb = os.environ.get("TERM", "dumb") == "dumb" or os.environ.get("CI")
    terminal = all(s.isatty() for s in (sys.__stdin__, sys.__stdout__, sys.__stderr__)) and not dumb
    asked = args.once or args.plain or args.json or args.list or args.svg
    live = not asked and (terminal or args.serve or served)
    try:
        if args.list:
            folder = Path(*args.runs[:1] or ["runs"])
            if not (paths := sorted(folder.glob("*/events.jsonl"))):
                raise FileNotFoundError(f"no runs in {folder}")
        else:
            paths = [find(name) for name in args.runs or [None]]
        if lost := [path for path in paths if not live and not os.access(path, os.R_OK)]:
            raise FileNotFoundError(f"no events yet, or none that we may read: {lost[0]}")
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    if args.serve and not served:
        return serve(args.serve)
    logs = [Log(path, args.replay, patience=20 if live else 0) for path in paths]
    for log in [*logs]:
        while log.poll(0.05) and not live:
            pass
        if log.history.bad == log.history.lines > 0:
            print(f"{log.path}: no event log, none of its lines is an event", file=sys.stderr)
            logs.remove(log)
            if not (args.list and logs):
                return 2
    if any(log.history.newer for log in logs) and not args.list:
        print(f"the log is newer than version {SCHEMA}: update tui.py", file=sys.stderr)
        return 3
    view, size = first_view(args, logs), shutil.get_terminal_size((120, 40))
    if live:
        app = make_app(view, args.hz)
        signal.signal(signal.SIGTERM, lambda *_: app.exit())  # the terminal is put back in order
        app.run()
        return app.return_code or 0
    elif args.list:
        print("\n".join(run_line(log, str(log.path.parent)) for log in logs))
    elif args.json:
        print(json.dumps(logs[0].summary(), allow_nan=False))
    elif args.plain:
        print_lines(logs[0], args.hz)
    elif args.svg:
        try:
            args.svg.write_text(svg(frame(view, *size), view.light), encoding="utf-8")
        except OSError as error:
            print(f"--svg {args.svg}: {error.strerror}", file=sys.stderr)
            return 2
    else:
        print(plain(frame(view, *size)))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(0)
