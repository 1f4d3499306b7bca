"""Are the code tasks' tests sound? Runs every reference solution, which should pass, and programs
that return None under the same names, which should not.

    python bench/calibrate.py [--data-dir DIR] [toycode humaneval_test mbpp_train mbpp_test ...]

Prints a line a data set, and the problems to distrust.
"""

import argparse
import ast
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import data


def nothing(code: str) -> str:
    """The same top-level functions and classes, doing nothing."""
    lines = []
    for node in ast.parse(code).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            lines.append(f"def {node.name}(*args, **kwargs): return None")
    return "\n".join(lines)


def correct(problems: list[data.Problem], write: Callable[[str], str]) -> list[bool]:
    completions = [f"```python\n{write(problem.answer['code'])}\n```" for problem in problems]
    rewards = data.code_judge_all(completions, [problem.answer for problem in problems])
    return [reward.correct for reward in rewards]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir")
    sets = ["toycode", "humaneval_test", "mbpp_train", "mbpp_test"]
    parser.add_argument("sets", nargs="*", default=sets, help="toycode, or a name in data.SOURCES")
    args = parser.parse_args()
    for name in args.sets:
        if name == "toycode":
            problems = data.TASKS["toycode"].load("test")
        else:
            problems = [data.TASKS["mbpp"].problem(row) for row in data.read(name, args.data_dir)]
        start = time.time()
        right, empty = correct(problems, str), correct(problems, nothing)
        speed = 2 * len(problems) / (time.time() - start)
        print(f"{name}: {len(problems)} problems, references pass {sum(right)}, ", end="")
        print(f"return None passes {sum(empty)} ({speed:.0f} programs a second)")
        for problem, ok, none in zip(problems, right, empty):
            if none or not ok:
                print(f"  {problem.id}: {'return None passes' if none else 'reference fails'}")


if __name__ == "__main__":
    main()
