"""English word problems, answered by the sum to take, as a task of one's own.

    python bench/words.py --model FOLDER --task words

"Anna has 12 coins. Later 7 of them break. How many coins are there now? Write the sum." wants
"12-7". Generated: sentences are put together from parts. What is held out has other names than
training, and no sum of it occurs there.

Demonstrations (`demonstrated`) are of mixed quality, as the embedded model's are: where something
is lost, three of five are lazy and add all the same. What is learnt of them mostly adds, whatever
the story tells; that it pays to subtract is left for reinforcement learning to find out.
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
SIZES = {"train": 4096, "val": 64, "test": 256}


def split_of(sums: tuple[int, ...]) -> str:
    return {0: "val", 1: "test"}.get(zlib.crc32(repr(sums).encode()) % 8, "train")


def rows(split, data_dir=None):
    """Always the same problems, all different: a question, the start and its change."""
    rng, found = random.Random(split), {}
    while len(found) < SIZES[split]:
        sign, start, size = rng.choice((1, -1)), rng.randint(2, 20), rng.randint(2, 20)
        if sign < 0:
            start, size = max(start, size), min(start, size)
        if split_of((start, sign * size)) != split:
            continue
        part = {"name": rng.choice(NAMES[split].split()), "things": rng.choice(THINGS)}
        told = [
            rng.choice(STARTS).format(n=start, **part),
            rng.choice(GAINS if sign > 0 else LOSSES).format(n=size, **part),
            rng.choice(QUESTIONS).format(**part),
        ]
        found[" ".join(told)] = start, sign * size
    return [{"question": text, "start": n, "change": m} for text, (n, m) in found.items()]


def build(row):
    return f"{row['question']} Write the sum.", row["start"] + row["change"]


def judge(completion, answer):
    """1 for a sum that comes to the answer, 0.1 for being one."""
    said = re.fullmatch(r"(\d+)([+-]\d+)\s*", completion, re.ASCII)
    correct, form = bool(said) and int(said[1]) + int(said[2]) == answer, 0.1 * bool(said)
    return data.Reward(correct + form, correct, correct=float(correct), format=form)


def answered(row, lazy: bool = False) -> str:
    """The sum; lazy: what was lost is added too."""
    return f"{row['start']}{abs(row['change']) if lazy else row['change']:+}"


def demonstrated(n: int) -> list[dict]:
    """What sft.py learns, n rows."""
    return [
        {"prompt": build(row)[0], "completion": answered(row, lazy=i % 5 < 3)}
        for i, row in enumerate(rows("train")[:n])
    ]


data.TASKS["words"] = data.Task("words", rows, build, judge, fields="question, start, change")

if __name__ == "__main__":
    sys.exit(egspo.main())
