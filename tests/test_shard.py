"""--shard: weights, gradients and optimizer cut over two real gloo processes change nothing."""

import os
import shutil
import signal
import sys

import pytest

import egspo
from processes import LETTERS, REPO, SMALL, events, run, same, start_ranks, train, weights
from toy import hasty

# Blocks of 4, so that rows end early; 5 held-out problems, so that one rank has a batch less.
SHARDED = ["--shard", "--B", 1, "--block", 4, "--eval-n", 5]
UNSHARDED = ["--no-shard", *SHARDED[1:]]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return hasty(tmp_path_factory.mktemp("model") / "toy")


@pytest.fixture(scope="module")
def sharded(toy, tmp_path_factory):
    """Six steps without interruption."""
    out = tmp_path_factory.mktemp("runs") / "sharded"
    train(toy, out, *SHARDED, "--steps", 6, ranks=2)
    return out


def curve(out) -> list[float]:
    names = ("reward/mean", "loss", "kl", "grad_norm", "entropy/mean", "len/mean")
    steps = [event["m"] for event in events(out) if event["e"] == "step"]
    evals = [event["m"]["reward"] for event in events(out) if event["e"] == "eval"]
    return [m[name] for m in steps for name in names] + evals


def test_a_sharded_run_equals_the_unsharded_one(toy, sharded, tmp_path):
    train(toy, tmp_path / "whole", *UNSHARDED, "--steps", 6, ranks=2)
    assert len(curve(sharded)) == 6 * 6 + 4  # of each step, of three validations and of one test
    assert curve(sharded) == pytest.approx(curve(tmp_path / "whole"), rel=1e-3, abs=1e-4)
    assert same(weights(sharded), weights(tmp_path / "whole"), atol=1e-4)
    rows = [event for event in events(sharded) if event["e"] == "sample"]
    assert any(6 in event["rev"] for event in rows)  # a row had ended: T stands where it was done
    pick = lambda out: [e["rev"] for e in events(out) if e["e"] == "sample"]
    assert pick(sharded) == pick(tmp_path / "whole")


def test_killed_and_resumed_equals_uninterrupted(toy, sharded, tmp_path):
    out = tmp_path / "killed"
    words = ["--model", toy, *SMALL, *SHARDED, "--out", out, "--steps", 6]
    first, second = start_ranks(*words, ranks=2)
    for line in first.stdout:
        if line.startswith("step    3"):
            break
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait().returncode == -signal.SIGKILL
    assert second.wait().returncode == 1  # by itself
    assert (out / "checkpoints" / "latest").resolve().name in ("step-2", "step-4")
    train(toy, out, *SHARDED, "--steps", 6, "--resume", ranks=2)
    assert same(weights(sharded), weights(out))


@pytest.mark.slow
def test_another_number_of_ranks_goes_on_with_the_optimizer_as_it_was(toy, tmp_path):
    """Three ranks with two rows each, then two with three: the work of a step is the same."""
    words = [*SHARDED, "--method", "diffu_grpo", "--G", 2, "--weight-decay", 0]
    train(toy, tmp_path / "two", *words, "--B", 3, "--steps", 4, ranks=2)
    train(toy, tmp_path / "moved", *words, "--B", 2, "--steps", 2, ranks=3)
    train(toy, tmp_path / "moved", *words, "--B", 3, "--steps", 4, "--resume", ranks=2)
    assert same(weights(tmp_path / "two"), weights(tmp_path / "moved"), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--compile"], ["--precision", "bf16", "--checkpointing"]])
def test_sharding_goes_with_compile_bf16_and_checkpointing(toy, tmp_path, words):
    for name, shard in (("sharded", SHARDED), ("whole", UNSHARDED)):
        train(toy, tmp_path / name, *shard, *words, "--steps", 2, ranks=2)
    if "bf16" in words:  # a block's norms are read as bf16 too: near, but not the same
        first = [curve(tmp_path / name)[:6] for name in ("sharded", "whole")]
        assert first[0] == pytest.approx(first[1], rel=0.05, abs=1e-3)
    else:
        assert same(weights(tmp_path / "sharded"), weights(tmp_path / "whole"), atol=1e-4)


@pytest.mark.slow
def test_a_tied_head_is_sharded_too(tmp_path):
    tied = hasty(tmp_path / "tied", weight_tying=True)
    for name, shard in (("sharded", SHARDED), ("whole", UNSHARDED)):
        train(tied, tmp_path / name, *shard, "--steps", 2, ranks=2)
    assert same(weights(tmp_path / "sharded"), weights(tmp_path / "whole"), atol=1e-4)


def test_a_rank_that_cannot_write_ends_all_with_one_line_and_latest_stays(sharded, tmp_path):
    """The second rank alone has no room for its shard of the optimizer's state."""
    out, script = tmp_path / "full", tmp_path / "cramped.py"
    shutil.copytree(sharded, out, symlinks=True)
    script.write_text(
        "import os, resource, runpy, sys\n"
        "if os.environ['RANK'] == '1':\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        f"sys.path.insert(0, {str(REPO / 'tests')!r})\n"
        f"runpy.run_path({str(LETTERS)!r}, run_name='__main__')\n"
    )
    done = run("--out", out, "--resume", "--steps", 8, ranks=2, script=script)
    assert done.returncode != 0
    assert done.stderr.count("egspo: step 8: cannot write the checkpoint") == 1, done.stderr
    assert "in train" not in done.stderr  # no traceback of ours
    assert (out / "checkpoints" / "latest").resolve().name == "step-6"
    names = [path.name for path in (out / "checkpoints").iterdir()]
    assert "step-8" not in names and ".writing" not in names


@pytest.mark.parametrize(
    "words, named",
    [
        (["--shard", "--lora-r", "4"], "--lora-r 0"),
        (["--shard", "--optimizer", "adamw8bit"], "--optimizer adamw"),
        (["--shard", "--eval-only"], "--eval-only"),
        (["--shard"], "torchrun"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_usage_is_one_line(toy, tmp_path, monkeypatch, capsys, words, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["egspo.py", "--model", str(toy), *SMALL, *words])
    assert egspo.main() == 2
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1 and "--shard" in stderr and named in stderr, stderr


def test_a_checkpoint_is_resumed_the_way_it_was_written(toy, sharded):
    done = run("--out", sharded, "--resume", "--no-shard")
    assert done.returncode == 2 and "--shard" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
