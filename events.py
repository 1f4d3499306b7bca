"""What is written down? events.jsonl: its schema, `EventLog` that writes it, `Log` that reads it.

`events.jsonl` is the contract between the trainer and whoever reads along (tui.py, bench/): schema
version 1. UTF-8, one JSON object per line, appended by one writer, the first rank; where a line
would pass 64 KiB, the guesses and then the texts are left out. Denoising time t counts in
generation order, 0 sees only masks; entropies are in nats, means over the tokens revealed at a
step; numbers have 4 significant digits; nan and inf are the strings "nan", "inf" and "-inf".

Every event begins with `e`, its kind, `q`, its number in the file, and `ts`, unix seconds.

  meta     v 1; run, host, boot, pid, git, argv, model, task; iters, T, K, L (= C), block, N, G;
           cfg, all settings; resume: the step it continues from (no step yet: null, or 0 of sft.py)
  phase    it; name: rollout, logp (choosing steps, log-probs, guesses), score (rewards, credit),
           update, eval, save
  denoise  the rollout in progress, from a few looks a second: it; b 0; t0, the first step since
           the last look; H, the mean entropy of each step since; s 0, the row shown; rv, what was
           revealed there, [position, text, entropy]; in a rollout's first one also its prompt
  sample   a trajectory: it, s (row), p (prompt), g (sample of it), prompt; of each position tok
           (its text), rev (the step that revealed it, T where the row had ended) and tent (its
           entropy, in 1/50 nat); of each step ent; of each selected step sel (which), adv, ratio,
           srw (the reward of its guess) and x0 (the guess, token by token); rw, the reward by
           part; ok, correct or not; len, tokens before the end
  group    all samples of a prompt: it, p; text and rw of each
  step     it; m, the metrics; ent, the mean entropy of each denoising step; sel, by how many rows
           each was selected; n rows of this rank
  eval     it = step, the rollouts learnt; split (val, test, or a task of --eval-also); n problems;
           m: accuracy with its 95 % interval lo to hi, reward and its parts, tokens, forwards,
           seconds, tok_s; in training also kl/uniform, the KL to the reference in nats a token, at
           steps drawn uniformly
  ckpt     it, path: a checkpoint is complete on disk
  alert    it, level, msg
  hb       pid: still alive, where nothing was written for 15 s
  end      status: finished, stopped or crashed; it, err

Metrics of a step are means over all rows, micro-batches, updates and ranks (seconds and memory are
the first rank's), in groups by slash:
reward/mean, reward/std and reward/PART; correct; loss, kl (k3 over the selected moves), clip_hi,
clip_lo, clip_frac, ratio/mean, ratio/max, adv/abs, zero_adv_frac (groups without any gradient),
grad_norm, lr; entropy/mean, entropy/sel (of the selected steps); len/mean, len/max, trunc_frac
(rows without an end token); cache/weight, cache/kl; seconds t/PHASE and t/total, eta_s, tok_s;
mem/peak_gb; and what the run took so far on all ranks: compute/samples, compute/updates,
compute/forwards (passes of a row through the network; a backward counts as two, over frozen
weights as one, and what fills up a micro-batch not) and compute/tflop. Another one is a
`tally.add` in the trainer: readers take whatever they find.

After `meta` with resume k, a reader forgets the steps, samples and groups from k on. What it does
not know, kinds and fields, it ignores; a line that it cannot use, it counts.

The writer is given tensors but needs nothing of torch, so that the monitor, which imports this
file, starts at once and runs where there is none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

SCHEMA = 1  # the newest version that is written and understood here


def say(line: str, file=None) -> None:
    """To the terminal, from the first rank only. A run outlives its terminal: Ctrl-C ends the `tee`
    behind a pipe too, and may come in the middle of a line."""
    if int(os.environ.get("RANK", 0)) == 0:
        try:
            print(line, file=file, flush=True)
        except OSError:  # what is written later, at the exit too, goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), (file or sys.stdout).fileno())
        except RuntimeError:  # of a signal, inside another print
            pass


# ---- writing -------------------------------------------------------------------------------------

LONGEST = 65536  # bytes of a line
PHASES = ("rollout", "logp", "score", "update")  # of a step; `eval` and `save` come between two


class EventLog:
    """events.jsonl, written by the first rank: one line and one os.write an event.

    A log that cannot be written is reported once and never stops training. A torn last line is
    closed first. ValueError where another process is writing it.
    """

    def __init__(self, out: str, rank: int = 0):
        self.file, self.fd = Path(out) / "events.jsonl", None
        self.q = self.it = self.lost = 0
        self.torn = False
        self.compute: dict[str, float] = {}  # since the run began
        self.tracker = None  # see `tracker`
        self.wrote = self.shown = time.monotonic()
        self.seconds: dict[str, float] = {}
        self.pace: list[float] = []
        self.lock, self.closed = threading.Lock(), threading.Event()
        if rank > 0:
            return
        self.fd = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--out {out}: another process is writing this run") from None
        except OSError as error:  # Lustre, unless mounted with -o flock
            say(f"warning: no locks in {out} ({error.strerror}): let no second process write there")
        size = os.fstat(self.fd).st_size
        tail = os.pread(self.fd, 2 * LONGEST, max(0, size - 2 * LONGEST))
        if tail and not tail.endswith(b"\n"):
            os.write(self.fd, b"\n")
        self.q = next_number(tail)
        threading.Thread(target=self.heartbeat, daemon=True).start()

    def write(self, e: str, durable: bool = False, **fields) -> None:
        """One event; `durable`: on disk before this returns."""
        with self.lock:
            if self.fd is None:
                return
            head = f'{{"e":"{e}","q":{self.q},"ts":{time.time():.3f},'
            line = head + encode(fields)
            for optional in ("x0", "text", "prompt"):
                if len(line) >= LONGEST and optional in fields:
                    fields[optional] = None
                    line = head + encode(fields)
            text = ("\n" * self.torn + line + "\n").encode()
            try:
                self.torn = os.write(self.fd, text) < len(text)  # the disk is full
                if durable:
                    os.fsync(self.fd)
            except OSError as error:
                self.lost += 1
                if self.lost == 1:
                    say(f"warning: cannot write {self.file}: {error}; training does not need it")
            self.q += 1
            self.wrote = time.monotonic()

    def track(self, m: dict[str, float], step: int) -> None:
        """Metrics for --track, until that service fails."""
        try:
            if self.tracker:
                self.tracker(m, step)
        except Exception as error:
            self.tracker = None
            say(f"warning: --track {self.cfg.track} failed and gets no more: {error}; the log does")

    def heartbeat(self) -> None:
        while not self.closed.wait(15):
            if time.monotonic() - self.wrote >= 15:
                self.write("hb", pid=os.getpid())

    def begin(self, cfg, name: str, ranks, tokenizer, ends, resume: int | None) -> None:
        """Say what the run is: the first event, and again whenever it is resumed.

        cfg: a config.Config; name: of the model; ranks: run.Ranks; ends: the ids that end a
        turn.
        """
        self.cfg, self.ranks, self.tokenizer, self.ends = cfg, ranks, tokenizer, ends
        N, sizes = cfg.B * cfg.G * ranks.world, dict(T=cfg.T, K=cfg.K, L=cfg.C, block=cfg.block)
        if self.fd is not None and cfg.track != "none":
            try:
                self.tracker = tracker(cfg, resume)
            except Exception as error:  # each service has its own
                raise ValueError(f"--track {cfg.track}: {error}") from None
        self.meta(cfg, name, resume, task=cfg.task, **sizes, N=N, G=cfg.G)

    def meta(self, cfg, name: str, resume: int | None, **more) -> None:
        """The event that begins a run. cfg: settings with at least `out` and `steps`."""
        host, boot = this_machine()
        self.write(
            "meta",
            v=SCHEMA,
            run=Path(cfg.out).name,
            host=host,
            boot=boot,
            pid=os.getpid(),
            git=git_commit(),
            argv=sys.argv,
            model=name,
            iters=cfg.steps,
            **more,
            cfg=dataclasses.asdict(cfg),
            resume=resume,
        )

    @contextlib.contextmanager
    def phase(self, step: int, name: str):
        self.it = step
        self.write("phase", it=step, name=name)
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began

    def watcher(self, step: int, prompt: str) -> Callable | None:
        """For `egspo.rollout`: at most `log_live` times a second, the steps since the last look."""
        if self.fd is None or self.cfg.log_live == 0:
            return None
        seen = 0

        def watch(t: int, roll) -> None:
            nonlocal seen
            now = time.monotonic()
            if now - self.shown < 1 / self.cfg.log_live and t < self.cfg.T - 1:
                return
            self.shown = now
            when, ids, nats = (
                x_NC[0].tolist() for x_NC in (roll.when_NC, roll.token_NC, roll.entropy_NC)
            )
            revealed = [
                [i, self.tokenizer.decode([ids[i]]), nats[i]]
                for i in sorted(range(self.cfg.C), key=when.__getitem__)  # in order of time
                if seen <= when[i] <= t
            ]
            H = mean_by_step(roll.entropy_NT[:, seen : t + 1])
            what = {} if seen else {"prompt": prompt}
            self.write("denoise", it=step, b=0, t0=seen, H=H, s=0, rv=revealed, **what)
            seen = t + 1

        return watch

    def tell(self, step: int, tally, problems, answers, rewards, roll, moves) -> None:
        """What a step did: statistics of all ranks, and some of this one's trajectories.

        tally: a run.Tally. Of this rank's N rows: problems, answers (texts) and rewards
        (data.Reward); roll, an egspo.Rollout; moves, the egspo.Moves that were learnt.
        """
        length_N, entropy_NT = roll.lengths(self.ends), roll.entropy_NT
        t_NK = None if moves.t_S is None else moves.t_S.view(len(rewards), -1)
        values = [float(reward) for reward in rewards]
        tally.add("reward/mean", values)
        tally.add("reward/square", [value**2 for value in values])
        tally.add("correct", [float(reward.correct) for reward in rewards])
        for name in dict.fromkeys(name for reward in rewards for name in reward.parts):
            said = [reward.parts[name] for reward in rewards if name in reward.parts]
            tally.add(f"reward/{name}", said)
        tally.add("entropy/mean", entropy_NT, entropy_NT > -math.inf)
        if t_NK is not None:
            tally.add("entropy/sel", entropy_NT.gather(1, t_NK), moves.live_SU.view(t_NK.shape))
        tally.add("adv/abs", moves.adv_SU.abs(), moves.live_SU)
        if moves.cache_SU is not None:
            tally.add("cache/weight", moves.cache_SU, moves.live_SU)
            tally.add("cache/kl", moves.rollout_SU - moves.old_SU, moves.live_SU)
        idle_B = (moves.adv_SU.reshape(len(rewards) // self.cfg.G, -1).abs() < 1e-6).all(1)
        tally.add("zero_adv_frac", idle_B.float())
        tally.add("len/mean", length_N)
        tally.peak("len/max", length_N)
        tally.add("trunc_frac", (length_N == self.cfg.C).float())
        self.step(step, tally.means(self.ranks.gather), entropy_NT, t_NK)
        if self.fd is not None:
            self.samples(step, problems, answers, rewards, roll, length_N.tolist(), moves)

    def step(self, step: int, m: dict[str, float], entropy_NT, t_NK) -> None:
        """The step's record, and one line on the terminal."""
        cfg, N = self.cfg, len(entropy_NT)
        total = sum(self.seconds.get(name, 0) for name in PHASES)
        self.pace = (self.pace + [total])[-20:]
        left = (cfg.steps - step - 1) * sum(self.pace) / len(self.pace)
        m["reward/std"] = math.sqrt(max(0.0, m.pop("reward/square") - m["reward/mean"] ** 2))
        m["clip_frac"] = m["clip_hi"] + m["clip_lo"]
        m["tok_s"] = m["len/mean"] * N * self.ranks.world / self.seconds["rollout"]
        self.compute = {
            name: value + self.compute.get(name, 0)
            for name, value in m.items()
            if name.startswith("compute/")
        }
        m.update(self.compute)
        m.update({f"t/{name}": self.seconds[name] for name in PHASES})
        m.update({"t/total": total, "eta_s": left})
        selected = []
        if t_NK is not None:  # steps after a row's end fill up its K and do not count
            chosen_NT = entropy_NT.new_zeros(entropy_NT.shape).scatter(1, t_NK, 1)
            selected = (chosen_NT * (entropy_NT > -math.inf)).sum(0).int().tolist()
        self.write("step", it=step, m=m, ent=mean_by_step(entropy_NT), sel=selected, n=N)
        self.track(m, step)
        kl = f"  kl {m['kl']:.4f}" if "kl" in m else ""
        say(
            f"step {step + 1:>4}/{cfg.steps}  reward {m['reward/mean']:.3f}"
            f"  correct {m['correct']:.3f}  entropy {m['entropy/mean']:.2f}{kl}"
            f"  clip {m['clip_frac']:.3f}  {total:.1f} s  eta {left / 60:.1f} min"
        )

    def samples(self, step, problems, answers, rewards, roll, length, moves) -> None:
        """The trajectory of the first row of two prompts, and the groups of two prompts."""
        G, K = self.cfg.G, 0 if moves.t_S is None else len(moves.t_S) // len(rewards)
        live = moves.live_SU[:, 0].tolist()
        for row in dict.fromkeys((0, min(G, len(problems) - 1) // G * G)):
            own = [s for s in range(row * K, (row + 1) * K) if live[s]]
            guess = None if moves.guess_SC is None else moves.guess_SC[own].tolist()
            self.write(
                "sample",
                it=step,
                s=row,
                p=row // G,
                g=row % G,
                prompt=problems[row].prompt,
                tok=pieces(roll.token_NC[row].tolist(), self.tokenizer),
                rev=roll.when_NC[row].tolist(),
                tent=(roll.entropy_NC[row] * 50).round().int().tolist(),
                ent=roll.entropy_NT[row].tolist(),
                sel=moves.t_S[own].tolist() if K else [],
                adv=moves.adv_SU[own, 0].tolist() if K else [],
                ratio=moves.ratio_SU[own, 0].tolist() if K else [],
                srw=moves.early_S[own].tolist() if guess else [],
                x0=[pieces(ids, self.tokenizer) for ids in guess] if guess else None,
                rw={"reward": float(rewards[row]), **rewards[row].parts},
                ok=rewards[row].correct,
                len=length[row],
            )
        for p in range(min(2, len(problems) // G)):
            group = slice(p * G, (p + 1) * G)
            marks = [float(reward) for reward in rewards[group]]
            self.write("group", it=step, p=p, text=answers[group], rw=marks)

    def eval(self, step: int, m: dict[str, float], split: str) -> None:
        self.write("eval", it=step, m=m, n=m["n"], split=split, step=step)
        self.track({f"eval/{split}/{name}": value for name, value in m.items()}, step)
        say(
            f"{split:<4} {step:>4}/{self.cfg.steps}  accuracy {m['accuracy']:.3f}"
            f" [{m['lo']:.3f}, {m['hi']:.3f}]"
            f"  reward {m['reward']:.3f}  of {m['n']} held out  {m['seconds']:.1f} s"
        )

    def end(self, status: str, error: str | None = None) -> None:
        self.closed.set()
        if status == "crashed":
            self.write("alert", it=self.it, level="error", msg=error)
        self.write("end", status=status, it=self.it, err=error, durable=True)
        with self.lock:
            if self.fd is not None:
                os.close(self.fd)  # and with it the lock on the file
            self.fd = None


def tracker(cfg, resume: int | None) -> Callable[[dict, int], None]:
    """Shows the metrics of a step elsewhere too (--track), under the run's name; a run that is
    resumed goes on there. The log stays the source."""
    if cfg.track == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(Path(cfg.out) / "tensorboard"), purge_step=resume)
        return lambda m, step: [board.add_scalar(name, x, step) for name, x in m.items()]
    service, name = importlib.import_module(cfg.track), Path(cfg.out).name
    same = {"id": name} if cfg.track == "wandb" else {}  # trackio goes by the name
    service.init(project="egspo", name=name, resume="allow", config=dataclasses.asdict(cfg), **same)
    return lambda m, step: service.log(m, step=step)


def encode(fields: dict) -> str:
    """The rest of a line, behind the fields that every event has."""
    return json.dumps(compact(fields), separators=(",", ":"), allow_nan=False)[1:]


def compact(x):
    """Numbers to 4 significant digits; nan and inf as strings, since JSON has none."""
    if isinstance(x, float):
        return float(f"{x:.4g}") if math.isfinite(x) else str(x)
    if isinstance(x, dict):
        return {key: compact(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [compact(value) for value in x]
    return x


def next_number(tail: bytes) -> int:
    """One more than the number of the last event."""
    for line in reversed(tail.splitlines()):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return json.loads(line)["q"] + 1
    return 0


def mean_by_step(entropy_NT) -> list[float]:
    """Over the rows that had not ended."""
    live_NT = entropy_NT > -math.inf
    return (entropy_NT.masked_fill(~live_NT, 0).sum(0) / live_NT.sum(0)).tolist()


def pieces(ids: list[int], tokenizer) -> list[str]:
    """Each token as text; a character split over tokens stands at the first, the rest are empty."""
    texts, first = [], 0
    for i in range(len(ids)):
        text = tokenizer.decode(ids[first : i + 1])
        texts.append("")
        if text.endswith("\ufffd") and i - first < 3:
            continue
        texts[first], first = text, i + 1
    return texts


def git_commit() -> str:
    ask = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--short", "HEAD"]
    with contextlib.suppress(OSError):
        return subprocess.run(ask, capture_output=True, text=True).stdout.strip()
    return ""


# ---- reading -------------------------------------------------------------------------------------
# `read` for a run that is over. For one that goes on: Tail (the bytes of a growing file) -> History
# (what its events add up to), Sample (a trajectory), together a Log.

Place = tuple[int, int]  # offset and length of a line in the file
Lines = list[tuple[int, bytes]]  # offset and line


def read(out: str | Path) -> list[dict]:
    """The events that count of the run in this folder: neither torn lines nor what a resume did
    again."""
    file, kept = Path(out) / "events.jsonl", []
    for line in file.read_bytes().split(b"\n") if file.exists() else ():
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if event["e"] == "meta":
                done = event.get("resume") or 0  # steps; what was evaluated after them still holds
                kept = [e for e in kept if e.get("it", -1) < done + (e["e"] == "eval")]
            kept.append(event)
    return kept


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
            with open(self.path, "rb") as file:
                stat, head = os.fstat(file.fileno()), file.read(64)
                same = stat.st_ino == self.inode and stat.st_size >= self.offset
                again = self.offset > 0 and not (same and head.startswith(self.head))
                file.seek(0 if again else self.offset)
                chunk = file.read(limit)
        except OSError:  # there is none yet, or a network's disk is away for a while
            return False, []
        if again:
            self.offset = self.holes = 0
        self.inode, self.head = stat.st_ino, head[: self.offset or None]
        end = chunk.rfind(b"\n") + 1
        if not end and len(chunk) == limit:
            end = limit  # no event is this long: count it as a bad line
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


# what parsing a line that is no event of ours may raise
UNUSABLE = (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError)
STAMP = re.compile(rb'"ts":\s*([\d.]+)')
FILED = re.compile(rb'\{"e":\s*"(denoise|sample|group)".*?"it":\s*(\d+),\s*"[bsp]":\s*(\d+)')


def stamp(line: bytes) -> float:
    """The unix time in a line of the log; 0 if it has none."""
    found = STAMP.search(line)
    return float(found[1]) if found else 0.0


def number(value: object) -> float:
    """A logged number; "nan", "inf" and "-inf" are strings in the log."""
    return math.nan if value is None else float(value)


def finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


@dataclass
class History:
    """What the events of a log add up to. `feed` depends on the lines alone: no clock, no files."""

    meta: dict = field(default_factory=dict)
    series: dict[str, dict[int, float]] = field(default_factory=dict)  # metric -> it -> value
    entropy: dict[int, list[float]] = field(default_factory=dict)  # it -> mean entropy of each step
    share: dict[int, list[float]] = field(default_factory=dict)  # it -> of rows that chose a step
    evals: dict[int, dict] = field(default_factory=dict)  # on the validation split
    tests: dict[str, dict] = field(default_factory=dict)  # the last on each other split
    samples: dict[int, dict[int, Place]] = field(default_factory=dict)  # it -> row -> where it is
    groups: dict[int, dict[int, Place]] = field(default_factory=dict)  # it -> prompt -> where
    alerts: list[tuple[int, str, str]] = field(default_factory=list)  # it, level, message
    rollout: list[bytes] = field(default_factory=list)  # `denoise` lines since the last `step`
    phase: str = ""
    it: int = 0  # the iteration being worked on
    rows: int = 0  # of the last step, whose means `entropy` and `share` are
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
        filed = FILED.match(line) if line.endswith(b"}") else None
        try:
            if not filed:
                self.apply(json.loads(line))
            elif filed[1] == b"denoise":
                self.rollout.append(line)
            else:
                places = self.samples if filed[1] == b"sample" else self.groups
                places.setdefault(int(filed[2]), {})[int(filed[3])] = offset, len(line)
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
                self.step(it, event)
            case "eval":
                values = {name: number(value) for name, value in event["m"].items()}
                told = {"n": event.get("n"), "split": event.get("split", "")}
                evaluated = {"accuracy": math.nan} | values | told
                if told["split"] in ("", "val"):
                    self.evals[it] = evaluated
                else:
                    self.tests[str(told["split"])] = {"it": it} | evaluated
                if told["split"] not in ("", "val", "test"):  # of --eval-also: a curve of its own
                    series = self.series.setdefault(f"eval/{told['split']}", {})
                    series[it] = evaluated["accuracy"]
                self.edition += 1
            case "alert":
                self.alerts.append((it, str(event.get("level", "warn")), str(event["msg"])))
                self.edition += 1
            case "ckpt" | "end" as name:
                setattr(self, name, event)

    def step(self, it: int, event: dict) -> None:
        metrics = {name: number(value) for name, value in event["m"].items()}
        entropy = [number(value) for value in event.get("ent") or []]
        chosen = [int(n) for n in event.get("sel") or []]
        self.rows = rows = int(event.get("n") or max(chosen, default=0)) or 1
        for name, value in metrics.items():
            if not math.isfinite(value) and math.isfinite(self.latest(name) or 0.0):
                self.alerts.append((it, "error", f"{name} is {value}"))
            self.series.setdefault(name, {})[it] = value
        if entropy:
            self.entropy[it], self.share[it] = entropy, [n / rows for n in chosen]
        self.it, self.done, self.edition = it, it + 1, self.edition + 1
        self.rollout.clear()

    def rewind(self, it: int) -> None:
        """The run starts again at `it`: what was logged from there on is void."""
        records = self.entropy, self.share, self.samples, self.groups, *self.series.values()
        for record in records:
            for key in [key for key in record if key >= it]:
                del record[key]
        self.series = {name: values for name, values in self.series.items() if values}
        self.evals = {at: e for at, e in self.evals.items() if at <= it}  # of the weights at `it`
        self.tests = {split: e for split, e in self.tests.items() if e["it"] <= it}
        self.alerts = [alert for alert in self.alerts if alert[0] < it]
        self.rollout.clear()
        self.done, self.edition = min(self.done, it), self.edition + 1

    def along(self, axis: str, values: dict[int, float]) -> dict[float, float]:
        """Values by iteration, by what the run had taken of `axis` (compute/*) when it began; what
        the log does not say drops out."""
        if axis == "iteration":
            return values
        taken = self.series.get(f"compute/{axis}")
        spent = {-1: 0.0} | taken if taken else {}
        return {spent[it - 1]: value for it, value in values.items() if it - 1 in spent}

    def size(self, name: str) -> int:
        """T, K, C, block, G, N or iters, from wherever the trainer wrote it; 0 if it did not."""
        cfg = self.meta.get("cfg")
        both = self.meta | (cfg if isinstance(cfg, dict) else {})
        value = both.get(name) or both.get({"C": "L", "iters": "steps"}.get(name, name))
        return value if isinstance(value, int) and 0 < value < 10**6 else 0

    def latest(self, name: str) -> float | None:
        return next(reversed(self.series.get(name, {}).values()), None)

    @property
    def evaluations(self) -> list[tuple[int, str, dict]]:
        """(it, split, what it said): all of the validation split, the last of each other."""
        found = [(it, "eval", e) for it, e in self.evals.items()]
        return found + [(e["it"], split, e) for split, e in self.tests.items()]

    @property
    def accuracy(self) -> float | None:
        """That of the last evaluation."""
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
                    hidden = {"tok": [""] * C, "rev": [T] * C, "tent": [0.0] * C}
                    sample = Sample({"it": it, "s": event.get("s"), "g": b, **hidden}, T)
                sample.prompt = str(event.get("prompt") or sample.prompt)
                sample.ent += [math.nan] * (t0 - len(sample.ent)) + H
                for k, (i, token, entropy) in enumerate(revealed):
                    sample.tok[i], sample.tent[i] = str(token), 50 * number(entropy)
                    sample.rev[i] = t0 + k * len(H) // len(revealed)
        return sample


class Sample:
    """One trajectory. The state at step t is: `tok[i]` where `rev[i] <= t`, masks elsewhere."""

    def __init__(self, event: dict, live_T: int | None = None):
        """From a sample event, raising one of UNUSABLE if it is none; or from the rollout in
        progress, which will have live_T steps."""
        event = {name: value for name, value in event.items() if value is not None}

        def numbers(name: str) -> list[float]:
            return [number(value) for value in event.get(name, [])]

        self.it, self.s, self.p, self.g = (
            int(event.get(name, 0)) for name in ("it", "s", "p", "g")
        )
        self.prompt = str(event.get("prompt", ""))
        self.tok = ["" if token is None else str(token) for token in event["tok"]]
        when, n = [int(t) for t in event["rev"]], len(self.tok)
        self.ent, self.live = numbers("ent"), live_T is not None
        self.T = live_T if self.live else len(self.ent) or max(when, default=0) + 1
        self.rev = (when + [self.T] * n)[:n]  # T where never decoded: the row had ended
        self.tent = (numbers("tent") + [0.0] * n)[:n]  # entropy of each token, in 1/50 nat
        self.sel = [int(t) for t in event.get("sel", [])]  # the selected steps, and for each:
        self.adv, self.ratio = numbers("adv"), numbers("ratio")
        self.srw = numbers("srw")  # reward of the greedy one-step completion
        self.x0 = [[str(token) for token in guess] for guess in event.get("x0", [])]  # and itself
        self.rw = {name: number(value) for name, value in event.get("rw", {}).items()}  # by part
        self.reward = self.rw.get("reward", sum(self.rw.values()) if self.rw else None)
        right = event.get("ok", self.rw.get("correct", self.rw.get("solved")))
        self.ok = None if right is None else right >= 1
        self.decoded = sum(map(self.reached, range(n)))  # positions that were decoded at all
        self.length = int(event.get("len", 0)) or self.decoded

    @property
    def steps(self) -> int:
        """Denoising steps so far."""
        return len(self.ent) if self.live else self.T

    def reached(self, i: int) -> bool:
        """Whether position i is decoded in some step, this far or later."""
        return self.live or self.rev[i] < self.T

    def guess(self, t: int) -> Sequence[str]:
        """The one-step completion whose reward step t got, if t was selected."""
        k = self.sel.index(t) if t in self.sel else len(self.x0)
        return self.x0[k] if k < len(self.x0) else ()


def parse_group(event: dict) -> list[tuple[str, float]]:
    """(completion, reward) of the samples of one prompt."""
    return [(str(text), number(reward)) for text, reward in zip(event["text"], event["rw"])]


class Log:
    """A run on disk: the tail of its file, the history read so far, the trajectories looked at."""

    def __init__(self, path: Path, speed: float = 0.0, patience: int = 20, clock=time.time):
        """With a speed, a finished log as if it were being written now, so many times as fast."""
        self.path, self.speed, self.clock, self.began = path, speed, clock, clock()
        self.tail, self.waiting = Tail(path, patience), deque()
        self.replayed, self.first = speed > 0, 0.0
        self.forget()

    def now(self) -> float:
        """The time, or how far a replay has got."""
        now = self.clock()
        return self.first + (now - self.began) * self.speed if self.speed else now

    def forget(self) -> None:
        self.history, self.event = History(), lru_cache(2048)(self.read)

    @property
    def name(self) -> str:
        return str(self.history.meta.get("run") or self.path.parent.name)

    def poll(self, seconds: float = 0.04) -> bool:
        """Read what is new, for about so long; True if there may be more."""
        until = time.monotonic() + seconds
        while True:
            again, lines = self.tail.read()
            if again:
                edition = self.history.edition
                self.forget()
                self.history.edition = edition + 1  # what was drawn of the old one is not of it
            self.waiting.extend(lines)
            self.first = self.first or stamp(self.waiting[0][1] if self.waiting else b"")
            while self.waiting and (not self.speed or stamp(self.waiting[0][1]) <= self.now()):
                offset, line = self.waiting.popleft()
                self.history.feed(line, offset)
            if not lines or time.monotonic() > until:
                return bool(lines)

    def read(self, place: Place | None, parse: Callable[[dict], object]) -> object:
        """What `parse` makes of a line of the file; None if there is no such event."""
        with contextlib.suppress(OSError, *UNUSABLE), open(self.path, "rb") as file:
            file.seek(place[0])
            return parse(json.loads(file.read(place[1])))

    def sample(self, it: int, s: int) -> Sample | None:
        """The trajectory of row s of an iteration."""
        return self.event(self.history.samples.get(it, {}).get(s), Sample)

    def group(self, sample: Sample) -> list[Sample]:
        """The samples that share a sample's prompt: of the others only the text is known."""
        it, p, group = sample.it, sample.p, {sample.g: sample}
        texts = self.event(self.history.groups.get(it, {}).get(p), parse_group)
        for g, (text, reward) in enumerate(texts or ()):
            event = {"it": it, "p": p, "g": g, "s": sample.s - sample.g + g, "tok": [text]}
            group.setdefault(g, Sample(event | {"rev": [0], "rw": {"reward": reward}}))
        return [group[g] for g in sorted(group)]

    def status(self) -> tuple[str, float]:
        """(one of STATUS; seconds since the last event)."""
        history, meta = self.history, self.history.meta
        if not history.recent:
            return "waiting", 0.0
        age = max(0.0, self.now() - stamp(history.recent[-1]))
        if history.end:
            return str(history.end.get("status", "finished")), age
        if not self.replayed and [meta.get("host"), meta.get("boot")] == this_machine():
            try:
                os.kill(int(meta.get("pid")), 0)
            except ProcessLookupError:
                return "crashed", age
            except (PermissionError, *UNUSABLE):
                pass  # it runs, or there is no telling
        seconds = list(history.series.get("t/total", {}).values())[-50:]
        usual = statistics.median(seconds) if seconds else 0.0
        return ("dead" if age > 600 else "quiet" if age > max(60, 4 * usual) else "live"), age

    def summary(self) -> dict:
        """The last state of a run; numbers that JSON does not have are strings."""
        history, meta, (state, age) = self.history, self.history.meta, self.status()

        def safe(values: dict) -> dict:
            lost = {k for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)}
            return {k: str(v) if k in lost else v for k, v in values.items()}

        # fmt: off
        return {
            "run": self.name, "log": str(self.path), "status": state, "age_s": round(age, 1),
            "host": meta.get("host"), "pid": meta.get("pid"), "git": meta.get("git"),
            "command": shlex.join(map(str, meta.get("argv") or ())),
            "task": meta.get("task"), "model": meta.get("model"),
            "sizes": "  ".join(f"{x} {history.size(x)}" for x in "T K C block N G".split()),
            "phase": history.phase, "it": history.it, "done": history.done,
            "iters": history.size("iters"), "checkpoint": history.ckpt.get("path"),
            "error": (history.end or {}).get("err"),
            "lines": history.lines, "bad_lines": history.bad,
            "metrics": safe({name: history.latest(name) for name in history.series}),
            "evals": {it: safe(e) for it, e in history.evals.items()},
            "tests": {split: safe(e) for split, e in history.tests.items()},
            "alerts": history.alerts[-20:],
        }
        # fmt: on


def this_machine() -> list[str]:
    """Its name, and an id of the time since it was started."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return [platform.node(), path.read_text().strip() if path.exists() else ""]
