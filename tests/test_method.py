"""What must stay true of the method where it was once wrong."""

import contextlib
import copy
import dataclasses
import functools
import importlib.machinery
import importlib.util
import json
import math
import shutil
import signal
import sys
import types
from pathlib import Path

import pytest
import torch

import config
import data
import egspo
import letters  # noqa: F401  a task in which even a random model earns something
import model
import run
import score
from events import Log
from processes import SMALL, events, same, train
from processes import run as start
from toy import CONFIG, END, byte_tokenizer, toy_model

CPU = torch.device("cpu")
EOT, PAST = "<|eot_id|>", "<|endoftext|>"  # LLaDA-Instruct writes one and then the other


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    return toy_model(tmp_path_factory.mktemp("model") / "toy")


@pytest.fixture(scope="module")
def policy(toy):
    return run.load_policy(settings(), str(toy), CPU)[0]


def settings(**changes) -> config.Config:
    base = dict(
        task="letters", C=12, T=6, block=4, K=4, G=2, B=3, micro=4, minibatches=1, lora_r=0, P=7,
        warmup=0, compile=False, checkpointing=False, precision="float32", max_grad_norm=1.0,
    )  # fmt: skip
    return config.Config(**(base | changes))


def act(policy, cfg, N: int = 6, greedy: bool = False):
    stream = torch.Generator().manual_seed(0)
    ids_NP = torch.randint(0, 200, (N, 7), generator=stream)
    real_NP = torch.arange(7) >= torch.arange(N)[:, None] % 6
    u_NT2J = run.uniform((cfg.T, 2, cfg.block), range(N), 0, "draw")
    return egspo.rollout(policy, ids_NP, real_NP, cfg, u_NT2J, greedy)


def ready(policy, cfg, N: int = 6):
    """Moves with everything that an update reads."""
    moves = egspo.choose_moves(act(policy, cfg, N), cfg, policy, 0, range(N))
    old_SU, token_SU, _ = egspo.log_probs(policy, moves, cfg)
    moves = moves._replace(old_SU=old_SU, ref_SU=token_SU)
    reward_N = torch.rand(N, generator=torch.Generator().manual_seed(1))
    return egspo.credit(moves, reward_N, cfg)


@contextlib.contextmanager
def opened(cfg, out: Path, monkeypatch):
    """A run in this process."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    cfg = dataclasses.replace(cfg, out=str(out), eval_n=2, eval_every=100, test=False)
    the_run, _ = run.open_run(cfg, run.Ranks(), config.Mode())
    yield the_run
    the_run.log.end("finished")


def steps_of(out: Path) -> list[dict]:
    return [event["m"] for event in events(out) if event["e"] == "step"]


# ---- exact likelihoods ---------------------------------------------------------------------------


def test_an_exact_likelihood_stays_finite_when_what_a_loser_drew_crosses_the_floor():
    """Two policies that differ by next to nothing: the winner is a little surer than the loser's
    dominant token, then a little less. Of what is surely less sure than that, e^-22 is left."""
    logp = []
    for shift in (0.01, -0.01):
        logits_SJV = torch.tensor([[[20 + shift, 0.0, 0.0], [20.0, 0.0, 0.0]]]).double()
        logits_SJV.requires_grad_()
        hidden_SJ, at_SR = torch.ones(1, 2).bool(), torch.zeros(1, 1, dtype=torch.long)
        token_SR, drawn_SJ = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 2).long()
        logp_S, _ = egspo.exact_logp(logits_SJV, 0.9, hidden_SJ, at_SR, token_SR, drawn_SJ)
        logp_S.sum().backward()
        assert logits_SJV.grad.isfinite().all()
        logp.append(logp_S.item())
    assert abs(logp[1] - logp[0]) < 1e-6


def test_ratios_and_the_kl_are_bounded_however_far_two_policies_are_apart():
    far = torch.tensor([[-300.0], [300.0], [0.0]], requires_grad=True)
    mb = egspo.Moves(*[None] * 3, torch.zeros(3, 2), None, torch.ones(3, 1).bool(), None)
    mb = mb._replace(adv_SU=-torch.ones(3, 1), old_SU=torch.zeros(3, 1), ref_SU=torch.zeros(3, 1))
    loss_SU, stats = egspo.clipped_loss(far, far, mb, settings())
    loss_SU.sum().backward()
    assert loss_SU.isfinite().all() and far.grad.isfinite().all()
    assert stats["ratio/mean"].max() < math.exp(11) and stats["kl"].max() < math.exp(11)


def test_exact_likelihoods_train_the_embedded_model_on_all_steps_twice(tmp_path):
    words = (
        "--model tiny --task sudoku --likelihood exact --select all --mu 2 --B 1 --G 4 --steps 2"
    )
    quick = "--micro 48 --precision float32 --no-compile --eval-n 1 --eval-every 100 --no-test"
    done = start(*words.split(), *quick.split(), "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    for m in steps_of(tmp_path / "run"):
        assert all(isinstance(value, (int, float)) for value in m.values())  # inf would be a string
        assert m["kl"] < 0.5 and m["ratio/max"] < 20 and m["grad_norm"] < 5


# ---- one order -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.3, 0.9])
def test_the_positions_surest_at_temperature_one_are_revealed_whatever_it_is_drawn_at(
    policy, temperature
):
    cfg, others = settings(temperature=temperature, block=12, T=6), 0
    roll = act(policy, cfg, N=20)
    for t in range(cfg.T):
        state_NC = torch.where(roll.when_NC < t, roll.token_NC, 257)
        ids_NL = torch.cat((roll.prompt_NP, state_NC), dim=1)
        logits_NCV = policy(ids_NL, model.with_completion(roll.real_NP, cfg.C))[:, 7:]
        logits_NCV = logits_NCV.masked_fill(policy.never_V, -math.inf)
        best = []
        for heat in (1.0, temperature):
            drawn_NC1 = roll.drawn_NTJ[:, t, :, None]
            sure_NC = (logits_NCV / heat).log_softmax(-1).gather(2, drawn_NC1).squeeze(2)
            sure_NC = sure_NC.masked_fill(state_NC != 257, -math.inf)
            best.append(sure_NC.topk(2, dim=1).indices.sort(dim=1).values)
        made_NR = (roll.when_NC == t).nonzero()[:, 1].view(-1, 2)
        assert torch.equal(made_NR, best[0])
        others += (best[0] != best[1]).any(1).sum()
    assert temperature == 0.9 or others > 10  # the sampling temperature would choose others


# ---- several updates from one rollout ------------------------------------------------------------


def test_each_minibatch_learns_its_slots_the_most_uncertain_first_and_every_move_once_a_pass(
    policy,
):
    cfg = settings(minibatches=2, mu=3)
    roll = act(policy, cfg)
    moves = egspo.choose_moves(roll, cfg, policy, 0, range(6))
    parts = list(egspo.minibatches(moves, cfg))
    assert len(parts) == 6
    entropy_S = roll.entropy_NT.gather(1, moves.t_S.view(6, 4)).flatten()
    for first, second in zip(parts[::2], parts[1::2]):
        assert sorted(first.tolist() + second.tolist()) == list(range(24))
        for row in range(6):
            early, late = (entropy_S[part[part // 4 == row]] for part in (first, second))
            assert len(early) == len(late) == 2 and early.min() >= late.max()
    assert len(list(egspo.minibatches(moves, settings()))) == 1


def test_ratios_leave_one_after_the_first_minibatch_and_the_clip_acts(toy):
    cfg = settings(minibatches=4, lr=3e-2, eps_low=0.05, eps_high=0.05)
    net = run.load_policy(cfg, str(toy), CPU)[0]
    moves, optimizer, clipped = ready(net, cfg), run.make_optimizer(net, cfg), []
    for i, part in enumerate(egspo.minibatches(moves, cfg)):
        tally = run.Tally()
        ratio_SU = egspo.update(net, optimizer, moves.take(part), cfg, run.Ranks(), tally)
        live_SU = moves.live_SU[part]
        assert (ratio_SU[live_SU] == 1).all() == (i == 0)
        m = tally.means(run.Ranks().gather)
        clipped.append(m["clip_hi"] + m["clip_lo"])
    assert clipped[0] == 0 and max(clipped[1:]) > 0


def test_a_minibatch_whose_rows_had_all_ended_changes_nothing_and_stops_nothing(toy):
    cfg = settings(weight_decay=0.1)  # neither does this change anything, nor old momentum
    net = run.load_policy(cfg, str(toy), CPU)[0]
    moves, optimizer, ranks = ready(net, cfg), run.make_optimizer(net, cfg), run.Ranks()
    egspo.update(net, optimizer, moves, cfg, ranks, run.Tally())
    before = copy.deepcopy(net.state_dict())
    moves = moves._replace(live_SU=torch.zeros_like(moves.live_SU))
    ratio_SU = egspo.update(net, optimizer, moves, cfg, ranks, run.Tally())
    assert same(before, net.state_dict()) and (ratio_SU == 1).all()


def test_an_evaluation_by_lengths_does_not_mind_the_minibatches_of_training(toy, tmp_path):
    words = "--eval-only --lengths 4 --minibatches 2 --eval-n 2".split()
    done = start("--model", toy, *SMALL, *words, "--out", tmp_path)
    assert done.returncode == 0, done.stderr


# ---- the reference -------------------------------------------------------------------------------


def test_the_reference_of_a_warm_started_adapter_is_that_adapter_after_a_resume_too(toy, tmp_path):
    net = model.load(toy)
    model.add_lora(net, 4, 8.0)
    with torch.no_grad():
        for lora in model.adapters(net).values():
            lora.lora_B.normal_(0, 0.1)
    warm, again = tmp_path / "warm", ["--lora-r", 4, "--steps", 4, "--warmup", 0]
    model.save(net, warm)
    byte_tokenizer().save_pretrained(warm)
    (warm / "defaults.json").write_text((toy / "defaults.json").read_text())
    train(warm, tmp_path / "whole", *again)
    train(warm, tmp_path / "cut", *again, "--steps", 2)
    train(warm, tmp_path / "cut", *again, "--resume")
    whole, cut = ([m["kl"] for m in steps_of(tmp_path / out)] for out in ("whole", "cut"))
    assert whole == cut and whole[0] < 1e-9 and min(whole[1:]) > 1e-3
    plain = model.load(toy)
    model.add_lora(plain, 4, 8.0)
    ids_NL = torch.arange(12).view(1, 12)
    with torch.no_grad():
        base, start_of = plain(ids_NL), net(ids_NL)
        net.load_state_dict(model.load(tmp_path / "whole/checkpoints/latest").state_dict())
        model.keep_start(net, warm)
        assert not torch.allclose(net(ids_NL), start_of)
        with model.as_reference(net):
            assert torch.allclose(net(ids_NL), start_of) and not torch.allclose(start_of, base)


# ---- the end of a turn ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chatty(tmp_path_factory) -> Path:
    """A model with LLaDA's two ends beside the one that its config.json names."""
    folder = toy_model(tmp_path_factory.mktemp("chatty") / "model", vocab_size=261)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [EOT, PAST]})
    tokenizer.save_pretrained(folder)
    return folder


def test_every_id_that_ends_a_turn_is_known(chatty, tmp_path):
    net, tokenizer = run.load_policy(settings(), str(chatty), CPU)
    ids = tokenizer.convert_tokens_to_ids([END, EOT, PAST])
    assert net.ends.tolist() == ids == [256, 259, 260]
    assert CONFIG["eos_token_id"] == 256  # the others come from the tokenizer
    for said, more in (([256, 65], [65]), (66, [66]), (None, [])):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": said}))
        known = model.end_ids(tmp_path, net.config, tokenizer, data.END_TOKENS)
        assert known == sorted(ids + more)
        made = tmp_path / f"made of it {more}"  # a checkpoint, or a merged model
        made.mkdir()
        model.bring_ends(tmp_path, made)
        assert model.end_ids(made, net.config, tokenizer, data.END_TOKENS) == known


def test_padding_that_ends_a_turn_may_be_said(chatty, tmp_path):
    """As of models that were taught to pad behind the turn with what also ends it."""
    shutil.copytree(chatty, tmp_path / "padded")
    (tmp_path / "padded" / "generation_config.json").write_text('{"eos_token_id": [256, 258]}')
    assert CONFIG["pad_token_id"] == 258
    for folder, may in ((chatty, False), (tmp_path / "padded", True)):
        net, _ = run.load_policy(settings(), str(folder), CPU)
        assert (258 in net.ends.tolist()) == may == (not net.never_V[258])
        assert net.never_V[CONFIG["mask_token_id"]]


@pytest.mark.parametrize("end", [256, 259, 260])
def test_each_of_them_ends_a_row_its_text_and_its_length(chatty, end):
    cfg = settings()
    net, tokenizer = run.load_policy(cfg, str(chatty), CPU)
    with torch.no_grad():
        net.unembed.weight[end] = net.unembed.weight[256] * 3
    roll, ended = act(net, cfg, N=40), 0
    answers, length_N = model.texts(roll.token_NC, tokenizer, net.ends), roll.lengths(net.ends)
    for n, (token_C, when_C) in enumerate(zip(roll.token_NC.tolist(), roll.when_NC.tolist())):
        first = next((i for i, token in enumerate(token_C) if token in (256, 259, 260)), cfg.C)
        done = first // cfg.block * cfg.block + cfg.block
        assert all(t == cfg.T for t in when_C[done:]) and all(t < cfg.T for t in when_C[:done])
        assert length_N[n] == first and token_C[done:] == [256] * (cfg.C - done)
        assert answers[n] == tokenizer.decode(token_C[:first], skip_special_tokens=True)
        ended += done < cfg.C
    assert 10 < ended < 40 and roll.forwards < 40 * cfg.T  # they leave the batch


def test_outputs_of_others_are_cut_at_the_same_ends(chatty):
    _, tokenizer = run.load_policy(settings(), str(chatty), CPU)
    for end in (EOT, PAST):
        assert end in data.END_TOKENS and score.END.split(f"4{end}5")[0] == "4"
        ids = tokenizer(f"4{end}5")["input_ids"]
        net_ends = torch.tensor(model.end_ids(
            chatty, model.parse_config(CONFIG), tokenizer, data.END_TOKENS
        ))  # fmt: skip
        assert model.texts(torch.tensor([ids]), tokenizer, net_ends) == ["4"]


# ---- d1's baseline -------------------------------------------------------------------------------


def test_diffu_grpo_hides_other_tokens_of_the_prompt_at_each_of_its_updates(policy):
    cfg, N = settings(method="diffu_grpo", mu=4), 400
    roll = act(policy, cfg, N)
    moves = egspo.choose_moves(roll, cfg, policy, 0, range(N))
    hidden_NKP = (moves.prompt_SP == 257).unflatten(0, (N, 4))
    real_NKP = roll.real_NP[:, None].expand_as(hidden_NKP)
    assert not hidden_NKP[~real_NKP].any()
    assert 0.13 < hidden_NKP[real_NKP].float().mean() < 0.17
    for a in range(4):
        for b in range(a):
            assert (hidden_NKP[:, a] != hidden_NKP[:, b]).any(1).float().mean() > 0.3
    parts = list(egspo.minibatches(moves, cfg))
    assert len(parts) == 4  # an update with each, of all rows
    assert all(part.div(4, rounding_mode="floor").tolist() == list(range(N)) for part in parts)
    assert (moves.state_SC == 257).all()


def test_what_diffu_grpo_hides_of_a_prompt_does_not_depend_on_how_far_its_batch_is_padded(policy):
    cfg, N = settings(method="diffu_grpo", mu=2, P=20), 40
    roll, hidden = act(policy, cfg, N), []
    for wide in (7, 9, 20):
        pad = functools.partial(torch.nn.functional.pad, pad=(wide - 7, 0))
        roll.prompt_NP = pad(roll.prompt_NP[:, -7:], value=258)
        roll.real_NP = pad(roll.real_NP[:, -7:], value=False)
        moves = egspo.choose_moves(roll, cfg, policy, 0, range(N))
        assert moves.prompt_SP.shape == (2 * N, wide)
        hidden.append(moves.prompt_SP[:, -7:])
    assert (hidden[0] == 257).any() and all(torch.equal(hidden[0], other) for other in hidden[1:])


def test_diffu_grpo_does_not_count_tokens_after_the_first_end(toy):
    cfg = settings(method="diffu_grpo", mu=2)
    net = run.load_policy(cfg, str(toy), CPU)[0]
    with torch.no_grad():
        net.unembed.weight[256] *= 2.5
    roll = act(net, cfg, N=40)
    moves, inside = egspo.choose_moves(roll, cfg, net, 0, range(40)), 0
    for row in range(40):
        token_C = roll.token_NC[row].tolist()
        first = token_C.index(256) if 256 in token_C else cfg.C
        for live_C in moves.live_SU[2 * row : 2 * row + 2].tolist():
            assert live_C == [i <= first for i in range(cfg.C)]
        inside += first < cfg.C and first % cfg.block < cfg.block - 1
    assert inside > 0  # some end in the middle of a block


def test_diffu_grpo_comes_with_its_authors_settings_unless_the_model_says_otherwise(toy):
    d1 = config.of_model(str(toy), "letters", "diffu_grpo")
    assert (d1.lr, d1.mu, d1.eps_low, d1.eps_high) == (3e-6, 12, 0.5, 0.5)
    ours = config.of_model(str(toy), "letters")
    assert (ours.lr, ours.mu, ours.eps_low, ours.eps_high) == (3e-5, 1, 0.2, 0.5)


# ---- evaluation ----------------------------------------------------------------------------------


@pytest.fixture
def evaluated(toy, monkeypatch):
    """Evaluate six problems: (metrics, rollouts)."""

    def evaluate(reference=None, **changes):
        cfg, rolls = settings(P=0, B=2, **changes), []
        net, tokenizer = run.load_policy(cfg, str(toy), CPU)
        problems = data.TASKS["letters"].load("val")[:6]
        cfg = run.measured(cfg, net, problems, tokenizer)
        the_run = run.Run(cfg, net, tokenizer, run.Ranks(), problems, reference=reference)
        plain = egspo.rollout
        note = lambda *args, **more: rolls.append(plain(*args, **more)) or rolls[-1]
        with monkeypatch.context() as patch:
            patch.setattr(egspo, "rollout", note)
            return egspo.evaluate(the_run, problems, cfg), rolls

    return evaluate


def test_random_order_is_evaluated_at_random_and_repeats_exactly(evaluated):
    m, rolls = evaluated(order="random")
    again, same_rolls = evaluated(order="random")
    _, sure = evaluated(order="low_confidence")
    whens = [torch.cat([roll.when_NC for roll in some]) for some in (rolls, same_rolls, sure)]
    assert torch.equal(whens[0], whens[1]) and m["reward"] == again["reward"]
    assert not torch.equal(whens[0], whens[2])
    assert len({tuple(when) for when in whens[0].tolist()}) > 3  # each row in an order of its own


def test_the_kl_of_an_evaluation_compares_whatever_a_run_selects_or_scores(evaluated, toy):
    other = run.load_policy(settings(), str(toy), CPU)[0]
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1 + 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    reference, kinds = functools.partial(contextlib.nullcontext, other), []
    for changes in (dict(), dict(select="uniform"), dict(select="all"), dict(likelihood="exact")):
        kinds.append(evaluated(reference, **changes)[0]["kl/uniform"])
    assert kinds[0] > 0 and kinds == [kinds[0]] * 4
    assert "kl/uniform" not in evaluated()[0]


def test_the_kl_at_a_step_is_that_between_the_two_distributions_of_its_tokens(policy, toy):
    cfg = settings()
    other = run.load_policy(cfg, str(toy), CPU)[0]
    with torch.no_grad():
        other.unembed.weight.mul_(1.2)
    roll, the_run = act(policy, cfg), run.Run(cfg, policy, None, run.Ranks(), [])
    the_run.reference = functools.partial(contextlib.nullcontext, other)
    fast_N = egspo.kl_of_a_step(the_run, roll, range(6), cfg)
    u_N = run.uniform((), range(6), cfg.seed, "kl")
    for n in range(6):
        t = int(u_N[n] * (max(t for t in roll.when_NC[n].tolist() if t < cfg.T) + 1))
        state_C = torch.where(roll.when_NC[n] < t, roll.token_NC[n], 257)
        ids_NL = torch.cat((roll.prompt_NP[n], state_C))[None]
        real_NL = model.with_completion(roll.real_NP[n : n + 1], cfg.C)
        logps = []
        for net in (policy, other):
            logits_CV = net(ids_NL, real_NL)[0, 7:][:, ~policy.never_V]
            logps.append((logits_CV / cfg.temperature).log_softmax(-1)[roll.when_NC[n] == t])
        want = torch.nn.functional.kl_div(logps[1], logps[0], reduction="none", log_target=True)
        assert fast_N[n].item() == pytest.approx(want.sum(1).mean().item(), rel=1e-4)


# ---- what a run took -----------------------------------------------------------------------------


def test_compute_adds_up_from_the_first_step_on_across_a_resume_and_over_ranks(toy, tmp_path):
    words = "--mu 2 --minibatches 2 --lam 0 --B 2".split()
    train(toy, tmp_path / "whole", *words, "--steps", 4)
    train(toy, tmp_path / "cut", *words, "--steps", 2)
    train(toy, tmp_path / "cut", *words, "--steps", 4, "--resume")
    train(toy, tmp_path / "two", *words, "--steps", 1, "--B", 1, ranks=2)
    names = [f"compute/{name}" for name in ("samples", "updates", "forwards", "tflop")]
    whole, cut, two = (
        [[m[name] for name in names] for m in steps_of(tmp_path / out)]
        for out in ("whole", "cut", "two")
    )
    assert whole == cut
    N, S = 4, 8  # 2 prompts with 2 samples, 2 moves of each
    for i, (samples, updates, forwards, tflop) in enumerate(whole):
        assert samples == N * (i + 1) and updates == 4 * (i + 1)
        # 6 denoising steps; old log-probs and the reference's; two passes, each worth three
        assert forwards == (6 * N + 2 * S + 2 * 3 * S) * (i + 1)
        assert tflop == pytest.approx(whole[0][3] * (i + 1), rel=1e-3) and tflop > 0
    assert two[0] == pytest.approx(whole[0], rel=1e-3)  # the same work, shared


# ---- uniform steps -------------------------------------------------------------------------------


@pytest.mark.parametrize("live", [1, 3, 4, 6, 10])
@pytest.mark.parametrize("K", [1, 3, 4])
def test_uniform_steps_are_spread_over_the_live_ones_and_hold_the_last(live, K):
    entropy_NT = torch.rand(2, 10).masked_fill(torch.arange(10) >= live, -math.inf)
    t_NK = egspo.select_steps(entropy_NT, K, "uniform")
    alive = [t for t in t_NK[0].tolist() if t < live]
    assert len(alive) == min(K, live) and live - 1 in alive
    if K <= live:
        gaps = [b - a for a, b in zip([-1, *alive], alive)]
        assert max(gaps) - min(gaps) <= 1


# ---- no pass for nothing -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, passes",
    [
        (dict(lam=0.0, beta=0.0), 0),
        (dict(lam=0.0, beta=0.1), 1),
        (dict(lam=0.5, beta=0.0), 1),
        (dict(lam=0.5, beta=0.1), 2),
        (dict(lam=0.0, beta=0.0, mu=2), 1),
        (dict(lam=0.0, beta=0.0, minibatches=2), 1),
        (dict(lam=0.0, beta=0.0, cache="block"), 1),
        (dict(method="diffu_grpo", beta=0.0), 0),
        (dict(method="diffu_grpo", beta=0.0, mu=2), 1),
    ],
    ids=str,
)
def test_log_probs_are_computed_only_where_something_needs_them(
    toy, tmp_path, monkeypatch, changes, passes
):
    cfg, calls, plain = settings(model=str(toy), steps=1, P=0, **changes), [], egspo.log_probs
    monkeypatch.setattr(
        egspo, "log_probs", lambda *args, **more: calls.append(1) or plain(*args, **more)
    )
    with opened(cfg, tmp_path / "run", monkeypatch) as the_run:
        egspo.train(the_run, 0)
    assert len(calls) == passes
    assert ("kl" in steps_of(tmp_path / "run")[0]) == (cfg.beta > 0)


def test_the_reference_is_asked_for_tokens_alone_whatever_the_likelihood(
    toy, tmp_path, monkeypatch
):
    """Its log-prob of the choice of positions, a head over the whole block, would go unused."""
    asked, plain = [], egspo.exact_logp
    monkeypatch.setattr(egspo, "exact_logp", lambda *args: asked.append(1) or plain(*args))
    changes = dict(likelihood="exact", micro=24, beta=0.1, steps=1)
    with opened(settings(model=str(toy), P=0, **changes), tmp_path / "run", monkeypatch) as the_run:
        egspo.train(the_run, 0)
    assert len(asked) == 2  # for the old log-prob, and in the update


@pytest.mark.parametrize("minibatches", [1, 4, 7])
def test_minibatches_share_the_moves_evenly_the_most_uncertain_first(policy, minibatches):
    """Also where they do not divide the K slots."""
    cfg = settings(minibatches=minibatches)
    moves = egspo.choose_moves(act(policy, cfg), cfg, policy, 0, range(6))
    parts = list(egspo.minibatches(moves, cfg))
    assert len(parts) == minibatches and max(map(len, parts)) - min(map(len, parts)) <= 1
    order = torch.cat(parts)
    assert order.sort().values.tolist() == list(range(24))
    assert moves.nth_S[order].tolist() == sorted(moves.nth_S.tolist())


def test_leaving_out_the_old_log_probs_changes_no_update(toy):
    cfg, grads = settings(lam=0.0, beta=0.1), []
    for keep in (True, False):
        net = run.load_policy(cfg, str(toy), CPU)[0]
        moves = ready(net, cfg)
        moves = moves if keep else moves._replace(old_SU=None)
        egspo.update(net, run.make_optimizer(net, cfg), moves, cfg, run.Ranks(), run.Tally())
        grads.append({name: p.detach() for name, p in net.named_parameters()})
    assert same(*grads)


# ---- statistics ----------------------------------------------------------------------------------


def test_a_judge_that_leaves_parts_out_does_not_stop_the_run(toy, tmp_path, monkeypatch):
    def judge(completion, letter):
        parts = ["early", "late", "bonus"][: len(completion) % 4]
        return data.Reward(len(parts), False, **dict.fromkeys(parts, 1.0))

    task = dataclasses.replace(data.TASKS["letters"], judge=judge)
    monkeypatch.setitem(data.TASKS, "letters", task)
    cfg = settings(model=str(toy), steps=2, P=0, B=4)
    with opened(cfg, tmp_path / "run", monkeypatch) as the_run:
        egspo.train(the_run, 0)
    for m in steps_of(tmp_path / "run"):  # means over those that have the part
        assert {m.get(f"reward/{name}") for name in ("early", "late", "bonus")} == {1.0}


def test_a_peak_is_over_all_updates_and_not_only_the_last():
    tally = run.Tally()
    tally.peak("ratio/max", torch.tensor([1.0, 3.0]))
    tally.peak("ratio/max", torch.tensor([2.0, 0.5]))
    assert tally.means(run.Ranks().gather)["ratio/max"] == 3.0


def test_ratios_of_a_step_are_means_and_peaks_over_all_its_updates(toy, tmp_path, monkeypatch):
    ratios, update = [], egspo.update

    def noted(net, optimizer, moves, *more):
        ratio_SU = update(net, optimizer, moves, *more)
        ratios.append(ratio_SU[moves.live_SU])
        for group in optimizer.param_groups:
            group["lr"] = -group["lr"]  # back again: the ratios of the last update are the nearest
        return ratio_SU

    monkeypatch.setattr(egspo, "update", noted)
    cfg = settings(model=str(toy), steps=1, P=0, mu=3, lr=1e-2, weight_decay=0.0)
    with opened(cfg, tmp_path / "run", monkeypatch) as the_run:
        egspo.train(the_run, 0)
    m, together = steps_of(tmp_path / "run")[0], torch.cat(ratios)
    assert len(ratios) == 3 and ratios[2].max() < together.max()
    assert m["ratio/max"] == pytest.approx(together.max().item(), rel=1e-3)
    assert m["ratio/mean"] == pytest.approx(together.mean().item(), rel=1e-3)


# ---- normalised advantages -----------------------------------------------------------------------


def test_normalised_advantages_are_divided_by_the_deviation_of_their_groups_rewards(policy):
    reward_N, early_NK = torch.rand(8), torch.rand(8, 3)
    live_NK = torch.rand(8, 3, generator=torch.Generator().manual_seed(0)) > 0.2
    plain, divided = (
        egspo.stepwise_advantages(reward_N, early_NK, live_NK, 4, 0.5, normalise)
        for normalise in (False, True)
    )
    for group in (slice(0, 4), slice(4, 8)):
        deviation = reward_N[group].std().item()
        assert torch.allclose(divided[group], plain[group] / (deviation + 1e-4))
    equal = egspo.stepwise_advantages(torch.ones(8), None, live_NK, 4, 0.0, normalise=True)
    assert (equal == 0).all()
    rewards = torch.arange(6.0) ** 2
    for normalise, spread in ((False, 9.0), (True, 1.0)):
        cfg = settings(lam=0.0, normalise=normalise)
        moves = egspo.choose_moves(act(policy, cfg), cfg, policy, 0, range(6))
        size_N = egspo.credit(moves, rewards, cfg).adv_SU.view(6, -1).abs().amax(1)
        assert (size_N.max() / size_N.min()).item() == pytest.approx(spread, rel=1e-3)


# ---- other tasks, other places -------------------------------------------------------------------


def test_other_tasks_are_evaluated_by_their_own_rewards_and_kept_with_the_checkpoint(
    toy, tmp_path, monkeypatch
):
    changes = dict(eval_also=("sudoku",), steps=1, P=0, save_every=1, weights="late=2")
    with opened(settings(model=str(toy), **changes), tmp_path / "run", monkeypatch) as the_run:
        assert the_run.others["sudoku"][0].P > the_run.cfg.P  # its prompts are longer
        egspo.train(the_run, 0)
    told = [event for event in events(tmp_path / "run") if event["e"] == "eval"]
    assert [(event["split"], event["it"]) for event in told] == [
        (split, step) for step in (0, 1) for split in ("val", "sudoku")
    ]
    assert all(("reward/cells" in e["m"]) == (e["split"] == "sudoku") for e in told)
    note = json.loads((tmp_path / "run/checkpoints/best/validation.json").read_text())
    assert note["also"]["sudoku"] == told[-1]["m"] and note["reward"] == told[-2]["m"]["reward"]
    log = Log(tmp_path / "run" / "events.jsonl")
    log.poll()
    assert list(log.history.series["eval/sudoku"]) == [0, 1]
    assert run.Config(**vars(config.of_run(str(tmp_path / "run")))).eval_also == ("sudoku",)


@pytest.mark.parametrize("service", ["wandb", "trackio"])
def test_metrics_are_shown_in_the_same_run_of_a_service_before_and_after_a_resume(
    toy, tmp_path, monkeypatch, service
):
    told, begun = {}, []
    fake = types.ModuleType(service)
    fake.__spec__ = importlib.machinery.ModuleSpec(service, None)
    fake.init = lambda **options: begun.append(options)
    fake.log = lambda m, step: told.setdefault(step, {}).update(m)
    monkeypatch.setitem(sys.modules, service, fake)
    cfg = settings(model=str(toy), track=service, steps=2, P=0)
    with opened(cfg, tmp_path / "run", monkeypatch) as the_run:
        egspo.train(the_run, 0)
    again, start = run.open_run(
        dataclasses.replace(the_run.cfg, steps=3), the_run.ranks, config.Mode(resume=True)
    )
    egspo.train(again, start)
    logged = [(e["it"], e["m"]) for e in events(tmp_path / "run") if e["e"] == "step"]
    assert [it for it, _ in logged] == [0, 1, 2]
    for it, m in logged:
        shown = {name: value for name, value in told[it].items() if name in m}
        assert shown == pytest.approx(m, rel=1e-3)
    assert {"eval/val/accuracy"} <= told[2].keys()
    assert [options["name"] for options in begun] == ["run", "run"]
    assert {options["resume"] for options in begun} == {"allow"}
    assert service == "trackio" or {options["id"] for options in begun} == {"run"}


def test_a_service_that_fails_is_said_once_and_stops_nothing(toy, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("no route to host")

    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    fake.init, fake.log = lambda **_: None, fail
    monkeypatch.setitem(sys.modules, "wandb", fake)
    cfg = settings(model=str(toy), track="wandb", steps=2, P=0)
    with opened(cfg, tmp_path / "run", monkeypatch) as the_run:
        egspo.train(the_run, 0)
    assert len(steps_of(tmp_path / "run")) == 2
    assert capsys.readouterr().out.count("--track wandb failed and gets no more: no route") == 1
    fake.init = fail
    with pytest.raises(ValueError, match="--track wandb: no route to host"):
        run.open_run(dataclasses.replace(cfg, out=str(tmp_path / "b")), run.Ranks(), config.Mode())


def test_a_service_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--track wandb: not installed: pip install wandb"):
        settings(track="wandb")


def test_a_merged_model_says_where_it_comes_from_and_how_it_is_published(
    toy, tmp_path, monkeypatch, capsys
):
    cfg = settings(model=str(toy), lora_r=2, steps=1, save_every=1, P=0)
    with opened(cfg, tmp_path / "run", monkeypatch) as the_run:
        egspo.train(the_run, 0)
    made, best = tmp_path / "mine", tmp_path / "run" / "checkpoints" / "best"
    assert run.merge(dataclasses.replace(cfg, model=str(best), out=str(made))) == 0
    assert f"hf upload OWNER/mine {made}" in capsys.readouterr().out
    card, note = (
        (made / "README.md").read_text(),
        json.loads((best / "validation.json").read_text()),
    )
    assert card.startswith(f"---\nbase_model: {toy}\n") and "letters" in card and "rank 2" in card
    assert f"{note['accuracy']:.1%}" in card and "2 problems" in card
