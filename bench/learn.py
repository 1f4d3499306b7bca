"""Does it learn? Runs the default for several tasks and seeds, and writes bench/learn.md.

    python bench/learn.py [--task sudoku countdown toycode] [--seeds 0 1 2] [-- flags of egspo.py]

The table is made of the runs' own event logs. Runs that are already there are not repeated.
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import events

BARS = "▁▂▃▄▅▆▇█"


def run(task: str, seed: int, folder: Path, flags: list[str]) -> list[dict]:
    """The run's events; made now unless it has already finished."""
    out = folder / f"{task}-{seed}"
    if not any(event.get("status") == "finished" for event in events.read(out)):
        words = ["--task", task, "--seed", str(seed), "--out", str(out), *flags]
        resume = ["--resume"] if (out / "config.json").exists() else []
        subprocess.run([sys.executable, HERE.parent / "egspo.py", *words, *resume], check=True)
    return events.read(out)


def row(task: str, seed: int, log: list[dict]) -> str:
    evals = [event for event in log if event["e"] == "eval" and event["split"] == "val"]
    evals = [*{event["it"]: event for event in evals}.values()]  # a resume evaluates again
    test = [event for event in log if event["e"] == "eval" and event["split"] == "test"][-1]["m"]
    steps = [event for event in log if event["e"] == "step"]
    curve = "".join(BARS[round(7 * event["m"]["accuracy"])] for event in evals)
    first, last = evals[0]["m"], evals[-1]["m"]
    minutes = (log[-1]["ts"] - log[0]["ts"]) / 60
    rewards = f"{steps[0]['m']['reward/mean']:.2f} → {steps[-1]['m']['reward/mean']:.2f}"
    interval = f"{100 * test['accuracy']:.1f} [{100 * test['lo']:.1f}, {100 * test['hi']:.1f}]"
    cells = (
        task, seed, f"{100 * first['accuracy']:.1f}", f"{100 * last['accuracy']:.1f}",
        interval, rewards, curve, len(steps), f"{minutes:.1f}",
    )  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", nargs="+", default=["sudoku", "countdown", "toycode"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/learn"), help="where the runs go")
    parser.add_argument("flags", nargs="*", help="flags of egspo.py, after --")
    args = parser.parse_args()
    lines = [
        "| task | seed | validation before, % | after, % | test after, % [95 %] | training reward "
        "| validation, 0 to 100 % | steps | minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for task in args.task:
        for seed in args.seeds:
            lines.append(row(task, seed, run(task, seed, args.runs, args.flags)))
            print(lines[-1], flush=True)
    (HERE / "learn.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
