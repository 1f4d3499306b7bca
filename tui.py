"""What is on disk right now? A monitor for training runs: live, or after the end.

    python tui.py                     the newest run under runs/
    python tui.py RUN [RUN ...]       one run, or several to compare
    python tui.py RUN --once          one frame as plain text (the default without a terminal)

Nobody trains a masked diffusion model by its reward curve alone: the denoising is what is learned. So
this shows which steps were uncertain, which of them got the gradient, and how the text appeared. It
reads `events.jsonl` and writes nothing; it needs no tokenizer, no torch and no connection to the
trainer, so it works on a copy, over ssh, or while rsync is still bringing the file.

Three parts, top to bottom:
  read   Tail (bytes of a growing file) -> Run (what the events add up to) -> Sample (one trajectory)
  draw   pure functions: data, width and height in, rows of styled text out; `frame` draws a screen
  app    keys change a View; one Textual widget shows the frame and repaints the cells that differ

Denoising time t counts in generation order: 0 is all masks. Entropies are in nats.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import signal
import statistics
import sys
import time
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from html import escape
from pathlib import Path

from rich.cells import cell_len, set_cell_size  # the widths Textual goes by

# ==== read ========================================================================================

SCHEMA = 1  # the newest version of the event log this file knows


class Tail:
    """The complete new lines of a growing file, by polling (works on NFS, sshfs and under rsync).

    A torn last line waits for its newline. A hole of NUL bytes (a network file system that knows the
    length before the bytes) waits for `patience` polls. A file that was replaced, truncated, or
    truncated and grown again (its first bytes tell) is read again from the start.
    """

    def __init__(self, path: Path, patience: int = 20):
        self.path, self.patience = path, patience
        self.offset, self.inode, self.head, self.holes = 0, 0, b"", 0

    def read(self, limit: int = 1 << 20) -> tuple[bool, list[tuple[int, bytes]]]:
        """(started over?, [(offset, line)]) of at most `limit` bytes; nothing while there is no file."""
        try:
            file = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            return False, []
        try:
            stat, head = os.fstat(file), os.pread(file, 64, 0)
            same = stat.st_ino == self.inode and stat.st_size >= self.offset
            again = self.offset > 0 and not (same and head.startswith(self.head))
            if again:
                self.offset = self.holes = 0
            self.inode, self.head = stat.st_ino, head[: self.offset or None]
            chunk = os.pread(file, limit, self.offset)
        finally:
            os.close(file)
        end = chunk.rfind(b"\n") + 1
        hole = chunk.find(b"\0", 0, end)
        if hole >= 0 and self.holes < self.patience:
            self.holes, end = self.holes + 1, chunk.rfind(b"\n", 0, hole) + 1
        elif hole < 0:
            self.holes = 0
        if not end and hole < 0 and len(chunk) == limit:
            end = limit  # no line is this long: let it be counted as a bad one
        lines = []
        for line in chunk[:end].removesuffix(b"\n").split(b"\n") if end else ():
            lines.append((self.offset, line))
            self.offset += len(line) + 1
        return again, lines


class Replay(Tail):
    """A finished log as if it were being written now, `speed` times as fast."""

    def __init__(self, path: Path, speed: float):
        super().__init__(path, patience=0)
        self.speed, self.waiting, self.began, self.first = speed, deque(), time.time(), 0.0

    def now(self) -> float:
        return self.first + (time.time() - self.began) * self.speed

    def read(self, limit: int = 1 << 20) -> tuple[bool, list[tuple[int, bytes]]]:
        if len(self.waiting) < 1000:
            self.waiting.extend(super().read(limit)[1])
        if self.waiting and not self.first:
            self.first = stamp(self.waiting[0][1])
        lines = []
        while self.waiting and stamp(self.waiting[0][1]) <= self.now():
            lines.append(self.waiting.popleft())
        return False, lines


STAMP = re.compile(rb'"ts":\s*([\d.]+)')
SAMPLE = re.compile(rb'"it":\s*(\d+),\s*"s":\s*(\d+)')


def stamp(line: bytes) -> float:
    """The unix time in a line of the log; 0 if it has none."""
    found = STAMP.search(line)
    return float(found[1]) if found else 0.0


def number(value: object) -> float:
    """A logged number; "nan", "inf" and "-inf" are strings in the log."""
    return math.nan if value is None else float(value)


class Series:
    """One metric over iterations; logging an iteration again replaces it and what came after."""

    def __init__(self):
        self.its, self.values = array("q"), array("d")

    def add(self, it: int, value: float) -> None:
        self.cut(it)
        self.its.append(it)
        self.values.append(value)

    def cut(self, it: int) -> None:
        """Forget iteration `it` and later."""
        if self.its and self.its[-1] >= it:
            at = bisect_left(self.its, it)
            del self.its[at:], self.values[at:]


@dataclass
class Run:
    """What the events of a log add up to. `feed` depends on the lines alone: no clock, no files."""

    meta: dict = field(default_factory=dict)
    series: dict[str, Series] = field(default_factory=dict)
    entropy: dict[int, array] = field(default_factory=dict)  # it -> mean entropy of each step
    chosen: dict[int, list[int]] = field(default_factory=dict)  # it -> samples that selected a step
    rows: dict[int, int] = field(default_factory=dict)  # it -> samples in that iteration
    evals: dict[int, dict] = field(default_factory=dict)
    samples: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)  # offset, length
    alerts: list[tuple[int, str, str]] = field(default_factory=list)  # it, level, message
    rollout: list[bytes] = field(default_factory=list)  # `denoise` lines since the last `step`
    phase: str = ""
    it: int = 0  # the iteration being worked on
    ckpt: dict = field(default_factory=dict)
    end: dict | None = None
    recent: deque = field(default_factory=lambda: deque(maxlen=50))  # the last good lines
    lines: int = 0
    bad: int = 0
    newer: bool = False

    def feed(self, line: bytes, offset: int = 0) -> None:
        """Take one line in. What cannot be used is counted, never fatal."""
        self.lines += 1
        # The two frequent events are only filed: `denoise` lines are parsed while their rollout is
        # on the screen, `sample` lines when somebody looks at them.
        try:
            if line.startswith((b'{"e":"denoise"', b'{"e": "denoise"')) and line.endswith(b"}"):
                self.rollout.append(line)
            elif line.startswith((b'{"e":"sample"', b'{"e": "sample"')) and line.endswith(b"}"):
                it, s = SAMPLE.search(line).groups()
                self.samples[int(it), int(s)] = offset, len(line)
            else:
                self.apply(json.loads(line))
            self.recent.append(line)
        except (ValueError, TypeError, KeyError, AttributeError):
            self.bad += 1

    def apply(self, event: dict) -> None:
        kind, it = event["e"], int(event.get("it") or 0)
        if kind == "meta":
            self.newer |= event.get("v", SCHEMA) > SCHEMA
            self.rewind(int(event.get("resume") or 0))
            self.meta, self.end = event, None
        elif kind == "phase":
            self.phase, self.it = str(event["name"]), it
        elif kind == "step":
            metrics = {name: number(value) for name, value in event["m"].items()}
            for name, value in metrics.items():
                series = self.series.setdefault(name, Series())
                if not math.isfinite(value) and (not series.values or math.isfinite(series.values[-1])):
                    self.alerts.append((it, "error", f"{name} is {value}"))
                series.add(it, value)
            if event.get("ent"):
                self.entropy[it] = array("f", map(number, event["ent"]))
                self.chosen[it] = list(event.get("sel") or [])
                self.rows[it] = event.get("n") or 0
            self.it = it
            self.rollout.clear()
        elif kind == "eval":
            values = {name: number(value) for name, value in event["m"].items()}
            self.evals[it] = values | {"n": event.get("n"), "split": event.get("split", "")}
        elif kind == "ckpt":
            self.ckpt = event
        elif kind == "alert":
            self.alerts.append((it, str(event.get("level", "warn")), str(event["msg"])))
        elif kind == "end":
            self.end = event

    def rewind(self, it: int) -> None:
        """The run starts again at `it`: what was logged from there on is void."""
        for series in self.series.values():
            series.cut(it)
        for record in (self.entropy, self.chosen, self.rows):
            for key in [key for key in record if key >= it]:
                del record[key]
        self.samples = {key: value for key, value in self.samples.items() if key[0] < it}
        self.evals = {key: value for key, value in self.evals.items() if key <= it}  # made at its start
        self.alerts = [alert for alert in self.alerts if alert[0] < it]
        self.rollout.clear()

    def size(self, name: str, default: int = 0) -> int:
        """T, K, C, block, G, N or iters, from wherever the trainer wrote it."""
        cfg = self.meta.get("cfg") or {}
        other = {"C": "L", "iters": "steps"}.get(name, name)
        value = next((d[k] for d in (self.meta, cfg) for k in (name, other) if d.get(k)), default)
        return value if isinstance(value, int) else default

    def latest(self, name: str) -> float | None:
        series = self.series.get(name)
        return series.values[-1] if series and series.values else None

    @property
    def done(self) -> int:
        """Updates made."""
        return max(self.entropy, default=max((s.its[-1] for s in self.series.values() if s.its), default=-1)) + 1

    def live(self) -> "Sample | None":
        """The rollout in progress as far as it was logged; None between rollouts."""
        sample, C, T = None, self.size("C"), self.size("T")
        for line in self.rollout:
            try:
                event = json.loads(line)
                H, t0, it, b = event["H"], int(event["t0"]), int(event["it"]), event.get("b", 0)
                revealed = event.get("rv") or []
                if sample is None or (sample.it, sample.g) != (it, b):  # g holds the batch here
                    sample = Sample(it=it, s=event.get("s", 0), g=b, live=True, ent=[], T=T,
                                    tok=[""] * C, rev=[T] * C, tent=[0] * C)
                sample.ent += [math.nan] * (t0 - len(sample.ent)) + [number(h) for h in H]
                for k, (i, token, entropy) in enumerate(revealed):
                    sample.tok[i], sample.tent[i] = str(token), round(50 * number(entropy))
                    sample.rev[i] = t0 + k * len(H) // len(revealed)
            except (ValueError, TypeError, KeyError, IndexError):
                continue  # half a line of a crashed trainer
        return sample


@dataclass
class Sample:
    """One trajectory. The state at step t is: `tok[i]` where `rev[i] <= t`, masks elsewhere."""

    it: int = 0
    s: int = 0  # row in the batch
    p: int = 0  # prompt
    g: int = 0  # sample of that prompt
    prompt: str = ""
    tok: list = field(default_factory=list)
    rev: list = field(default_factory=list)  # T where never decoded (the row had ended)
    tent: list = field(default_factory=list)  # entropy of each token, in 1/50 nat
    ent: list = field(default_factory=list)  # of each step
    sel: list = field(default_factory=list)  # the K selected steps, and per selected step:
    srw: list = field(default_factory=list)  # reward of the greedy one-step completion
    adv: list = field(default_factory=list)  # advantage
    ratio: list = field(default_factory=list)
    x0: list = field(default_factory=list)  # that completion, token by token
    rw: dict = field(default_factory=dict)  # reward by part
    reward: float | None = None
    correct: bool | None = None
    gold: object = None
    pred: object = None
    eos: int = 0  # end tokens cut from the tail of tok
    edit: list = field(default_factory=list)  # remasking: [t, i, token or null]
    T: int = 0
    live: bool = False

    @classmethod
    def parse(cls, line: bytes, T: int = 0) -> "Sample":
        """Raises ValueError, TypeError or AttributeError for what is no sample event."""
        event = json.loads(line)
        sample = cls(**{f.name: event[f.name] for f in fields(cls) if event.get(f.name) is not None})
        sample.ent = [number(h) for h in sample.ent]
        sample.T = len(sample.ent) or T or max(sample.rev, default=0) + 1
        sample.tok = ["" if token is None else str(token) for token in sample.tok]
        sample.rev = (list(sample.rev) + [sample.T] * len(sample.tok))[: len(sample.tok)]
        sample.tent = (list(sample.tent) + [0] * len(sample.tok))[: len(sample.tok)]
        if not isinstance(sample.rw, dict):
            sample.rw = {"reward": number(sample.rw)}
        parts = {name: number(value) for name, value in sample.rw.items()}
        if sample.reward is None:
            sample.reward = parts.get("reward", parts.get("total", sum(parts.values())))
        if sample.correct is None:
            known = [parts[name] for name in ("correct", "solved", "passed") if name in parts]
            sample.correct = known[0] >= 1 if known else None
        return sample

    @property
    def decoded(self) -> int:
        """Positions that were decoded at all."""
        return sum(t < self.T for t in self.rev)

    def at(self, t: int) -> list[str | None]:
        """The state after step t: a token or None (masked) for each position."""
        state = [token if rev <= t else None for token, rev in zip(self.tok, self.rev)]
        for when, i, token in self.edit:
            if when <= t and 0 <= i < len(state):
                state[i] = token
        return state


class Log:
    """A run on disk: its path, its tail, and the state read so far."""

    def __init__(self, path: Path, speed: float = 0.0, patience: int = 20):
        self.path, self.run, self.version = path, Run(), 0
        self.tail = Replay(path, speed) if speed else Tail(path, patience)
        self.parsed: dict[tuple[int, int], Sample | None] = {}  # by place in the file
        self.briefs: dict[tuple[int, int], tuple[float, int, str]] = {}

    @property
    def name(self) -> str:
        return str(self.run.meta.get("run") or self.path.parent.name)

    def now(self) -> float:
        return self.tail.now() if isinstance(self.tail, Replay) else time.time()

    def poll(self, seconds: float = 0.04) -> bool:
        """Read what is new, for about so long; True if there may be more."""
        until = time.monotonic() + seconds
        while True:
            again, lines = self.tail.read()
            if again:
                self.run, self.parsed, self.briefs = Run(), {}, {}
            for offset, line in lines:
                self.run.feed(line, offset)
            self.version += bool(lines) or again
            if not lines or time.monotonic() > until:
                return bool(lines)

    def sample(self, key: tuple[int, int]) -> Sample | None:
        """The trajectory (it, s), read from the file now; None if it cannot be."""
        place = self.run.samples.get(key)
        if place and place not in self.parsed:
            if len(self.parsed) > 64:
                self.parsed.clear()
            try:
                with open(self.path, "rb") as file:
                    line = os.pread(file.fileno(), place[1], place[0])
                self.parsed[place] = Sample.parse(line, self.run.size("T"))
            except (OSError, ValueError, TypeError, AttributeError):
                self.parsed[place] = None
        return self.parsed[place] if place else None

    def brief(self, key: tuple[int, int]) -> tuple[float, int, str]:
        """(reward, length, text) of a sample, remembered: for sorting and filtering them all."""
        place = self.run.samples[key]
        if place not in self.briefs:
            sample = self.sample(key) or Sample(reward=math.nan)
            self.briefs[place] = sample.reward, sample.decoded, "".join(sample.tok)
        return self.briefs[place]

    def status(self) -> tuple[str, float]:
        """(live, quiet, dead, crashed, finished, stopped or waiting; seconds since the last event)."""
        run = self.run
        age = max(0.0, self.now() - stamp(run.recent[-1])) if run.recent else 0.0
        if not run.recent:
            return "waiting", 0.0
        if run.end:
            return str(run.end.get("status", "finished")), age
        here = (os.uname().nodename, boot_id())
        if (run.meta.get("host"), run.meta.get("boot")) == here and isinstance(self.tail, Tail):
            if not isinstance(self.tail, Replay) and not alive(run.meta.get("pid")):
                return "crashed", age
        gaps = run.series.get("t/total")
        usual = statistics.median(gaps.values[-50:]) if gaps and gaps.values else 0.0
        return ("dead" if age > 600 else "quiet" if age > max(60, 4 * usual) else "live"), age


@lru_cache(1)
def boot_id() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def alive(pid: object) -> bool:
    """Whether a process of this machine runs; True if there is no telling."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, TypeError, ValueError):
        return True
    return True

# ==== draw ========================================================================================
# A row is a list of (text, style); a style is "[bold] [italic] #rrggbb [on #rrggbb]" or "". Every
# function here takes the width and height it must fill, and fills exactly that.

Row = list[tuple[str, str]]

PALETTES = {
    "viridis": "440154 482475 414487 355f8d 2a788e 21918c 22a884 44bf70 7ad151 bddf26 fde725",
    "cividis": "00224e 123570 3b496c 575d6d 707173 8a8678 a59c74 c3b369 e1cc55 fee838",
    "magma": "2c115f 51127c 721f81 932b80 b73779 d8456c f1605d fc8961 feb078 fed799 fcfdbf",
    "grey": "45484e f4f4f4",
}
DARK = dict(bg="#0f1116", fg="#d8dbe0", dim="#7c828d", line="#323742", bar="#181c25", sky="#56b4e9",
            orange="#f0a030", teal="#2fb5a0", mark="#fde725", mask="#59606d", veil="#1b1f28")
LIGHT = dict(bg="#fbfbf8", fg="#22262c", dim="#686e78", line="#c6cad0", bar="#eceef0", sky="#0b6fb0",
             orange="#a85800", teal="#007a68", mark="#6a1b80", mask="#8d939d", veil="#edeff1")
GLYPHS = {  # bars of 0 to 8 eighths, then marks by name
    "braille": (" ▁▂▃▄▅▆▇█", dict(box="╭─╮│╰╯", sel="▲", maybe="△", eval="◆", bad="×", dot="·", mask="░",
                yes="✓", no="✗", cut="…", edge="┤", rail="│", done="━", todo="─", here="▸", full="█", new="◆", sep="·")),
    "ascii": ("  .::||##", dict(box="+-+|++", sel="^", maybe="~", eval="o", bad="x", dot=".", mask=":",
              yes="+", no="-", cut="~", edge="|", rail="|", done="=", todo="-", here=">", full="#", new="@", sep="|")),
}
GLYPHS["block"] = GLYPHS["braille"]
STATUS = {"live": ("●", "*", "teal"), "finished": ("■", "#", "teal"), "stopped": ("▪", "#", "sky"),
          "quiet": ("◌", "o", "orange"), "dead": ("✖", "x", "orange"), "crashed": ("✖", "x", "orange"),
          "waiting": ("○", "o", "dim")}


@lru_cache(4096)
def mix(low: str, high: str, x: float) -> str:
    """The colour a share x of the way from one to the other."""
    pairs = [(int(low[i : i + 2], 16), int(high[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * x):02x}" for a, b in pairs)


@dataclass(frozen=True)
class Look:
    """Colours and characters. Colours of the theme are attributes: look.sky, look.dim, ..."""

    palette: str = "viridis"
    glyphs: str = "braille"
    light: bool = False

    def __getattr__(self, name: str) -> str:
        theme = LIGHT if self.light else DARK
        if name not in theme:
            raise AttributeError(name)
        return theme[name]

    def glyph(self, name: str) -> str:
        return GLYPHS[self.glyphs][1][name]

    @property
    def eighths(self) -> str:
        return GLYPHS[self.glyphs][0]

    def heat(self, x: float, floor: float = 0.0) -> str:
        """Of a value from 0 to 1. More always means more contrast with the background."""
        x = min(1.0, max(0.0, floor + (1 - floor) * x)) if math.isfinite(x) else 0.0
        return heat(self.palette, round((1 - x if self.light else x) * 64))

    def ink(self, x: float) -> str:
        """The same for text: the part of the palette that can be read."""
        return self.heat(x, floor=0.45)


@lru_cache(1024)
def heat(palette: str, level: int) -> str:
    colours = ["#" + colour for colour in PALETTES[palette].split()]
    at = level / 64 * (len(colours) - 1)
    low = min(int(at), len(colours) - 2)
    return mix(colours[low], colours[low + 1], at - low)


# ---- rows ----------------------------------------------------------------------------------------


def fit(row: Row, width: int) -> Row:
    """Exactly `width` cells: cut (never half a wide character) or padded; neighbours merged."""
    out, left = [], width
    for text, style in row:
        cells = cell_len(text)
        if cells > left:
            text, cells = set_cell_size(text, left), left
        if text and out and out[-1][1] == style:
            out[-1] = (out[-1][0] + text, style)
        elif text:
            out.append((text, style))
        left -= cells
        if left <= 0:
            break
    return out + [(" " * left, "")] if left > 0 else out


def block(rows: Iterable[Row], width: int, height: int) -> list[Row]:
    rows = list(rows)[:height]
    return [fit(row, width) for row in rows + [[]] * (height - len(rows))]


def beside(*blocks: list[Row]) -> list[Row]:
    return [sum(rows, []) for rows in zip(*blocks)]


def ends(left: Row, right: Row, width: int) -> Row:
    """Left and right aligned on one row; the right part goes first when there is no room."""
    room = width - sum(cell_len(text) for text, _ in left + right)
    return fit(left + [(" " * room, "")] + right if room > 0 else left, width)


def panel(title: str, draw: Callable[[int, int], list[Row]], width: int, height: int, look: Look,
          right: str = "", foot: str = "", hot: bool = False) -> list[Row]:
    """A box around what draw(width, height) returns; without the box where there is no room for one."""
    if width < 24 or height < 4:
        return block(draw(width, height), width, height)
    tl, h, tr, v, bl, br = look.glyph("box")
    line, name = (look.sky if hot else look.line), (f"bold {look.fg}" if hot else look.dim)

    def border(start: str, stop: str, words: str, more: str) -> Row:
        words = set_cell_size(words, min(cell_len(words), width - 6))
        more = more if cell_len(words) + cell_len(more) < width - 10 else ""
        left = [(start + h, line)] + ([(f" {words} ", name)] if words else [])
        tail = ([(f" {more} ", look.dim)] if more else []) + [(h + stop, line)]
        room = width - sum(cell_len(text) for text, _ in left + tail)
        return left + [(h * room, line)] + tail

    inner = block(draw(width - 4, height - 2), width - 4, height - 2)
    middle = [[(v + " ", line), *row, (" " + v, line)] for row in inner]
    return [border(tl, tr, title, right), *middle, border(bl, br, "", foot)]


def num(value: float | None) -> str:
    """At most three digits that matter, in at most seven cells."""
    if value is None:
        return "-"
    size = abs(value)
    if not math.isfinite(value) or not size:
        return f"{value:g}"
    if not 1e-3 <= size < 1e5:
        return re.sub(r"e([+-])0?", r"e\1", f"{value:.1e}").replace("+", "")
    digits = 0 if size >= 100 else 1 if size >= 10 else 2
    return f"{value:.{digits}f}" if size >= 0.1 else f"{value:.2g}"


def span(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{s:02d}s" if minutes else f"{s}s"


def clean(text: str) -> str:
    """Text whose characters all have a known width; newlines stay."""
    if text.isascii() and text.isprintable():
        return text
    text = text.replace("\t", "    ")
    return "".join(c if c.isprintable() or c == "\n" else " " if c.isspace() else "" for c in text)


def nice(low: float, high: float, ticks: int) -> tuple[float, float, float]:
    """Round bounds and the step between ticks. Round bounds also keep an axis still while data grow."""
    if not high > low:
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    raw = (high - low) / max(1, ticks)
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, step


def finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


# ---- the parts of a picture ----------------------------------------------------------------------


def slots(n: int, width: int) -> tuple[int, list[range]]:
    """How n steps share `width` cells: cells a column, and the steps that each column stands for."""
    if n <= width:
        return min(max(1, width // max(1, n)), 9), [range(i, i + 1) for i in range(n)]
    return 1, [range(c * n // width, (c + 1) * n // width) for c in range(width)]


def strip(entropy: Sequence[float], T: int, width: int, height: int, look: Look, *, K: int = 0,
          sel: Sequence[int] = (), share: Sequence[float] = (), maybe: bool = False,
          t: int | None = None, tick: int = 0) -> list[Row]:
    """Entropy of each denoising step as bars, a triangle under the selected ones, a cursor at t.

    `sel`: selected steps of one sample. `share`: instead, for each step, the share of the samples that
    selected it. `maybe`: the selection is provisional. `tick`: steps between labels.
    """
    gutter = 6 if width > 30 else 0
    high = nice(0, max(finite(entropy), default=1) or 1, 2)[1]
    pitch, columns = slots(max(1, T), width - gutter)
    wide = pitch - (pitch > 2)  # wide bars get a gap
    values = []
    for steps in columns:
        seen = [entropy[i] for i in steps if i < len(entropy)]
        values.append(max(finite(seen), default=math.nan) if seen else None)
    bars = max(1, height - 2)
    rows = []
    for r in range(bars):
        label = num(high) if r == 0 else "0" if r == bars - 1 else ""
        row = [(f"{label:>{gutter - 2}}  ", look.dim)] if gutter else []
        for value, steps in zip(values, columns):
            ground = f" on {look.line}" if t in steps else ""
            if value is None:
                row.append(((look.glyph("dot") if r == bars - 1 else " ") * wide, look.line + ground))
            elif math.isnan(value):
                row.append(((look.glyph("bad") if r == bars - 1 else " ") * wide, look.orange + ground))
            else:
                level = round(value / high * bars * 8) - 8 * (bars - 1 - r)
                level = max(level, int(r == bars - 1), 0)
                row.append((look.eighths[min(8, level)] * wide, look.heat(value / high, 0.12) + ground))
            row.append((" " * (pitch - wide), ""))
        rows.append(row)
    row = [(f"{f'K={K}' if K else '':<{gutter}}", look.mark)] if gutter else []
    for steps in columns:
        part = max((share[i] for i in steps if i < len(share)), default=float(any(i in sel for i in steps)))
        glyph = look.glyph("maybe" if maybe else "sel") if part > 0 else " "
        colour = mix(look.bg, look.mark, 0.25 + 0.75 * part)
        row.append((glyph + " " * (pitch - 1) if pitch < 3 else f"{glyph:^{wide}} ", colour))
    rows.append(row)
    axis = [" "] * (gutter + pitch * len(columns) + 6)
    for c, steps in enumerate(columns):
        first, last = c == 0, steps[-1] == T - 1
        if first or last or (tick and any(i % tick == 0 for i in steps)):
            label = str(T - 1 if last else 0 if first else next(i for i in steps if i % tick == 0))
            x = gutter + c * pitch + (max(0, (wide - len(label)) // 2) if pitch > 2 else 0)
            if all(ch == " " for ch in axis[max(0, x - 1) : x + len(label) + 1]):
                axis[x : x + len(label)] = label
    row = [("".join(axis), look.dim)]
    if t is not None and 0 <= t < T:
        c = next(c for c, steps in enumerate(columns) if t in steps)
        x = gutter + c * pitch + (max(0, (wide - len(str(t))) // 2) if pitch > 2 else 0)
        text = "".join(axis)
        row = [(text[: max(0, x - 1)] + " " * min(1, x), look.dim), (str(t), f"bold {look.fg}"),
               (" " + text[x + len(str(t)) + 1 :], look.dim)]
    rows.append(row)
    return block(rows[:bars] + rows[bars : bars + 1 + (height > 2)], width, height)


def spark(values: Sequence[float], width: int, look: Look, colour: str) -> Row:
    """The last iterations as a row of small bars; what is not a number stays visible."""
    if width < 1 or not values:
        return [(" " * max(0, width), "")]
    values = values[-4 * width :]
    pitch, columns = slots(len(values), width)
    pitch = 1
    means = [[values[i] for i in steps] for steps in columns]
    low, high = min(finite(values), default=0), max(finite(values), default=1)
    row = []
    for group in means:
        good = finite(group)
        if len(good) < len(group):
            row.append((look.glyph("bad"), look.orange))
        else:
            x = (sum(good) / len(good) - low) / (high - low) if high > low else 0.3
            row.append((look.eighths[1 + round(7 * x)] * pitch, colour))
    return fit(row, width)


@dataclass
class Curve:
    """A line of a chart. A faint curve is the unsmoothed data behind another."""

    label: str
    its: Sequence[int]
    values: Sequence[float]
    colour: str
    faint: bool = False


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """Exponential mean without the bias of its start; gaps stay gaps."""
    out, mean, norm = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            mean, norm = weight * mean + (1 - weight) * value, weight * norm + 1 - weight
        out.append(mean / norm if math.isfinite(value) else math.nan)
    return out


DOTS = {"braille": (2, 4), "block": (2, 2), "ascii": (1, 1)}
BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
QUADRANT = " ▘▝▀▖▌▞▛▗▚▐▜▄▙▟█"


def chart(curves: Sequence[Curve], width: int, height: int, look: Look, *, log: bool = False,
          points: Sequence[tuple[int, float]] = (), t: int | None = None) -> list[Row]:
    """Curves over iterations, each named at its right end; `points` are marked, `t` is a cursor.

    A value that is not a number is marked on the bottom row, where it cannot be missed.
    """
    def scale(value: float) -> float:
        return value if not log else math.log10(value) if value > 0 else math.nan

    curves = [replace(c, values=[scale(v) for v in c.values]) for c in curves if len(c.its)]
    points = [(it, scale(value)) for it, value in points]
    shown = finite([v for c in curves for v in c.values] + [v for _, v in points])
    if not curves or width < 4 or height < 2:
        return block([[("no data yet", look.dim)]], width, height)
    names = [c for c in curves if c.label and not c.faint]
    gutter = 7 if width >= 30 else 0
    margin = min(14, max((cell_len(c.label) for c in names), default=-1) + 1) if width >= 44 else 0
    w, h = max(1, width - gutter - margin), height - 1
    low, high, step = nice(min(shown, default=0), max(shown, default=1), max(1, min(5, h // 2)))
    first = min([c.its[0] for c in curves] + [it for it, _ in points])
    last = max([c.its[-1] for c in curves] + [it for it, _ in points])
    dx, dy = DOTS[look.glyphs]

    def column(it: int) -> int:
        return round((it - first) / max(1, last - first) * (w * dx - 1))

    def line(value: float) -> int:
        return round((high - value) / (high - low) * (h * dy - 1))

    cells: dict[tuple[int, int], list] = {}

    def dot(x: int, y: int, colour: str) -> None:
        cell = cells.setdefault((x // dx, y // dy), [0, colour])
        bit = BRAILLE[y % 4][x % 2] if dy == 4 else 1 << (y % 2 * 2 + x % 2)
        cell[:] = [cell[0] | bit, colour]

    grid = [[(" ", "")] * w for _ in range(h)]
    for curve in curves:
        colour = mix(look.bg, curve.colour, 0.35) if curve.faint else curve.colour
        heights: dict[int, list[float]] = {}
        for it, value in zip(curve.its, curve.values):
            if math.isfinite(value):
                heights.setdefault(column(it), []).append(value)
                if curve.faint:
                    dot(column(it), line(value), colour)
            elif not curve.faint and not log:
                grid[h - 1][column(it) // dx] = (look.glyph("bad"), f"bold {look.orange}")
        before = None
        for x in sorted(heights if not curve.faint else ()):
            y = line(sum(heights[x]) / len(heights[x]))
            x0, y0 = before or (x, y)
            for step_x in range(x0, x + 1):  # join the points, upright where it is steep
                a = y0 + (y - y0) * (step_x - x0) / max(1, x - x0)
                b = y0 + (y - y0) * min(step_x + 1 - x0, x - x0) / max(1, x - x0)
                for step_y in range(round(min(a, b)), round(max(a, b)) + 1):
                    dot(step_x, step_y, colour)
            before = x, y
    for (x, y), (bits, colour) in cells.items():
        glyph = chr(0x2800 + bits) if dy == 4 else QUADRANT[bits] if dy == 2 else "*"
        if grid[y][x][0] == " ":
            grid[y][x] = (glyph, colour)
    for it, value in points:
        if math.isfinite(value):
            grid[line(value) // dy][column(it) // dx] = (look.glyph("eval"), f"bold {look.mark}")
    if t is not None and first <= t <= last:
        x = column(t) // dx
        for y in range(h):
            grid[y][x] = (grid[y][x][0], (grid[y][x][1] or look.dim) + f" on {look.line}")
    ticks = {line(low + i * step) // dy: low + i * step for i in range(round((high - low) / step), -1, -1)}
    labels = place([(line(finite(c.values)[-1]) // dy, c) for c in names if finite(c.values)], h)
    rows = []
    for y in range(h):
        value = ticks.get(y)
        text = "" if value is None else num(10 ** value if log else 0.0 if abs(value) < step / 1e6 else value)
        axis = [(f"{text:>{gutter - 1}}" + look.glyph("edge" if text else "rail"), look.dim)] if gutter else []
        name = [(" " + labels[y].label, labels[y].colour)] if margin and y in labels else []
        rows.append(fit(axis + grid[y] + name, width))
    start, stop = str(first), str(last)
    marks = [start] + [str(first + (last - first) * i // 4) for i in (1, 2, 3)] + [stop]
    axis = [" "] * width
    for text in [start, stop] + marks[1:-1] if last > first else [start]:
        x = gutter + min(w - len(text), max(0, column(int(text)) // dx - (len(text) // 2 if text != start else 0)))
        if x >= 0 and all(ch == " " for ch in axis[max(0, x - 2) : x + len(text) + 2]):
            axis[x : x + len(text)] = text
    return block(rows + [[("".join(axis), look.dim)]], width, height)


def place(wanted: list[tuple[int, Curve]], height: int) -> dict[int, Curve]:
    """A row for each label: the wanted one, or the nearest that is free."""
    rows: dict[int, Curve] = {}
    for y, curve in sorted(wanted, key=lambda pair: pair[0]):
        free = [row for row in range(height) if row not in rows]
        if free:
            rows[min(free, key=lambda row: (abs(row - y), row))] = curve
    return rows


def carpet(data: Sequence[Sequence[float]], its: Sequence[int], width: int, height: int, look: Look, *,
           high: float, it: int | None = None, gutter: int = 7, tick: int = 0) -> list[Row]:
    """Rows of values as colours, iterations down and denoising steps across: two of them a cell row."""
    h, T = max(1, height - 1), max((len(row) for row in data), default=0)
    if not T or width < gutter + 2:
        return block([[("no data yet", look.dim)]], width, height)
    pitch, columns = slots(T, width - gutter)
    half = 1 if look.glyphs == "ascii" else 2
    total = min(h * half, len(data) * 4 * half)
    bins = [range(r * len(data) // total, max(r * len(data) // total + 1, (r + 1) * len(data) // total))
            for r in range(total)]

    def level(group: range, steps: range) -> float:
        values = finite(data[r][i] for r in group for i in steps if i < len(data[r]))
        return sum(values) / len(values) / high if values and high else math.nan

    shares = [[level(group, steps) for steps in columns] for group in bins]
    rows = []
    for y in range(0, total, half):
        here = it is not None and any(it == its[r] for group in bins[y : y + half] for r in group)
        label = (look.glyph("here") if here else " ") + f"{its[bins[y][0]]:>{gutter - 3}}  "
        row = [(label, f"bold {look.fg}" if here else look.dim)] if gutter else []
        under = shares[y + 1] if half == 2 and y + 1 < total else [math.nan] * len(columns)
        for top, bottom in zip(shares[y], under):
            if half == 1:
                text, style = (" .:-=+*#%@"[min(9, int(9 * max(0, top)))] if top == top else look.glyph("bad"), look.ink(top))
            elif math.isnan(top) and math.isnan(bottom):
                text, style = " ", ""
            else:
                ground = f" on {look.heat(bottom)}" if bottom == bottom else ""
                text, style = "▀", (look.heat(top) if top == top else look.bg) + ground
            row.append((text * pitch, style))
        rows.append(row)
    axis = [" "] * (width + 6)
    for c, steps in enumerate(columns):
        if c == 0 or (tick and any(i % tick == 0 for i in steps)):
            label = str(0 if c == 0 else next(i for i in steps if i % tick == 0))
            x = gutter + c * pitch
            if all(ch == " " for ch in axis[max(0, x - 1) : x + len(label)]):
                axis[x : x + len(label)] = label
    return block(rows + [[("".join(axis), look.dim)]], width, height)


def token_style(sample: Sample, i: int, t: int, look: Look, colour: str) -> str:
    """How position i looks after step t, given that it is revealed."""
    if sample.rev[i] == t and (t < sample.T - 1 or sample.live):
        return f"bold {look.bg} on {look.mark}"
    if colour == "none":
        return look.fg
    share = sample.rev[i] / max(1, sample.T - 1) if colour == "step" else sample.tent[i] / 125
    return look.ink(share)


def prose(sample: Sample, t: int, width: int, height: int, look: Look, colour: str = "step",
         guess: Sequence[str] = ()) -> list[Row]:
    """The completion after step t. What is hidden is hatched, as wide as what will appear there;
    or, with `guess`, filled with that one-step completion."""
    rows: list[Row] = [[]]
    x = focus = 0
    for i, token in enumerate(sample.at(t)):
        if token is None and sample.rev[i] >= sample.T and not sample.live:
            continue  # the row had ended: this position never was decoded
        if token is not None:
            body, style = clean(token), token_style(sample, i, t, look, colour)
        elif i < len(guess):
            body, style = clean(str(guess[i])), f"italic {look.sky} on {look.veil}"
        else:
            body = re.sub(r"[^\n]", "░", clean(sample.tok[i])) or "░░"
            body, style = body.replace("░", look.glyph("mask")), f"{look.mask} on {look.veil}"
        for k, piece in enumerate(body.split("\n")):
            if k:
                rows.append([])
                x = 0
            if x and x + cell_len(piece) > width:
                rows.append([])
                x = 0
            while cell_len(piece) > width > 1:
                head = set_cell_size(piece, width).rstrip()
                rows[-1].append((head, style))
                rows.append([])
                piece = piece[len(head) :] if head else ""
            if piece:
                rows[-1].append((piece, style))
                x += cell_len(piece)
        if token is not None and sample.rev[i] == t:
            focus = len(rows) - 1
    top = max(0, min(focus - height // 2, len(rows) - height))  # keep what is new in sight
    return block(rows[top:], width, height)


def mosaic(sample: Sample, t: int, width: int, height: int, look: Look, size: int,
           colour: str = "step") -> list[Row]:
    """Every position as a cell, a row for each decoding block: where the text is filled in."""
    gutter = 5 if width > 20 else 0
    size = max(1, min(size or 32, width - gutter))
    pitch = min(3, (width - gutter) // size)
    rows = []
    state = sample.at(t)
    for start in range(0, len(state), size):
        row = [(f"{start:>{gutter - 2}}  ", look.dim)] if gutter else []
        for i in range(start, min(start + size, len(state))):
            if state[i] is None:
                never = sample.rev[i] >= sample.T and not sample.live
                row.append(((" " if never else look.glyph("dot")) * pitch, look.mask))
            elif sample.rev[i] == t and (t < sample.T - 1 or sample.live):
                row.append((f"{look.glyph('new'):^{pitch}}", f"bold {look.mark}"))
            else:
                style = token_style(sample, i, -1, look, colour)
                row.append((look.glyph("full") * pitch, style))
        rows.append(row)
    top = max(0, min(len(rows) - height, next((i for i, r in enumerate(sample.rev) if r == t), 0) // size))
    return block(rows[top:], width, height)


# ---- the screen ----------------------------------------------------------------------------------

VIEWS = ["overview", "entropy", "trajectory", "samples", "curves", "run"]
CURATED = ["reward/mean", "reward/correct", "reward/solved", "kl", "clip_frac", "loss", "grad_norm",
           "entropy/mean", "entropy/sel", "tok_s"]
HEALTH = ["reward/mean", "kl", "clip_frac", "ratio/max", "grad_norm", "entropy/mean", "entropy/sel",
          "zero_adv_frac", "len/mean", "trunc_frac", "loss", "adv/abs", "t/total", "mem/peak_gb", "tok_s"]
SMOOTH = (0.0, 0.6, 0.8, 0.95)
COLOURS = ("step", "entropy", "none")
SORTS = ("newest", "reward", "length")


@dataclass
class View:
    """What is looked at, and how: all that keys can change."""

    view: int = 1
    it: int | None = None  # None: the newest
    s: int = 0  # sample of that iteration
    t: int | None = None  # denoising step; None: the last
    follow: bool = True
    playing: bool = False
    speed: float = 8.0  # steps a second
    colour: str = "step"
    guess: bool = False
    smooth: float = 0.8
    log: bool = False
    sort: str = "newest"
    filter: str = ""
    typing: bool = False
    zoom: bool = False
    pick: int = 0  # chart of view 5, run of a comparison, scroll of view 6
    focus: int = 0  # the run shown, of several
    help: bool = False
    note: str = ""
    look: Look = Look()


def key_at(view: View, log: Log) -> tuple[int, int] | None:
    """The sample that is looked at: (it, s)."""
    samples = log.run.samples
    if not samples:
        return None
    it = max(samples)[0] if view.it is None else view.it
    near = min({key[0] for key in samples}, key=lambda k: (abs(k - it), k)) if (it, 0) not in samples else it
    rows = sorted(s for i, s in samples if i == near)
    return near, rows[min(view.s, len(rows) - 1)]


def current(view: View, log: Log) -> Sample | None:
    """The trajectory on the screen: the rollout in progress when following, else a logged sample."""
    live = log.run.live() if view.follow and log.status()[0] in ("live", "quiet") else None
    key = key_at(view, log)
    return live or (log.sample(key) if key else None)


def step_of(view: View, sample: Sample) -> int:
    last = (len(sample.ent) if sample.live else sample.T) - 1
    return last if view.t is None or sample.live else max(0, min(view.t, last))


def block_steps(run: Run) -> int:
    """Denoising steps of one block."""
    T, C, size = run.size("T"), run.size("C"), run.size("block")
    return T * size // C if C and size else 0


def header(view: View, log: Log, width: int) -> Row:
    run, look, (state, age) = log.run, view.look, log.status()
    glyph, plain, colour = STATUS.get(state, STATUS["finished"])
    iters, done = run.size("iters"), run.done
    seconds, eta = run.latest("t/total"), run.latest("eta_s")
    if state in ("live", "quiet") and eta is None and seconds and iters:
        eta = (iters - done) * seconds
    live = run.live() if state in ("live", "quiet") else None
    phase = f"{run.phase} {len(live.ent)}/{live.T}" if live else run.phase
    memory, evals = run.latest("mem/peak_gb"), list(run.evals.values())
    accuracy = evals[-1].get("accuracy", evals[-1].get("acc")) if evals else None
    parts: list[Row] = [
        [(f" {plain if look.glyphs == 'ascii' else glyph} {state}", f"bold {getattr(look, colour)}")]
        + ([(f" {span(age)} ago", look.dim)] if age >= 5 and state in ("live", "quiet") else []),
        [(clean(log.name), f"bold {look.fg}")]]
    if iters:
        n = min(18, max(0, width // 6 - 4))
        full = round(n * min(1.0, done / iters))
        parts.append([(look.glyph("done") * full, look.sky), (look.glyph("todo") * (n - full), look.line),
                      (f" {done}/{iters}", look.fg)])
    if state in ("live", "quiet"):
        parts += [[(f"ETA {span(eta)}", look.fg)]] * (eta is not None) + [[(phase, look.mark)]] * bool(phase)
    if accuracy is not None:
        parts.append([("eval ", look.dim), (f"{accuracy:.1%}", f"bold {look.fg}")])
    for value, unit in ((seconds, "s/it"), (run.latest("tok_s"), "tok/s"), (memory, "GB")):
        parts += [[(f"{num(value)} {unit}", look.dim)]] * (value is not None)
    parts.append([(clean(f"{Path(str(run.meta.get('model', ''))).name} {run.meta.get('task', '')}".strip()), look.dim)])
    row: Row = []
    for part in parts:  # what does not fit goes, from the right
        if row and sum(cell_len(text) for text, _ in row + part) + 2 > width:
            break
        row += ([("  ", "")] if row else []) + part
    return [(text, f"{style or look.fg} on {look.bar}") for text, style in fit(row, width)]


def footer(view: View, logs: Sequence[Log], width: int) -> Row:
    look = view.look
    if view.typing or view.filter:
        row = [(f" /{view.filter}", f"bold {look.fg}"), ("_" if view.typing else "  esc clears", look.dim)]
    elif view.note:
        row = [(f" {view.note}", look.orange)]
    else:
        words = [("1-6", VIEWS[view.view - 1])] if width < 90 else list(zip("123456", VIEWS))
        words += {3: [("←→", "step"), ("n", "next chosen"), ("space", "play"), ("x", "guess"), ("j/k", "sample")],
                  2: [("↑↓", "iteration"), ("←→", "step")], 4: [("j/k", "row"), ("s", "sort"), ("enter", "open")],
                  5: [("j/k", "chart"), ("enter", "zoom"), ("/", "filter"), ("s", "smooth"), ("y", "log")]}.get(
            view.view, [("←→", "step"), ("n", "next chosen"), ("space", "play"), ("j/k", "sample")])
        words += [("f", "follow on" if view.follow else "follow off"), ("?", "help"), ("q", "quit")]
        if look.glyphs == "ascii":
            words = [(key.replace("←→", "h/l").replace("↑↓", "j/k"), word) for key, word in words]
        row = []
        for key, word in words:
            here = key.isdigit() and view.view == int(key)
            part = [(f" {key} ", f"bold {look.orange}"), (word + " ", f"bold {look.fg}" if here else look.dim)]
            if sum(cell_len(text) for text, _ in row + part) <= width:
                row += part
    return [(text, f"{style or look.fg} on {look.bar}") for text, style in fit(row, width)]


def strip_panel(view: View, log: Log, sample: Sample | None, width: int, height: int) -> list[Row]:
    """Entropy per step of what is on the screen: this sample in view 3, else the batch."""
    run, look = log.run, view.look
    T, K, tick = run.size("T"), run.size("K"), block_steps(run)
    if sample and sample.live:
        top = sorted(range(len(sample.ent)), key=lambda i: -sample.ent[i])[:K]
        title, right = f"entropy per denoising step {look.glyph('sep')} rollout {sample.it}, live", "top-K so far"
        args = dict(sel=top, maybe=True, t=len(sample.ent) - 1)
        entropy = sample.ent
    elif sample and (view.view == 3 or view.t is not None):
        title = f"entropy per denoising step {look.glyph('sep')} iteration {sample.it}, sample {sample.s}"
        right, entropy, K = f"{look.glyph('sel')} gets the gradient", sample.ent, len(sample.sel)
        args = dict(sel=sample.sel, t=step_of(view, sample))
    elif run.entropy:
        it = max(run.entropy) if view.it is None else min(run.entropy, key=lambda k: abs(k - view.it))
        n = run.rows.get(it) or max(run.chosen[it], default=1) or 1
        title = f"entropy per denoising step {look.glyph('sep')} iteration {it}, mean of {n}"
        entropy, right = run.entropy[it], f"{look.glyph('sel')} chosen, bright = by many"
        args = dict(share=[count / n for count in run.chosen[it]])
    else:
        return panel("entropy per denoising step", lambda w, h: [[("waiting for the first rollout", look.dim)]],
                     width, height, look)
    T = T or len(entropy)

    def draw(w: int, h: int) -> list[Row]:
        pitch = slots(T, w - 6)[0]
        free = w - 6 - pitch * min(T, w - 6)
        if free < 26:
            return strip(entropy, T, w, h, look, K=K, tick=tick, **args)
        chosen = [entropy[i] for i in args.get("sel", ()) if i < len(entropy)]
        if "share" in args:
            chosen = [value * part for value, part in zip(entropy, args["share"])]
        total = sum(finite(entropy))
        facts = [("mean", num(total / max(1, len(finite(entropy)))) + " nats"),
                 ("K of T", f"{K} of {T}"),
                 ("entropy kept", f"{sum(finite(chosen)) / total:.0%}" if total else "-")]
        if sample and sample.live:
            facts.append(("revealed", f"{sum(map(bool, sample.tok))} of {len(sample.tok)}"))
        side = [[(f"{name:>14}  ", look.dim), (value, f"bold {look.fg}")] for name, value in facts]
        return beside(strip(entropy, T, w - 26, h, look, K=K, tick=tick, **args), block([[]] * (h > 5) + side, 26, h))

    return panel(title, draw, width, height, look, right=right)


def metric_curves(logs: Sequence[Log], name: str, view: View) -> list[Curve]:
    """One metric of one run, or of each of several under its name."""
    look = view.look
    colours = (look.sky, look.orange, look.teal, look.dim, look.fg, look.mark)
    curves = []
    for i, log in enumerate(logs):
        series = log.run.series.get(name)
        if series and series.its:
            soft = smooth(series.values, view.smooth) if view.smooth else series.values
            if view.smooth and len(logs) == 1:
                curves.append(Curve("", series.its, series.values, look.sky, faint=True))
            curves.append(Curve(log.name if len(logs) > 1 else "", series.its, soft, colours[i % 6]))
    return curves


def reward_panel(view: View, logs: Sequence[Log], width: int, height: int) -> list[Row]:
    look, run = view.look, logs[0].run
    names = ["reward/mean"] + [name for name in run.series if name.startswith("reward/")
                               and name not in ("reward/mean", "reward/std")][:2]
    if len(logs) > 1:
        curves, points, right = metric_curves(logs, "reward/mean", view), [], f"{len(logs)} runs"
    else:
        curves = []
        for name, colour in reversed(list(zip(names, (look.sky, look.orange, look.dim)))):
            for curve in metric_curves(logs, name, view):
                label = "" if curve.faint else name.removeprefix("reward/")
                if not curve.faint or name == "reward/mean":
                    curves.append(replace(curve, colour=colour, label=label))
        points = [(it, e.get("accuracy", e.get("acc", math.nan))) for it, e in run.evals.items()]
        value, soft = run.latest("reward/mean"), finite(curves[-1].values if curves else [])
        trend = soft[-1] - soft[max(0, len(soft) - 11)] if soft else 0
        right = "" if value is None else f"mean {num(soft[-1] if soft else value)} {'+' if trend >= 0 else ''}{num(trend)} in 10"
        if points:
            right += f" {look.glyph('sep')} {look.glyph('eval')} eval {num(points[-1][1])}"
    return panel("reward", lambda w, h: chart(curves, w, h, look, points=points, log=view.log), width, height, look, right)


def health_panel(view: View, log: Log, width: int, height: int) -> list[Row]:
    run, look = log.run, view.look
    names = [name for name in HEALTH if name in run.series]
    names += [name for name in run.series if name not in HEALTH and not name.startswith(("reward/", "t/", "eta"))]
    times = "  ".join(f"{name.removeprefix('t/')} {num(run.latest(name))}" for name in run.series
                      if name.startswith("t/") and name != "t/total")

    def draw(w: int, h: int) -> list[Row]:
        rows = []
        for name in names[: h - bool(run.alerts)]:
            values = run.series[name].values
            bad = not math.isfinite(values[-1])
            rows.append([(f"{name[:13]:<13} ", look.dim), (f"{num(values[-1]):>7}  ", f"bold {look.orange if bad else look.fg}")]
                        + spark(values, max(0, w - 23), look, look.sky))
        if run.alerts:
            it, _, message = run.alerts[-1]
            rows.append([(f"! it {it} {clean(message)}", look.orange)])
        return rows or [[("waiting for the first update", look.dim)]]

    return panel("health", draw, width, height, look, foot=f"seconds: {times}" if times else "")


def caption(view: View, sample: Sample, look: Look) -> Row:
    t = step_of(view, sample)
    sep = look.glyph("sep")
    row = [(f"it {sample.it} {sep} prompt {sample.p} {sep} sample {sample.s}", f"bold {look.fg}")]
    if sample.reward is not None:
        sign = "" if sample.correct is None else look.glyph("yes" if sample.correct else "no") + " "
        row.append((f"   {sign}reward {num(sample.reward)}", look.teal if sample.correct else look.orange))
    shown = sum(token is not None for token in sample.at(t)) if not sample.live else sum(map(bool, sample.tok))
    entropy = sample.ent[t] if t < len(sample.ent) else math.nan
    total = sample.decoded if not sample.live else len(sample.tok)
    return row + [(f"   step {t}/{sample.T - 1}   {shown}/{total} tokens   H {num(entropy)}", look.dim)]


def chosen_row(view: View, sample: Sample, look: Look) -> Row:
    """What training made of the step under the cursor, if it was selected."""
    t = step_of(view, sample)
    if t not in sample.sel:
        return []
    k = sample.sel.index(t)
    facts = [(name, values[k]) for name, values in (("advantage", sample.adv), ("one-step reward", sample.srw),
                                                     ("ratio", sample.ratio)) if k < len(values)]
    row = [(f"{look.glyph('sel')} chosen", f"bold {look.mark}")]
    for name, value in facts:
        sign = "+" if name == "advantage" and number(value) > 0 else ""
        row += [(f"   {name} ", look.dim), (sign + num(number(value)), f"bold {look.fg}")]
    if k < len(sample.x0):
        row.append(("   x hides the guess" if view.guess else "   x shows the guess", look.dim))
    return row


def sample_panel(view: View, sample: Sample | None, width: int, height: int, title: str = "denoising") -> list[Row]:
    look = view.look
    if sample is None:
        return panel(title, lambda w, h: [[("no sample logged yet", look.dim)]], width, height, look)
    t = step_of(view, sample)
    k = sample.sel.index(t) if t in sample.sel else -1
    guess = sample.x0[k] if view.guess and 0 <= k < len(sample.x0) else ()

    def draw(w: int, h: int) -> list[Row]:
        question = clean(sample.prompt).replace("\n", " ")
        lines = [question[i : i + w - 3] for i in range(0, len(question), max(1, w - 3))][: max(0, min(2, h - 3))]
        head = [caption(view, sample, look)] + [[("Q: " if i == 0 else "   ", look.dim), (line, f"italic {look.dim}")]
                                                for i, line in enumerate(lines)]
        if h > 6:
            head.append(chosen_row(view, sample, look))
        return head + prose(sample, t, w, max(1, h - len(head)), look, view.colour, guess)

    return panel("denoising now" if sample.live else title, draw, width, height, look, right=f"colour: {view.colour}")


def mosaic_panel(view: View, sample: Sample | None, run: Run, width: int, height: int) -> list[Row]:
    def draw(w: int, h: int) -> list[Row]:
        return mosaic(sample, step_of(view, sample), w, h, view.look, run.size("block"), view.colour) if sample else []
    return panel("positions", draw, width, height, view.look)


def overview(view: View, logs: Sequence[Log], width: int, height: int) -> list[Row]:
    log, sample = logs[view.focus], current(view, logs[view.focus])
    if len(logs) > 1:
        return comparison(view, logs, width, height)
    if width < 60 or height < 14:
        return facts(view, log, width, height)
    top = max(6, min(12, height // 4 if height > 30 else 7))
    left = width * 5 // 8
    if height < 28:
        return strip_panel(view, log, sample, width, top) + beside(
            reward_panel(view, logs, left, height - top), health_panel(view, log, width - left, height - top))
    bottom = (height - top) * 11 // 24
    middle = height - top - bottom
    wide = min(max(26, 9 + (log.run.size("block") or 32)), width // 2)
    return strip_panel(view, log, sample, width, top) + beside(
        reward_panel(view, logs, left, middle), health_panel(view, log, width - left, middle)) + beside(
        mosaic_panel(view, sample, log.run, wide, bottom), sample_panel(view, sample, width - wide, bottom))


def facts(view: View, log: Log, width: int, height: int) -> list[Row]:
    """The overview of a small window: one line per fact."""
    run, look = log.run, view.look
    it = max(run.entropy, default=None)
    rows = [[("entropy ", look.dim)] + spark(run.entropy[it], width - 8, look, look.teal)] if it is not None else []
    for name in ["reward/mean"] + [name for name in HEALTH[1:] if name in run.series]:
        if name in run.series:
            rows.append([(f"{name[:13]:<13} ", look.dim), (f"{num(run.latest(name)):>7} ", f"bold {look.fg}")]
                        + spark(run.series[name].values, max(0, width - 22), look, look.sky))
    if run.alerts:
        rows.insert(1, [(f"! it {run.alerts[-1][0]} {clean(run.alerts[-1][2])}", look.orange)])
    return block(rows or [[("waiting for events", look.dim)]], width, height)


def entropy_view(view: View, logs: Sequence[Log], width: int, height: int) -> list[Row]:
    """Every iteration's entropies as one row of colour; beside it, who was selected."""
    log, look = logs[view.focus], view.look
    run, tick = log.run, block_steps(log.run)
    its = sorted(run.entropy)
    data = [run.entropy[it] for it in its]
    high = max((max(finite(row), default=0) for row in data), default=1) or 1
    it = max(its, default=None) if view.it is None else view.it
    below = 0 if height < 20 else min(11, height // 4)
    left = width * 5 // 8 if width >= 100 else width
    panels = [panel(f"entropy {look.glyph('sep')} iteration down, denoising step across",
                    lambda w, h: carpet(data, its, w, h, look, high=high, it=it, tick=tick),
                    left, height - below, look, right=f"0 to {num(high)} nats")]
    if left < width:
        share = [[count / (run.rows.get(i) or 1) for count in run.chosen[i]] for i in its]
        panels.append(panel("selected steps", lambda w, h: carpet(
            share, its, w, h, look, high=1, gutter=0, tick=tick), width - left, height - below, look,
            right="share of samples"))
    rows = beside(*panels)
    return rows + (strip_panel(replace(view, t=None), log, None, width, below) if below else [])


def trajectory_view(view: View, logs: Sequence[Log], width: int, height: int) -> list[Row]:
    log = logs[view.focus]
    sample = current(view, log)
    top = max(5, min(10, height // 4)) if height >= 14 else 0
    rows = strip_panel(view, log, sample, width, top) if top else []
    wide = min(9 + (log.run.size("block") or 32), width // 3) if width >= 80 else 0
    parts = [mosaic_panel(view, sample, log.run, wide, height - top)] if wide else []
    return rows + beside(*parts, sample_panel(view, sample, width - wide, height - top))


def samples_view(view: View, logs: Sequence[Log], width: int, height: int) -> list[Row]:
    """A table of the logged samples, and the group of the one under the cursor side by side."""
    log, look = logs[view.focus], view.look
    keys, here = sample_keys(view, log), key_at(view, log)
    below = height * 2 // 5 if height >= 16 else 0

    def table(w: int, h: int) -> list[Row]:
        at = keys.index(here) if here in keys else 0
        top = max(0, min(at - (h - 1) // 2, len(keys) - h + 1))
        rows = [[(f"  {'it':>5} {'prompt':>6} {'g':>3}    {'reward':>6} {'adv':>6} {'len':>4}  parts and text", look.dim)]]
        for key in keys[top : top + h - 1]:
            sample = log.sample(key)
            if sample is None:
                continue
            mark = "" if sample.correct is None else look.glyph("yes" if sample.correct else "no")
            adv = finite(map(number, sample.adv))
            parts = " ".join(f"{name} {num(number(value))}" for name, value in sample.rw.items())
            words = " ".join(clean("".join(sample.tok)).split())
            style = f"bold {look.fg}" if key == here else look.dim
            rows.append([(look.glyph("here") + " " if key == here else "  ", look.sky), (f"{sample.it:>5} {sample.p:>6} {sample.g:>3} ", style),
                         (f"{mark:>2} {num(sample.reward):>6}", look.teal if sample.correct else look.orange),
                         (f" {num(sum(adv) / len(adv)) if adv else '-':>6} {sample.decoded:>4}  ", style), (f"{parts}  ", look.dim), (words, style)])
        return rows if keys else [[("no sample logged yet", look.dim)]]

    rows = panel("samples", table, width, height - below, look, right=f"{len(keys)} by {view.sort}")
    sample = log.sample(here) if here else None
    if not below or sample is None:
        return rows + block([], width, below)
    group = [log.sample(key) for key in sorted(log.run.samples) if key[0] == sample.it]
    group = [other for other in group if other and other.p == sample.p]
    shown = group[max(0, group.index(sample) - 3) :][: max(1, min(4, width // 30))]

    def member(other: Sample, w: int) -> list[Row]:
        sign = "" if other.correct is None else look.glyph("yes" if other.correct else "no") + " "
        return panel(f"{sign}sample {other.s} {look.glyph('sep')} {num(other.reward)}", lambda w, h: prose(
            other, other.T, w, h, look, view.colour), w, below, look, hot=other is sample)

    each = width // len(shown)
    sizes = [each] * (len(shown) - 1) + [width - each * (len(shown) - 1)]
    return rows + beside(*[member(other, w) for other, w in zip(shown, sizes)])


def sample_keys(view: View, log: Log) -> list[tuple[int, int]]:
    """The newest 2000 samples that pass the filter, in the chosen order."""
    keys = sorted(log.run.samples, reverse=True)[:2000]
    if view.filter and view.view == 4:
        keys = [key for key in keys if view.filter.lower() in log.brief(key)[2].lower()]
    if view.sort != "newest":
        keys.sort(key=lambda key: -log.brief(key)[view.sort == "length"])
    return keys


def metric_names(view: View, logs: Sequence[Log]) -> list[str]:
    """What view 5 shows: the curated metrics first, or those that match the filter."""
    names = list(dict.fromkeys(name for log in logs for name in log.run.series))
    if view.filter:
        return [name for name in names if view.filter.lower() in name.lower()]
    return [name for name in CURATED if name in names] + [name for name in names if name not in CURATED]


def curves_view(view: View, logs: Sequence[Log], width: int, height: int) -> list[Row]:
    look, names = view.look, metric_names(view, logs)
    if not names:
        text = f"no metric matches {view.filter!r}" if view.filter else "waiting for the first update"
        return panel("curves", lambda w, h: [[(text, look.dim)]], width, height, look)
    pick = min(view.pick, len(names) - 1)

    def one(name: str, w: int, h: int, hot: bool) -> list[Row]:
        curves = metric_curves(logs, name, view)
        right, t = num(logs[view.focus].run.latest(name)), None
        if view.zoom and curves and len(curves[-1].its):
            t = curves[-1].its[-1] if view.it is None else view.it
            right = "   ".join(f"{c.label or name} at {t}: {num(c.values[min(bisect_left(c.its, t), len(c.its) - 1)])}"
                               for c in curves if not c.faint)
        return panel(name, lambda w, h: chart(curves, w, h, look, log=view.log, t=t), w, h, look, right, hot=hot)

    if view.zoom:
        return one(names[pick], width, height, True)
    across, down = max(1, min(3, width // 38)), max(1, min(3, height // 7))
    page = pick // (across * down) * across * down
    rows: list[Row] = []
    for r in range(down):
        h = height * (r + 1) // down - height * r // down
        line = names[page + r * across : page + (r + 1) * across]
        cells = [one(name, width * (c + 1) // across - width * c // across, h, name == names[pick]) for c, name in enumerate(line)]
        rows += block(beside(*cells) if cells else [], width, h)
    return rows


def run_view(view: View, logs: Sequence[Log], width: int, height: int) -> list[Row]:
    log, look = logs[view.focus], view.look
    run, meta = log.run, log.run.meta
    state, age = log.status()
    pairs = {"state": f"{state}, last event {span(age)} ago", "log": str(log.path), "model": meta.get("model"),
             "task": meta.get("task"), "machine": f"{meta.get('host')} pid {meta.get('pid')}", "git": meta.get("git"),
             "command": " ".join(map(str, meta.get("argv") or [])), "updates": f"{run.done} of {run.size('iters')}",
             "sizes": "  ".join(f"{name} {run.size(name)}" for name in ("T", "K", "C", "block", "N", "G")),
             "checkpoint": run.ckpt.get("path"), "ended": (run.end or {}).get("err") or (run.end or {}).get("status"),
             "events": f"{run.lines} lines, {run.bad} unreadable, {len(run.samples)} samples"}
    for it, e in list(run.evals.items())[-3:]:
        interval = f" ({e['lo']:.1%} to {e['hi']:.1%})" if "lo" in e and "hi" in e else ""
        pairs[f"eval at {it}"] = f"{e.get('accuracy', e.get('acc', math.nan)):.1%}{interval} of {e['n']} {e['split']}"
    left = [[(f"{name:<11} ", look.dim), (clean(str(value)), look.fg)] for name, value in pairs.items() if value]
    times = {name[2:]: run.latest(name) for name in run.series if name.startswith("t/") and name != "t/total"}
    for name, value in times.items():
        share = value / (sum(finite(times.values())) or 1) if math.isfinite(value) else 0
        left.append([(f"{name:<11} ", look.dim), (f"{num(value):>6} s ", look.fg), (look.glyph("full") * round(20 * share), look.sky)])
    cfg = [[(f"{name:<14} ", look.dim), (clean(str(value)), look.fg)] for name, value in (meta.get("cfg") or {}).items()]
    news = [[(f"it {it:>4} {level:<5} ", look.dim), (clean(message), look.orange)] for it, level, message in reversed(run.alerts)]
    tail = [[(clean(line.decode(errors="replace")), look.dim)] for line in reversed(run.recent)]
    scroll = view.pick
    below = height * 2 // 5
    wide = width * 5 // 8 if width >= 80 else width
    top = [panel("run", lambda w, h: left[scroll if wide == width else 0 :], wide, height - below, look)]
    if wide < width:
        top.append(panel("config", lambda w, h: cfg[scroll:], width - wide, height - below, look))
    return beside(*top) + panel(f"alerts ({len(run.alerts)}) and last events", lambda w, h: news[: h // 2] + tail, width, below, look)


def comparison(view: View, logs: Sequence[Log], width: int, height: int) -> list[Row]:
    """Several runs over one another: how an ablation is watched."""
    look = view.look
    colours = (look.sky, look.orange, look.teal, look.dim, look.fg, look.mark)
    table = min(len(logs) + 2, max(3, height // 3))

    def rows(w: int, h: int) -> list[Row]:
        out = []
        for i, log in enumerate(logs[max(0, view.focus - h + 1) :][:h]):
            run, state = log.run, log.status()[0]
            evals = list(run.evals.values())
            accuracy = evals[-1].get("accuracy", math.nan) if evals else math.nan
            out.append([(look.glyph("here") + " " if log is logs[view.focus] else "  ", look.fg), (look.glyph("full") * 2 + " ", colours[i % 6]),
                        (f"{log.name[:28]:<28} ", look.fg), (f"{state:<9} {run.done:>5}/{run.size('iters'):<5} ", look.dim),
                        (f"reward {num(run.latest('reward/mean')):>6}  eval {accuracy:6.1%}", look.fg)])
        return out

    def over(name: str, w: int, h: int) -> list[Row]:
        curves = metric_curves(logs, name, view)
        if name == "eval":
            curves = [Curve(log.name, list(log.run.evals), [e.get("accuracy", math.nan) for e in log.run.evals.values()], colours[i % 6])
                      for i, log in enumerate(logs) if log.run.evals]
        return panel(name, lambda w, h: chart(curves, w, h, look, log=view.log), w, h, look)

    rest = height - table
    out = panel("runs", rows, width, table, look)
    if width < 100 or rest < 16:
        names = ["reward/mean", "entropy/mean"][: 1 + (rest >= 12)]
        return out + sum((over(name, width, rest // len(names)) for name in names), [])
    for names, h in ((("reward/mean", "eval"), rest - rest // 2), (("entropy/mean", "entropy/sel"), rest // 2)):
        out += beside(over(names[0], width - width // 2, h), over(names[1], width // 2, h))
    return out


KEYS = [
    ("1-6, tab", "views: overview, entropy, trajectory, samples, curves, run"),
    ("left right, h l", "denoising step, or the cursor of a zoomed chart; with shift or H L ten at a time"),
    ("home end, 0 $", "first and last step"),
    ("n N", "next and previous selected step; in views 2, 5 and 6 the next and previous alert"),
    ("space, < >", "play the denoising, slower, faster"),
    ("up down, k j", "sample; iteration in view 2; row, chart or run elsewhere"),
    ("PgUp PgDn, K J", "iteration"),
    ("g G", "first iteration; newest, and follow"),
    ("f", "follow the newest on or off; moving by hand turns it off"),
    ("c", "colour of tokens: step, entropy, none"),
    ("x", "at a selected step: the one-step completion that its reward was read from"),
    ("s", "smoothing 0, .6, .8, .95; in view 4 the order of the table"),
    ("y", "logarithmic axis"),
    ("/, esc", "filter metrics or samples; clear, back"),
    ("enter", "zoom a chart; open a sample"),
    ("p, a, t", "palette; characters: braille, block, ascii; dark or light"),
    ("e", "save this screen beside the log as svg and text"),
    ("?, q, ctrl+c", "this help; quit (the trainer is never touched)"),
]


def helper(view: View, width: int, height: int) -> list[Row]:
    look = view.look
    wide = 17 if width >= 60 else 10
    rows = [[(f"{keys:<{wide}} ", f"bold {look.orange}"), (words, look.fg)] for keys, words in KEYS]
    return panel("keys", lambda w, h: rows[view.pick :], width, height, look)


DRAW = (overview, entropy_view, trajectory_view, samples_view, curves_view, run_view)


def frame(view: View, logs: Sequence[Log], width: int, height: int) -> list[Row]:
    """The whole screen: exactly `height` rows of `width` cells."""
    if width < 20 or height < 5:
        return block([[("needs 20x5", "")]], width, height)
    log = logs[view.focus]
    draw = DRAW[view.view - 1]
    body = helper(view, width, height - 2) if view.help else draw(view, logs, width, height - 2)
    return [header(view, log, width), *block(body, width, height - 2), footer(view, logs, width)]


def plain(rows: Iterable[Row]) -> str:
    return "\n".join("".join(text for text, _ in row).rstrip() for row in rows)


@lru_cache(4096)
def colours_of(style: str, look: Look) -> tuple[str, str, bool, bool]:
    """(foreground, background, bold, italic) of a style."""
    words, _, ground = style.partition("on ")
    colour = re.search(r"#\w{6}", words)
    return colour[0] if colour else look.fg, ground.strip() or look.bg, "bold" in words, "italic" in words


def svg(rows: Sequence[Row], look: Look) -> str:
    """A screen as a picture. Bars, dots and boxes are drawn as shapes, so no font can misplace them."""
    W, H, size = 9, 18, 15
    shapes, words = [], []

    def rect(x: float, y: float, w: float, h: float, colour: str) -> None:
        shapes.append(f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{colour}"/>')

    for r, row in enumerate(rows):
        x, y = 0, r * H
        for text, style in row:
            fg, bg, bold, italic = colours_of(style, look)
            if bg != look.bg:
                rect(x, y, cell_len(text) * W, H, bg)
            run = ""  # what is left to the font, as one string
            for k, c in enumerate(text):
                cx, code = x + cell_len(text[:k]) * W, ord(c)
                drawn = True
                if 0x2581 <= code <= 0x2588:
                    rect(cx, y + H * (0x2588 - code) / 8, W, H * (code - 0x2580) / 8, fg)
                elif c == "▀":
                    rect(cx, y, W, H / 2, fg)
                elif c == "░":
                    shapes += [f'<circle cx="{cx + W * (2 * i + 1 + j % 2) / 4:g}" cy="{y + 3 + 4 * j:g}" r="0.9" fill="{fg}"/>'
                               for i in range(2) for j in range(4)]
                elif 0x2800 <= code <= 0x28FF:
                    shapes += [f'<circle cx="{cx + W * (1 + 2 * i) / 4:g}" cy="{y + H * (1 + 2 * j) / 8:g}" r="1.7" fill="{fg}"/>'
                               for j in range(4) for i in range(2) if (code - 0x2800) & BRAILLE[j][i]]
                elif c in QUADRANT[1:-1]:
                    for bit in range(4):
                        if QUADRANT.index(c) >> bit & 1:
                            rect(cx + W / 2 * (bit % 2), y + H / 2 * (bit // 2), W / 2, H / 2, fg)
                elif c in "─│╭╮╰╯┤━":
                    mx, my, stroke = cx + W / 2, y + H / 2, 3 if c == "━" else 1
                    path = {"─": f"M{cx} {my}h{W}", "━": f"M{cx} {my}h{W}", "│": f"M{mx} {y}v{H}", "┤": f"M{mx} {y}v{H}M{cx} {my}h{W / 2}",
                            "╭": f"M{mx} {y + H}v-4q0 -5 {W / 2} -5", "╮": f"M{mx} {y + H}v-4q0 -5 -{W / 2} -5",
                            "╰": f"M{mx} {y}v4q0 5 {W / 2} 5", "╯": f"M{mx} {y}v4q0 5 -{W / 2} 5"}[c]
                    shapes.append(f'<path d="{path}" stroke="{fg}" stroke-width="{stroke}" fill="none"/>')
                else:
                    drawn = False
                run += " " * cell_len(c) if drawn else c
            if run.strip():
                extra = ' font-weight="bold"' * bold + ' font-style="italic"' * italic
                words.append(f'<text x="{x}" y="{y + 13.5}" fill="{fg}" textLength="{cell_len(run) * W}"{extra}>{escape(run)}</text>')
            x += cell_len(text) * W
    width, height = x + 16, len(rows) * H + 16
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="-8 -8 {width} {height}">'
            f'<rect x="-8" y="-8" width="{width}" height="{height}" rx="8" fill="{look.bg}"/><g shape-rendering="auto">{"".join(shapes)}</g>'
            f'<g font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="{size}" xml:space="preserve">'
            f'{"".join(words)}</g></svg>\n')


# ==== app =========================================================================================


def press(view: View, key: str, logs: Sequence[Log]) -> str:
    """What a key does to the view; "quit" or "save" if it is for the app."""
    log = logs[view.focus]
    run, number_of = log.run, VIEWS.index
    view.note = ""
    if view.typing:
        if key == "escape":
            view.filter = ""
        view.typing = key not in ("escape", "enter")
        if key == "backspace":
            view.filter = view.filter[:-1]
        elif len(key) == 1 or key == "space":
            view.filter += " " if key == "space" else key
        return ""
    along = {"left": -1, "h": -1, "right": 1, "l": 1, "shift+left": -10, "H": -10, "shift+right": 10, "L": 10,
             "home": -10**9, "0": -10**9, "end": 10**9, "$": 10**9}.get(key)
    down = {"up": -1, "k": -1, "down": 1, "j": 1}.get(key)
    page = {"pageup": -1, "K": -1, "pagedown": 1, "J": 1}.get(key)
    if along and view.view in (2, 5) and (view.zoom or view.view == 2):
        iteration(view, log, along)
    elif along and view.view == 5:
        view.pick = max(0, min(view.pick + along, len(metric_names(view, logs)) - 1))
    elif along:
        step(view, log, along)
    elif down and (view.help or view.view == 6):
        view.pick = max(0, view.pick + down)
    elif down and view.view == 5:
        across = 3
        view.pick = max(0, min(view.pick + down * across, len(metric_names(view, logs)) - 1))
    elif down and view.view == 2:
        iteration(view, log, down)
    elif down and view.view == 1 and len(logs) > 1:
        view.focus = max(0, min(view.focus + down, len(logs) - 1))
    elif down:
        move_sample(view, log, down)
    elif page:
        iteration(view, log, page)
    elif key in "123456":
        view.view, view.zoom, view.help, view.pick = int(key), False, False, 0
    elif key in ("tab", "shift+tab"):
        view.view = (view.view - 1 + (1 if key == "tab" else -1)) % 6 + 1
        view.zoom = view.help = False
    elif key in "nN" and view.view in (2, 5, 6):
        its = sorted({alert[0] for alert in run.alerts})
        here = run.it if view.it is None else view.it
        ahead = [it for it in its if it > here] if key == "n" else [it for it in its if it < here][::-1]
        if ahead:
            view.it, view.follow = ahead[0], False
            view.note = next(message for it, _, message in run.alerts if it == ahead[0])
    elif key in "nN":
        sample = stop_following(view, log)
        if sample and sample.sel:
            t, chosen = step_of(view, sample), sorted(sample.sel)
            at = bisect_left(chosen, t + 1) if key == "n" else bisect_left(chosen, t) - 1
            view.t = chosen[at % len(chosen)]
    elif key == "space":
        sample = stop_following(view, log)
        view.playing = not view.playing and sample is not None
        if view.playing and step_of(view, sample) >= sample.T - 1:
            view.t = -1
    elif key in "<>":
        view.speed = max(1.0, min(64.0, view.speed * (2 if key == ">" else 0.5)))
        view.note = f"{view.speed:g} steps a second"
    elif key == "g":
        view.it, view.s, view.follow = min(run.entropy or [0]), 0, False
    elif key == "G" or key == "f" and not view.follow:
        view.it, view.t, view.follow, view.playing = None, None, True, False
    elif key == "f":
        stop_following(view, log)
    elif key == "c":
        view.colour = after(COLOURS, view.colour)
    elif key == "x":
        view.guess = not view.guess
    elif key == "s" and view.view == 4:
        view.sort = after(SORTS, view.sort)
    elif key == "s":
        view.smooth = after(SMOOTH, view.smooth)
        view.note = f"smoothing {view.smooth:g}"
    elif key == "y":
        view.log = not view.log
    elif key == "/":
        view.typing, view.filter = True, ""
        view.view = view.view if view.view in (4, 5) else 5
    elif key == "escape":
        view.help = view.zoom = False
        view.filter = ""
    elif key == "enter" and view.view == 5:
        view.zoom = not view.zoom
    elif key == "enter":
        stop_following(view, log)
        view.view = 3
    elif key == "p":
        view.look = replace(view.look, palette=after(tuple(PALETTES), view.look.palette))
    elif key == "a":
        view.look = replace(view.look, glyphs=after(tuple(DOTS), view.look.glyphs))
    elif key == "t":
        view.look = replace(view.look, light=not view.look.light)
    elif key == "?":
        view.help, view.pick = not view.help, 0
    elif key in ("q", "e"):
        return {"q": "quit", "e": "save"}[key]
    return ""


def after(values: Sequence, value: object) -> object:
    """The next of a cycle."""
    return values[(list(values).index(value) + 1) % len(values)]


def stop_following(view: View, log: Log) -> Sample | None:
    """Stay with what is on the screen, whatever arrives; the sample that is then shown."""
    view.follow = False
    key = key_at(view, log)
    if key:
        view.it = key[0]
    return log.sample(key) if key else None


def step(view: View, log: Log, by: int) -> None:
    sample = stop_following(view, log)
    view.playing = False
    if sample:
        view.t = max(0, min(step_of(view, sample) + by, sample.T - 1))


def iteration(view: View, log: Log, by: int) -> None:
    its = sorted(log.run.entropy) or [0]
    here = its[-1] if view.it is None else view.it
    at = max(0, min(bisect_left(its, here) + by, len(its) - 1))
    view.it, view.follow = its[at], False


def move_sample(view: View, log: Log, by: int) -> None:
    keys = sample_keys(view, log) if view.view == 4 else sorted(log.run.samples)
    stop_following(view, log)
    key = key_at(view, log)
    if keys:
        at = keys.index(key) + by if key in keys else 0
        view.it, near = keys[max(0, min(at, len(keys) - 1))]
        view.s = sorted(s for it, s in log.run.samples if it == view.it).index(near)


def play(view: View, log: Log) -> None:
    """One step of the playback."""
    sample = current(view, log)
    last = (sample.T if sample else 0) - 1
    view.t = min((-1 if view.t is None else view.t) + 1, last)
    view.playing = view.t < last


def save(view: View, logs: Sequence[Log], width: int, height: int) -> str:
    """Write the screen beside the log; what to tell the user."""
    rows = frame(view, logs, width, height)
    path = logs[view.focus].path.with_name(f"screen-{time.strftime('%Y%m%d-%H%M%S')}.svg")
    try:
        path.write_text(svg(rows, view.look))
        path.with_suffix(".txt").write_text(plain(rows) + "\n")
    except OSError as error:
        return f"could not save: {error}"
    return f"saved {path.name} and {path.with_suffix('.txt').name}"


def make_app(logs: Sequence[Log], view: View, hz: float = 4.0):
    """The Textual app; hz 0 leaves polling to whoever calls `pump`."""
    from rich.segment import Segment
    from rich.style import Style
    from textual import events
    from textual.app import App, ComposeResult
    from textual.binding import Binding
    from textual.geometry import Region
    from textual.strip import Strip
    from textual.widget import Widget

    class Frame(Widget):
        """One widget for the whole screen. Only the cells that differ are painted again."""

        DEFAULT_CSS = "Frame { width: 100%; height: 100%; }"
        rows: list[Row] = []
        base = Style()

        def paint(self, rows: list[Row]) -> None:
            regions = [Region(first, y, last - first, 1) for y, (old, new) in enumerate(zip(self.rows, rows))
                       if old != new for first, last in [changed(old, new)]]
            whole = len(rows) != len(self.rows) or view.look.bg != self.look.bg
            self.rows, self.look = rows, view.look
            self.base = Style.parse(f"{view.look.fg} on {view.look.bg}")
            if whole:
                self.refresh()
            elif regions:
                self.refresh(*regions)

        look = view.look

        def render_line(self, y: int) -> Strip:
            row = self.rows[y] if y < len(self.rows) else [(" " * self.size.width, "")]
            return Strip([Segment(text, self.base + Style.parse(style)) for text, style in row])

    class Monitor(App):
        CSS = "Screen { overflow: hidden; }"
        ENABLE_COMMAND_PALETTE = False
        BINDINGS = [Binding("ctrl+c", "quit", priority=True),
                    Binding("tab", "press('tab')", priority=True), Binding("shift+tab", "press('shift+tab')", priority=True)]

        def compose(self) -> ComposeResult:
            self.picture = Frame()
            yield self.picture

        def on_mount(self) -> None:
            if hz:
                self.set_interval(1 / hz, self.pump)
                self.set_interval(1 / 30, self.advance)
            self.clock = time.monotonic()
            self.call_after_refresh(self.pump)

        def on_resize(self, event: events.Resize) -> None:
            self.draw()

        def draw(self) -> None:
            self.picture.paint(frame(view, logs, *self.size))

        def pump(self) -> None:
            """Read what is new and show it."""
            behind = [log.poll() for log in logs]
            self.draw()
            if any(behind) and hz:
                self.call_later(self.pump)

        def advance(self) -> None:
            if view.playing and time.monotonic() - self.clock >= 1 / view.speed:
                self.clock = time.monotonic()
                play(view, logs[view.focus])
                self.draw()

        def action_press(self, key: str) -> None:
            wish = press(view, key, logs)
            if wish == "quit":
                self.exit()
            elif wish == "save":
                view.note = save(view, logs, *self.size)
            self.draw()

        def on_key(self, event: events.Key) -> None:
            self.action_press(event.character if event.is_printable and event.character != " " else event.key)

    return Monitor()


def changed(old: Row, new: Row) -> tuple[int, int]:
    """The cells from the first to the last that differ between two rows of one width."""
    first = last = 0
    for a, b in zip(old, new):
        if a != b:
            break
        first += cell_len(a[0])
    for a, b in zip(reversed(old), reversed(new)):
        if a != b:
            break
        last += cell_len(a[0])
    width = sum(cell_len(text) for text, _ in new)
    return first, max(first + 1, width - last)


# ---- command line --------------------------------------------------------------------------------


def find(name: str | None) -> Path:
    """The event log that a run folder, a file or nothing (the newest under runs/) stands for."""
    if name is None:
        logs = sorted(Path("runs").glob("*/events.jsonl"), key=lambda path: path.stat().st_mtime)
        if not logs:
            raise FileNotFoundError("no run under runs/: start one with `python egspo.py`, or name a run folder")
        return logs[-1]
    path = Path(name)
    if not path.exists():
        raise FileNotFoundError(f"no such run: {name} (a run folder, or its events.jsonl)")
    return path / "events.jsonl" if path.is_dir() else path


def summary(log: Log) -> dict:
    """The last state of a run, for scripts."""
    run, (state, age) = log.run, log.status()
    def safe(value: object) -> object:
        return value if not isinstance(value, float) or math.isfinite(value) else str(value)
    return {"run": log.name, "path": str(log.path), "status": state, "age_s": round(age, 1), "done": run.done,
            "iters": run.size("iters"), "phase": run.phase, "task": run.meta.get("task"), "model": run.meta.get("model"),
            "metrics": {name: safe(run.latest(name)) for name in run.series},
            "evals": {it: {k: safe(v) for k, v in e.items()} for it, e in run.evals.items()},
            "checkpoint": run.ckpt.get("path"), "alerts": run.alerts[-20:], "lines": run.lines, "bad_lines": run.bad}


def follow(log: Log, hz: float) -> None:
    """One line per iteration, and per evaluation, alert and end, until the run ends."""
    told: set = set()
    while True:
        behind, run = log.poll(), log.run
        lines = []
        for it in sorted(run.entropy):
            values = [(name, run.series[name]) for name in HEALTH if name in run.series]
            text = "  ".join(f"{name} {num(s.values[at])}" for name, s in values[:8]
                             if (at := bisect_left(s.its, it)) < len(s.its) and s.its[at] == it)
            lines.append((it, 1, f"it {it:>5}  {text}"))
        for it, e in run.evals.items():
            lines.append((it, 0, f"it {it:>5}  eval  " + "  ".join(f"{k} {num(v) if isinstance(v, float) else v}" for k, v in e.items())))
        lines += [(it, 2, f"it {it:>5}  {level}: {message}") for it, level, message in run.alerts]
        for line in sorted(lines):
            if line not in told:
                told.add(line)
                print(line[2], flush=True)
        state = log.status()[0]
        if not behind and state in ("finished", "stopped", "crashed", "dead"):
            print(f"{state} after {run.done} updates")
            return
        time.sleep(0 if behind else 1 / hz)


def main() -> int:
    parser = argparse.ArgumentParser(prog="tui.py", description="Watch a training run, or look at one that is over.",
                                     epilog="Exit codes: 0 fine, 2 no such run, 3 the log is of a newer version.")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folder or events.jsonl (default: the newest under runs/)")
    parser.add_argument("--once", action="store_true", help="print one frame as plain text (the default without a terminal)")
    parser.add_argument("--plain", action="store_true", help="one line per iteration, like tail -f")
    parser.add_argument("--json", action="store_true", help="print the last state as JSON")
    parser.add_argument("--list", action="store_true", help="list the runs under runs/ with their state")
    parser.add_argument("--svg", metavar="FILE", help="write one frame as a picture (size: COLUMNS and LINES)")
    parser.add_argument("--replay", type=float, default=0.0, metavar="SPEED", help="show a finished log as if live, this much faster")
    parser.add_argument("--serve", nargs="?", type=int, const=8000, metavar="PORT", help="offer the monitor in a browser on 127.0.0.1")
    parser.add_argument("--view", default="overview", choices=VIEWS + list("123456"), metavar="VIEW", help=", ".join(VIEWS))
    parser.add_argument("--it", type=int, help="open at this iteration")
    parser.add_argument("--sample", type=int, help="... at this sample of it")
    parser.add_argument("--step", type=int, help="... at this denoising step")
    parser.add_argument("--guess", action="store_true", help="... with the one-step completion shown")
    parser.add_argument("--hz", type=float, default=4.0, help="looks at the file per second")
    parser.add_argument("--palette", default="viridis", choices=PALETTES)
    parser.add_argument("--ascii", action="store_true", help="no character outside ASCII")
    parser.add_argument("--light", action="store_true", default=os.environ.get("COLORFGBG", "").endswith(";15"),
                        help="for a light terminal")
    args = parser.parse_args()
    size = shutil.get_terminal_size((120, 40))
    try:
        paths = [find(name) for name in args.runs or [None]] if not args.list else [
            Path(p) for p in sorted(Path(args.runs[0] if args.runs else "runs").glob("*/events.jsonl"))]
        asked = args.once or args.plain or args.json or args.svg or args.list
        screen = sys.__stdin__.isatty() and sys.__stdout__.isatty() and sys.__stderr__.isatty() and (
            os.environ.get("TERM", "dumb") != "dumb" and "CI" not in os.environ)
        interactive = not asked and (screen or "TEXTUAL_DRIVER" in os.environ or args.serve)
        if not interactive and not all(path.exists() for path in paths):
            raise FileNotFoundError(f"no events yet: {next(path for path in paths if not path.exists())}")
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    if args.serve:
        from textual_serve.server import Server
        words = [word for word in sys.argv[1:] if not word.startswith("--serve") and word != str(args.serve)]
        Server(" ".join(map(repr, [sys.executable, __file__, *words])), host="127.0.0.1", port=args.serve).serve()
        return 0
    wide = (sys.stdout.encoding or "").lower().startswith("utf")
    look = Look(args.palette, "ascii" if args.ascii or not (wide or interactive) else "braille", args.light)
    view = View(look=look, view=VIEWS.index(args.view) + 1 if args.view in VIEWS else int(args.view),
                it=args.it, s=args.sample or 0, t=args.step, guess=args.guess,
                follow=args.it is None and args.sample is None and args.step is None)
    logs = [Log(path, args.replay, patience=20 if interactive else 0) for path in paths]
    for log in logs:
        while not (interactive or args.plain) and log.poll():
            pass
        if interactive and log.poll(0.1) is None:
            pass
    if any(log.run.newer for log in logs):
        print(f"the log is of a newer version than this monitor knows ({SCHEMA}): update tui.py", file=sys.stderr)
        return 3
    if interactive:
        app = make_app(logs, view, args.hz)
        signal.signal(signal.SIGTERM, lambda *_: app.exit())
        app.run()
    elif args.list:
        for log in logs:
            print(f"{log.status()[0]:<9} {log.run.done:>6}/{log.run.size('iters'):<6} reward {num(log.run.latest('reward/mean')):>6}"
                  f"  {span(log.status()[1]):>7} ago  {log.path.parent}")
    elif args.json:
        print(json.dumps(summary(logs[0]), allow_nan=False))
    elif args.plain:
        follow(logs[0], args.hz)
    elif args.svg:
        Path(args.svg).write_text(svg(frame(view, logs, *size), look))
    else:
        sys.stdout.reconfigure(errors="replace")
        print(plain(frame(view, logs, *size)))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(0)
