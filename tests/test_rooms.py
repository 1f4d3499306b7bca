"""The files of the project are rooms: which of them knows which."""

import ast
import graphlib
import re
from pathlib import Path

REPO = Path(__file__).parents[1]


def imported(tree: ast.AST) -> set[str]:
    """What a file imports, now or later, but not what it imports as a program."""
    names = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
        names |= imported(node)
    return names


def test_no_room_imports_itself_in_a_circle_and_none_imports_the_method():
    files = {file.stem: file for file in REPO.glob("*.py")}
    knows = {
        name: imported(ast.parse(file.read_text())) & files.keys() for name, file in files.items()
    }
    assert {"run", "config", "data"} <= knows["egspo"]  # imports are seen at all
    assert not [name for name, others in knows.items() if "egspo" in others]
    graphlib.TopologicalSorter(knows).prepare()  # CycleError says which


def test_every_test_that_the_readme_names_is_there():
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", (REPO / "README.md").read_text())
    assert len(named) > 12
    for file, name in named:
        assert f"\ndef {name}(" in (REPO / "tests" / file).read_text(), (file, name)
