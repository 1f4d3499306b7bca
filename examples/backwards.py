"""A task of one's own: spell a word backwards.

    python examples/backwards.py --model tiny --task backwards

Every flag of egspo.py works, and so does the monitor.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import egspo


def rows(split, data_dir=None):  # "train", "val" or "test" -> dicts
    words = {"train": ["banana", "kiwi"], "val": ["pear"], "test": ["fig"]}
    return [{"word": word} for word in words[split]]


def build(row):  # a row -> the prompt, and what the reward needs
    return f"Spell this word backwards: {row['word']}", row["word"][::-1]


def judge(completion, answer):  # any text in, a data.Reward out
    right = sum(a == b for a, b in zip(completion.strip(), answer)) / len(answer)
    return data.Reward(right, completion.strip() == answer)


data.TASKS["backwards"] = data.Task("backwards", rows, build, judge, fields="word")

if __name__ == "__main__":
    sys.exit(egspo.main())
