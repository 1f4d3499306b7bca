"""What does each idea contribute? Runs arms, tasks and seeds, and keeps what came out.

    python bench/study.py run exact [--processes 2] [--seeds 0 1 2] [--tasks sudoku ...]
    python bench/study.py table exact

A group (`exact`, ...) is some arms on some tasks; an arm is flags of egspo.py. Every run is a
process of one thread, and a line of bench/study.jsonl when it has finished; runs with a line are
not repeated, and one that was interrupted goes on where it was. So the command may be stopped at
any time. The folders of the runs are under --runs, without the checkpoints of finished ones.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
RECORD = HERE / "study.jsonl"

TASKS = {  # flags beside the embedded model's defaults
    "sudoku": "--task sudoku",
    "countdown": "--task countdown",
    "toycode": "--task toycode",
}
ARMS = {
    "default": "",
    "mu2": "--mu 2",
    "all": "--select all",
    "all-mu2": "--select all --mu 2",
    "exact": "--likelihood exact",
    "exact-mu2": "--likelihood exact --mu 2",
    "exact-all": "--likelihood exact --select all",
    "exact-all-mu2": "--likelihood exact --select all --mu 2",
    "minibatches": "--minibatches 4",
}
GROUPS = {  # name -> tasks, arms
    "exact": (TASKS, [arm for arm in ARMS if arm != "minibatches"]),
    "minibatches": (TASKS, ["default", "minibatches"]),
}


def rows(group: str, record: Path = RECORD) -> Iterator[dict]:
    """What the finished runs of a group have left."""
    tasks, arms = GROUPS[group]
    for line in record.read_text().splitlines() if record.exists() else ():
        row = json.loads(line)
        if row["task"] in tasks and row["arm"] in arms:
            yield row


# ---- one run -------------------------------------------------------------------------------------


def run(task: str, arm: str, seed: int, folder: Path, more: list[str]) -> dict:
    """Start it, or go on with it, and return its row. RuntimeError if it fails."""
    out = folder / f"{task}-{arm}-{seed}"
    flags = [*TASKS[task].split(), *ARMS[arm].split(), "--seed", str(seed), *more]
    words = ["--resume"] if (out / "config.json").exists() else ["--model", "tiny", *flags]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{out.name}.txt", "a") as said:
        done = subprocess.run(
            [sys.executable, HERE.parent / "egspo.py", "--out", str(out), *words],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=said, stderr=said, check=False,
        )  # fmt: skip
    log = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    if done.returncode:
        raise RuntimeError(f"{out.name}: {log[-1].get('err') or 'failed'}; see {said.name}")
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return {"task": task, "arm": arm, "seed": seed, "flags": " ".join(flags)} | summary(log)


def summary(log: list[dict]) -> dict:
    """A run's row: its curve on the validation split, the test split, and how far it moved."""
    steps = [event for event in log if event["e"] == "step"]
    evals = {split: [] for split in ("val", "test")}
    for event in log:
        if event["e"] == "eval":
            evals[event["split"]].append((event["it"], event["m"]))
    spent = {0: {}} | {event["it"] + 1: event["m"] for event in steps}
    curve = [
        {
            "step": step,
            "accuracy": m["accuracy"],
            "samples": spent[step].get("compute/samples", 0),
            "tflop": spent[step].get("compute/tflop", 0),
        }
        for step, m in evals["val"]
    ]
    last, test = evals["val"][-1][1], evals["test"][-1][1]
    return {
        "curve": curve,
        "accuracy": last["accuracy"],
        "test": [test["accuracy"], test["lo"], test["hi"]],
        "kl": max(event["m"].get("kl", 0) for event in steps),
        "kl/uniform": last.get("kl/uniform"),
        "hours": sum(event["m"]["t/total"] for event in steps) / 3600,
    }


def run_group(args: argparse.Namespace) -> None:
    """All that is missing, some at a time; what fails is said, and the others go on."""
    tasks, arms = (
        chosen or all for chosen, all in zip((args.tasks, args.arms), GROUPS[args.group])
    )
    have = {(row["task"], row["arm"], row["seed"]) for row in rows(args.group)}
    wanted = [(task, arm, seed) for seed in args.seeds for arm in arms for task in tasks]
    missing = [key for key in wanted if key not in have]
    print(f"{len(wanted) - len(missing)} of {len(wanted)} runs are there", flush=True)

    def one(key: tuple[str, str, int]) -> None:
        try:
            row = run(*key, args.runs, args.flags)
        except (RuntimeError, OSError) as error:
            print(f"failed: {error}", flush=True)
            return
        with open(RECORD, "a") as file:  # one short line: whole, whoever else appends
            file.write(json.dumps(row) + "\n")
        print(f"{' '.join(map(str, key))}: {row['accuracy']:.3f}", flush=True)

    with ThreadPoolExecutor(args.processes) as pool:
        list(pool.map(one, missing))


# ---- what came out -------------------------------------------------------------------------------


def table(group: str) -> None:
    """Every run of the group, a line each."""
    print("| task | arm | seed | validation, % | test, % [95 %] | largest KL | KL, uniform step |")
    print("|---|---|---|---|---|---|---|")
    for row in sorted(rows(group), key=lambda row: (row["task"], row["arm"], row["seed"])):
        test, lo, hi = (100 * x for x in row["test"])
        cells = (
            row["task"], row["arm"], row["seed"], f"{100 * row['accuracy']:.1f}",
            f"{test:.1f} [{lo:.1f}, {hi:.1f}]", f"{row['kl']:.3f}", f"{row['kl/uniform']:.3f}",
        )  # fmt: skip
        print("| " + " | ".join(map(str, cells)) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[], help="only these")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[], help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="where the runs go")
    parser.add_argument("flags", nargs="*", help="more flags of egspo.py, after --")
    args = parser.parse_args()
    if args.what == "table":
        return table(args.group)
    run_group(args)


if __name__ == "__main__":
    main()
