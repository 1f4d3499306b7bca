"""What does each idea contribute? Runs arms, tasks and seeds, and says what came out.

    python bench/study.py run exact             stability of the exact likelihood; default settings
    python bench/study.py run tune              arms at several learning rates, on other seeds
    python bench/study.py run rates             entropy and random, each at the other's rate too
    python bench/study.py run planned           the arms of the planned contrasts, each at its best
    python bench/study.py run rest              other ways to select, ten seeds
    python bench/study.py run sweep             values of K and lam, and arms of less weight: three
    python bench/study.py table GROUP           every run of a group, a line each
    python bench/study.py report                bench/study.md: contrasts, tables, pictures

Every run is a process of one thread and, when it has finished, a line of bench/study.jsonl; runs
with a line are not repeated and one that was interrupted goes on where it was, so the command may
be stopped at any time. --tasks, --arms, --seeds, --rates and --processes choose less. The folders
of the runs are under --runs, without the checkpoints of finished ones.

The statistic is the mean share solved on the validation split over the run, the area under its
curve along samples or FLOPs. A seed decides batches and noise, and with them the whole first
rollout, so runs are compared in pairs of equal seed: mean difference, sign-flip test and
the 95 % interval that goes with it, Holm's correction over the planned contrasts of a task. A rate
is chosen for the arms in TUNED; the others differ from entropy in one thing and take its rate,
which favours none but entropy.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import events

RECORD = HERE / "study.jsonl"

DEFAULTS = {  # the embedded model's, as they are
    "sudoku": "--task sudoku",
    "countdown": "--task countdown",
    "toycode": "--task toycode",
}
SHORT = "--steps 6 --eval-every 1 --no-test --precision float32"  # later all arms are alike
FEW = f"--T 24 --K 2 {SHORT}"
SEPARATE = {  # one token a step, few selected, short: arms do not meet at the ceiling
    "hard": f"--task sudoku-hard {FEW}",
    "sums": f"--task countdown {FEW}",
    "code": f"--task toycode {FEW}",
}
TASKS = DEFAULTS | SEPARATE
ARMS = {  # arm of bench/arms.py, flags
    "default": "plain",
    "mu2": "plain --mu 2",
    "all-steps": "plain --select all",
    "all-mu2": "plain --select all --mu 2",
    "exact-default": "plain --likelihood exact",
    "exact-mu2": "plain --likelihood exact --mu 2",
    "exact-all": "plain --likelihood exact --select all",
    "exact-all-mu2": "plain --likelihood exact --select all --mu 2",
    "minibatches": "plain --minibatches 4",
    "entropy": "plain --lam 0",
    "all-few": "plain --lam 0 --select all --B 4",  # a quarter of the samples: FLOPs as entropy's
    "all-2": "plain --lam 0 --select all --steps 2",  # as many FLOPs in few, large updates
    "random": "plain --lam 0 --select random",
    "half": "half --lam 0 --select random",
    "uniform": "plain --lam 0 --select uniform",
    "lowest": "lowest --lam 0",
    "joint": "joint --lam 0",
    "stepwise": "plain --lam 0.5",
    "placebo": "placebo --lam 0.5",
    "exact": "plain --lam 0 --likelihood exact",
    "exact-own": "plain --lam 0 --likelihood exact",  # at the rate that is best for itself
    "all": "plain --lam 0 --select all",
    "diffu-grpo": "plain --method diffu_grpo --mu 12 --eps-low 0.5 --eps-high 0.5",
    "sampled": "plain --lam 0 --select sampled",
    "just-grpo": "plain --lam 0 --block 1 --select all --beta 0 --temperature 1 --normalise",
    "K-1": "plain --lam 0 --K 1",
    "K-4": "plain --lam 0 --K 4",
    "K-8": "plain --lam 0 --K 8",
    "lam-0.25": "plain --lam 0.25",
    "lam-1": "plain --lam 1",
}
PLANNED = [  # (arm, against, along)
    ("entropy", "random", "samples"),
    ("entropy", "all-few", "tflop"),
    ("stepwise", "entropy", "samples"),
    ("stepwise", "placebo", "samples"),
    ("exact", "entropy", "samples"),
]
ALONG = {"samples": "samples", "tflop": "FLOPs"}
SELECTING = ["half", "sampled", "uniform"]
PLANNED_ARMS = list(dict.fromkeys(arm for pair in PLANNED for arm in pair[:2]))
STUDIED = list(ARMS)[list(ARMS).index("entropy") :]
RATES = {"diffu-grpo": (1e-5, 3e-5, 1e-4)}  # and of the others:
USUAL_RATES = (2e-4, 4e-4, 8e-4, 1.6e-3)
TUNED = "entropy all-few all-2 random uniform exact-own all diffu-grpo just-grpo".split()
TUNING = (100, 101)  # seeds
GROUPS = {  # name -> tasks, arms, seeds
    "exact": (DEFAULTS, list(ARMS)[:8], (0, 1, 2)),
    "minibatches": (DEFAULTS, ["default", "minibatches"], (0, 1, 2)),
    "tune": (SEPARATE, TUNED, TUNING),
    "rates": (SEPARATE, ["entropy", "random"], range(10)),
    "planned": (SEPARATE, PLANNED_ARMS, range(10)),
    "rest": (SEPARATE, SELECTING, range(10)),
    "sweep": (SEPARATE, [a for a in STUDIED if a not in PLANNED_ARMS + SELECTING], range(3)),
}


def recorded() -> list[dict]:
    """What the finished runs have left."""
    return [json.loads(line) for line in RECORD.read_text().splitlines()] if RECORD.exists() else []


# ---- runs ----------------------------------------------------------------------------------------


def wanted(args: argparse.Namespace) -> list[tuple[str, str, float, int]]:
    """(task, arm, learning rate or 0 for the default, seed) of every run of a group, those first
    that complete a comparison."""
    tasks, arms, seeds = GROUPS[args.group]
    tasks, arms, seeds = args.tasks or tasks, args.arms or arms, args.seeds or seeds
    keys = []
    for task, seed, arm in itertools.product(tasks, seeds, arms):
        if args.group in ("tune", "rates"):
            rates = args.rates or RATES.get(arm, USUAL_RATES)
            keys += [(task, arm, rate, seed) for rate in rates]
        else:
            keys.append((task, arm, best_rate(task, arm) if task in SEPARATE else 0, seed))
    return keys


def tuned(task: str, arm: str) -> dict[float, float]:
    """The mean area at each learning rate tried, over the seeds of `tune`."""
    areas = {}
    for row in recorded():
        if (row["task"], row["arm"]) == (task, arm) and row["seed"] in TUNING and current(row):
            areas.setdefault(row["lr"], []).append(area(row, "samples"))
    return {rate: float(numpy.mean(areas[rate])) for rate in sorted(areas)}


def best_rate(task: str, arm: str) -> float:
    arm = arm if arm in TUNED else "entropy"
    areas = tuned(task, arm)
    if not areas:
        sys.exit(f"{task}, {arm}: no learning rate was tuned: python bench/study.py run tune")
    return max(areas, key=areas.get)


def current(row: dict) -> bool:
    """Was it made with the flags that its name means today?"""
    return row["flags"] == flags_of(row["task"], row["arm"], row["lr"], row["seed"])


def flags_of(task: str, arm: str, lr: float, seed: int) -> str:
    """An arm's exchange is not among them: its name says it."""
    rate = f"--lr {lr}" if lr else ""
    return " ".join(f"{TASKS[task]} {ARMS[arm].partition(' ')[2]} {rate} --seed {seed}".split())


def run(task: str, arm: str, lr: float, seed: int, folder: Path) -> dict:
    """Start it, or go on with it, and return its row. RuntimeError if it fails."""
    name, flags = ARMS[arm].split()[0], flags_of(task, arm, lr, seed)
    of_flags = hashlib.blake2b(flags.encode(), digest_size=3).hexdigest()  # changed: a new run
    out = folder / "-".join(map(str, (task, arm, *([lr] if lr else []), seed, of_flags)))
    words = ["--resume"] if (out / "config.json").exists() else ["--model", "tiny", *flags.split()]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{out.name}.txt", "a") as said:
        done = subprocess.run(
            [sys.executable, HERE / "arms.py", name, "--out", str(out), *words],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=said, stderr=said, check=False,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{out.name}: exit code {done.returncode}; see {said.name}")
    key = {"task": task, "arm": arm, "lr": lr, "seed": seed, "flags": flags}
    row = key | summary(events.read(out))
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return row


def summary(log: list[dict]) -> dict:
    """A run's row: its curve on the validation split, the test split, and how far it moved."""
    steps = {event["it"]: event["m"] for event in log if event["e"] == "step"}
    evals = {"val": {}, "test": {}}
    for event in log:
        if event["e"] == "eval":
            evals[event["split"]][event["it"]] = event["m"]
    curve = []
    for step, m in evals["val"].items():
        spent = steps[step - 1] if step else {}
        samples, tflop = (spent.get(f"compute/{name}", 0) for name in ("samples", "tflop"))
        curve.append(dict(step=step, accuracy=m["accuracy"], samples=samples, tflop=tflop))
    seconds = sum(m["seconds"] for split in evals.values() for m in split.values())
    (*_, last), (*_, test) = evals["val"].values(), evals["test"].values() or [None]
    return {
        "git": next(event["git"] for event in log if event["e"] == "meta"),
        "curve": curve,
        "accuracy": last["accuracy"],
        "test": test and [test["accuracy"], test["lo"], test["hi"]],
        "kl/uniform": last.get("kl/uniform"),
        "hours": (sum(m["t/total"] for m in steps.values()) + seconds) / 3600,
    }


def run_group(args: argparse.Namespace) -> None:
    """All that is missing, some at a time; what fails is said, and the others go on."""
    have = {(row["arm"], row["flags"]) for row in recorded()}
    missing = [key for key in wanted(args) if (key[1], flags_of(*key)) not in have]
    print(f"{len(missing)} runs to make", flush=True)

    def one(key: tuple) -> None:
        try:
            row = run(*key, args.runs)
        except Exception as error:
            print(f"failed: {' '.join(map(str, key))}: {error!r}", flush=True)
            return
        with open(RECORD, "a") as file:  # one short line: whole, whoever else appends
            file.write(json.dumps(row) + "\n")
        print(f"{' '.join(map(str, key))}: {row['accuracy']:.3f}", flush=True)

    with ThreadPoolExecutor(args.processes) as pool:
        list(pool.map(one, missing))


# ---- statistics ----------------------------------------------------------------------------------


def area(row: dict, along: str, limit: float | None = None) -> float:
    """The mean share solved over the run, along its samples or TFLOP, up to a limit."""
    x = numpy.array([point[along] for point in row["curve"]], dtype=float)
    y = numpy.array([point["accuracy"] for point in row["curve"]])
    limit = limit or x[-1]
    inside = x < limit
    x, y = numpy.append(x[inside], limit), numpy.append(y[inside], numpy.interp(limit, x, y))
    return float(numpy.sum(numpy.diff(x) * (y[1:] + y[:-1]) / 2) / limit)


def sign_flip(differences: numpy.ndarray, draws: int = 100_000) -> float:
    """How often a mean is as far from 0 if every difference could as well be its opposite: all sign
    patterns up to 16 differences, else a sample of them."""
    n = len(differences)
    if n <= 16:
        signs = numpy.array(list(itertools.product((-1, 1), repeat=n)))
    else:
        signs = numpy.random.default_rng(0).choice((-1, 1), (draws, n))
        signs[0] = 1  # what was seen is one of the patterns
    means = abs((signs * differences).mean(1))
    return float((means >= abs(differences.mean()) - 1e-12).mean())


def interval(values: numpy.ndarray) -> tuple[float, float]:
    """95 %: the means that the sign-flip test does not reject; endless below six values."""
    if sign_flip(numpy.ones_like(values)) > 0.05:
        return -math.inf, math.inf
    ends = []
    for rejected in (values.min() - 1e-9, values.max() + 1e-9):
        kept = values.mean()
        for _ in range(30):
            middle = (kept + rejected) / 2
            if sign_flip(values - middle) > 0.05:
                kept = middle
            else:
                rejected = middle
        ends.append(float(kept))
    return tuple(ends)


def holm(p: list[float]) -> list[float]:
    """p-values corrected for looking at several (Holm 1979)."""
    order, corrected, largest = numpy.argsort(p), [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = largest
    return corrected


def contrast(rows: dict, one: str, other: str, along: str) -> dict:
    """The paired difference of areas between two arms of a task; rows: (arm, seed) -> row."""
    found = dict(contrast=f"{one} − {other}", along=along)
    seeds = sorted(seed for arm, seed in rows if arm == one and (other, seed) in rows)
    if not seeds:
        return found | dict(n=0, p=1.0)  # and counts in Holm's correction all the same
    pairs = {seed: (rows[one, seed], rows[other, seed]) for seed in seeds}
    limit = min(row["curve"][-1][along] for pair in pairs.values() for row in pair)
    areas = {seed: [area(row, along, limit) for row in pair] for seed, pair in pairs.items()}
    ends = {s: [row["curve"][-1]["accuracy"] for row in pair] for s, pair in pairs.items()}
    return found | compared(areas) | dict(ends=compared(ends))


def compared(pairs: dict[int, list[float]]) -> dict:
    """Paired scores of two arms, by seed: their means and the difference."""
    scores = numpy.array([*pairs.values()])
    differences = scores[:, 0] - scores[:, 1]
    lo, hi = interval(differences)
    return dict(
        n=len(scores), pairs=pairs, means=scores.mean(0), differences=differences, lo=lo, hi=hi,
        mean=differences.mean(), median=numpy.median(differences), p=sign_flip(differences),
    )  # fmt: skip


# ---- what came out -------------------------------------------------------------------------------


def table(group: str) -> list[str]:
    """Every run of the group, a line each."""
    tasks, arms, seeds = GROUPS[group]
    lines = [
        "| task | arm | learning rate | seed | solved over the run, % | validation, % "
        "| test, % [95 %] | KL at a uniform step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = [row for row in recorded() if row["task"] in tasks and row["arm"] in arms]
    rows = [row for row in rows if row["seed"] in seeds and current(row)]
    for row in sorted(rows, key=lambda row: (row["task"], arms.index(row["arm"]), row["seed"])):
        test = "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in row["test"] or [0] * 3))
        cells = (
            row["task"], row["arm"], row["lr"] or "default", row["seed"],
            f"{100 * area(row, 'samples'):.1f}", f"{100 * row['accuracy']:.1f}",
            test if row["test"] else "",
            "" if row["kl/uniform"] is None else f"{row['kl/uniform']:.3f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def by_arm(task: str) -> dict[tuple[str, int], dict]:
    """The studied runs of a task at the best learning rate of their arm, by arm and seed."""
    found = {}
    for row in recorded():
        arm, seed = row["arm"], row["seed"]
        if row["task"] == task and arm in STUDIED and seed not in TUNING and current(row):
            if row["lr"] == best_rate(task, arm):
                found[arm, seed] = row
    return found


def report() -> None:
    """bench/study.md and a picture for each task that has runs."""
    lines = ["# What each idea contributes", ""]
    hours = sum(row["hours"] for row in recorded())
    lines += [
        "Every run starts from the same model. Its score is the share of 256 validation problems "
        "solved, averaged over the run: one that learns early scores more. Runs of equal seed "
        "share batches and noise (all-few, of smaller batches, those of the first step only), so "
        "two arms are compared seed by seed, and an interval holds the "
        "differences that a sign-flip test does not reject at 5 %, which supposes that they are "
        "symmetric (of six pairs it is their range). It is one over the noise of training alone: "
        "the starting model and the 256 problems are always the same, and learning rates were "
        "chosen on them too, with seeds 100 and 101, which count nowhere else. Arms without a line "
        "among the rates take entropy's. Holm: p corrected for as many contrasts as were planned. "
        f"{len(recorded())} runs, {hours:.1f} hours of one core.",
        "",
    ]
    for task in SEPARATE:
        rows = by_arm(task)
        if not rows:
            continue
        lines += [f"## {task}: `{SEPARATE[task]}`", "", *rate_table(task), ""]
        lines += [*arm_table(rows), ""]
        found, others = [contrast(rows, *pair) for pair in PLANNED], unplanned(rows)
        marked = [each | {"contrast": f"not planned: {each['contrast']}"} for each in others]
        if any(each["n"] for each in found):
            lines += [*contrast_table(found), ""]
        if drawn := [each for each in found + marked if each["n"] > 5]:  # whose intervals end
            picture(task, drawn)
            lines += [f"![{task}](study-{task}.png)", ""]
        if others:
            lines += ["Entropy against the other arms, not planned:", ""]
            lines += COLUMNS.format("arms, at equal").split("\n")
            for each in others:
                lines.append(f"| {each['contrast']}, {ALONG[each['along']]} | {cells(each)} |")
            lines.append("")
        if told := equal_rates(task):
            lines += [*told, ""]
    for group in ("exact", "minibatches"):
        if any(row["arm"] == GROUPS[group][1][-1] and current(row) for row in recorded()):
            lines += [f"## Default settings: {group}", "", *table(group), ""]
    (HERE / "study.md").write_text("\n".join(lines))
    print(f"written: {HERE / 'study.md'}")


def rate_table(task: str) -> list[str]:
    lines = [
        "| arm | solved over the run, %, at each learning rate tried (seeds 100 and 101) |",
        "|---|---|",
    ]
    for arm in TUNED:
        if areas := tuned(task, arm):
            tried = ", ".join(f"{rate:g}: {100 * share:.1f}" for rate, share in areas.items())
            lines.append(f"| {arm} | {tried} |")
    return lines


def equal_rates(task: str) -> list[str]:
    """Entropy against the other selections and the exact likelihood at each rate that was tried for
    both, and at the mean of the rates: which is best is itself uncertain."""
    title, rule = COLUMNS.format("arms, learning rate").split("\n")
    lines, at = [], {}
    for row in recorded():
        if row["task"] == task and row["seed"] not in TUNING and current(row):
            at.setdefault(row["lr"], {})[row["arm"], row["seed"]] = row
    for other in ("random", *SELECTING, "exact"):
        found = {rate: contrast(at[rate], "entropy", other, "samples") for rate in sorted(at)}
        found = {rate: each for rate, each in found.items() if each["n"] > 5}
        if len(found) < 2:  # what there is stands among the best rates
            continue
        for rate, each in found.items():
            lines.append(f"| {each['contrast']}, {rate:g} | {cells(each)} |")
        of_rates = [each["pairs"] for each in found.values()]
        seeds = sorted(set.intersection(*map(set, of_rates)))
        pairs = {s: numpy.mean([pairs[s] for pairs in of_rates], axis=0) for s in seeds}
        lines.append(f"| entropy − {other}, mean of them | {cells(compared(pairs))} |")
    if lines:
        lines[:0] = ["At the same learning rate, not planned:", "", title, rule]
    return lines


def unplanned(rows: dict) -> list[dict]:
    """The arms that are in no planned contrast against entropy, along samples (all-2, of two steps,
    is not comparable so) and, where a sample costs another amount, along FLOPs."""
    others = [(arm, "samples") for arm in STUDIED if arm not in (*PLANNED_ARMS, "all-2")]
    costly = [arm for arm in STUDIED if arm.startswith("K-")] + ["all-2", "diffu-grpo", "just-grpo"]
    others += [(arm, "tflop") for arm in costly]
    found = [contrast(rows, "entropy", *pair) for pair in others]
    return [each for each in found if each["n"]]


def arm_table(rows: dict) -> list[str]:
    lines = [
        "| arm | learning rate | seeds | solved over the run, %, and its range | after each update "
        "| samples | TFLOP |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in STUDIED:
        of_arm = [row for (name, _), row in rows.items() if name == arm]
        if of_arm:
            areas = numpy.array([area(row, "samples") for row in of_arm])
            lo, hi = areas.min(), areas.max()
            curves = [[point["accuracy"] for point in row["curve"]] for row in of_arm]
            curve = ", ".join(f"{100 * share:.0f}" for share in numpy.mean(curves, axis=0)[1:])
            ends = [row["curve"][-1] for row in of_arm]
            samples, tflop = (numpy.mean([e[name] for e in ends]) for name in ("samples", "tflop"))
            lines.append(
                f"| {arm} | {of_arm[0]['lr']:g} | {len(of_arm)} | {100 * areas.mean():.1f} "
                f"({100 * lo:.1f} to {100 * hi:.1f}) | {curve} | {samples:.0f} "
                f"| {tflop:.1f} |"
            )
    return lines


COLUMNS = (
    "| {} | pairs | the first, % | the second, % | difference, points [95 %] | median | p "
    "| at the end, %, p |\n|---|---|---|---|---|---|---|---|"
)


def cells(each: dict) -> str:
    """What a comparison says: a table's cells, from the number of pairs to the ends."""
    if not each["n"]:
        return "0 | | | not run | | | "
    mean, lo, hi, median = (100 * each[name] for name in ("mean", "lo", "hi", "median"))
    first, second = 100 * each["means"]
    bounds = f" [{lo:+.1f}, {hi:+.1f}]" if math.isfinite(lo) else ""  # of few pairs there are none
    ends = ""
    if "ends" in each:
        ends = "{:.1f} and {:.1f}, {:.3f}".format(*100 * each["ends"]["means"], each["ends"]["p"])
    return (
        f"{each['n']} | {first:.1f} | {second:.1f} | {mean:+.1f}{bounds} | {median:+.1f} "
        f"| {each['p']:.3f} | {ends}"
    )


def contrast_table(found: list[dict]) -> list[str]:
    title, rule = COLUMNS.format("planned contrast, at equal").split("\n")
    lines = [f"{title} Holm |", f"{rule}---|"]
    for each, corrected in zip(found, holm([each["p"] for each in found])):
        name = f"{each['contrast']}, {ALONG[each['along']]}"
        lines.append(f"| {name} | {cells(each)} | {corrected:.3f} |")
    return lines


def picture(task: str, found: list[dict]) -> None:
    """Each contrast: its pairs as dots, mean and interval as a bar, named at the left."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 0.45 * len(found) + 1))
    for y, each in enumerate(reversed(found)):
        dots = 100 * each["differences"]
        axes.plot(dots, [y + 0.15] * len(dots), "o", color="0.7", markersize=4)
        axes.plot([100 * each["lo"], 100 * each["hi"]], [y, y], "-", color="0.2", linewidth=2)
        axes.plot(dots.mean(), y, "D", color="black", markersize=5)
    axes.axvline(0, color="0.5", linewidth=1)
    names = [f"{each['contrast']}, equal {ALONG[each['along']]}" for each in reversed(found)]
    axes.set_yticks(range(len(found)), names)
    axes.set_ylim(-0.5, len(found) - 0.5)
    axes.set_xlabel("difference of the share solved over the run, points")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(HERE / f"study-{task}.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "table", "report"))
    parser.add_argument("group", choices=GROUPS, nargs="?", default="planned")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[], help="only these")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[], help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="only these")
    parser.add_argument(
        "--rates", nargs="+", type=float, default=[], help="only these, of `tune` and `rates`"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="where the runs go")
    args = parser.parse_args()
    if args.what == "run":
        run_group(args)
    elif args.what == "table":
        print("\n".join(table(args.group)))
    else:
        report()


if __name__ == "__main__":
    main()
