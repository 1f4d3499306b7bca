"""What people copy runs: the loop, and a task of one's own."""

import sys

from processes import REPO, run
from toy import toy_model

sys.path.insert(0, str(REPO / "examples"))
import loop


def test_the_loop_to_copy_starts_at_its_reference_and_earns_more(capsys):
    loop.main(steps=2)
    first, second = (line.split() for line in capsys.readouterr().out.splitlines())
    assert first[:2] == ["step", "0"] and first[-2:] == ["kl", "0.000"]
    assert float(second[3]) > float(first[3]) and float(second[-1]) > 0


def test_a_task_of_ones_own_trains_under_its_name(tmp_path):
    words = "--task backwards --C 12 --T 6 --block 12 --K 2 --B 1 --G 2 --steps 1 --no-compile"
    model = toy_model(tmp_path / "toy")
    words = ["--model", model, *words.split(), "--out", tmp_path / "run"]
    done = run(*words, script=REPO / "examples" / "backwards.py")
    assert done.returncode == 0, done.stderr
    assert "backwards with" in done.stdout and "step    1/1" in done.stdout
