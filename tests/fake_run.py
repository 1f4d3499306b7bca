"""A run that never ran: an events.jsonl (schema v1) with the shape of a real one, without a model.

    python tests/fake_run.py runs/demo --iters 240 --kind gsm8k          # a finished run
    python tests/fake_run.py runs/demo --kind sudoku --live 10           # in (faster) real time

Two kinds: "sudoku" has the sizes of the embedded default (T 12, C 24, K 4), "gsm8k" those of an
8B model (T 64, C 128, K 8). The same seed writes the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

SIZES = {"sudoku": dict(T=12, L=24, K=4, block=24), "gsm8k": dict(T=64, L=128, K=8, block=32)}
QUESTION = {
    "sudoku": "Fill the 4x4 grid so that every row, column and 2x2 box holds 1 to 4 once.\n"
    "Puzzle: 1..4.41.2.4..3.1",
    "gsm8k": "A bakery sold 48 loaves on Monday and half as many on Tuesday. On Wednesday it sold "
    "twice what it sold on Tuesday. How many loaves did it sell over the three days?",
}
ANSWER = {
    "sudoku": "<answer>1234341221434321</answer>",
    "gsm8k": "<reasoning>\nOn Monday the bakery sold 48 loaves.\n"
    "On Tuesday it sold half as many, so it sold 48 / 2 = 24 loaves.\n"
    "On Wednesday it sold twice that, so it sold 24 * 2 = 48 loaves.\n"
    "To get the total we add the three days together:\n    48 + 24 + 48 = 120\n"
    "So the bakery sold 120 loaves over the three days.\n</reasoning>\n"
    "<answer>\n\\boxed{120}\n</answer>",
}


def tokens(text: str) -> list[str]:
    return re.findall(r"<\/?\w+>|\n *| ?[A-Za-z]+|\d| ?[^\sA-Za-z\d]|\s", text)


def number(value: float):
    """Numbers to 4 significant digits; what JSON cannot hold as a string."""
    return float(f"{value:.4g}") if math.isfinite(value) else str(value)


def decode(rng: random.Random, T: int, L: int, block: int, filled: int, sharp: float):
    """One trajectory: when each position was revealed, its entropy, and the mean of each step."""
    per_step, when, token_entropy = L // T, [T] * L, [0.0] * L
    steps_per_block = T * block // L
    for t in range(T):
        start = t // steps_per_block * block
        hidden = [i for i in range(start, start + block) if when[i] == T]
        depth = (t % steps_per_block) / steps_per_block
        for i in sorted(hidden, key=lambda i: i / block + rng.gauss(0, 0.35))[:per_step]:
            when[i] = t
            likely = 2.6 * math.exp(-4 * depth) * (0.75 + 0.25 * math.exp(-start / L))
            burst = 1.4 if rng.random() < 0.06 else 0.0
            token_entropy[i] = max(0.002, (likely + burst) * rng.lognormvariate(0, 0.3) * sharp)
    steps = [0.0] * T
    for i in range(L):
        if i >= filled:  # the end tokens are certain
            token_entropy[i] *= 0.05
        steps[when[i]] += token_entropy[i] / per_step
    return when, token_entropy, steps


def events(
    kind: str = "sudoku",
    iters: int = 40,
    N: int = 16,
    G: int = 8,
    seed: int = 0,
    start: float = 1.76e9,
    name: str = "",
    until: int | None = None,
) -> Iterator[dict]:
    """The events of a run in order; `until`: stop, without an end, in the rollout of that step."""
    size = SIZES[kind]
    T, L, K, block = size["T"], size["L"], size["K"], size["block"]
    rng, now = random.Random(seed), start
    seconds = {"sudoku": 1.6, "gsm8k": 23.4}[kind]
    words = tokens(ANSWER[kind])[:L]
    cfg = dict(
        task=kind,
        lr=3e-5,
        beta=0.04,
        eps_low=0.2,
        eps_high=0.5,
        lam=0.5,
        select="entropy",
        temperature=0.9,
        seed=seed,
        G=G,
        **{k: v for k, v in size.items() if k != "L"},
        C=L,
    )
    yield dict(
        e="meta",
        ts=now,
        v=1,
        run=name or f"egspo-{kind}",
        host="h",
        boot="b",
        pid=4242,
        git="a7d618b",
        argv=["egspo.py", "--task", kind],
        task=kind,
        model="tiny" if kind == "sudoku" else "LLaDA-8B-Instruct",
        iters=iters,
        N=N,
        G=G,
        cfg=cfg,
        resume=None,
        **size,
    )

    def phase(name: str, it: int, share: float) -> dict:
        nonlocal now
        now += share * seconds
        return dict(e="phase", ts=now, it=it, name=name)

    def evaluation(it: int) -> dict:
        share = skill(it)
        return dict(
            e="eval",
            ts=now,
            it=it,
            n=256,
            split="val",
            step=it,
            m=dict(
                accuracy=number(share),
                lo=number(max(0, share - 0.06)),
                hi=number(min(1, share + 0.06)),
                reward=number(0.3 + 0.7 * share),
            ),
        )

    def skill(it: int) -> float:
        return 0.05 + 0.9 / (1 + math.exp(-8 * (it / max(1, iters) - 0.35)))

    yield evaluation(0)
    for it in range(iters):
        sharp = 1.1 - 0.5 * it / max(1, iters)
        rolls = [decode(rng, T, L, block, len(words), sharp) for _ in range(N)]
        mean = [sum(r[2][t] for r in rolls) / N for t in range(T)]
        yield phase("rollout", it, 0.05)
        ticks = min(T, 14)
        for tick in range(ticks):
            t0, t1 = tick * T // ticks, (tick + 1) * T // ticks
            now += 0.5 * seconds / ticks
            when, entropy, _ = rolls[0]
            shown = sorted((when[i], i) for i in range(L) if t0 <= when[i] < t1)
            yield dict(
                e="denoise",
                ts=now,
                it=it,
                b=0,
                t0=t0,
                s=0,
                H=[number(h) for h in mean[t0:t1]],
                rv=[
                    [i, words[i] if i < len(words) else "<|eot|>", number(entropy[i])]
                    for _, i in shown
                ],
            )
            if it == until and tick == ticks * 3 // 5:
                return
        yield phase("score", it, 0.05)
        chosen = [sorted(sorted(range(T), key=lambda t: -r[2][t])[:K]) for r in rolls]
        right = [rng.random() < skill(it) for _ in range(N)]
        for s in range(min(4, N)):
            when, entropy, steps = rolls[s]
            wrong = [
                w if not w.strip().isdigit() or rng.random() < 0.6 else str(rng.randint(1, 4))
                for w in words
            ]
            tok = words if right[s] else wrong
            guess = [
                [w if rng.random() < 0.5 + 0.5 * t / T else rng.choice(words) for w in tok]
                + ["<|eot|>"] * (L - len(tok))
                for t in chosen[s]
            ]
            early = [number(0.2 + 0.6 * rng.random() * t / T) for t in chosen[s]]
            reward = 1.0 if right[s] else number(0.2 + 0.5 * rng.random())
            yield dict(
                e="sample",
                ts=now,
                it=it,
                s=s,
                p=s // G,
                g=s % G,
                prompt=QUESTION[kind],
                tok=tok,
                rev=when[: len(tok)],
                tent=[round(50 * h) for h in entropy[: len(tok)]],
                ent=[number(h) for h in steps],
                sel=chosen[s],
                srw=early,
                adv=[number(reward + 0.5 * (reward - e) - 0.6) for e in early],
                ratio=[number(1 + rng.gauss(0, 0.06)) for _ in range(K)],
                rw=dict(correct=float(right[s]), format=0.5)
                if kind == "gsm8k"
                else dict(cells=reward, solved=float(right[s])),
                gold="120",
                pred="120" if right[s] else "96",
                eos=L - len(tok),
                x0=guess,
            )
        yield dict(
            e="group", ts=now, it=it, p=0, text=["".join(words)] * G, len=[len(words)] * G,
            rw=[1.0 if ok else 0.4 for ok in right[:G]],
        )  # fmt: skip
        yield phase("update", it, 0.2)
        now += 0.2 * seconds
        reward = sum(right) / N
        metric = {
            "reward/mean": 0.25 + 0.7 * reward,
            "reward/std": 0.3,
            "loss": rng.gauss(0, 0.02),
            "reward/correct" if kind == "gsm8k" else "reward/solved": reward,
            "reward/format" if kind == "gsm8k" else "reward/cells": 0.3 + 0.6 * skill(it),
            "kl": 0.002 + 0.02 * it / iters + abs(rng.gauss(0, 0.001)),
            "clip_frac": abs(rng.gauss(0.055, 0.02)),
            "ratio/mean": 1 + rng.gauss(0, 0.003),
            "ratio/max": 1.1 + abs(rng.gauss(0, 0.2)),
            "adv/abs": 0.3 + rng.gauss(0, 0.03),
            "grad_norm": abs(rng.gauss(0.42, 0.09)),
            "lr": 3e-5,
            "entropy/mean": sum(mean) / T,
            "entropy/sel": sum(sorted(mean)[-K:]) / K,
            "zero_adv_frac": max(0, rng.gauss(0.06, 0.05)),
            "len/mean": len(words) + rng.gauss(0, 3),
            "len/max": L,
            "trunc_frac": 0.03,
            "tok_s": N * L / seconds * rng.gauss(1, 0.04),
            "t/rollout": 0.55 * seconds,
            "t/score": 0.05 * seconds,
            "t/logp": 0.1 * seconds,
            "t/update": 0.3 * seconds,
            "t/total": seconds * rng.gauss(1, 0.03),
            "mem/peak_gb": 61.2 if kind == "gsm8k" else 0.4,
            "eta_s": (iters - it - 1) * seconds,
        }
        yield dict(
            e="step",
            ts=now,
            it=it,
            m={k: number(v) for k, v in metric.items()},
            ent=[number(h) for h in mean],
            sel=[sum(t in c for c in chosen) for t in range(T)],
            n=N,
        )
        if metric["clip_frac"] > 0.1:
            yield dict(
                e="alert",
                ts=now,
                it=it,
                level="warn",
                msg=f"clip_frac {metric['clip_frac']:.2f}: the policy moved far in one update",
            )
        if (it + 1) % max(1, iters // 6) == 0 or it + 1 == iters:
            yield phase("eval", it + 1, 0.3)
            yield evaluation(it + 1)
            yield dict(e="ckpt", ts=now, it=it + 1, path=f"checkpoints/step-{it + 1}")
    yield dict(e="end", ts=now, status="finished", it=iters, err=None)


def encode(event: dict, q: int) -> bytes:
    head = {"e": event["e"], "q": q, "ts": round(event["ts"], 3)}
    rest = {k: v for k, v in event.items() if k not in head}
    return (
        json.dumps(head | rest, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
        + b"\n"
    )


def write(folder: Path, **options) -> Path:
    """Write a whole run into `folder`, return the path of its log."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "events.jsonl"
    options.setdefault("name", folder.name)
    path.write_bytes(b"".join(encode(e, q) for q, e in enumerate(events(**options))))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=SIZES, default="sudoku")
    parser.add_argument("--iters", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--until", type=int, help="stop in the rollout of this iteration")
    parser.add_argument(
        "--live", type=float, metavar="SPEED", help="write in real time, this much faster"
    )
    args = parser.parse_args()
    options = dict(kind=args.kind, iters=args.iters, seed=args.seed, until=args.until)
    if not args.live:
        print(write(args.folder, **options))
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    began = time.time()
    with open(args.folder / "events.jsonl", "ab", buffering=0) as file:
        for q, event in enumerate(events(start=began, name=args.folder.name, **options)):
            event["ts"] = began + (event["ts"] - began) / args.live
            if event["e"] == "meta":
                event |= dict(
                    pid=os.getpid(),
                    host=os.uname().nodename,
                    boot=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
                )
            time.sleep(max(0.0, event["ts"] - time.time()))
            file.write(encode(event, q))


if __name__ == "__main__":
    main()
