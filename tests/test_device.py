"""On a device that is not the CPU nothing is mixed and the host seldom waits (a pretended one)."""

import dataclasses
import os
import signal

import pytest
import torch

import config
import egspo
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
            the_run, start = running.open_run(cfg, ranks, resume)
            assert start == 2 * resume
            assert {p.device for p in the_run.policy.parameters()} == {DEVICE}
            egspo.train(the_run, start)
        the_run.log.end("finished")
        os.close(the_run.log.fd)
        compute.append(the_run.log.compute["compute/samples"])
        cfg = dataclasses.replace(cfg, steps=3)
    assert compute == [8, 12]
    for waits, blocks in watched.rollouts:
        assert len(waits) <= blocks, waits
    assert len(watched.rollouts) == 3 + 3 and len(watched.steps) == 3
    updates = cfg.repeats * cfg.parts
    for waits in watched.steps:
        assert len(waits) <= 36 + 3 * updates, (len(waits), waits)


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
    [(dict(beta=0.0), 2), (dict(cache="block"), 6), (dict(lora_r=4, checkpointing=True), 5)],
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
    the_run, start = running.open_run(cfg, running.Ranks(), False)
    egspo.train(the_run, start)
    the_run.log.end("finished")
    assert len(graphs) == at[cfg.beta > 0] == count, (at, graphs)
