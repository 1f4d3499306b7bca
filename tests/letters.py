"""egspo.py with one more task, added from outside: even a random model earns something in it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import data
import egspo


def rows(split, data_dir=None):
    return [{"letter": chr(97 + i % 26), "times": i} for i in range(20)]


def build(row):
    return f"{row['letter']} {row['times']}", row["letter"]


def judge(completion, letter):
    late = sum(character >= letter for character in completion) / max(1, len(completion))
    return data.Reward(late, late == 1, late=late)


data.TASKS["letters"] = data.Task("letters", rows, build, judge)

if __name__ == "__main__":
    sys.exit(egspo.main())
