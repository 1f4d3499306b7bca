"""Are the code tasks' tests sound? Runs every reference solution, which should pass, and `return None`
under the same names, which should not.

    python bench/calibrate.py [--data-dir DIR] [DATA SET ...]     of: toycode humaneval mbpp kodcode

Prints a line a data set, and the ids of the problems to distrust.
"""

import argparse
import ast
import sys
import time
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-dir")
    parser.add_argument("names", nargs="*", default=["toycode", "humaneval", "mbpp"])
    args = parser.parse_args()
    for name in args.names:
        if name == "toycode":
            problems = data.TASKS[name].load("test")
        else:
            problems = list(map(data.TASKS["mbpp"].problem, data.read(name, args.data_dir)))
        start = time.time()
        run = lambda write: [  # noqa: E731
            reward.correct
            for reward in data.code_judge_all(
                [f"```python\n{write(p.answer['code'])}\n```" for p in problems],
                [p.answer for p in problems],
            )
        ]
        right, empty = run(str), run(nothing)
        seconds = time.time() - start
        n = len(problems)
        print(
            f"{name}: {n} problems, references pass {sum(right)}, `return None` passes {sum(empty)} "
            f"({2 * n / seconds:.0f} programs a second)"
        )
        bad = [p.id for p, ok, none in zip(problems, right, empty) if none or not ok]
        if bad:
            print("  distrust:", " ".join(bad))


if __name__ == "__main__":
    main()
