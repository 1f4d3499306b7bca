"""A run that never ran: an events.jsonl (schema 1) of the size of an 8B model's, without a model.

The stored log of a real run, tests/run, is small; this one is for long texts (T 64, C 128, K 8),
for a rollout in progress and for logs of any length. The same seed writes the same bytes.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path

T, C, K, BLOCK, N, G = 64, 128, 8, 32, 16, 8
PROMPT = (
    "A bakery sold 48 loaves on Monday and half as many on Tuesday. On Wednesday it sold twice "
    "what it sold on Tuesday. How many loaves did it sell over the three days?"
)
ANSWER = (
    "<reasoning>\nOn Monday the bakery sold 48 loaves.\n"
    "On Tuesday it sold half as many, so it sold 48 / 2 = 24 loaves.\n"
    "On Wednesday it sold twice that, so it sold 24 * 2 = 48 loaves.\n"
    "To get the total we add the three days together:\n    48 + 24 + 48 = 120\n"
    "So the bakery sold 120 loaves over the three days.\n</reasoning>\n"
    "<answer>\n\\boxed{120}\n</answer>"
)
WORDS = re.findall(r"<\/?\w+>|\n *| ?[A-Za-z]+|\d| ?[^\sA-Za-z\d]|\s", ANSWER)[:C]


def decode(rng: random.Random, sharp: float) -> tuple[list[int], list[float], list[float]]:
    """One trajectory: when each position was revealed, its entropy, and the mean of each step."""
    when, entropy, steps = [T] * C, [0.0] * C, [0.0] * T
    for t in range(T):
        start, depth = t * C // T // BLOCK * BLOCK, t * C / T % BLOCK / BLOCK
        masked = [i for i in range(start, start + BLOCK) if when[i] == T]
        for i in sorted(masked, key=lambda i: i / BLOCK + rng.gauss(0, 0.35))[: C // T]:
            likely = 2.6 * math.exp(-4 * depth) + 1.4 * (rng.random() < 0.06)
            when[i] = t
            entropy[i] = (
                likely * rng.lognormvariate(0, 0.3) * sharp * (1.0 if i < len(WORDS) else 0.05)
            )
            steps[t] += entropy[i] * T / C
    return when, entropy, steps


def rounded(values: list[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def sample(
    rng: random.Random, it: int, s: int, right: bool, roll: tuple, chosen: list[int]
) -> dict:
    """One whole trajectory with what training made of its selected steps."""
    when, entropy, steps = roll
    guesses = [[w if rng.random() < 0.5 + t / T / 2 else "120" for w in WORDS] for t in chosen]
    early = rounded([0.2 + 0.6 * rng.random() * t / T for t in chosen])
    return dict(
        e="sample", it=it, s=s, p=s // G, g=s % G, prompt=PROMPT, tok=WORDS,
        rev=when[: len(WORDS)], tent=[round(50 * h) for h in entropy[: len(WORDS)]],
        ent=rounded(steps), sel=chosen, srw=early, adv=rounded([right - e for e in early]),
        ratio=rounded([1 + rng.gauss(0, 0.06) for _ in chosen]), x0=guesses,
        rw=dict(correct=float(right), format=0.5),
    )  # fmt: skip


def metrics(rng: random.Random, it: int, iters: int, reward: float, mean: list[float]) -> dict:
    """The record of a step under the names that the trainer logs."""
    return {
        "reward/mean": reward + 0.5, "reward/std": 0.3, "reward/correct": reward,
        "reward/format": 0.5, "loss": rng.gauss(0, 0.02), "kl": 0.002 + 0.02 * it / iters,
        "clip_frac": abs(rng.gauss(0.055, 0.02)), "ratio/mean": 1.0, "ratio/max": 1.2,
        "adv/abs": 0.3, "grad_norm": abs(rng.gauss(0.42, 0.09)), "lr": 3e-5,
        "entropy/mean": sum(mean) / T, "entropy/sel": sum(sorted(mean)[-K:]) / K,
        "zero_adv_frac": 0.06, "len/mean": 116.0, "trunc_frac": 0.03,
        "tok_s": 89 + rng.gauss(0, 4), "t/rollout": 12.9, "t/update": 7.0,
        "t/total": 23.4 + rng.gauss(0, 0.7), "mem/peak_gb": 61.2, "eta_s": (iters - it - 1) * 23.4,
    }  # fmt: skip


def events(
    iters: int = 12, start: float = 1.76e9, name: str = "fake", until: int | None = None
) -> Iterator[dict]:
    """The events of a run in order; `until`: stop, without an end, in the rollout of that step."""
    rng, now = random.Random(0), start
    sizes = dict(T=T, K=K, block=BLOCK, N=N, G=G)
    yield dict(
        e="meta", ts=now, v=1, run=name, host="h", boot="b", pid=4242, git="a7d618b", L=C,
        argv=["egspo.py"], task="gsm8k", model="LLaDA-8B-Instruct", iters=iters, **sizes,
        cfg=dict(task="gsm8k", lr=3e-5, C=C, **sizes), resume=None,
    )  # fmt: skip
    for it in range(iters):
        skill, now = 0.05 + 0.9 / (1 + math.exp(-8 * (it / iters - 0.35))), now + 1
        rolls = [decode(rng, 1.1 - 0.5 * it / iters) for _ in range(N)]
        mean = [sum(roll[2][t] for roll in rolls) / N for t in range(T)]
        yield dict(e="phase", ts=now, it=it, name="rollout")
        for t0 in range(0, T, 5):
            now += 1
            shown = [i for i in range(len(WORDS)) if t0 <= rolls[0][0][i] < t0 + 5]
            revealed = [[i, WORDS[i], *rounded([rolls[0][1][i]])] for i in shown]
            H = rounded(mean[t0 : t0 + 5])
            yield dict(e="denoise", ts=now, it=it, b=0, t0=t0, s=0, H=H, rv=revealed)
            if it == until and t0 > T // 2:
                return
        yield dict(e="phase", ts=now, it=it, name="update")
        chosen = [sorted(sorted(range(T), key=lambda t: -roll[2][t])[:K]) for roll in rolls]
        right = [rng.random() < skill for _ in range(N)]
        for s in range(4):
            yield sample(rng, it, s, right[s], rolls[s], chosen[s]) | dict(ts=now)
        rewards = [0.5 + one for one in right[:G]]
        yield dict(e="group", ts=now, it=it, p=0, text=["".join(WORDS)] * G, rw=rewards)
        m = {k: float(f"{v:.4g}") for k, v in metrics(rng, it, iters, sum(right) / N, mean).items()}
        counts, now = [sum(t in steps for steps in chosen) for t in range(T)], now + 8
        yield dict(e="step", ts=now, it=it, m=m, ent=rounded(mean), sel=counts, n=N)
        if m["clip_frac"] > 0.09:
            yield dict(e="alert", ts=now, it=it, level="warn", msg=f"clip_frac {m['clip_frac']}")
        if it % 3 == 2:
            ends = dict(zip(("accuracy", "lo", "hi"), rounded([skill, skill - 0.05, skill + 0.05])))
            yield dict(e="eval", ts=now, it=it + 1, n=256, split="val", m=ends)
            yield dict(e="ckpt", ts=now, it=it + 1, path=f"checkpoints/step-{it + 1}")
    yield dict(e="end", ts=now, status="finished", it=iters, err=None)


def encode(event: dict, q: int) -> bytes:
    head = {"e": event["e"], "q": q, "ts": round(event["ts"], 3)}
    rest = {name: value for name, value in event.items() if name not in head}
    text = json.dumps(head | rest, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def write(folder: Path, **options) -> Path:
    """Write a whole run into `folder`, return the path of its log."""
    folder.mkdir(parents=True, exist_ok=True)
    path, run = folder / "events.jsonl", events(**{"name": folder.name} | options)
    path.write_bytes(b"".join(encode(event, q) for q, event in enumerate(run)))
    return path
