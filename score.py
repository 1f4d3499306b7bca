"""What are anybody's outputs worth, by the published rules too?

    python data.py --task math --score outputs.jsonl              one JSON line: ours and published
    python data.py --task math --score outputs.jsonl --compat     the published rules alone

A row holds question, completion and answer. For code, answer is the data set's own row, with its
tests, or what `egspo.py --eval-only` has written. Completions may still end in end tokens.

The published rules are those of d1's evaluation, which the authors of the method use too. They are
kept with their faults, because the tables were made with them: GSM8K takes the first box, a text
without a box is its own answer, Sudoku is compared with one stored grid. The code is our own. No
training reward depends on it.
"""

import argparse
import ast
import itertools
import json
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import data
from data import Problem, Reward, Row

END = re.compile("|".join(map(re.escape, data.END_TOKENS)))


# ---- the published rules -------------------------------------------------------------------------


def first_tag(text: str) -> str | None:
    """What the first closed <answer> tag holds."""
    found = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return found[1].strip() if found else None


def published_box(text: str) -> str | None:
    """The last box's content; the whole text where there is no box; None for one never closed."""
    if "\\boxed " in text:
        return text.split("\\boxed ")[-1].split("$")[0]
    start = text.rfind("\\boxed") if "\\boxed" in text else text.rfind("\\fbox")
    if start < 0:
        return text
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if text[i] == "}" and depth == 0:
            box = text[start : i + 1]
            return box[7:-1] if box.startswith("\\boxed{") else box
    return None


def published_form(text: str) -> str:
    """Hendrycks' normal form of a LaTeX answer. ValueError or IndexError: it has none."""
    for old, new in (("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"),
                     ("\\left", ""), ("\\right", ""), ("^{\\circ}", ""), ("^\\circ", ""),
                     ("\\$", "")):  # fmt: skip
        text = text.replace(old, new)
    if "\\text{ " in text:  # units on the right
        text, _ = text.split("\\text{ ")
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    text = "0" + text if text.startswith(".") else text
    left, *right = text.split("=")
    if len(right) == 1 and len(left) <= 2:  # x = 5
        text = right[0]
    head, *tails = text.split("\\sqrt")
    text = head + "".join("\\sqrt" + (t if t[0] == "{" else f"{{{t[0]}}}{t[1:]}") for t in tails)
    text = text.replace(" ", "")
    head, *tails = text.split("\\frac")
    if all(tail[0] == "{" or len(tail) >= 2 for tail in tails):
        text = head
        for t in tails:
            below = t[1:2] if t[1:2] == "{" else f"{{{t[1:2]}}}"
            text += "\\frac" + (t if t[0] == "{" else f"{{{t[0]}}}{below}{t[2:]}")
    text = "\\frac{1}{2}" if text == "0.5" else text
    if text.count("/") == 1:
        above, below = map(int, text.split("/"))
        text = f"\\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text
    return text


def published_equal(a: str, b: str) -> bool:
    try:
        return published_form(a) == published_form(b)
    except (ValueError, IndexError):
        return a == b


def published_gsm8k(completion: str, answer: Fraction | None) -> Reward:
    """The first box with a number in it, its first number; else the last number in the tag."""

    def read_number(text: str, which: int) -> list[float]:
        try:
            return [float(text)]
        except ValueError:
            return [float(n) for n in re.findall(r"-?\d+\.?\d*", text)][which:][:1]

    boxes = [box.strip() for box in re.findall(r"\\boxed{(.*?)}", completion)]
    found = [n for box in boxes if box.strip(".") for n in read_number(box, 0)]
    found = found or read_number(first_tag(completion) or "", -1)
    correct = bool(found) and answer is not None and found[0] == float(answer)
    return Reward(float(correct), correct)


def published_math(completion: str, answer: str) -> Reward:
    found = published_box(completion) or first_tag(completion)
    correct = found is not None and published_equal(found, answer)
    return Reward(float(correct), correct)


def power(a: Fraction, b: Fraction) -> Fraction:
    if b.denominator > 1:
        return Fraction(float(a) ** float(b))
    if abs(b) * max(a.numerator.bit_length(), a.denominator.bit_length()) > 10_000:
        raise ValueError("a power too large to compute")
    return a ** int(b)


PYTHON = data.OPERATORS | {
    ast.Pow: power,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def published_countdown(completion: str, answer: dict) -> Reward:
    """What stands before an equals sign, by Python's rules: powers, signs and floats included."""
    text = published_box(completion)
    if text is None:
        tag = first_tag(completion)
        text = completion if tag is None else tag
    text = text.replace("\\div", "/").replace("\\times", "*").replace("\\cdot", "*")
    for left, right in itertools.pairwise(text.split("=")):
        expression = left[len(left.rstrip("0123456789+-*/() ")) :]
        if expression and right[:1] in tuple("0123456789. "):
            text = expression
            break
    correct = False
    if sorted(map(int, re.findall(r"\d{1,40}", text))) == sorted(answer["numbers"]):
        try:
            value, _ = data.calculate(text, PYTHON, (int, float))
            correct = abs(value - answer["target"]) < 1e-5
        except (ValueError, TypeError, ArithmeticError):  # TypeError: a complex power
            pass
    return Reward(float(correct), correct)


def published_sudoku(completion: str, answer: dict) -> Reward:
    """The empty cells that agree with the stored grid, read from the first of five places."""
    tail, rest = completion.partition("<answer>")[2], completion.partition("</answer>")[2]
    fence = re.search(r"```([\d\s]+)```", tail)
    end = re.search(END.pattern + "|</answer>", tail)
    places = [fence[1] if fence else "", tail[: end.start()] if end else "", END.split(rest)[0]]
    places += re.findall(r"(\d{16})\s*</answer>", completion)[:1]
    places += re.findall(r"\b(\d{16})\b", completion)[:1]
    grid = re.sub(r"\s", "", next((place for place in places if place.strip()), ""))
    cells = [g == s for p, g, s in zip(answer["puzzle"], grid, answer["solution"]) if p == "0"]
    share = sum(cells) / answer["puzzle"].count("0")
    return Reward(share, share == 1, cells=share)


PUBLISHED: dict[str, Callable[[str, Any], Reward]] = {
    "gsm8k": published_gsm8k,
    "math": published_math,
    "countdown": published_countdown,
    "sudoku": published_sudoku,
}


# ---- scoring a file ------------------------------------------------------------------------------


def read_outputs(name: str, file: str | Path) -> tuple[list[str], list[Problem]]:
    """The completions in a file of outputs, and the problems that they answer."""
    completions, problems = [], []
    for row in data.read_file(Path(file)):
        if not isinstance(row.get("completion"), str) or "answer" not in row:
            raise ValueError(f"{row.where}: expected question, completion (a text) and answer")
        completions.append(row["completion"])
        problems.append(output_problem(name, row))
    return completions, problems


def output_problem(name: str, row: Row) -> Problem:
    """The problem that an output answers. A GSM8K answer of null makes every completion wrong."""
    fields, question, answer = dict(row), str(row.get("question")), row["answer"]
    if isinstance(answer, dict):
        job = answer.get("job")
        if isinstance(job, dict) and job.keys() >= {"names", "before", "setup", "tests"}:
            return Problem(name, question, answer, row.where)
        fields = answer
    elif name == "gsm8k" and answer is None:
        return Problem(name, question, None, row.where)
    elif name == "sudoku":
        puzzle = re.search("[0-4]{16}", question)
        fields = {"puzzle": puzzle and puzzle[0], "solution": answer}
    elif name == "countdown" and isinstance(answer, list):
        fields = dict(zip(("numbers", "target"), answer))
    return data.TASKS[name].problem(Row(fields, row.where))


def score(name: str, file: str | Path, compat: bool = False) -> dict:
    """How many of a file's outputs are right; by the published rules with `compat`."""
    if compat and name not in PUBLISHED:
        raise ValueError(f"--compat: published rules exist for {', '.join(PUBLISHED)}, not {name}")
    completions, problems = read_outputs(name, file)
    if compat:
        rewards = [PUBLISHED[name](c, p.answer) for c, p in zip(completions, problems)]
    else:
        rewards = data.TASKS[name].rewards([END.split(c)[0] for c in completions], problems)
    n, correct = len(rewards), sum(reward.correct for reward in rewards)
    tally = {"task": name, "n": n, "correct": correct, "accuracy": correct / n}
    if name == "sudoku":
        empty = [problem.answer["puzzle"].count("0") for problem in problems]
        cells = sum(round(reward * k) for reward, k in zip(rewards, empty))
        tally |= {"cells": cells, "cells_accuracy": cells / sum(empty)}
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)  # so that an error is one line
    parser.add_argument("--task", required=True, choices=data.TASKS)
    parser.add_argument("--score", required=True, metavar="FILE", help="rows of outputs")
    parser.add_argument("--compat", action="store_true", help="by the published rules alone")
    parser.add_argument("--unsafe-code", action="store_true", help="run programs without locks")
    args = parser.parse_args()
    try:
        if args.unsafe_code:
            data.sandbox(unsafe=True)
        tally = score(args.task, args.score, args.compat)
        if args.task in PUBLISHED and not args.compat:
            tally["published_rules"] = score(args.task, args.score, compat=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(json.dumps(tally))


if __name__ == "__main__":
    main()
