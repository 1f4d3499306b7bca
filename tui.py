"""What is on disk right now? A monitor for training runs: live, or after the end.

    python tui.py                     the newest run under runs/
    python tui.py RUN [RUN ...]       one run, or several to compare
    python tui.py RUN --once          one frame as plain text (the default without a terminal)

What a masked diffusion model learns is the denoising, and no reward curve shows it. So this shows
which steps were uncertain, which of them got the gradient, and how the text appeared. It reads
`events.jsonl` and writes nothing; it needs no tokenizer, no torch and no connection to the trainer,
so it works on a copy, over ssh, or while rsync is still bringing the file.

Three parts, top to bottom:
  read   Tail (bytes of a growing file) -> Run (what its events add up to), Sample (a trajectory)
  draw   pure functions: data, width and height in, rows of styled text out; `frame` draws a screen
  app    keys change a View; one Textual widget shows the frame and repaints the lines that differ

Denoising time t counts in generation order: 0 is all masks. Entropies are in nats.
"""

from __future__ import annotations

import argparse
import contextlib
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
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from html import escape
from pathlib import Path

from rich.cells import cell_len, set_cell_size  # the widths Textual goes by
from rich.segment import Segment

# ==== read ========================================================================================

SCHEMA = 1  # the newest version of the event log this file knows
Lines = list[tuple[int, bytes]]  # offset in the file, line
Place = tuple[int, int]  # offset and length of a line


class Tail:
    """The complete new lines of a growing file, by polling (works on NFS, sshfs and under rsync).

    A torn last line waits for its newline. A hole of NUL bytes (a network file system may know the
    length before the bytes) waits for `patience` polls. A file that was replaced, truncated, or
    truncated and grown again (its first bytes tell) is read again from the start.
    """

    def __init__(self, path: Path, patience: int = 20):
        self.path, self.patience = path, patience
        self.offset, self.inode, self.head, self.holes = 0, 0, b"", 0

    def read(self, limit: int = 1 << 20) -> tuple[bool, Lines]:
        """(started over?, new lines) of `limit` bytes at most; none if there is no file."""
        try:
            file = open(self.path, "rb")
        except FileNotFoundError:
            return False, []
        with file:
            stat, head = os.fstat(file.fileno()), file.read(64)
            same = stat.st_ino == self.inode and stat.st_size >= self.offset
            again = self.offset > 0 and not (same and head.startswith(self.head))
            if again:
                self.offset = self.holes = 0
            self.inode, self.head = stat.st_ino, head[: self.offset or None]
            file.seek(self.offset)
            chunk = file.read(limit)
        end = chunk.rfind(b"\n") + 1
        if not end and len(chunk) == limit:
            end = limit  # no line is this long: let it be counted as a bad one
        hole = chunk.find(b"\0", 0, end)
        if hole < 0:
            self.holes = 0
        elif self.holes < self.patience:
            self.holes, end = self.holes + 1, chunk.rfind(b"\n", 0, hole) + 1
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

    def read(self, limit: int = 1 << 20) -> tuple[bool, Lines]:
        if len(self.waiting) < 1000:
            self.waiting.extend(super().read(limit)[1])
        if self.waiting and not self.first:
            self.first = stamp(self.waiting[0][1])
        lines = []
        while self.waiting and stamp(self.waiting[0][1]) <= self.now():
            lines.append(self.waiting.popleft())
        return False, lines


UNUSABLE = (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError)  # a line
STAMP = re.compile(rb'"ts":\s*([\d.]+)')
KIND = re.compile(rb'\{"e":\s*"(denoise|sample|group)"')
INDEX = re.compile(rb'"it":\s*(\d+),\s*"[sp]":\s*(\d+)')


def stamp(line: bytes) -> float:
    """The unix time in a line of the log; 0 if it has none."""
    found = STAMP.search(line)
    return float(found[1]) if found else 0.0


def number(value: object) -> float:
    """A logged number; "nan", "inf" and "-inf" are strings in the log."""
    return math.nan if value is None else float(value)


@dataclass
class Run:
    """What the events of a log add up to. `feed` depends on the lines alone: no clock, no files."""

    meta: dict = field(default_factory=dict)
    series: dict[str, dict[int, float]] = field(default_factory=dict)  # metric -> it -> value
    entropy: dict[int, array] = field(default_factory=dict)  # it -> mean entropy of each step
    share: dict[int, list[float]] = field(default_factory=dict)  # it -> of the samples, by step
    evals: dict[int, dict] = field(default_factory=dict)
    samples: dict[int, dict[int, Place]] = field(default_factory=dict)  # it -> row -> where it is
    groups: dict[int, dict[int, Place]] = field(default_factory=dict)  # it -> prompt -> where
    alerts: list[tuple[int, str, str]] = field(default_factory=list)  # it, level, message
    rollout: list[bytes] = field(default_factory=list)  # `denoise` lines since the last `step`
    phase: str = ""
    it: int = 0  # the iteration being worked on
    done: int = 0  # updates made
    ckpt: dict = field(default_factory=dict)
    end: dict | None = None
    recent: deque = field(default_factory=lambda: deque(maxlen=50))  # the last good lines
    edition: int = 0  # changes whenever a chart does
    lines: int = 0
    bad: int = 0
    newer: bool = False

    def feed(self, line: bytes, offset: int = 0) -> None:
        """Take one line in. What cannot be used is counted, never fatal."""
        self.lines += 1
        # What is frequent or long is only filed: `denoise` lines are parsed while their rollout is
        # on the screen, samples and groups when somebody looks at them.
        kind = KIND.match(line) if line.endswith(b"}") else None
        try:
            if kind and kind[1] == b"denoise":
                self.rollout.append(line)
            elif kind:
                it, row = map(int, INDEX.search(line).groups())
                places = self.samples if kind[1] == b"sample" else self.groups
                places.setdefault(it, {})[row] = offset, len(line)
            else:
                self.apply(json.loads(line))
            self.recent.append(line)
        except UNUSABLE:
            self.bad += 1

    def apply(self, event: dict) -> None:
        it = int(event.get("it") or 0)
        if not 0 <= it < 1 << 53:
            raise ValueError(f"iteration {it}")
        match event["e"]:
            case "meta":
                self.newer |= event.get("v", SCHEMA) > SCHEMA
                self.rewind(int(event.get("resume") or 0))
                self.meta, self.end = event, None
            case "phase":
                self.phase, self.it = str(event["name"]), it
            case "step":
                metrics = {name: number(value) for name, value in event["m"].items()}
                entropy = array("f", map(number, event.get("ent") or []))
                chosen = [int(n) for n in event.get("sel") or []]
                rows = int(event.get("n") or max(chosen, default=0)) or 1
                for name, value in metrics.items():
                    if not math.isfinite(value) and math.isfinite(self.latest(name) or 0.0):
                        self.alerts.append((it, "error", f"{name} is {value}"))
                    self.series.setdefault(name, {})[it] = value
                if entropy:
                    self.entropy[it], self.share[it] = entropy, [n / rows for n in chosen]
                self.it, self.done, self.edition = it, it + 1, self.edition + 1
                self.rollout.clear()
            case "eval":
                values = {name: number(value) for name, value in event["m"].items()}
                told = {"n": event.get("n"), "split": event.get("split", "")}
                self.evals[it] = {"accuracy": math.nan} | values | told
                self.edition += 1
            case "ckpt":
                self.ckpt = event
            case "alert":
                self.alerts.append((it, str(event.get("level", "warn")), str(event["msg"])))
                self.edition += 1
            case "end":
                self.end = event

    def rewind(self, it: int) -> None:
        """The run starts again at `it`: what was logged from there on is void."""
        records = self.entropy, self.share, self.samples, self.groups, *self.series.values()
        for record in records:
            for key in [key for key in record if key >= it]:
                del record[key]
        self.series = {name: values for name, values in self.series.items() if values}
        self.evals = {at: e for at, e in self.evals.items() if at <= it}  # of the weights at `it`
        self.alerts = [alert for alert in self.alerts if alert[0] < it]
        self.rollout.clear()
        self.done, self.edition = min(self.done, it), self.edition + 1

    def size(self, name: str) -> int:
        """T, K, C, block, G, N or iters, from wherever the trainer wrote it; 0 if it did not."""
        cfg = self.meta.get("cfg")
        both = self.meta | (cfg if isinstance(cfg, dict) else {})
        value = both.get(name) or both.get({"C": "L", "iters": "steps"}.get(name, name))
        return value if isinstance(value, int) and 0 < value < 10**6 else 0

    def latest(self, name: str) -> float | None:
        return next(reversed(self.series.get(name, {}).values()), None)

    def seconds(self) -> dict[str, float]:
        """How long the phases of the last step took."""
        names = [name for name in self.series if name.startswith("t/") and name != "t/total"]
        return {name[2:]: self.latest(name) for name in names}

    @property
    def block_steps(self) -> int:
        """Denoising steps of a block; 0 if that is not known."""
        C = self.size("C")
        return self.size("T") * self.size("block") // C if C else 0

    @property
    def score(self) -> float | None:
        """Accuracy of the last evaluation."""
        return self.evals[max(self.evals)]["accuracy"] if self.evals else None

    def live(self) -> Sample | None:
        """The rollout in progress as far as it was logged; None between rollouts."""
        sample, C, T = None, self.size("C"), self.size("T")
        for line in self.rollout:
            with contextlib.suppress(*UNUSABLE):
                event = json.loads(line)
                it, t0, b = int(event["it"]), int(event["t0"]), int(event.get("b", 0))
                H, revealed = [number(h) for h in event["H"]], event.get("rv") or []
                if not 0 <= t0 < max(1, T):
                    continue
                if sample is None or (sample.it, sample.g) != (it, b):  # g holds the batch here
                    sample = Sample(it=it, s=int(event.get("s", 0)), g=b, live=True, T=T,
                                    tok=[""] * C, rev=[T] * C, tent=[0] * C)
                sample.prompt = str(event.get("prompt") or sample.prompt)
                sample.ent += [math.nan] * (t0 - len(sample.ent)) + H
                for k, (i, token, entropy) in enumerate(revealed):
                    sample.tok[i], sample.tent[i] = str(token), round(50 * number(entropy))
                    sample.rev[i] = t0 + k * len(H) // len(revealed)
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
    ok: bool | None = None  # correct, where that is known
    len: int = 0
    edit: list = field(default_factory=list)  # remasking: [t, i, token or null]
    T: int = 0
    live: bool = False

    @classmethod
    def parse(cls, line: bytes) -> Sample:
        """The trajectory in a sample event; raises one of UNUSABLE for what is none."""
        event = {name: value for name, value in json.loads(line).items() if value is not None}
        sample = cls(*(int(event.get(name, 0)) for name in ("it", "s", "p", "g")))
        sample.prompt = str(event.get("prompt", ""))
        sample.tok = ["" if token is None else str(token) for token in event["tok"]]
        for name in ("tent", "ent", "srw", "adv", "ratio"):
            setattr(sample, name, [number(value) for value in event.get(name, [])])
        when, n = [int(t) for t in event["rev"]], len(sample.tok)
        sample.T = len(sample.ent) or max(when, default=0) + 1
        sample.rev = (when + [sample.T] * n)[:n]
        sample.tent = (sample.tent + [0.0] * n)[:n]
        sample.sel = [int(t) for t in event.get("sel", [])]
        sample.x0 = [[str(token) for token in guess] for guess in event.get("x0", [])]
        sample.edit = [(int(t), int(i), token) for t, i, token in event.get("edit", [])]
        sample.rw = {name: number(value) for name, value in event.get("rw", {}).items()}
        sample.reward = sample.rw.get("reward", sum(sample.rw.values()))
        right = event.get("ok", sample.rw.get("correct", sample.rw.get("solved")))
        sample.ok = None if right is None else right >= 1
        sample.len = int(event.get("len", 0)) or sample.decoded
        return sample

    @property
    def steps(self) -> int:
        """Denoising steps so far."""
        return len(self.ent) if self.live else self.T

    @property
    def decoded(self) -> int:
        """Positions that were decoded at all."""
        return sum(map(self.reached, range(len(self.rev))))

    def reached(self, i: int) -> bool:
        """Whether position i is decoded in some step, this far or later."""
        return self.live or self.rev[i] < self.T

    def at(self, t: int) -> list[str | None]:
        """The state after step t: a token or None (masked) for each position."""
        state = [token if rev <= t else None for token, rev in zip(self.tok, self.rev)]
        for when, i, token in self.edit:
            if when <= t and 0 <= i < len(state):
                state[i] = token
        return state

    def guess(self, t: int) -> Sequence[str]:
        """The one-step completion that was scored at step t, if t was selected."""
        k = self.sel.index(t) if t in self.sel else len(self.x0)
        return self.x0[k] if k < len(self.x0) else ()


def parse_group(line: bytes) -> list[tuple[str, float]]:
    """(completion, reward) of the samples of one prompt."""
    event = json.loads(line)
    return [(str(text), number(reward)) for text, reward in zip(event["text"], event["rw"])]


class Log:
    """A run on disk: the tail of its file, the state read so far, the trajectories looked at."""

    def __init__(self, path: Path, speed: float = 0.0, patience: int = 20,
                 clock: Callable[[], float] = time.time):
        self.path, self.replayed = path, speed > 0
        self.tail = Replay(path, speed) if speed else Tail(path, patience)
        self.clock = self.tail.now if speed else clock
        self.forget()

    def forget(self) -> None:
        self.run, self.event = Run(), lru_cache(64)(self.read)
        self.briefs: dict[Place, tuple[float, int, str]] = {}
        self.pictures: dict[str, tuple[tuple, list]] = {}

    @property
    def name(self) -> str:
        return clean(str(self.run.meta.get("run") or self.path.parent.name))

    def poll(self, seconds: float = 0.04) -> bool:
        """Read what is new, for about so long; True if there may be more."""
        until = time.monotonic() + seconds
        while True:
            again, lines = self.tail.read()
            if again:
                self.forget()
            for offset, line in lines:
                self.run.feed(line, offset)
            if not lines or time.monotonic() > until:
                return bool(lines)

    def once(self, name: str, key: tuple, make: Callable[[], list]) -> list:
        """make(), or what it made last time if the key is the same: for what is slow to draw."""
        if name not in self.pictures or self.pictures[name][0] != key:
            self.pictures[name] = key, make()
        return self.pictures[name][1]

    def read(self, place: Place | None, parse: Callable[[bytes], object]) -> object:
        """What `parse` makes of a line of the file; None if there is no such event."""
        with contextlib.suppress(OSError, *UNUSABLE), open(self.path, "rb") as file:
            file.seek(place[0])
            return parse(file.read(place[1]))

    def sample(self, it: int, s: int) -> Sample | None:
        """The trajectory of row s of an iteration."""
        return self.event(self.run.samples.get(it, {}).get(s), Sample.parse)

    def group(self, sample: Sample) -> list[Sample]:
        """All that is known of the samples that share a sample's prompt; of some only the text."""
        rows = [self.sample(sample.it, s) for s in sorted(self.run.samples[sample.it])]
        known = {row.g: row for row in rows if row and row.p == sample.p}
        place = self.run.groups.get(sample.it, {}).get(sample.p)
        for g, (text, reward) in enumerate(self.event(place, parse_group) or ()):
            known.setdefault(g, Sample(sample.it, sample.s - sample.g + g, sample.p, g, tok=[text],
                                       rev=[0], tent=[0.0], T=1, reward=reward))
        return [known[g] for g in sorted(known)]

    def brief(self, it: int, s: int) -> tuple[float, int, str]:
        """(reward, length, text) of a sample, to sort and filter them all."""
        place = self.run.samples[it][s]
        if place not in self.briefs:
            sample = self.sample(it, s) or Sample(reward=math.nan)
            self.briefs[place] = sample.reward, sample.len, "".join(sample.tok)
        return self.briefs[place]

    def status(self) -> tuple[str, float]:
        """(one of STATUS; seconds since the last event)."""
        run, meta = self.run, self.run.meta
        if not run.recent:
            return "waiting", 0.0
        age = max(0.0, self.clock() - stamp(run.recent[-1]))
        if run.end:
            return str(run.end.get("status", "finished")), age
        if not self.replayed and [meta.get("host"), meta.get("boot")] == this_machine():
            try:
                os.kill(int(meta.get("pid")), 0)
            except ProcessLookupError:
                return "crashed", age
            except (PermissionError, *UNUSABLE):
                pass  # it runs, or there is no telling
        seconds = list(run.series.get("t/total", {}).values())[-50:]
        usual = statistics.median(seconds) if seconds else 0.0
        return ("dead" if age > 600 else "quiet" if age > max(60, 4 * usual) else "live"), age


def this_machine() -> list[str]:
    """Its name, and an id of the time since it was started."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return [os.uname().nodename, path.read_text().strip() if path.exists() else ""]


# ==== draw ========================================================================================
# A row is a list of (text, style); a style is "[bold] [italic] #rrggbb [on #rrggbb]" or "". What
# draws takes the width and height it has, in cells, and the rows it returns fill them.

Row = list[tuple[str, str]]
Draw = Callable[[int, int], list[Row]]

PALETTES = {
    "viridis": "440154 482475 414487 355f8d 2a788e 21918c 22a884 44bf70 7ad151 bddf26 fde725",
    "cividis": "00224e 123570 3b496c 575d6d 707173 8a8678 a59c74 c3b369 e1cc55 fee838",
    "magma": "2c115f 51127c 721f81 932b80 b73779 d8456c f1605d fc8961 feb078 fed799 fcfdbf",
    "grey": "45484e f4f4f4",
}
DARK = dict(bg="#0f1116", fg="#d8dbe0", dim="#7c828d", line="#323742", bar="#181c25",
            sky="#56b4e9", orange="#f0a030", teal="#2fb5a0", mark="#fde725", mask="#59606d",
            veil="#1b1f28")
LIGHT = dict(bg="#fbfbf8", fg="#22262c", dim="#686e78", line="#c6cad0", bar="#eceef0",
             sky="#0b6fb0", orange="#a85800", teal="#007a68", mark="#6a1b80", mask="#8d939d",
             veil="#edeff1")
NAMES = ("bars tl h tr v bl br sel maybe eval bad dot mask yes no edge done todo here full new sep "
         "nl eos")
UNICODE = "▁▂▃▄▅▆▇█ ╭ ─ ╮ │ ╰ ╯ ▲ △ ◆ × · ░ ✓ ✗ ┤ ━ ─ ▸ █ ◆ · ↵ ◦"
ASCII = "..::||## + - + | + + ^ ~ o x . : + - | = - > # @ | \\ $"
GLYPHS = {kind: dict(zip(NAMES.split(), glyphs.split())) for kind, glyphs in
          (("braille", UNICODE), ("block", UNICODE), ("ascii", ASCII))}
STATUS = {"live": ("●", "*", "teal"), "finished": ("■", "#", "teal"), "stopped": ("▪", "#", "sky"),
          "quiet": ("◌", "o", "orange"), "dead": ("✖", "x", "orange"),
          "crashed": ("✖", "x", "orange"), "waiting": ("○", "o", "dim")}
GOING = ("live", "quiet")


@lru_cache(4096)
def mix(low: str, high: str, x: float) -> str:
    """The colour a share x of the way from one to the other."""
    pairs = [(int(low[i : i + 2], 16), int(high[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * x):02x}" for a, b in pairs)


@lru_cache(1024)
def heat(palette: str, level: int) -> str:
    """Level 0 to 64 of a palette."""
    colours = ["#" + colour for colour in PALETTES[palette].split()]
    low = min(level * (len(colours) - 1) // 64, len(colours) - 2)
    return mix(colours[low], colours[low + 1], level / 64 * (len(colours) - 1) - low)


@dataclass(frozen=True)
class Look:
    """Colours and characters: look.sky (the names of DARK) and look("sel") (those of NAMES)."""

    palette: str = "viridis"
    glyphs: str = "braille"
    light: bool = False

    def __getattr__(self, name: str) -> str:
        colours = LIGHT if self.light else DARK
        if name not in colours:
            raise AttributeError(name)
        return colours[name]

    def __call__(self, name: str) -> str:
        return GLYPHS[self.glyphs][name]

    def heat(self, x: float, floor: float = 0.0) -> str:
        """The colour of 0 to 1. In both themes more is further from the background."""
        x = min(1.0, max(0.0, floor + (1 - floor) * x)) if math.isfinite(x) else 0.0
        return heat(self.palette, round((1 - x if self.light else x) * 64))

    def ink(self, x: float) -> str:
        """The same for text: only the part of the palette that can be read."""
        return self.heat(x, floor=0.55 if self.light else 0.45)

    @property
    def lines(self) -> tuple[str, ...]:
        return self.sky, self.orange, self.teal, self.dim, self.fg, self.mark


# ---- rows and numbers ----------------------------------------------------------------------------


def cells(row: Row) -> int:
    return sum(len(text) if text.isascii() else cell_len(text) for text, _ in row)


def fit(row: Row, width: int) -> Row:
    """Exactly `width` cells, cut (never through a wide character) or padded; like styles joined."""
    runs = [Segment("".join(text for text, _ in run), style)
            for style, run in itertools.groupby(row, key=lambda part: part[1])]
    return [part[:2] for part in Segment.adjust_line_length(runs, width, "")]


def block(rows: Iterable[Row], width: int, height: int) -> list[Row]:
    """Exactly `height` rows of exactly `width` cells."""
    rows = list(rows)[: max(0, height)]
    return [fit(row, width) for row in rows + [[]] * (height - len(rows))]


def centred(rows: list[Row], focus: int, width: int, height: int) -> list[Row]:
    """The same of more rows than fit, with row `focus` in sight."""
    return block(rows[max(0, min(focus - height // 2, len(rows) - height)) :], width, height)


def divide(total: int, *weights: int) -> list[int]:
    """`total` cells in parts of these weights."""
    ends = [total * end // sum(weights) for end in itertools.accumulate(weights)]
    return [end - start for start, end in zip([0, *ends], ends)]


def beside(height: int, widths: Iterable[int], *draws: Draw) -> list[Row]:
    blocks = [block(draw(w, height), w, height) for w, draw in zip(widths, draws)]
    return [sum(rows, []) for rows in zip(*blocks)]


def labelled(labels: Iterable[tuple[int, str]], width: int) -> str:
    """Labels at their columns, the first ones first; one that would touch another is left out."""
    line = [" "] * width
    for x, label in labels:
        x = max(0, min(x, width - len(label)))
        if not "".join(line[max(0, x - 1) : x + len(label) + 1]).strip():
            line[x : x + len(label)] = label
    return "".join(line)[:width]


def say(text: str, look: Look) -> Draw:
    return lambda width, height: [[(text, look.dim)]]


def panel(title: str, draw: Draw, look: Look, right: str = "", foot: str = "",
          hot: bool = False) -> Draw:
    """A box around what draws; no box where there is no room for it."""
    line, name = (look.sky, f"bold {look.fg}") if hot else (look.line, look.dim)

    def border(width: int, start: str, title: str, note: str, stop: str) -> Row:
        title = f" {set_cell_size(title, min(cell_len(title), width - 6))} " if title else ""
        note = f" {note} " if note and cell_len(title) + cell_len(note) < width - 8 else ""
        fill = look("h") * (width - 4 - cell_len(title) - cell_len(note))
        return [(look(start) + look("h"), line), (title, name), (fill, line), (note, look.dim),
                (look("h") + look(stop), line)]

    def boxed(width: int, height: int) -> list[Row]:
        if width < 24 or height < 4:
            return block(draw(width, height), width, height)
        rows, side = block(draw(width - 4, height - 2), width - 4, height - 2), look("v")
        return [border(width, "tl", title, right, "tr"),
                *[[(side + " ", line), *row, (" " + side, line)] for row in rows],
                border(width, "bl", "", foot, "br")]

    return boxed


def num(value: float | None) -> str:
    """At most three digits that matter, in at most seven cells."""
    if value is None:
        return "-"
    size = abs(value)
    if not math.isfinite(value) or not size:
        return f"{value:g}"
    if not 1e-3 <= size < 1e5:
        text = f"{value:.1e}" if value > 0 else f"{value:.0e}"
        return re.sub(r"e([+-])0?", r"e\1", text).replace("+", "")
    digits = 0 if size >= 100 else 1 if size >= 10 else 2
    return f"{value:.{digits}f}" if size >= 0.1 else f"{value:.2g}"


def span(seconds: float) -> str:
    m, s = divmod(int(seconds), 60)
    h, m = divmod(m, 60)
    if h:
        return f"{h // 24} days" if h > 48 else f"{h}h{m:02}m"
    return f"{m}m{s:02}s" if m else f"{s}s"


def clean(text: str, look: Look | None = None) -> str:
    """Text in which every character has a known width; newlines stay. With a look it is a token,
    and a special one (<|endoftext|>) becomes one character."""
    if look and re.fullmatch(r"<\|[^|]*\|>", text):
        return look("eos")
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else " " if c.isspace() else ""
                   for c in text.replace("\t", "    "))


def finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def nice(low: float, high: float, ticks: int) -> tuple[float, float, float]:
    """Round bounds around a range and the step between ticks; being round, they seldom move."""
    size = max(abs(low), abs(high))
    if high - low <= 1e-9 * max(size, 1e-9):  # a constant
        low, high = (low - 0.1 * size, high + 0.1 * size) if size > 1e-9 else (0.0, 1.0)
    raw = (high - low) / max(1, ticks)
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, step


# ---- pictures ------------------------------------------------------------------------------------


def slots(n: int, width: int) -> tuple[int, list[range]]:
    """How n steps share `width` cells: cells a column, and the steps each column stands for."""
    if n <= width:
        return min(max(1, width // max(1, n)), 9), [range(i, i + 1) for i in range(n)]
    return 1, [range(c * n // width, (c + 1) * n // width) for c in range(max(1, width))]


BARS_LEFT = 7  # cells for the axis of `strip`


def step_axis(columns: list[range], left: int, pitch: int, every: int, width: int, look: Look,
              cursor: int | None = None) -> Row:
    """The denoising steps under their columns; the cursor's for sure, then the ends."""
    every = 1 if pitch >= 3 else every or max(1, columns[-1][-1] // 8)
    marks = [(c, i) for c, steps in enumerate(columns) for i in steps if i % every == 0]
    marks.insert(1, (len(columns) - 1, columns[-1][-1]))
    marks = [(c, cursor) for c, steps in enumerate(columns) if cursor in steps] + marks
    labels = [(left + c * pitch + max(0, pitch - 1 - len(str(i))) // 2, str(i)) for c, i in marks]
    return [(labelled(labels, width), look.dim)]


def strip(entropy: Sequence[float], T: int, width: int, height: int, look: Look, *, K: int = 0,
          sel: Sequence[int] = (), share: Sequence[float] = (), maybe: bool = False,
          t: int | None = None, every: int = 0) -> list[Row]:
    """Entropy of each denoising step as bars, triangles under the selected ones, a cursor at t.

    sel: the selected steps of one sample; share: for a batch, the share that selected each step;
    maybe: the selection may still change; every: steps between labels.
    """
    left = BARS_LEFT if width > 30 else 0
    bars, high = max(1, height - 2), nice(0, max(finite(entropy), default=1), 4)[1]
    pitch, columns = slots(max(1, T), width - left)
    wide = pitch - (pitch > 2)  # a gap between bars that are wide enough
    scale = {0: num(high)[-5:], bars - 1: "0"} if bars > 1 else {0: num(high)[-5:]}
    rows: list[Row] = [[(f"{scale.get(r, ''):>{left - 2}}  ", look.dim)] if left else []
                       for r in range(bars)]
    marks: Row = [(f"{f'K={K}' if K else '':<{left}}", look.mark)] if left else []
    for steps in columns:
        value = max(finite(entropy[i] for i in steps if i < len(entropy)), default=None)
        size = 0 if value is None else max(1, round(value / high * bars * 8))
        colour = look.heat((value or 0) / high, 0.12) + (f" on {look.line}" if t in steps else "")
        for r, row in enumerate(rows):
            part = min(8, size - 8 * (bars - 1 - r))  # of this cell, in eighths
            row.append((f"{look('bars')[part - 1] * wide if part > 0 else '':<{pitch}}", colour))
        if value is None:  # no sample was, or is yet, at this step
            rows[-1][-1] = f"{look('dot') * wide:<{pitch}}", look.mask
        part = max((share[i] for i in steps if i < len(share)), default=0.0)
        part = part or float(any(i in sel for i in steps))
        glyph = look("maybe" if maybe else "sel") if part > 0 else ""
        marks.append((f"{glyph:^{wide}}".ljust(pitch), mix(look.bg, look.mark, 0.2 + 0.8 * part)))
    axis = step_axis(columns, left, pitch, every, width, look, t)
    return block([*rows, marks, axis], width, height)


def spark(values: Sequence[float], width: int, look: Look) -> Row:
    """The last values as small bars; one that is not a number stays visible."""
    values = values[-4 * max(1, width) :]
    low, high = min(finite(values), default=0.0), max(finite(values), default=0.0)
    row: Row = []
    for steps in slots(len(values), max(1, width))[1] if values else ():
        group = finite(values[i] for i in steps)
        if len(group) < len(steps):
            row.append((look("bad"), look.orange))
        else:
            x = (sum(group) / len(group) - low) / (high - low) if high > low else 0.3
            row.append((look("bars")[round(6 * x)], look.sky))
    return fit(row, width)


@dataclass
class Curve:
    """A line of a chart; `faint` ones are unconnected dots behind the others."""

    label: str
    its: Sequence[int]
    values: Sequence[float]
    colour: str
    faint: bool = False


DOTS = {  # the bit of each dot of a character, and the characters
    "braille": (((1, 8), (2, 16), (4, 32), (64, 128)),
                " " + "".join(map(chr, range(0x2801, 0x2900)))),
    "block": (((1, 2), (4, 8)), " ▘▝▀▖▌▞▛▗▚▐▜▄▙▟█"),
    "ascii": (((1,),), " *"),
}


class Canvas:
    """A grid of dots, several to a character."""

    def __init__(self, width: int, height: int, look: Look):
        self.table, self.glyphs = DOTS[look.glyphs]
        self.dx, self.dy = len(self.table[0]), len(self.table)
        self.width, self.height = width, height
        self.bits: dict[tuple[int, int], tuple[int, str]] = {}
        self.marks: dict[tuple[int, int], tuple[str, str]] = {}  # characters over the dots

    def dot(self, x: int, y: int, colour: str) -> None:
        place, bit = (x // self.dx, y // self.dy), self.table[y % self.dy][x % self.dx]
        self.bits[place] = self.bits.get(place, (0, ""))[0] | bit, colour

    def line(self, points: Sequence[tuple[int, int]], colour: str) -> None:
        for (x0, y0), (x1, y1) in zip(points, points[1:] or points):
            n = max(abs(x1 - x0), abs(y1 - y0), 1)
            for i in range(n + 1):
                self.dot(x0 + round((x1 - x0) * i / n), y0 + round((y1 - y0) * i / n), colour)

    def cell(self, x: int, y: int) -> tuple[str, str]:
        bits, colour = self.bits.get((x, y), (0, ""))
        return self.marks.get((x, y), (self.glyphs[bits], colour))


def chart(curves: Sequence[Curve], width: int, height: int, look: Look, *, log: bool = False,
          points: Sequence[tuple[int, float]] = (), cursor: int | None = None) -> list[Row]:
    """Curves over iterations, each named at its right end. `points` are marked; so, on the bottom
    row, is every value that is not a number."""
    def scale(value: float) -> float:
        return value if not log else math.log10(value) if value > 0 else math.nan

    curves = [replace(c, values=[scale(v) for v in c.values]) for c in curves if len(c.its)]
    points = [(it, scale(value)) for it, value in points if math.isfinite(scale(value))]
    its = [it for c in curves for it in (c.its[0], c.its[-1])] + [it for it, _ in points]
    if not its or width < 4 or height < 2:
        return block([[("no data yet", look.dim)]], width, height)
    named = [c for c in curves if c.label and finite(c.values)]
    left = 7 if width >= 30 else 0
    right = min(20, max((cell_len(c.label) for c in named), default=-1) + 1) if width >= 44 else 0
    w, h, first, last = max(1, width - left - right), height - 1, min(its), max(its)
    shown = finite([v for c in curves for v in c.values] + [v for _, v in points])
    low, high, tick = nice(min(shown, default=0), max(shown, default=1), max(1, min(5, h // 3)))
    canvas = Canvas(w, h, look)

    def across(it: int) -> int:
        return round((it - first) / max(1, last - first) * (w * canvas.dx - 1))

    def down(value: float) -> int:
        return round((high - value) / (high - low) * (h * canvas.dy - 1))

    for curve in sorted(curves, key=lambda c: not c.faint):
        columns: dict[int, list[float]] = {}
        for it, value in zip(curve.its, curve.values):
            if math.isfinite(value):
                columns.setdefault(across(it), []).append(value)
            elif not log:
                canvas.marks[across(it) // canvas.dx, h - 1] = look("bad"), f"bold {look.orange}"
        if curve.faint:
            for x, value in ((x, value) for x in columns for value in columns[x]):
                canvas.dot(x, down(value), mix(look.bg, curve.colour, 0.35))
        else:
            means = [(x, down(statistics.fmean(values))) for x, values in columns.items()]
            canvas.line(means, curve.colour)
    for it, value in points:
        place = across(it) // canvas.dx, down(value) // canvas.dy
        canvas.marks[place] = look("eval"), f"bold {look.mark}"
    if cursor is not None and first <= cursor <= last:
        x = across(cursor) // canvas.dx
        for y in range(h):
            glyph, colour = canvas.cell(x, y)
            canvas.marks[x, y] = glyph, f"{colour or look.dim} on {look.line}"

    digits = max(0, math.ceil(-math.log10(tick) - 1e-9) + (f"{tick:e}"[:3] == "2.5"))
    ticks = {}
    for i in range(round((high - low) / tick) + 1):
        value = low + i * tick
        label = num(10.0 ** min(300, value)) if log else f"{value:.{digits}f}"
        ticks[down(value) // canvas.dy] = label if len(label) < left else num(value)
    names: dict[int, Curve] = {}  # by row; highest first, moved apart where they would collide
    for i, curve in enumerate(sorted(named, key=lambda c: -finite(c.values)[-1])):
        wanted = max(down(finite(curve.values)[-1]) // canvas.dy, max(names, default=-1) + 1)
        names[min(wanted, h - len(named) + i)] = curve
    rows = []
    for y in range(h):
        rail = look("edge") if y in ticks else look("v")
        row = [(f"{ticks.get(y, ''):>{left - 1}}{rail}", look.dim)] if left else []
        name = [(" " + names[y].label, names[y].colour)] if right and y in names else []
        rows.append(row + [canvas.cell(x, y) for x in range(w)] + name)
    every = max(1, round(nice(0, max(1, last - first), max(1, w // 8))[2]))
    labels = [first, last, *range(first - first % every + every, last, every)]
    axis = labelled([(left + across(it) // canvas.dx - len(str(it)) // 2 * (it != first), str(it))
                     for it in labels], left + w)
    return block(rows + [[(axis, look.dim)]], width, height)


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """Exponential mean, without the bias of its start; gaps stay gaps."""
    out, mean, norm = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            mean, norm = weight * mean + (1 - weight) * value, weight * norm + 1 - weight
        out.append(mean / norm if math.isfinite(value) else math.nan)
    return out


def carpet(data: Sequence[Sequence[float]], its: Sequence[int], width: int, height: int, look: Look,
           high: float, *, it: int | None = None, left: int = 7, every: int = 0) -> list[Row]:
    """Values as colours, iterations down and denoising steps across, two iterations to a row."""
    T = max((len(row) for row in data), default=0)
    if not T or width < left + 2 or height < 2:
        return block([[("no data yet", look.dim)]], width, height)
    pitch, columns = slots(T, width - left)
    half = 1 if look.glyphs == "ascii" else 2  # iterations in a cell
    total, n = min((height - 1) * half, len(data) * 4 * half), len(data)
    groups = [range(r * n // total, max(r * n // total + 1, (r + 1) * n // total))
              for r in range(total)]

    def level(group: range, steps: range) -> float:
        values = finite(data[r][i] for r in group for i in steps if i < len(data[r]))
        return statistics.fmean(values) / high if values else math.nan

    levels = [[level(group, steps) for steps in columns] for group in groups]
    rows = []
    for y in range(0, total, half):
        here = any(it == its[r] for group in groups[y : y + half] for r in group)
        label = it if here else its[groups[y][0]] if y // half % 3 == 0 else ""
        row = [(f"{look('here') if here else ' '}{label:>{left - 3}}  ",
                f"bold {look.fg}" if here else look.dim)] if left else []
        for pair in itertools.zip_longest(*levels[y : y + half], fillvalue=math.nan):
            over, under = [look.heat(x) if x == x else look.bg for x in (*pair, math.nan)[:2]]
            shade = " .:-=+*#%@"[round(9 * min(1, pair[0]))] if pair[0] == pair[0] else "x"
            row.append(("▀" * pitch, f"{over} on {under}") if half == 2 else
                       (shade * pitch, look.ink(pair[0])))
        rows.append(row)
    return block(rows + [step_axis(columns, left, pitch, every, width, look)], width, height)


# ---- a trajectory --------------------------------------------------------------------------------


def token_style(sample: Sample, i: int, t: int, look: Look, colour: str) -> str:
    """How position i looks after step t once it is revealed; what t itself revealed stands out."""
    if sample.rev[i] == t:
        return f"bold {look.bg} on {look.mark}"
    share = sample.rev[i] / max(1, sample.T - 1) if colour == "step" else sample.tent[i] / 125
    return look.fg if colour == "none" else look.ink(share)


def position(sample: Sample, i: int, token: str | None, t: int, look: Look, colour: str,
             guess: Sequence[str]) -> tuple[str, str]:
    """What is seen at position i after step t, when the state there is `token`: that, or the guess,
    or a hatch as wide as what will be there; nothing where the row had ended before."""
    if token is not None:
        return clean(token, look), token_style(sample, i, t, look, colour)
    if not sample.reached(i):
        return "", ""
    if i < len(guess):
        return clean(guess[i], look), f"italic {look.sky} on {look.veil}"
    hatch = re.sub(r"[^\n]", look("mask"), clean(sample.tok[i], look)) or look("mask") * 2
    return hatch, f"{look.mask} on {look.veil}"


def prose(sample: Sample, t: int, width: int, height: int, look: Look, colour: str = "step",
          guess: Sequence[str] = ()) -> list[Row]:
    """The completion after step t as text, what is still hidden as a hatch or as `guess`."""
    rows: list[Row] = [[]]
    x = focus = 0
    for i, token in enumerate(sample.at(t)):
        body, style = position(sample, i, token, t, look, colour, guess)
        for k, piece in enumerate(body.split("\n")):
            size = cell_len(piece)
            if k or (x and x + size > width):
                rows.append([])
                x = 0
            while size > width > 1:  # longer than a line
                head = set_cell_size(piece, width).rstrip(" ") or piece[0]
                rows[-1].append((head, style))
                rows.append([])
                piece = piece[len(head) :]
                size = cell_len(piece)
            rows[-1].append((piece, style))
            x += size
        if token is not None and sample.rev[i] == t:
            focus = len(rows) - 1
    return centred(rows, focus, width, height)


def mosaic(sample: Sample, t: int, width: int, height: int, look: Look, size: int,
           colour: str = "step") -> list[Row]:
    """Every position as a cell, a row for each decoding block: where the text is filled in."""
    left = 5 if width > 20 else 0
    size = max(1, min(size or 32, width - left))
    pitch = max(1, min(3, (width - left) // size))
    rows: list[Row] = []
    for i, token in enumerate(sample.at(t)):
        if i % size == 0:
            rows.append([(f"{i:>{left - 2}}  ", look.dim)] if left else [])
        glyph, style = look("full") * pitch, token_style(sample, i, -1, look, colour)
        if token is None:
            glyph, style = (look("dot") if sample.reached(i) else " ") * pitch, look.mask
        elif sample.rev[i] == t:
            glyph, style = f"{look('new'):^{pitch}}", f"bold {look.mark}"
        rows[-1].append((glyph, style))
    focus = sample.rev.index(t) // size if t in sample.rev else 0
    return centred(rows, focus, width, height)


def token_widths(sample: Sample, look: Look) -> list[int]:
    return [max(1, cell_len(clean(token, look).replace("\n", "+"))) for token in sample.tok]


def film(sample: Sample, t: int, width: int, height: int, look: Look, colour: str = "step",
         guess: bool = False) -> list[Row]:
    """All steps of a short completion under one another: a row a step, a column a position."""
    widths, rows = token_widths(sample, look), []
    gap = " " * (sum(widths) + len(widths) + 44 <= width)
    for when in range(sample.steps):
        ground = f" on {look.line}" if when == t else ""
        row = [(f"{when:>3} ", (f"bold {look.fg}" if ground else look.dim) + ground),
               (f"{look('sel') if when in sample.sel else ' '} ", look.mark + ground)]
        shown = sample.guess(when) if guess else ()
        for i, token in enumerate(sample.at(when)):
            body, style = position(sample, i, token, when, look, colour, shown)
            row += [(set_cell_size(body.replace("\n", look("nl")), widths[i]), style), (gap, "")]
        rows.append(row + [("  ", "")] + credit(sample, when, look))
    return centred(rows, t, width, height)


def credit(sample: Sample, t: int, look: Look) -> Row:
    """What training made of step t, if it selected it."""
    row: Row = []
    for name, values in (("adv", sample.adv), ("guess", sample.srw), ("ratio", sample.ratio)):
        for value in [v for when, v in zip(sample.sel, values) if when == t][:1]:
            text = ("+" if name == "adv" and value > 0 else "") + num(value)
            row += [(f" {name} ", look.dim), (f"{text:<7}", f"bold {look.fg}")]
    return row


# ---- screens -------------------------------------------------------------------------------------

VIEWS = ("overview", "entropy", "trajectory", "samples", "curves", "run")
CURATED = ("reward/mean", "reward/correct", "reward/solved", "kl", "clip_frac", "loss", "grad_norm",
           "entropy/mean", "entropy/sel", "tok_s")
HEALTH = ("reward/mean", "kl", "clip_frac", "ratio/max", "grad_norm", "entropy/mean", "entropy/sel",
          "zero_adv_frac", "len/mean", "trunc_frac", "loss", "adv/abs", "t/total", "mem/peak_gb",
          "tok_s")


@dataclass
class View:
    """What is looked at and how: all that keys can change."""

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
    log: bool = False
    sort: str = "newest"
    filter: str = ""
    typing: bool = False
    zoom: bool = False
    help: bool = False
    pick: int = 0  # chart of view 5, scrolled lines of view 6 and of the help
    run: int = 0  # of several
    note: str = ""
    look: Look = Look()


def nearest(keys: Iterable[int], wanted: int) -> int:
    return min(keys, key=lambda key: (abs(key - wanted), key))


def key_of(view: View, log: Log) -> tuple[int, int] | None:
    """(it, s) of the sample that is looked at: the nearest that was logged."""
    samples = log.run.samples
    if not samples:
        return None
    it = max(samples) if view.it is None else nearest(samples, view.it)
    return it, nearest(samples[it], view.s)


def on_screen(view: View, log: Log) -> Sample | None:
    """The rollout in progress while following, else a logged sample."""
    live = log.run.live() if view.follow and log.status()[0] in GOING else None
    key = key_of(view, log)
    return live or (log.sample(*key) if key else None)


def step_of(view: View, sample: Sample) -> int:
    last = sample.steps - 1
    return last if view.t is None or sample.live else max(-1, min(view.t, last))


def bar(row: Row, width: int, look: Look) -> Row:
    """A row on its own ground, at the top or at the bottom."""
    return [(text, f"{style or look.fg} on {look.bar}") for text, style in fit(row, width)]


def header(view: View, log: Log, width: int) -> Row:
    """State, name, progress and pace on one row; what does not fit goes, from the right."""
    run, look, (state, age) = log.run, view.look, log.status()
    glyph, ascii_glyph, colour = STATUS.get(state, STATUS["finished"])
    parts = [[(f" {ascii_glyph if look.glyphs == 'ascii' else glyph} {state}",
               f"bold {getattr(look, colour)}"),
              (f" {span(age)} ago" if state in GOING and age >= 5 else "", look.dim)],
             [(log.name, f"bold {look.fg}")]]
    if iters := run.size("iters"):
        size = max(0, min(18, width // 6 - 4))
        full = round(size * min(1.0, run.done / iters))
        parts.append([(look("done") * full, look.sky), (look("todo") * (size - full), look.line),
                      (f" {run.done}/{iters}", look.fg)])
    if state in GOING:
        live, left = run.live(), run.latest("eta_s")
        if left is not None and math.isfinite(left):
            parts.append([(f"ETA {span(left)}", look.fg)])
        rolling = f" {live.steps}/{live.T}" if live and run.phase == "rollout" else ""
        parts.append([(run.phase + rolling, look.mark)])
    if run.evals:
        parts.append([("eval ", look.dim), (f"{run.score:.1%}", look.fg)])
    for name, unit in (("t/total", "s/it"), ("tok_s", "tok/s"), ("mem/peak_gb", "GB")):
        if name in run.series:
            parts.append([(f"{num(run.latest(name))} {unit}", look.dim)])
    model = Path(str(run.meta.get("model", ""))).name
    parts.append([(clean(f"{model} {run.meta.get('task', '')}".strip()), look.dim)])
    row: Row = []
    for part in filter(cells, parts):
        if row and cells(row + part) + 2 > width:
            break
        row += [("  ", "")] * bool(row) + part
    return bar(row, width, look)


HINTS = {0: "j/k run", 2: "up/down iteration", 4: "j/k row  s sort  / filter  enter open",
         5: "j/k chart  enter zoom  / filter  s smooth  y log", 6: "j/k scroll  n alert"}


def footer(view: View, runs: int, width: int) -> Row:
    """What is being typed, or what there is to say, or the keys of this view as far as they fit."""
    look, row = view.look, []
    if view.typing or view.filter:
        return bar([(f" /{view.filter}", f"bold {look.fg}"),
                    ("_" if view.typing else "  esc clears", look.dim)], width, look)
    if view.note:
        return bar([(f" {view.note}", look.orange)], width, look)
    names = [f"{i} {name}" for i, name in enumerate(VIEWS, 1)]
    names = names if width >= 90 else [f"1-6 {VIEWS[view.number - 1]}"]
    hints = HINTS.get(0 if runs > 1 and view.number == 1 else view.number,
                      "h/l step  n chosen  space play  j/k sample  x guess")
    always = [f"f follow {'on' if view.follow else 'off'}", "? help", "q quit"]
    for hint in [*names, *hints.split("  "), *always]:
        key, word = hint.split(" ", 1)
        style = f"bold {look.fg}" if word == VIEWS[view.number - 1] else look.dim
        part = [(f" {key} ", f"bold {look.orange}"), (f"{word} ", style)]
        row += part if cells(row + part) <= width else []
    return bar(row, width, look)


def strip_panel(view: View, log: Log, sample: Sample | None) -> Draw:
    """Entropy per step: of the rollout in progress, of one sample, or of an iteration's batch."""
    run, look, K = log.run, view.look, log.run.size("K")
    if sample and sample.live:
        entropy, t = sample.ent, sample.steps - 1
        known = [i for i in range(len(entropy)) if math.isfinite(entropy[i])]
        marks = dict(sel=sorted(known, key=lambda i: -entropy[i])[:K], maybe=True, t=t)
        title = f"{sample.it}, {'rolling' if t + 1 < sample.T else 'rolled'} out"
        right = f"{look('maybe')} top {K} so far"
    elif sample and (view.number == 3 or not view.follow):
        entropy, K = sample.ent, len(sample.sel)
        marks = dict(sel=sample.sel, t=step_of(view, sample))
        title, right = f"{sample.it}, sample {sample.s}", f"{look('sel')} gets the gradient"
    elif run.entropy:
        it = max(run.entropy) if view.it is None else nearest(run.entropy, view.it)
        entropy, K = run.entropy[it], K if any(run.share[it]) else 0
        marks = dict(share=run.share[it], t=view.t)
        title = f"{it}, mean of {run.size('N') or 'the batch'}"
        right = f"{look('sel')} chosen, strong: by many" if K else ""
    else:
        return panel("entropy", say("waiting for the first rollout", look), look)
    T = run.size("T") or len(entropy)
    weights = marks.get("share", [float(i in marks.get("sel", ())) for i in range(T)])
    total, kept = sum(finite(entropy)), sum(finite(a * b for a, b in zip(entropy, weights)))
    facts = {"mean": f"{num(total / max(1, len(finite(entropy))))} nats", "chosen": f"{K} of {T}",
             "entropy kept": f"{kept / total:.0%}" if total else "-"}
    rows = [[(f"{name:>13}  ", look.dim), (value, f"bold {look.fg}")]
            for name, value in facts.items()]

    def draw(w: int, h: int) -> list[Row]:
        room = w - BARS_LEFT - slots(T, w - BARS_LEFT)[0] * T  # beside the bars: their sum
        side = 26 if room >= 26 else 0
        return beside(
            h, (w - side, side),
            lambda w, h: strip(entropy, T, w, h, look, K=K, every=run.block_steps, **marks),
            lambda w, h: [[]] * (h > 5) + rows)

    title = f"entropy per denoising step {look('sep')} iteration {title}"
    return panel(title, draw, look, right)


def curve_panel(view: View, logs: Sequence[Log], name: str, hot: bool = False) -> Draw:
    """One metric over iterations; zoomed with a cursor and the values there."""
    look, curves, cursor = view.look, curves_of(view, logs, name), None
    right = num(logs[view.run].run.latest(name))
    if view.zoom and curves:
        cursor = curves[-1].its[-1] if view.it is None else view.it
        at = [c.values[min(bisect_left(c.its, cursor), len(c.its) - 1)] for c in curves]
        right = f"at {cursor}: {'   '.join(map(num, at))}"
    return panel(name, lambda w, h: chart(curves, w, h, look, log=view.log, cursor=cursor), look,
                 right if name in logs[view.run].run.series else "", hot=hot)


def curves_of(view: View, logs: Sequence[Log], name: str) -> list[Curve]:
    """One metric: of one run, with the raw values behind it, or of each of several by name."""
    curves, several = [], len(logs) > 1
    for log, colour in zip(logs, itertools.cycle(view.look.lines)):
        series = log.run.series.get(name, {})
        if name == "eval":
            series = {it: e["accuracy"] for it, e in log.run.evals.items()}
        its, values = list(series), list(series.values())
        if name != "eval" and view.smooth:
            if values and not several:
                curves.append(Curve("", its, values, colour, faint=True))
            values = smooth(values, view.smooth)
        if values:
            label = f"{log.name} {num(values[-1])}" if several else ""
            curves.append(Curve(label, its, values, colour))
    return curves


def reward_panel(view: View, log: Log) -> Draw:
    """The reward and its parts over iterations, evaluations marked."""
    look, run, curves = view.look, log.run, []
    parts = [name for name in run.series if re.fullmatch("reward/(?!mean|std).*", name)]
    for name, colour in zip(["reward/mean", *parts[:2]], (look.sky, look.orange, look.dim)):
        for curve in curves_of(view, [log], name):
            label = "" if curve.faint else f"{name[7:]} {num(curve.values[-1])}"
            if not curve.faint or name == "reward/mean":
                curves.insert(0, replace(curve, colour=colour, label=label))
    points = [(it, e["accuracy"]) for it, e in run.evals.items()]
    right = f"{look('eval')} evaluation {num(run.score)}" if points else ""
    return panel("reward", lambda w, h: chart(curves, w, h, look, points=points, log=view.log),
                 look, right)


def metric_rows(view: View, log: Log, width: int, height: int) -> list[Row]:
    """One metric a row: name, last value, how it went. The last alert below."""
    run, look, rows = log.run, view.look, []
    names = [name for name in HEALTH if name in run.series]
    names += [name for name in run.series if not name.startswith(("reward/", "t/", "eta"))]
    for name in list(dict.fromkeys(names))[: height - bool(run.alerts)]:
        last = run.latest(name)
        colour = look.fg if math.isfinite(last) else look.orange
        rows.append([(f"{name[:13]:<13} ", look.dim), (f"{num(last):>7}  ", f"bold {colour}"),
                     *spark(list(run.series[name].values()), max(0, width - 23), look)])
    for it, _, message in run.alerts[-1:]:
        rows.append([(f"! it {it} {clean(message)}", look.orange)])
    return rows or [[("waiting for the first update", look.dim)]]


def trajectory(view: View, log: Log, sample: Sample | None, width: int, height: int) -> list[Row]:
    """One completion as it was denoised: a film of all steps if it is short; else where (mosaic)
    and what (prose) had been filled in after the step under the cursor."""
    look = view.look
    if sample is None:
        return panel("denoising", say("no sample logged yet", look), look)(width, height)
    t, sep, chosen = step_of(view, sample), look("sep"), sample.guess(step_of(view, sample))
    head = [(f"it {sample.it} {sep} prompt {sample.p} {sep} sample {sample.s}   ",
             f"bold {look.fg}")]
    if sample.reward is not None:
        sign = {True: look("yes") + " ", False: look("no") + " "}.get(sample.ok, "")
        head.append((f"{sign}reward {num(sample.reward)}   ",
                     look.teal if sample.ok else look.orange))
    entropy = num(sample.ent[t]) if 0 <= t < len(sample.ent) else "-"
    tokens = f"{sum(when <= t for when in sample.rev)}/{sample.decoded} tokens"
    head.append((f"step {t}/{sample.T - 1}   {tokens}   H {entropy}", look.dim))
    short = sum(token_widths(sample, look)) + 10 <= width

    def draw(w: int, h: int) -> list[Row]:
        question, wide = clean(sample.prompt).replace("\n", " "), max(1, w - 3)
        lines = [question[i : i + wide] for i in range(0, len(question), wide)]
        most = max(0, min(2 + (h > 18), h - 4))
        if len(lines) > most > 0:  # the puzzle itself often comes last
            lines[most - 1] = f"... {question[4 - wide :]}"
        rows = [head] + [[("Q: " if i == 0 else "   ", look.dim), (line, f"italic {look.dim}")]
                         for i, line in enumerate(lines[:most])]
        if short and h > len(rows) + 3:
            return rows + film(sample, t, w, h - len(rows), look, view.colour, view.guess)
        if t in sample.sel and h > 6:
            hint = "   x shows the guess" if chosen and not view.guess else ""
            rows.append([(f"{look('sel')} chosen  ", f"bold {look.mark}"), *credit(sample, t, look),
                         (hint, look.dim)])
        elif h > 8:
            rows.append([])
        return rows + prose(sample, t, w, max(1, h - len(rows)), look, view.colour,
                            chosen if view.guess else ())

    size = log.run.size("block")
    left = 0 if short or width < 80 else min(9 + (size or 32), width // 2)
    return beside(
        height, (left, width - left),
        panel("positions", lambda w, h: mosaic(sample, t, w, h, look, size, view.colour), look),
        panel(f"denoising{' now' * sample.live}", draw, look, f"colour: {view.colour}"))


def overview(view: View, logs: Sequence[Log], width: int, height: int) -> list[Row]:
    if len(logs) > 1:
        return comparison(view, logs, width, height)
    log, run, look = logs[0], logs[0].run, view.look
    if width < 60 or height < 14:  # one line per fact
        first = [[("entropy by step  ", look.dim),
                  *spark(run.entropy[max(run.entropy)], width - 17, look)]] if run.entropy else []
        return first + metric_rows(view, log, width, height - len(first))
    sample = on_screen(view, log)
    top = 7 if height < 36 else max(8, height // 5)
    bottom = 0 if height < 28 else max(11, (height - top) * 14 // 25)
    middle, widths = height - top - bottom, divide(width, *((5, 3) if width >= 100 else (1, 1)))
    times = [f"{name} {num(seconds)}" for name, seconds in run.seconds().items()]
    health = panel("health", lambda w, h: metric_rows(view, log, w, h), look,
                   foot="  ".join(["seconds", *times]) if times else "")
    charts = log.once("overview", (run.edition, width, middle, look, view.smooth, view.log),
                      lambda: beside(middle, widths, reward_panel(view, log), health))
    rows = strip_panel(view, log, sample)(width, top) + charts
    return rows + (trajectory(view, log, sample, width, bottom) if bottom else [])


def run_line(log: Log, name: str) -> str:
    """A run in a line: for the comparison and for --list."""
    run, (state, age) = log.run, log.status()
    return (f"{state:<9} {run.done:>6}/{run.size('iters'):<6} reward "
            f"{num(run.latest('reward/mean')):>6}  eval {num(run.score):>6}  {span(age):>8} ago  "
            f"{name}")


def comparison(view: View, logs: Sequence[Log], width: int, height: int) -> list[Row]:
    """Several runs over one another: how an ablation is watched."""
    look, top = view.look, min(len(logs) + 2, max(3, height // 3))
    table = [[(f"{look('here') if i == view.run else ' '} ", look.fg), (look("full"), colour),
              (f" {run_line(log, log.name)}", f"bold {look.fg}" if i == view.run else look.dim)]
             for i, (log, colour) in enumerate(zip(logs, itertools.cycle(look.lines)))]

    names, across = ["reward/mean", "entropy/mean", "eval", "entropy/sel"], 1 + (width >= 100)
    draws = [curve_panel(view, logs, name) for name in names[: 2 * across]]
    rows = panel("runs", lambda w, h: table[max(0, view.run - h + 1) :], look)(width, top)
    return rows + grid(draws, across, 2, width, height - top)


def grid(draws: Sequence[Draw], across: int, down: int, width: int, height: int) -> list[Row]:
    """As many columns and rows of equal size, filled line by line."""
    rows: list[Row] = []
    for r, h in enumerate(divide(height, *[1] * down)):
        line = draws[r * across : (r + 1) * across]
        rows += block(beside(h, divide(width, *[1] * across), *line), width, h)
    return rows


def entropy_view(view: View, logs: Sequence[Log], width: int, height: int) -> list[Row]:
    """Every iteration's entropies as a row of colours; beside them, which steps were selected."""
    log, run, look = logs[view.run], logs[view.run].run, view.look
    its = sorted(run.entropy)
    it = max(its, default=None) if view.it is None else view.it
    below = 0 if height < 20 else min(11, height // 4)
    widths = divide(width, 5, 3) if width >= 100 else [width]

    def draw() -> list[Row]:
        data, every = [run.entropy[i] for i in its], run.block_steps
        high = max((value for row in data for value in finite(row)), default=0.0) or 1.0
        entropy = panel(
            f"entropy {look('sep')} iteration down, denoising step across",
            lambda w, h: carpet(data, its, w, h, look, high, it=it, every=every),
            look, f"0 to {num(high)} nats")
        selected = panel("selected steps", lambda w, h: carpet(
            [run.share[i] for i in its], its, w, h, look, 1.0, left=0, every=every), look, "share")
        return beside(height - below, widths, entropy, selected)

    rows = log.once("carpet", (run.edition, it, width, height, look), draw)
    return rows + (strip_panel(view, log, None)(width, below) if below else [])


def trajectory_view(view: View, logs: Sequence[Log], width: int, height: int) -> list[Row]:
    log, top = logs[view.run], max(5, min(11, height // 3)) if height >= 14 else 0
    sample = on_screen(view, log)
    rows = strip_panel(view, log, sample)(width, top) if top else []
    return rows + trajectory(view, log, sample, width, height - top)


def sample_keys(view: View, log: Log) -> list[tuple[int, int]]:
    """(it, s) of the newest 2000 samples that pass the filter, in the order asked for."""
    samples = log.run.samples
    keys = [(it, s) for it in sorted(samples, reverse=True) for s in sorted(samples[it])][:2000]
    if view.filter:
        keys = [key for key in keys if view.filter.lower() in log.brief(*key)[2].lower()]
    if view.sort != "newest":
        keys.sort(key=lambda key: -log.brief(*key)[view.sort == "length"])
    return keys


def samples_view(view: View, logs: Sequence[Log], width: int, height: int) -> list[Row]:
    """A table of the logged samples, and the group of the one under the cursor side by side."""
    log, look = logs[view.run], view.look
    keys, here = sample_keys(view, log), key_of(view, log)
    below = height * 2 // 5 if height >= 16 else 0

    def line(key: tuple[int, int]) -> Row:
        sample, bold = log.sample(*key) or Sample(*key), key == here
        sign = {True: look("yes"), False: look("no")}.get(sample.ok, "")
        adv = num(statistics.fmean(finite(sample.adv))) if finite(sample.adv) else "-"
        parts = [f"{name} {num(v)}" for name, v in sample.rw.items() if name != "reward"]
        words = " ".join("".join(clean(token, look) for token in sample.tok).split())
        style = f"bold {look.fg}" if bold else look.dim
        return [(f"{look('here') if bold else ' '} ", look.sky),
                (f"{sample.it:>5} {sample.p:>6} {sample.g:>3} ", style),
                (f"{sign:>1} {num(sample.reward):>7}", look.teal if sample.ok else look.orange),
                (f" {adv:>7} {sample.len:>4}  {' '.join(parts)}  {words}", style)]

    def table(w: int, h: int) -> list[Row]:
        at = keys.index(here) if here in keys else 0
        start = max(0, min(at - h // 2, len(keys) - h + 1))
        return [[(f"  {'it':>5} {'prompt':>6} {'g':>3}    reward     adv  len", look.dim)],
                *map(line, keys[start : start + h - 1])]

    def member(one: Sample) -> Draw:
        return panel(f"sample {one.s} {look('sep')} reward {num(one.reward)}",
                     lambda w, h: prose(one, one.T, w, h, look, view.colour), look,
                     hot=one is sample)

    table = table if keys else say("no sample", look)
    rows = panel("samples", table, look, f"{len(keys)} by {view.sort}")(width, height - below)
    sample = log.sample(*here) if here else None
    if not below or sample is None:
        return rows
    same = log.group(sample)
    shown = same[max(0, same.index(sample) - 3) :][: max(1, min(4, width // 30))]
    return rows + grid([member(one) for one in shown], len(shown), 1, width, below)


def metric_names(view: View, logs: Sequence[Log]) -> list[str]:
    """What view 5 shows: the curated metrics first; only those that match a filter."""
    names = dict.fromkeys(name for log in logs for name in log.run.series)
    names = dict.fromkeys([name for name in CURATED if name in names] + list(names))
    return [name for name in names if view.filter.lower() in name.lower()]


def curves_view(view: View, logs: Sequence[Log], width: int, height: int) -> list[Row]:
    look, names = view.look, metric_names(view, logs)
    if not names:
        text = "no metric matches" if view.filter else "waiting for the first update"
        return panel("curves", say(text, look), look)(width, height)
    pick = min(view.pick, len(names) - 1)

    def page() -> list[Row]:
        if view.zoom:
            return curve_panel(view, logs, names[pick], hot=True)(width, height)
        across, down = max(1, min(3, width // 38)), max(1, min(3, height // 7))
        first = pick - pick % (across * down)
        draws = [curve_panel(view, logs, name, hot=name == names[pick])
                 for name in names[first : first + across * down]]
        return grid(draws, across, down, width, height)

    key = (width, height, view.zoom, view.it, view.smooth, view.log, view.filter, view.run, look,
           pick, *(log.run.edition for log in logs))
    return logs[0].once("curves", key, page)


def run_view(view: View, logs: Sequence[Log], width: int, height: int) -> list[Row]:
    """Where the run is, how far, how fast and with which settings; its alerts and last events."""
    log, look = logs[view.run], view.look
    run, meta, (state, age) = log.run, log.run.meta, log.status()
    argv = meta.get("argv")
    facts = {
        "state": f"{state}, last event {span(age)} ago", "log": log.path,
        "model": meta.get("model"), "task": meta.get("task"),
        "machine": f"{meta.get('host')}, process {meta.get('pid')}", "git": meta.get("git"),
        "command": " ".join(map(str, argv)) if isinstance(argv, list) else argv,
        "sizes": "  ".join(f"{name} {run.size(name)}" for name in "T K C block N G".split()),
        "updates": f"{run.done} of {run.size('iters')}", "checkpoint": run.ckpt.get("path"),
        "events": f"{run.lines} lines, {run.bad} unreadable", "error": (run.end or {}).get("err")}
    for it, e in list(run.evals.items())[-3:]:
        between = f" ({e['lo']:.1%} to {e['hi']:.1%})" if "lo" in e and "hi" in e else ""
        facts[f"eval at {it}"] = f"{e['accuracy']:.1%}{between} of {e['n']} {e['split']}"

    def table(pairs: dict) -> list[Row]:
        return [[(f"{name:<13} ", look.dim), (clean(str(value)), look.fg)]
                for name, value in pairs.items() if value not in (None, "")]

    left, times = table(facts), run.seconds()
    for name, value in times.items():
        share = value / (sum(finite(times.values())) or 1.0) if math.isfinite(value) else 0.0
        left.append([(f"{name:<13} ", look.dim), (f"{num(value):>6} s ", look.fg),
                     (look("full") * round(20 * share), look.sky)])
    cfg = meta.get("cfg") if isinstance(meta.get("cfg"), dict) else {}
    news = [[(f"it {it:>4} {level:<5} ", look.dim), (clean(message), look.orange)]
            for it, level, message in reversed(run.alerts)]
    tail = [[(clean(line.decode(errors="replace")), look.dim)] for line in reversed(run.recent)]
    below, skip = height * 2 // 5, view.pick
    widths = divide(width, 5, 3) if width >= 80 else [width]
    rows = beside(height - below, widths,
                  panel("run", lambda w, h: left[skip if len(widths) == 1 else 0 :], look),
                  panel("config", lambda w, h: table(cfg)[skip:], look))
    return rows + panel(f"alerts ({len(news)}) and the last events",
                        lambda w, h: news[: h // 2] + tail, look)(width, below)


KEYS = {
    "1-6, tab": "overview, entropy, trajectory, samples, curves, run; tab goes round",
    "left right, h l": "denoising step, ten with shift (H L); in a zoomed chart the iteration",
    "home end, 0 $": "first and last of them",
    "n N": "next and previous selected step; in 2, 5 and 6 the next and previous alert",
    "space, < >": "play the denoising; slower, faster",
    "up down, k j": "sample; iteration in 2, chart in 5, scrolling in 6, run when comparing",
    "PgUp PgDn, K J": "iteration",
    "g G": "first iteration; newest, and follow",
    "f": "follow the newest or not; moving by hand turns it off",
    "c": "colour of tokens: step, entropy, none",
    "x": "at selected steps: the one-step completion that EGSPO-SA scored there",
    "s": "smoothing 0, .6, .8, .95; in 4 the order of the table",
    "y": "logarithmic charts",
    "/, esc": "filter metrics or samples; clear and back",
    "enter": "zoom a chart; open a sample",
    "p, a, t": "palette; characters: braille, block, ascii; dark or light",
    "e": "save this screen beside the log as svg and text",
    "?, q, ctrl+c": "this help; quit (the trainer never notices)",
}



def help_view(view: View, logs: Sequence[Log], width: int, height: int) -> list[Row]:
    rows = [[(f"{keys:<16} ", f"bold {view.look.orange}"), (text, view.look.fg)]
            for keys, text in KEYS.items()]
    return panel("keys", lambda w, h: rows[view.pick :], view.look)(width, height)


SCREENS = (overview, entropy_view, trajectory_view, samples_view, curves_view, run_view)


def frame(view: View, logs: Sequence[Log], width: int, height: int) -> list[Row]:
    """The whole terminal: exactly `height` rows of `width` cells."""
    if width < 20 or height < 5:
        return block([[("needs 20x5", "")]], width, height)
    screen = help_view if view.help else SCREENS[view.number - 1]
    body = block(screen(view, logs, width, height - 2), width, height - 2)
    return [header(view, logs[view.run], width), *body, footer(view, len(logs), width)]


# ---- out of the terminal -------------------------------------------------------------------------


def plain(rows: Iterable[Row]) -> str:
    return "\n".join("".join(text for text, _ in row).rstrip() for row in rows)


ARMS = {"─": "lr", "│": "ud", "┤": "lud", "╭": "rd", "╮": "ld", "╰": "ru", "╯": "lu"}
ARM = {"l": (0, 0.47, 0.55, 0.06), "r": (0.45, 0.47, 0.55, 0.06), "u": (0.45, 0, 0.1, 0.5),
       "d": (0.45, 0.5, 0.1, 0.5)}


def shapes(c: str) -> list[tuple[float, float, float, float]]:
    """The rectangles (x, y, width, height in cells) of a character; none if it is a letter."""
    if c in ARMS:
        return [ARM[arm] for arm in ARMS[c]]
    if c == "━":
        return [(0, 0.42, 1, 0.16)]
    if "▁" <= c <= "█":
        size = (ord(c) - 0x2580) / 8
        return [(0, 1 - size, 1, size)]
    if c == "░":
        return [((x + y % 2 * 2) / 4, y / 4, 0.16, 0.08) for x in (0, 1) for y in range(4)]
    for table, glyphs in (DOTS["block"], DOTS["braille"]):
        bits, w, h = glyphs.find(c), 1 / len(table[0]), 1 / len(table)
        dot = (w, h) if h == 0.5 else (0.38, 0.19)
        if bits > 0:
            return [(x * w, y * h, *dot) for y, line in enumerate(table)
                    for x, bit in enumerate(line) if bits & bit]
    return []


def svg(rows: Sequence[Row], look: Look) -> str:
    """A screen as a picture. Bars, dots and boxes become shapes, so that no font misplaces them."""
    W, H, out = 9, 18, []  # pixels of a cell

    def rect(x: float, y: float, w: float, h: float, colour: str) -> None:
        out.append(f'<rect x="{x * W:g}" y="{y * H:g}" width="{w * W:g}" height="{h * H:g}" '
                   f'fill="{colour}" shape-rendering="crispEdges"/>')

    for y, row in enumerate(rows):
        x = 0
        for text, style in row:
            ink, _, ground = style.partition("on ")
            colour = (re.search(r"#\w{6}", ink) or [look.fg])[0]
            if ground:
                rect(x, y, cell_len(text), 1, ground)
            start, letters = x, ""
            for c in text:
                for dx, dy, w, h in shapes(c):
                    rect(x + dx, y + dy, w, h, colour)
                letters += " " if shapes(c) else c
                x += cell_len(c)
            if letters.strip():
                weight = ' font-weight="bold"' * ("bold" in ink)
                slant = ' font-style="italic"' * ("italic" in ink)
                place = f'x="{start * W}" y="{y * H + 13.5}" textLength="{(x - start) * W}"'
                out.append(f'<text {place} fill="{colour}"{weight}{slant}>{escape(letters)}</text>')
    w, h = max(map(cells, rows), default=0) * W + 16, len(rows) * H + 16
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}" '
            f'viewBox="-8 -8 {w} {h}" font-size="15" xml:space="preserve" '
            'font-family="DejaVu Sans Mono, Menlo, Consolas, monospace">'
            f'<rect x="-8" y="-8" width="{w}" height="{h}" rx="8" fill="{look.bg}"/>'
            f'{"".join(out)}</svg>\n')


def save(view: View, logs: Sequence[Log], width: int, height: int) -> str:
    """Write the screen beside the log as svg and text; returns what to tell."""
    rows = frame(view, logs, width, height)
    path = logs[view.run].path.with_name(f"screen-{time.strftime('%Y%m%d-%H%M%S')}.svg")
    try:
        path.write_text(svg(rows, view.look), encoding="utf-8")
        path.with_suffix(".txt").write_text(plain(rows) + "\n", encoding="utf-8")
    except OSError as error:
        return f"not saved: {error}"
    return f"saved {path} and .txt"


# ==== app =========================================================================================

FAR = 10**9
ACROSS = {"left": -1, "h": -1, "shift+left": -10, "H": -10, "home": -FAR, "0": -FAR,
          "right": 1, "l": 1, "shift+right": 10, "L": 10, "end": FAR, "$": FAR}
DOWN = {"up": -1, "k": -1, "down": 1, "j": 1}
PAGE = {"pageup": -1, "K": -1, "pagedown": 1, "J": 1}
CYCLES = {"c": "colour", "x": "guess", "s": "smooth", "y": "log", "p": "palette", "a": "glyphs",
          "t": "light"}  # keys that go round the values of something
VALUES = {"colour": ("step", "entropy", "none"), "smooth": (0.0, 0.6, 0.8, 0.95),
          "sort": ("newest", "reward", "length"), "palette": tuple(PALETTES),
          "glyphs": tuple(GLYPHS)}


def clamp(value: int, length: int) -> int:
    """The nearest index into so many items."""
    return max(0, min(value, length - 1))


def press(view: View, key: str, logs: Sequence[Log]) -> str:
    """What a key does to the view; returns "quit" or "save" for what is not the view's to do."""
    log, run, view.note = logs[view.run], logs[view.run].run, ""
    if view.typing:
        view.typing = key not in ("escape", "enter")
        view.filter = "" if key == "escape" else view.filter[:-1] if key == "backspace" else (
            view.filter + {"space": " "}.get(key, key if len(key) == 1 else ""))
        return ""
    across, down, page = ACROSS.get(key, 0), DOWN.get(key, 0), PAGE.get(key, 0)
    charts = view.number == 5
    match key:
        case _ if down and (view.help or view.number == 6):
            view.pick = max(0, view.pick + down)
        case _ if (across or down) and charts and not view.zoom:
            view.pick = clamp(view.pick + across + 3 * down, len(metric_names(view, logs)))
        case _ if page or across and charts or down and view.number == 2:
            its = sorted(run.entropy) or [0]
            at = bisect_left(its, its[-1] if view.it is None else view.it)
            view.it = its[clamp(at + (page or across or down), len(its))]
            view.follow = view.playing = False
        case _ if down and view.number == 1 and len(logs) > 1:
            view.run = clamp(view.run + down, len(logs))
        case _ if down:  # the next row of the table in view 4; else the next sample, then iteration
            keys = sample_keys(view, log) if view.number == 4 else sample_keys(View(), log)[::-1]
            stay(view, log)
            if keys:
                here = (view.it, view.s)
                at = keys.index(here) + down if here in keys else 0
                view.it, view.s = keys[clamp(at, len(keys))]
        case _ if across:
            sample = stay(view, log)
            view.t = clamp(step_of(view, sample) + across, sample.T) if sample else None
        case "1" | "2" | "3" | "4" | "5" | "6":
            view.number, view.zoom, view.help, view.pick = int(key), False, False, 0
        case "tab" | "shift+tab":
            press(view, str((view.number - (0 if key == "tab" else 2)) % 6 + 1), logs)
        case "n" | "N" if view.number in (2, 5, 6):
            here, ahead = run.it if view.it is None else view.it, key == "n"
            alerts = [a for a in run.alerts if (a[0] > here if ahead else a[0] < here)]
            if alerts:
                view.it, _, message = min(alerts) if ahead else max(alerts)
                view.note, view.follow = f"it {view.it}: {message}", False
        case "n" | "N":
            sample = stay(view, log)
            if sample and sample.sel:
                chosen, t = sorted(sample.sel), step_of(view, sample)
                at = bisect_left(chosen, t + 1) if key == "n" else bisect_left(chosen, t) - 1
                view.t = chosen[at % len(chosen)]
        case "space":
            playing, sample = view.playing, stay(view, log)
            view.playing = not playing and sample is not None
            if view.playing and step_of(view, sample) >= sample.T - 1:
                view.t = -1
        case "<" | ">":
            view.speed = max(1.0, min(64.0, view.speed * (2 if key == ">" else 0.5)))
            view.note = f"{view.speed:g} steps a second"
        case "g":
            stay(view, log)
            view.it, view.s = 0, 0
        case "G" | "f" if key == "G" or not view.follow:
            view.it, view.t, view.follow, view.playing = None, None, True, False
        case "f":
            stay(view, log)
        case _ if key in CYCLES:
            name = "sort" if key == "s" and view.number == 4 else CYCLES[key]
            values, of = VALUES.get(name, (False, True)), view if hasattr(view, name) else view.look
            value = values[(values.index(getattr(of, name)) + 1) % len(values)]
            if of is view:
                setattr(view, name, value)
            else:
                view.look = replace(view.look, **{name: value})
            view.note = f"{name}: {value}"
        case "/":
            view.typing, view.filter, view.pick = True, "", 0
            view.number = view.number if view.number == 4 else 5
        case "escape":
            view.help, view.zoom, view.filter = False, False, ""
        case "enter" if charts:
            view.zoom = not view.zoom
        case "enter":
            stay(view, log)
            view.number = 3
        case "?":
            view.help, view.pick = not view.help, 0
        case "q":
            return "quit"
        case "e":
            return "save"
    return ""


def stay(view: View, log: Log) -> Sample | None:
    """Stop following: keep what is on the screen, whatever arrives. The sample that this leaves."""
    view.follow = view.playing = False
    key = key_of(view, log)
    if key is None:
        return None
    view.it, view.s = key
    return log.sample(*key)


def play(view: View, log: Log) -> None:
    """One step of the playback."""
    sample = on_screen(view, log)
    last = sample.T - 1 if sample else 0
    view.t = min((-1 if view.t is None else view.t) + 1, last)
    view.playing = view.t < last


def make_app(logs: Sequence[Log], view: View, hz: float = 4.0):
    """The Textual app. With hz 0 it reads only when somebody calls its `pump`."""
    from rich.style import Style
    from textual import events
    from textual.app import App, ComposeResult
    from textual.binding import Binding
    from textual.geometry import Region
    from textual.strip import Strip
    from textual.widget import Widget

    def cut(line: Strip, x: int) -> bool:
        """Whether a wide character stands on both sides of column x."""
        return line.crop(0, x).text + line.crop(x).text != line.text

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

    class Monitor(App):
        """Keys and time change the view and the logs; `draw` shows them."""

        CSS = "Screen { layout: horizontal; overflow: hidden; } Slice { height: 100%; width: 1; }"
        ENABLE_COMMAND_PALETTE = False
        BINDINGS = [Binding("ctrl+c", "quit", priority=True),
                    Binding("tab", "press('tab')", priority=True),
                    Binding("shift+tab", "press('shift+tab')", priority=True)]

        told: list[tuple] = []  # what `news` was when the frame was drawn
        kept: dict[tuple, Strip] = {}  # by row
        base: Style | None = None
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
            base = Style.parse(f"{view.look.fg} on {view.look.bg}")
            rows = [tuple(row) for row in frame(view, logs, *self.size)]
            kept = self.kept if base == self.base else {}
            self.kept, self.base = {}, base
            for row in rows:
                self.kept[row] = kept.get(row) or Strip(
                    [Segment(text, base + Style.parse(style)) for text, style in row])
            self.told, self.drawn = self.news(), time.monotonic()
            lines, slices, ends = [self.kept[row] for row in rows], list(self.query(Slice)), [0]
            wide = [line for line in lines if any(cell_len(c) > 1 for c in set(line.text))]
            for i in range(1, len(slices) + 1):
                end = max(ends[-1], self.size.width * i // len(slices))
                while end > ends[-1] and any(cut(line, end) for line in wide):
                    end -= 1
                ends.append(end)
            columns = zip(*(line.divide(ends[1:]) for line in lines))
            for one, start, end, column in zip(slices, ends, ends[1:], columns):
                one.show(column, end - start)

        def news(self) -> list[tuple]:
            """What makes a new frame necessary, keys apart: events, the state, growing silence."""
            states = [(log.run.lines, *log.status()) for log in logs]
            return [(lines, state, int(age) if age >= 5 and state in GOING else 0)
                    for lines, state, age in states]

        def pump(self) -> None:
            """Read what is new, for 40 ms at most, and show it; go on at once if there is more."""
            behind = any([log.poll() for log in logs])
            hurry = behind and time.monotonic() < self.drawn + 0.5
            if not hurry and self.told != self.news():
                self.draw()
            if behind and hz:
                self.set_timer(0.01, self.pump)

        def advance(self) -> None:
            if view.playing and time.monotonic() - self.stepped >= 1 / view.speed:
                self.stepped = time.monotonic()
                play(view, logs[view.run])
                self.draw()
            elif not view.playing:
                self.player.pause()

        def action_press(self, key: str) -> None:
            wish = press(view, key, logs)
            if wish == "quit":
                self.exit()
            elif wish == "save":
                view.note = save(view, logs, *self.size)
            elif view.playing and hz:
                self.player.resume()
            self.draw()

        def on_key(self, event: events.Key) -> None:
            printable = event.is_printable and event.character != " "
            self.action_press(event.character if printable else event.key)

    return Monitor()


# ---- command line --------------------------------------------------------------------------------


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


def summary(log: Log) -> dict:
    """The last state of a run for scripts; numbers that JSON does not have are strings."""
    run, (state, age) = log.run, log.status()

    def safe(values: dict) -> dict:
        floats = {name: v for name, v in values.items() if isinstance(v, float)}
        return values | {name: str(v) for name, v in floats.items() if not math.isfinite(v)}

    return {"run": log.name, "log": str(log.path), "status": state, "age_s": round(age, 1),
            "it": run.it, "done": run.done, "iters": run.size("iters"), "phase": run.phase,
            "task": run.meta.get("task"), "model": run.meta.get("model"),
            "metrics": safe({name: run.latest(name) for name in run.series}),
            "evals": {it: safe(e) for it, e in run.evals.items()}, "alerts": run.alerts[-20:],
            "checkpoint": run.ckpt.get("path"), "lines": run.lines, "bad_lines": run.bad}


def follow(log: Log, hz: float) -> None:
    """Print a line for each iteration, evaluation and alert, until the run has ended."""
    told: set[tuple] = set()
    while True:
        behind, run = log.poll(), log.run
        names = [name for name in HEALTH if name in run.series][:8]
        lines = {(it, 2, f"{level}  {message}") for it, level, message in run.alerts}
        for it, e in run.evals.items():
            lines.add((it, 0, f"eval  accuracy {e['accuracy']:.1%} of {e['n']}"))
        for it in run.series[names[0]] if names else ():
            values = [f"{name} {num(run.series[name].get(it))}" for name in names]
            lines.add((it, 1, "  ".join(values)))
        for it, _, text in sorted(lines - told):
            print(f"it {it:>5}  {text}", flush=True)
        told |= lines
        state = log.status()[0]
        if not behind and state not in (*GOING, "waiting"):
            print(f"{state} after {run.done} updates", flush=True)
            return
        time.sleep(0 if behind else 1 / hz)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="python tui.py [RUN ...] [options]",
        description="Watch a training run, look at one that is over, compare several.",
        epilog="Exit codes: 0 fine, 2 no such run, 3 the log is newer than this program.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26, width=100))
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
    add("--palette", default="viridis", choices=PALETTES, metavar="NAME", help=", ".join(PALETTES))
    add("--ascii", action="store_true", help="nothing but ASCII")
    add("--light", action="store_true", help="for a light terminal (default: as COLORFGBG says)")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    streams = (sys.__stdin__, sys.__stdout__, sys.__stderr__)
    served = "TEXTUAL_DRIVER" in os.environ  # a browser is at the other end
    dumb = os.environ.get("TERM", "dumb") == "dumb" or os.environ.get("CI")
    terminal = all(stream.isatty() for stream in streams) and not dumb
    asked = args.once or args.plain or args.json or args.list or args.svg
    live = not asked and (terminal or args.serve or served)
    try:
        paths = [find(name) for name in args.runs or [None]] if not args.list else sorted(
            Path(args.runs[0] if args.runs else "runs").glob("*/events.jsonl"))
        missing = [path for path in paths if not path.exists()]
        if missing and not live:
            raise FileNotFoundError(f"no events yet: {missing[0]}")
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    if args.serve and not served:
        try:
            from textual_serve.server import Server
        except ModuleNotFoundError:
            print("--serve needs one more package: pip install textual-serve", file=sys.stderr)
            return 2
        command = shlex.join([sys.executable, __file__, *sys.argv[1:]])
        Server(command, "127.0.0.1", args.serve, title="tui.py").serve()
        return 0
    encoding = sys.stdout.encoding or "ascii"
    ascii_only = args.ascii or not encoding.lower().startswith("utf")
    look = Look(args.palette, "ascii" if ascii_only else "braille",
                args.light or os.environ.get("COLORFGBG", "").endswith(";15"))
    number = VIEWS.index(args.view) + 1 if args.view in VIEWS else int(args.view)
    view = View(number, args.it, args.sample or 0, args.step, guess=args.guess, look=look,
                follow=args.it is args.sample is args.step is None)
    logs = [Log(path, args.replay, patience=20 if live else 0) for path in paths]
    for log in logs:
        while log.poll(0.05) and not live:
            pass
    if any(log.run.newer for log in logs):
        print(f"the log is newer than version {SCHEMA}: update tui.py", file=sys.stderr)
        return 3
    size = shutil.get_terminal_size((120, 40))
    if live:
        app = make_app(logs, view, args.hz)
        signal.signal(signal.SIGTERM, lambda *_: app.exit())  # the terminal is put back in order
        app.run()
    elif args.list:
        print("\n".join(run_line(log, str(log.path.parent)) for log in logs))
    elif args.json:
        print(json.dumps(summary(logs[0]), allow_nan=False))
    elif args.plain:
        follow(logs[0], args.hz)
    elif args.svg:
        args.svg.write_text(svg(frame(view, logs, *size), look), encoding="utf-8")
    else:
        print(plain(frame(view, logs, *size)).encode(encoding, "replace").decode(encoding))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(0)
