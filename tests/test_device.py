"""On a device that is not the CPU nothing is mixed and the host seldom waits (a pretended one)."""

import dataclasses
import errno
import os
import shutil
import signal
import types
from pathlib import Path

import pytest
import torch

import config
import egspo
import events
import letters  # noqa: F401  a task in which even a random model earns something
import run as running
from pretend import DEVICE, pretending
from processes import SMALL
from toy import hasty

VARIANTS = [
    dict(), dict(lora_r=4, checkpointing=True), dict(cache="block"), dict(likelihood="exact"),
    dict(order="random", beta=0.0), dict(method="diffu_grpo", mu=2), dict(minibatches=2, mu=2),
    dict(select="sampled"),
]  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Rows of this one end early, so that a block decodes some of them."""
    return hasty(tmp_path_factory.mktemp("model") / "toy")


@pytest.fixture
def watched(monkeypatch):
    """Lists that fill up: of each rollout the waits and the blocks, of each step the waits that
    are neither its rollout's nor for the log."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    rollout, between, rollouts, steps = egspo.rollout, running.between_steps, [], []

    def seen_rollout(policy, prompt_NP, real_NP, cfg, *more, **options):
        before = len(watched.waits)
        roll = rollout(policy, prompt_NP, real_NP, cfg, *more, **options)
        rollouts.append((watched.waits[before:], cfg.C // cfg.block))
        del watched.waits[before:]
        return roll

    def seen_between(*args):
        if args[1] > args[2]:  # a step was made
            steps.append([wait for wait in watched.waits if not wait.startswith("events.py")])
        between(*args)
        watched.waits.clear()

    class watched:
        waits: list[str]

    monkeypatch.setattr(egspo, "rollout", seen_rollout)
    monkeypatch.setattr(running, "between_steps", seen_between)
    watched.rollouts, watched.steps = rollouts, steps
    return watched


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_training_evaluating_saving_and_resuming_mix_no_devices_and_seldom_wait(
    toy, tmp_path, watched, variant
):
    base = dict(
        task="letters", model=str(toy), out=str(tmp_path), C=12, T=6, block=4, K=2, G=2, B=2,
        micro=4, minibatches=1, lora_r=0, warmup=0, compile=False, checkpointing=False,
        precision="float32", steps=2, save_every=1, eval_every=3, eval_n=2, test=False,
        log_live=0.0,
    )  # fmt: skip
    cfg, compute = config.Config(**(base | variant)), []
    for resume in (False, True):
        with pretending() as watched.waits:
            ranks = running.Ranks()
            ranks.device = DEVICE
            the_run, start = running.open_run(cfg, ranks, config.Mode(resume=resume))
            assert start == 2 * resume
            assert {p.device for p in the_run.policy.parameters()} == {DEVICE}
            egspo.train(the_run, start)
        the_run.log.end("finished")
        compute.append(the_run.log.compute["compute/samples"])
        cfg = dataclasses.replace(cfg, steps=3)
    assert compute == [8, 12]
    for waits, blocks in watched.rollouts:
        assert len(waits) <= blocks, waits
    assert len(watched.rollouts) == 3 + 3 and len(watched.steps) == 3
    updates = cfg.repeats * cfg.updates_a_pass
    for waits in watched.steps:
        assert len(waits) <= 18 + 3 * updates, (len(waits), waits)


def test_the_pretended_device_tells_what_a_real_one_would():
    with pretending() as waits:
        there = torch.arange(6, device=DEVICE)
        assert there.device == DEVICE and (there + 1).device == DEVICE and not waits
        for mix in (lambda here: there + here, lambda here: there.gather(0, here)):
            with pytest.raises(RuntimeError, match="mixes gpu:0 and cpu"):
                mix(torch.arange(6))
        assert (there + torch.tensor(1)).device == DEVICE  # a 0-d one may come from the CPU,
        assert there[torch.tensor([1, 2])].device == DEVICE and not waits  # and so may indices
        there[there > 3] = 0  # and this needs no count
        assert not waits
        for wait in (
            lambda: there.sum().item(), lambda: bool(there[0] == 0), lambda: there.tolist(),
            lambda: there[there > 1], lambda: there.nonzero(), lambda: there.cpu(),
            lambda: torch.ones(2).to(DEVICE), lambda: torch.tensor([1], device=DEVICE),
            lambda: torch.zeros(6, dtype=torch.long).copy_(there),
        ):  # fmt: skip
            before = len(waits)
            wait()
            assert len(waits) == before + 1
    assert there.near.tolist() == [0, 1, 2, 3, 0, 0]


# ---- compiled shapes -----------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are compiled, as lists of shapes. Past the limit of shapes it is an error."""
    torch._dynamo.reset()
    made, compile = [], torch.nn.Module.compile

    def backend(graph, inputs):
        made.append([tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor)])
        return graph.forward

    asked = lambda block, **options: compile(block, backend=backend, **options)
    monkeypatch.setattr(torch.nn.Module, "compile", asked)
    monkeypatch.setattr(running, "can_compile", lambda: True)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield made
    torch._dynamo.reset()


def test_an_evaluation_by_lengths_compiles_one_graph_for_each(toy, tmp_path, graphs, monkeypatch):
    """Rows end early: each length decodes batches of several sizes."""
    words = "--eval-only --lengths 8 16 32 --block 4 --B 6 --compile --eval-n 12 --out".split()
    cfg, mode = config.parse(["--model", str(toy), *SMALL, *words, str(tmp_path)])
    the_run, sizes, features = running.open_evaluation(cfg, running.Ranks()), set(), None
    features = the_run.policy.features
    count = lambda ids_NL, *more: (sizes.add(ids_NL.shape), features(ids_NL, *more))[1]
    monkeypatch.setattr(the_run.policy, "features", count)
    running.evaluate_only(the_run, mode, egspo.evaluate)
    assert len({L for _, L in sizes}) == 3 and len(sizes) > 3, sizes
    assert len(graphs) == 3, graphs


@pytest.mark.parametrize(
    "variant, count",
    [
        ({}, 2),  # the reference takes the graph of the rollout
        (dict(beta=0.0), 2),
        (dict(cache="block"), 4),
        (dict(lora_r=4, checkpointing=True), 4),
    ],
    ids=str,
)
def test_a_run_compiles_its_uses_once_and_scores_with_the_graph_of_the_update(
    toy, tmp_path, graphs, monkeypatch, variant, count
):
    base = dict(
        task="letters", model=str(toy), out=str(tmp_path), C=16, T=8, block=4, K=2, G=4, B=2,
        micro=3, minibatches=2, lora_r=0, checkpointing=False, precision="float32", steps=3,
        eval_every=3, eval_n=4, test=False,
    )  # fmt: skip
    cfg, at = config.Config(**(base | variant)), []
    for name in ("log_probs", "update"):
        inner = getattr(egspo, name)
        told = lambda *args, inner=inner, **more: (inner(*args, **more), at.append(len(graphs)))[0]
        monkeypatch.setattr(egspo, name, told)
    the_run, start = running.open_run(cfg, running.Ranks(), config.Mode())
    egspo.train(the_run, start)
    the_run.log.end("finished")
    assert len(graphs) == at[cfg.beta > 0] == count, (at, graphs)


# ---- what machines lack --------------------------------------------------------------------------


def test_only_live_rows_and_distinct_ones_are_decoded():
    """A repeated row would be written twice, and under a GPU's noise with two choices."""
    done_N = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1, 1, 1]).bool()
    rows = egspo.unfinished(done_N, shard=False).tolist()
    assert rows[:4] == [0, 3, 4, 6] and len({*rows}) == len(rows) == 6
    assert egspo.unfinished(~done_N, False).tolist()[:6] == [1, 2, 5, 7, 8, 9]
    assert egspo.unfinished(torch.ones(10).bool(), False).tolist() == []
    assert sorted(egspo.unfinished(done_N, shard=True).tolist()) == list(range(10))


def test_a_full_gpu_is_one_line_that_names_what_takes_less(monkeypatch, capsys, tmp_path):
    cfg = config.Config(micro=8, out=str(tmp_path), task="sudoku")
    log = types.SimpleNamespace(it=3, end=lambda *_: None)
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"
    with pytest.raises(SystemExit), running.closing(types.SimpleNamespace(cfg=cfg, log=log)):
        raise torch.OutOfMemoryError(said)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "Tried to allocate 2.00 GiB. Less takes: --micro 4" in told
    assert "--quantize nf4" in told and "--checkpointing" not in told  # which is on
    with pytest.raises(ValueError, match="--checkpointing"):
        with running.enough_memory(dataclasses.replace(cfg, checkpointing=False), ValueError):
            raise torch.OutOfMemoryError(said)


def test_a_disk_without_locks_is_warned_of_and_written(monkeypatch, capsys, tmp_path):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(events.fcntl, "flock", flock)
    log = events.EventLog(str(tmp_path))
    log.end("finished")
    assert capsys.readouterr().out.startswith("warning: no locks in")
    assert '"finished"' in log.file.read_text()


def test_emulated_bf16_is_not_taken_for_bf16(monkeypatch):
    supported = lambda including_emulation=True: including_emulation
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert not running.use_bf16("auto", torch.device("cuda"))
    assert running.use_bf16("bf16", torch.device("cuda"))


@pytest.mark.parametrize(
    "cuda, lacks, told", [
        (False, "g++", "C++ compiler (g++ or clang++)"), (True, "gcc", "C compiler (gcc or clang)"),
        (True, "Python.h", "Python.h"), (True, "", ""),
    ],
)  # fmt: skip
def test_what_compiling_needs_is_looked_for_on_a_gpu_too(monkeypatch, capsys, cuda, lacks, told):
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(shutil, "which", lambda name: None if lacks.startswith("g") else name)
    monkeypatch.setattr(Path, "exists", lambda path: path.name != lacks)
    assert running.can_compile.__wrapped__() == (not told)
    assert told in capsys.readouterr().out


def test_a_control_groups_quota_counts_as_cores(tmp_path):
    own, inside = tmp_path / "own", tmp_path / "groups" / "job" / "step"
    inside.mkdir(parents=True)
    own.write_text("0::/job/step\n")
    most = egspo.data.cores(tmp_path / "groups", own)
    assert 1 <= most <= os.cpu_count()
    (inside / "cpu.max").write_text("max 100000\n")
    assert egspo.data.cores(tmp_path / "groups", own) == most
    (inside.parent / "cpu.max").write_text("150000 100000\n")
    assert egspo.data.cores(tmp_path / "groups", own) == 1
