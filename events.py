"""What does a run write down? `Tally` for its numbers, `EventLog` for its file, `say` for people.

`events.jsonl` is the contract between the trainer and whoever reads along (tui.py, bench/): schema
version 1. UTF-8, one JSON object a line, a line at most 64 KiB, appended by one writer, the first
rank. Denoising time t counts in generation order, 0 sees only masks; entropies are in nats, means
over the tokens revealed at a step; numbers have 4 significant digits; nan and inf are the strings
"nan", "inf" and "-inf".

Every event begins with `e`, its kind, `q`, its number in the file, and `ts`, unix seconds.

  meta     v 1; run, host, boot, pid, git, argv, model, task; iters, T, K, L (= C), block, N, G;
           cfg, all settings; resume: the step it continues from, or null
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
  eval     it = step, the updates made; split; n problems; m: accuracy with its 95 % interval lo to
           hi, reward and its parts, tokens, forwards, seconds, tok_s
  ckpt     it, path: a checkpoint is complete on disk
  alert    it, level, msg
  hb       pid: still alive, where nothing was written for 15 s
  end      status: finished, stopped or crashed; it, err

Metrics of a step are means over all rows, micro-batches, updates and ranks, in groups by slash:
reward/mean, reward/std and reward/PART; correct; loss, kl (k3 over the selected moves), clip_hi,
clip_lo, clip_frac, ratio/mean, ratio/max, adv/abs, zero_adv_frac (groups without any gradient),
grad_norm, lr; entropy/mean, entropy/sel (of the selected steps); len/mean, len/max, trunc_frac
(rows without an end token); cache/weight, cache/kl; seconds t/PHASE and t/total, eta_s, tok_s;
mem/peak_gb. Another one is a `tally.add` in the trainer: readers take whatever they find.

After `meta` with resume k, a reader forgets the steps, samples and groups from k on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from config import Config, model_name


class Tally:
    """Means over everything a metric names: all rows, micro-batches, updates and ranks.

    Sums stay tensors on the device until the one read in `means`.
    """

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.peaks: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor | float, where: Tensor | None = None) -> None:
        value = torch.as_tensor(value).double()
        where = torch.ones_like(value, dtype=torch.bool) if where is None else where
        pair = torch.stack((torch.where(where, value, 0).sum(), where.sum().double()))
        self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def peak(self, name: str, value: Tensor) -> None:
        self.peaks[name] = value.max()

    def means(self, gather: Callable[[object], list]) -> dict[str, float]:
        """`gather` brings together what all ranks have (`Ranks.gather`)."""
        mine = {name: pair.tolist() for name, pair in self.sums.items()}
        peaks = {name: value.item() for name, value in self.peaks.items()}
        means, parts = {}, gather((mine, peaks))
        for name in dict.fromkeys(name for sums, _ in parts for name in sums):
            pairs = [sums[name] for sums, _ in parts if name in sums]
            means[name] = sum(total for total, _ in pairs) / max(1, sum(n for _, n in pairs))
        for name in peaks:
            means[name] = max(part[name] for _, part in parts)
        return means


def say(line: str, file=None) -> None:
    """To the terminal, from the first rank only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(line, file=file, flush=True)


# ---- the file ------------------------------------------------------------------------------------

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
        size = os.fstat(self.fd).st_size
        tail = os.pread(self.fd, 2 * LONGEST, max(0, size - 2 * LONGEST))
        if tail and not tail.endswith(b"\n"):
            os.write(self.fd, b"\n")
        self.q = next_number(tail)
        threading.Thread(target=self.heartbeat, daemon=True).start()

    def write(self, e: str, durable: bool = False, **fields) -> None:
        """One event; `durable`: on disk before this returns."""
        if self.fd is None:
            return
        with self.lock:
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

    def heartbeat(self) -> None:
        while not self.closed.wait(15):
            if time.monotonic() - self.wrote >= 15:
                self.write("hb", pid=os.getpid())

    def begin(self, cfg: Config, ranks, tokenizer, end: int, resume: int | None) -> None:
        """Say what the run is: the first event, and again whenever it is resumed.

        ranks: run.Ranks; end: the id of the end token.
        """
        self.cfg, self.ranks, self.tokenizer, self.end_id = cfg, ranks, tokenizer, end
        boot = Path("/proc/sys/kernel/random/boot_id")
        self.write(
            "meta",
            v=1,
            run=Path(cfg.out).name,
            host=platform.node(),
            boot=boot.read_text().strip() if boot.exists() else "",
            pid=os.getpid(),
            git=git_commit(),
            argv=sys.argv,
            model=model_name(cfg.model),
            task=cfg.task,
            iters=cfg.steps,
            T=cfg.T,
            K=cfg.K,
            L=cfg.C,
            block=cfg.block,
            N=cfg.B * cfg.G * ranks.world,
            G=cfg.G,
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
                for i in range(self.cfg.C)
                if seen <= when[i] <= t
            ]
            H = mean_by_step(roll.entropy_NT[:, seen : t + 1])
            what = {} if seen else {"prompt": prompt}
            self.write("denoise", it=step, b=0, t0=seen, H=H, s=0, rv=revealed, **what)
            seen = t + 1

        return watch

    def tell(self, step: int, tally: Tally, problems, answers, rewards, roll, moves) -> None:
        """What a step did: statistics of all ranks, and some of this one's trajectories.

        Of this rank's N rows: problems, answers (texts) and rewards (data.Reward); roll, an
        egspo.Rollout; moves, the egspo.Moves that were learnt.
        """
        length_N, entropy_NT = roll.lengths(self.end_id), roll.entropy_NT
        t_NK = None if moves.t_S is None else moves.t_S.view(len(rewards), -1)
        value_N = torch.tensor(rewards, dtype=torch.float64)
        tally.add("reward/mean", value_N)
        tally.add("reward/square", value_N**2)
        tally.add("correct", torch.tensor([float(reward.correct) for reward in rewards]))
        for name in rewards[0].parts:
            tally.add(f"reward/{name}", torch.tensor([reward.parts[name] for reward in rewards]))
        tally.add("entropy/mean", entropy_NT, entropy_NT > -math.inf)
        if t_NK is not None:
            tally.add("entropy/sel", entropy_NT.gather(1, t_NK), moves.live_SU.view(t_NK.shape))
        tally.add("adv/abs", moves.adv_SU.abs(), moves.live_SU)
        if moves.weight_SU is not None:
            tally.add("cache/weight", moves.weight_SU, moves.live_SU)
            tally.add("cache/kl", moves.drawn_SU - moves.old_SU, moves.live_SU)
        idle_B = (moves.adv_SU.reshape(len(rewards) // self.cfg.G, -1).abs() < 1e-6).all(1)
        tally.add("zero_adv_frac", idle_B.float())
        tally.peak("ratio/max", torch.where(moves.live_SU, moves.ratio_SU, 0))
        tally.add("len/mean", length_N)
        tally.peak("len/max", length_N)
        tally.add("trunc_frac", (length_N == self.cfg.C).float())
        self.step(step, tally.means(self.ranks.gather), entropy_NT, t_NK)
        if self.fd is not None:
            self.samples(step, problems, answers, rewards, roll, length_N.tolist(), moves)

    def step(self, step: int, m: dict[str, float], entropy_NT: Tensor, t_NK: Tensor | None) -> None:
        """The step's record, and one line on the terminal."""
        cfg, N = self.cfg, len(entropy_NT)
        total = sum(self.seconds.get(name, 0) for name in PHASES)
        self.pace = (self.pace + [total])[-20:]
        left = (cfg.steps - step - 1) * sum(self.pace) / len(self.pace)
        m["reward/std"] = math.sqrt(max(0.0, m.pop("reward/square") - m["reward/mean"] ** 2))
        m["clip_frac"] = m["clip_hi"] + m["clip_lo"]
        m["tok_s"] = m["len/mean"] * N * self.ranks.world / self.seconds["rollout"]
        m.update({f"t/{name}": self.seconds[name] for name in PHASES})
        m.update({"t/total": total, "eta_s": left})
        if torch.cuda.is_available():
            m["mem/peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        selected = []
        if t_NK is not None:  # steps after a row's end fill up its K and do not count
            live_NK = entropy_NT.gather(1, t_NK) > -math.inf
            selected = torch.bincount(t_NK[live_NK], minlength=cfg.T).tolist()
        self.write("step", it=step, m=m, ent=mean_by_step(entropy_NT), sel=selected, n=N)
        say(
            f"step {step + 1:>4}/{cfg.steps}  reward {m['reward/mean']:.3f}"
            f"  correct {m['correct']:.3f}  entropy {m['entropy/mean']:.2f}  kl {m['kl']:.4f}"
            f"  clip {m['clip_frac']:.3f}  {total:.1f} s  eta {left / 60:.1f} min"
        )

    def samples(self, step, problems, answers, rewards, roll, length, moves) -> None:
        """The trajectory of the first row of two prompts, and the groups of two prompts."""
        G, K = self.cfg.G, 0 if moves.t_S is None else len(moves.t_S) // len(rewards)
        for row in dict.fromkeys((0, min(G, len(problems) - 1) // G * G)):
            own = [s for s in range(row * K, (row + 1) * K) if moves.live_SU[s, 0]]
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


def mean_by_step(entropy_NT: Tensor) -> list[float]:
    """Over the rows that had not ended."""
    live_NT = entropy_NT > -math.inf
    return (torch.where(live_NT, entropy_NT, 0).sum(0) / live_NT.sum(0)).tolist()


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
