"""English word problems of one or two sums, as a task of one's own.

    python bench/words.py --model FOLDER --task words

Generated: sentences are put together from parts. What is held out has other names than training,
and no sum of it (a start and its changes, 12 + 7 - 3) occurs there. Working is one sum a line:
"12+7=19", "19-3=16", "Answer: 16".
"""

import random
import re
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import egspo

NAMES = {
    "train": "Anna Ben Carla David Emma Frank Grace Henry Irene Jack Kate Leo Mia Noah Olga Paul",
    "val": "Quinn Rosa Sam Tina",
    "test": "Uma Victor Wendy Zoe",
}
THINGS = (
    "apples books cards coins cups eggs flowers keys lemons letters marbles pencils photos plates "
    "shells songs stamps stones tickets toys"
).split()
STARTS = (
    "{name} has {n} {things}.",
    "There are {n} {things} in {name}'s box.",
    "{name} starts the day with {n} {things}.",
    "On Monday {name} counts {n} {things}.",
)
GAINS = (
    "{name} buys {n} more.",
    "{name} finds {n} more.",
    "Then {name} gets {n} more from a friend.",
    "A neighbour brings {n} more.",
    "{name} wins another {n}.",
    "Later {n} more are added.",
)
LOSSES = (
    "{name} gives {n} away.",
    "{name} loses {n} of them.",
    "Then {name} sells {n}.",
    "A friend takes {n} of them.",
    "Later {n} of them break.",
    "{name} leaves {n} at school.",
)
QUESTIONS = (
    "How many {things} are there now?",
    "How many {things} does {name} have now?",
    "How many {things} does that make in the end?",
)
SIZES = {"train": 4096, "val": 128, "test": 256}


def split_of(sums: tuple[int, ...]) -> str:
    return {0: "val", 1: "test"}.get(zlib.crc32(repr(sums).encode()) % 8, "train")


def rows(split, data_dir=None):
    """Always the same problems, all different: a question, the start and its changes."""
    rng, found = random.Random(split), {}
    while len(found) < SIZES[split]:
        sums = [rng.randint(2, 20)]
        for _ in range(rng.choice((1, 2))):
            change = rng.choice((1, -1)) * rng.randint(2, 20)
            sums.append(change if sum(sums) + change >= 0 else -change)
        if split_of(tuple(sums)) != split:
            continue
        names, things = rng.choice(NAMES[split].split()), rng.choice(THINGS)
        told = [rng.choice(STARTS), *(rng.choice(GAINS if n > 0 else LOSSES) for n in sums[1:])]
        told = [part.format(name=names, things=things, n=abs(n)) for part, n in zip(told, sums)]
        told.append(rng.choice(QUESTIONS).format(name=names, things=things))
        found[" ".join(told)] = sums
    return [{"question": question, "sums": sums} for question, sums in found.items()]


def build(row):
    return row["question"], sum(row["sums"])


def judge(completion, answer):
    """1 for the right last number, 0.1 for an answer in the right form."""
    numbers = re.findall(r"\d+", completion, re.ASCII)
    correct = bool(numbers) and numbers[-1] == str(answer)
    form = 0.1 * bool(re.search(r"^Answer: \d+\s*\Z", completion, re.ASCII | re.MULTILINE))
    return data.Reward(correct + form, correct, correct=float(correct), format=form)


def worked(row) -> dict:
    """A demonstration: what sft.py learns."""
    total, *changes = row["sums"]
    lines = []
    for n in changes:
        lines.append(f"{total}{n:+}={total + n}")
        total += n
    return {"prompt": row["question"], "completion": "\n".join([*lines, f"Answer: {total}"])}


data.TASKS["words"] = data.Task("words", rows, build, judge, fields="question, sums")

if __name__ == "__main__":
    sys.exit(egspo.main())
