"""What --dry-run plans is what the code takes: counted over the code's own rollout, scoring and
update at the true widths of an 8B model, on tensors that have shapes and no numbers."""

import contextlib
import copy
import gc
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import egspo
import model
import plan
import run as running
from config import Config, of_model
from peak import Packed, allocated, counting
from toy import toy_model

FIXTURES = Path(__file__).parent / "fixtures"


class Enough(Exception):
    """Two denoising steps of a rollout: one that fills the cache and one that uses it."""


@pytest.fixture
def eight(monkeypatch):
    """This process as the first of eight ranks; the others never answer and never have to."""
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    mesh = dist.init_device_mesh("cpu", (8,))
    monkeypatch.setattr(dist, "init_device_mesh", lambda *_: mesh)
    yield
    dist.destroy_process_group()


def peaks(cfg: Config, bf16: bool, warm: bool = False) -> dict[str, float]:
    """Bytes alive at the peak of each phase, in the second step of a run."""
    raw = json.loads((Path(cfg.model) / "config.json").read_text())
    dtype = torch.bfloat16 if cfg.lora_r and bf16 else torch.float32
    net = model.skeleton(model.parse_config(raw), dtype)
    net.bf16, net.checkpointing = bf16, cfg.checkpointing
    frozen = copy.deepcopy(net)
    running.halve(frozen, bf16)
    N, P, ranks = cfg.B * cfg.G, cfg.P, running.Ranks()
    with counting() as count:
        allocated(net)
        for block in net.blocks if cfg.quantize == "nf4" else ():
            for name, linear in model.linears(block):
                setattr(block, name, Packed(linear))
        if cfg.lora_r:
            model.add_lora(net, cfg.lora_r, cfg.lora_alpha)
            for lora in model.adapters(net).values() if warm else ():
                lora.start = torch.empty_like(lora.lora_A), torch.empty_like(lora.lora_B)
        if cfg.shard:
            running.shard(net, bf16, ranks)
            running.shard(allocated(frozen), bf16, ranks)
            reference = lambda: running.in_turn(net, frozen)
        elif cfg.lora_r:
            reference = lambda: model.as_reference(net)
        elif cfg.beta == 0:
            reference = None
        else:
            allocated(frozen)
            reference = lambda: contextlib.nullcontext(frozen)
        optimizer = running.make_optimizer(net, cfg)
        trained = [p for p in net.parameters() if p.requires_grad]

        def act() -> egspo.Rollout:
            rolls, prompt_NP = [], torch.zeros(N, P, dtype=torch.long)

            def watch(t, roll):
                rolls.append(roll)
                if t == min(1, cfg.T - 1):
                    raise Enough

            u_NT2J = torch.zeros(N, cfg.T, 2, cfg.block, dtype=torch.float64)
            try:
                egspo.rollout(net, prompt_NP, prompt_NP == 0, cfg, u_NT2J, watch=watch)
            except Enough:
                return rolls.pop()

        def score(roll: egspo.Rollout) -> egspo.Moves:
            if cfg.method == "egspo":
                moves = egspo.gather_moves(roll, torch.zeros(N, cfg.K, dtype=torch.long), 1)
            else:
                moves = egspo.one_step_moves(roll, net, torch.zeros(N, cfg.mu, P))
            moves = moves.take(torch.arange(2 * cfg.micro))
            old_SU, _, _ = egspo.log_probs(net, moves, cfg, guess=cfg.stepwise)
            ref_SU = None
            if reference:
                with reference() as other, torch.no_grad():
                    ref_SU = egspo.log_probs(other, moves, cfg)[1]
            return moves._replace(old_SU=old_SU, ref_SU=ref_SU, adv_SU=old_SU)

        def learn(moves: egspo.Moves) -> None:
            """On top of the gradients of a first micro-batch."""
            for p in trained:
                p.grad = torch.zeros_like(p)
            moves = moves.take(torch.arange(cfg.micro))
            egspo.update(net, optimizer, moves, cfg, ranks, running.Tally())

        for p in trained:
            p.grad = torch.zeros_like(p)
        optimizer.step()  # from here on it has a state
        optimizer.zero_grad(set_to_none=True)
        gc.collect()
        found = {"held": count.now}
        roll, found["rollout"] = count.peak(act)
        moves, found["scoring"] = count.peak(lambda: score(roll))
        _, found["update"] = count.peak(lambda: learn(moves))
        return found


PHASES = {  # the moments of the plan in each
    "held": [],
    "rollout": ["rollout", "drawing"],
    "scoring": ["scoring", "likelihood"],
    "update": ["update", "loss", "backward", "sum"],
}
DREAM = dict(family="dream-7b-instruct")
ALL = dict(lora_r=0, optimizer="adamw8bit")
SHARD = dict(lora_r=0, shard=True)
HEAD = dict(P=1, C=32, T=16, K=16, G=2, micro=32, layers=1)  # where the head takes most
VARIANTS = [
    dict(P=3729),  # MBPP's longest prompt
    dict(P=848, layers=3),
    dict(P=848, layers=3, checkpointing=False),
    dict(P=848, layers=3, cache="block", G=16),
    dict(P=425, quantize="nf4", optimizer="adamw8bit", G=12, micro=4),
    dict(P=425, quantize="nf4", layers=3, micro=4, precision="float32"),
    dict(P=848, warm=True, cache="block", **DREAM),
    dict(HEAD, likelihood="exact"),
    dict(HEAD, method="diffu_grpo", mu=16, minibatches=1),
    dict(ALL, P=425, micro=12),
    dict(ALL, P=848, layers=3, checkpointing=False, beta=0.0),
    dict(lora_r=0, P=848, precision="float32"),
    dict(HEAD, **ALL, likelihood="exact"),
    dict(SHARD, P=256, layers=3),
    dict(SHARD, P=848, micro=24),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: " ".join(map(str, v.values())))
def test_the_plan_is_what_the_code_takes(variant, tmp_path, monkeypatch, request):
    """Within 5 % in each phase, or with --shard, where phases share their worst moment, in all."""
    few = dict(B=1, G=6, C=64, T=32, micro=6)  # each 33 tokens drawn are operations of their own
    settings = dict(few, layers=2, family="llada-8b-instruct", warm=False) | variant
    layers, family, warm = (settings.pop(name) for name in ("layers", "family", "warm"))
    raw = json.loads((FIXTURES / family / "config.json").read_text())
    raw["n_layers" if "n_layers" in raw else "num_hidden_layers"] = layers
    (tmp_path / "config.json").write_text(json.dumps(raw))
    if warm:
        adapter = {"r": 128, "base_model_name_or_path": str(tmp_path)}
        (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    cfg, bf16 = Config(task="gsm8k", model=str(tmp_path), **settings), "precision" not in settings
    if cfg.shard:
        request.getfixturevalue("eight")
    monkeypatch.setattr(egspo, "demand_finite", lambda *_: None)  # there are no numbers
    found = peaks(cfg, bf16, warm)
    planned = plan.plan(cfg, bf16, 8 if cfg.shard else 1, "cpu")
    held = sum(planned.held.values()) - planned.held["Python"]
    for phase, moments in PHASES.items():
        extra = max((sum(planned.moments[name].values()) for name in moments), default=0)
        if phase == "held" or not cfg.shard:
            assert held + extra == pytest.approx(found[phase], rel=0.05), phase
    moments = [sum(parts.values()) for name, parts in planned.moments.items() if name != "loading"]
    assert held + max(moments) == pytest.approx(max(found.values()), rel=0.05)


def test_the_plan_knows_the_divergence_of_an_evaluation(tmp_path, monkeypatch):
    """Two policies' probabilities of every revealed position, here 32 of each of 8 rows."""
    raw = json.loads((FIXTURES / "llada-8b-instruct" / "config.json").read_text()) | {"n_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    shape = dict(P=1, C=32, T=1, K=1, B=1, G=8, minibatches=1)
    cfg = Config(task="gsm8k", model=str(tmp_path), **shape)
    monkeypatch.setattr(egspo, "uniform", lambda shape, rows, *_: torch.zeros(len(rows)))
    net = model.skeleton(model.parse_config(raw), torch.bfloat16)
    with counting() as count:
        model.add_lora(allocated(net), cfg.lora_r, cfg.lora_alpha)
        at_NP, at_NC = torch.zeros(8, 1, dtype=torch.long), torch.zeros(8, 32, dtype=torch.long)
        logp_NC = torch.zeros(8, 32)
        roll = egspo.Rollout(at_NP, at_NP == 0, at_NC, at_NC, logp_NC, logp_NC, at_NC[:, None], 1)
        run = SimpleNamespace(policy=net, reference=lambda: model.as_reference(net))
        held = count.now
        _, most = count.peak(lambda: egspo.kl_of_a_step(run, roll, range(8), cfg))
    planned = sum(plan.plan(cfg, bf16=True).moments["likelihood"].values())
    assert planned == pytest.approx(most - held, rel=0.05)


def test_four_bits_take_what_the_plan_says():
    """Of bitsandbytes' own tensors, which cannot be fake."""
    linear = torch.nn.Linear(1024, 4096, bias=False)
    made = model.quantized(linear, linear.weight.data, "cpu")
    state = made.weight.quant_state
    stored = made.weight, state.absmax, state.state2.absmax
    assert sum(x.nbytes for x in stored) == pytest.approx(plan.NF4 * 1024 * 4096, rel=0.001)


@pytest.mark.parametrize(
    "changes",
    [dict(), dict(likelihood="exact"), dict(cache="block"), dict(method="diffu_grpo", mu=2)],
    ids=lambda changes: " ".join(map(str, changes.values())) or "plain",
)
def test_the_flops_of_a_step_are_those_of_the_code(changes, tmp_path):
    """Counted by torch over its matrix products, within 3 % in each phase. Without guesses, whose
    head is counted at every position and runs at the hidden ones."""
    path = str(toy_model(tmp_path, vocab_size=800, embedding_size=800))
    shape = dict(P=10, C=24, T=12, block=8, K=4, B=2, G=4, lam=0.0, mu=2, micro=4, compile=False)
    cfg = replace(of_model(path, "sudoku"), precision="float32", **shape | changes)
    net, _ = running.load_policy(cfg, path, torch.device("cpu"))
    frozen, optimizer = copy.deepcopy(net), running.make_optimizer(net, cfg)
    prompt_NP = torch.randint(0, 256, (8, 10))
    u_NT2J = torch.rand(8, cfg.T, 2, cfg.block, dtype=torch.float64)
    counted = {}

    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    known = {fused: lambda *shapes, **_: sdpa_flop_count(*shapes[:3])}

    def counting_flops(phase, work):
        with FlopCounterMode(display=False, custom_mapping=known) as counter:
            made = work()
        counted[phase] = counted.get(phase, 0) + counter.get_total_flops()
        return made

    roll = counting_flops(
        "rollout", lambda: egspo.rollout(net, prompt_NP, prompt_NP >= 0, cfg, u_NT2J)
    )
    moves = egspo.choose_moves(roll, cfg, net, 0, range(8))
    moves = moves.take(egspo.passed(moves, cfg).nonzero().squeeze(1)[: 8 * cfg.micro])
    moves = moves.take(torch.arange(len(moves.at_SR) // cfg.micro * cfg.micro))  # without fillers
    old_SU, *_ = counting_flops("logp", lambda: egspo.log_probs(net, moves, cfg))
    with torch.no_grad():
        of_tokens = replace(cfg, likelihood="tokens")
        ref_SU = counting_flops("logp", lambda: egspo.log_probs(frozen, moves, of_tokens))[1]
    moves = moves._replace(old_SU=old_SU, ref_SU=ref_SU, adv_SU=torch.ones_like(old_SU))
    for part in egspo.minibatches(moves, cfg):
        learn = lambda part=part: egspo.update(
            net, optimizer, moves.take(part), cfg, running.Ranks(), running.Tally()
        )
        counting_flops("update", learn)
    S = len(moves.at_SR)
    _, planned = plan.step_cost(cfg, net, 10 + cfg.C, roll.forwards, S)
    assert counted == pytest.approx(planned, rel=0.03)
