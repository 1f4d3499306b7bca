"""Reinforcement learning of masked diffusion language models: EGSPO, EGSPO-SA (arXiv 2603.12554).

The decision process. A completion of C tokens starts as C masks. At each of T denoising steps the
policy draws a token for every hidden position of the current block and reveals R = C / T of them;
blocks are decoded from left to right; a revealed token is never masked again. So (token, when) is
the whole trajectory: the state before step t is "tokens with when < t, masks elsewhere", the move
at t is "positions with when == t". Time here is generation order: t = 0 sees only masks (the
diffusion literature counts the other way). The reward comes at the end.

The gradient. grad J = sum_t E[A_t grad log pi(a_t | s_t)], A_t = r - V(s_t), for any baseline V
that looks only at the state; no likelihood of a sequence is needed. Over all steps it is exact but
for the jumps of a ranking (2), over steps fixed beforehand their part of it; tests/test_exact.py
prints what a shortcut costs.

  act      rollout              x_i ~ softmax(logits_i / temperature), the R surest are revealed
  choose   select_steps         the K steps of highest entropy H_t (the paper's), or others
  credit   stepwise_advantages  G_t = (r + lam (r - r_hat_t)) / (1 + lam), minus the group's mean
  learn    clipped_loss         -min(ratio A, clip(ratio) A) + beta k3, over R, mean of live moves
  tell     EventLog.tell        events.jsonl, which `python tui.py` shows

r_hat_t is the reward of the greedy one-step completion of s_t, the guess. lam = 0 is EGSPO, above
it EGSPO-SA.

Where this file departs from the paper or from its released code, and why (a table in the README
has data, prompts, rewards and settings):

 1. A move is scored at the sampling temperature; all that follows the logits is float32 or more.
 2. `--likelihood exact` is the probability of the whole move, the choice of positions included;
    the product of token probabilities (`tokens`, the paper's) is exact only for random order, or
    where a step reveals all that its block hides (`--block` C/T). Neither's gradient sees that the
    expected reward jumps where two draws tie in sureness and another one is revealed.
 3. The guess is read off the forward pass that gives the old log-probability of a selected move,
    made for it where nothing else needs one: K wide heads per trajectory rather than T.
 4. The final and the one-step reward are the same function, format terms included: they cancel in
    r - r_hat where both texts earn them.
 5. A slot is the k-th selected step in time; the released code's is the k-th by entropy. Either
    way the group's mean in it mixes different times. r_hat_t stays in the return, and a row that
    has ended counts in the mean, as its own guess.
 6. The old log-probability comes from the same function, shapes and mode as the new one: the first
    ratio is 1. There is no dropout anywhere.
 7. Padding is never attended to and positions count from the first real token, everywhere.
 8. A row that holds the end token in a finished block is done: nothing after that block is kept,
    selected or scored, in training and evaluation alike.
 9. Randomness is a function of (seed, step, row): it depends on neither ranks nor batches, and a
    resumed run continues exactly.
10. `--cache block` (not in the paper) draws from a slightly different policy: its moves carry a
    truncated importance weight, and the run logs how far apart the two are (cache/kl).
11. All seven linear maps of a block are adapted (the released list of names misses three of
    LLaDA's), and lam is constant (a later state of the released code takes lam t / T).

Names end in their dimensions: B prompts of this rank, G samples per prompt, N = B*G rows
(prompt-major), n of them still decoded, T denoising steps, K selected ones, S = N*K moves, R tokens
per step, U ratios per move, J positions of a block and M hidden ones, Q positions in all, P prompt,
C completion, L = P + C, V vocabulary, D width; X and W local counts. The settings are in config.py.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

import data
import plan
import run as running
from config import Config, parse
from model import draw, invert, logits_at, most_probable, pick, places, texts, with_completion
from run import Ranks, Run, Tally, batch, demand_finite, set_learning_rate, sum_and_clip, uniform

# ---- train ---------------------------------------------------------------------------------------


def train(run: Run, start: int) -> None:
    """Act, choose, credit, learn, tell, until cfg.steps are done."""
    cfg, policy, ranks, log = run.cfg, run.policy, run.ranks, run.log
    rows, of_tokens = ranks.rows(cfg.B * cfg.G), replace(cfg, likelihood="tokens")
    for step in itertools.count(start):
        running.between_steps(run, step, start, evaluate)
        if step == cfg.steps:
            return
        tally = Tally()
        problems = batch(run.train_set, cfg.B, step, cfg.seed, ranks)
        problems = [problem for problem in problems for _ in range(cfg.G)]

        with log.phase(step, "rollout"):  # act
            u_NT2J = uniform((cfg.T, 2, cfg.block), rows, cfg.seed, step, "draw").to(ranks.device)
            watch = log.watcher(step, problems[0].prompt)
            roll = rollout(policy, *run.prompts(problems), cfg, u_NT2J, watch=watch)
            demand_finite("entropy of the rollout's logits", roll.entropy_NC.sum(), ranks)
            answers = texts(roll.token_NC, run.tokenizer, policy.ends)
            judged = run.judge(answers, problems)

        with log.phase(step, "logp"):  # choose
            moves = choose_moves(roll, cfg, policy, step, rows)
            if cfg.looks_back:
                old_SU, _, guess_SC = log_probs(policy, moves, cfg, guess=cfg.stepwise)
                moves = moves._replace(old_SU=old_SU, guess_SC=guess_SC)
            if cfg.beta > 0:
                with run.reference() as reference, torch.no_grad():  # the KL is that of the tokens
                    moves = moves._replace(ref_SU=log_probs(reference, moves, of_tokens)[1])

        with log.phase(step, "score"):  # credit
            rewards, early_S = judged.result(), early_rewards(run, problems, moves.guess_SC)
            reward_N = torch.tensor(rewards, device=ranks.device)
            moves = credit(moves._replace(early_S=early_S), reward_N, cfg)

        with log.phase(step, "update"):  # learn
            set_learning_rate(run.optimizer, cfg, step)
            ratio_SU = torch.ones_like(moves.adv_SU)
            for part in minibatches(moves, cfg):
                ratio_SU[part] = update(policy, run.optimizer, moves.take(part), cfg, ranks, tally)
            moves = moves._replace(ratio_SU=ratio_SU)

        run.count(tally, roll, int(passed(moves, cfg).sum()))
        log.tell(step, tally, problems, answers, rewards, roll, moves)


# ---- act -----------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """N trajectories. `when` is the step that revealed a token, T where the row had ended."""

    prompt_NP: Tensor
    real_NP: Tensor  # False at padding
    token_NC: Tensor
    when_NC: Tensor
    logp_NC: Tensor  # log-prob of each token when it was revealed
    entropy_NC: Tensor  # nats, of the distribution it was drawn from
    drawn_NTJ: Tensor  # what was drawn at each hidden position of the step's block, else the mask
    T: int
    forwards: int = 0  # forward passes times rows, for the cost

    @property
    def entropy_NT(self) -> Tensor:
        """H_t: the mean over the tokens revealed at each step; -inf where the row had ended."""
        size = (len(self.when_NC), self.T + 1)
        one_NC = torch.ones_like(self.entropy_NC)
        total_NT = one_NC.new_zeros(size).scatter_add(1, self.when_NC, self.entropy_NC)
        count_NT = one_NC.new_zeros(size).scatter_add(1, self.when_NC, one_NC)
        return torch.where(count_NT > 0, total_NT / count_NT, -math.inf)[:, : self.T]

    def lengths(self, ends: Tensor) -> Tensor:
        """Tokens before the first end token [N]."""
        return (torch.isin(self.token_NC, ends).cumsum(1) == 0).sum(1)


@torch.no_grad()
def rollout(
    policy: nn.Module,
    prompt_NP: Tensor,
    real_NP: Tensor,
    cfg: Config,
    u_NT2J: Tensor | None = None,
    greedy: bool = False,
    watch: Callable[[int, Rollout], None] | None = None,
) -> Rollout:
    """Complete each prompt in T denoising steps (section 3).

    u_NT2J is the noise: for the draw of each position of a block, and for random order, which
    always needs it. Without it, or with `greedy`, the most probable tokens.

    With `cfg.cache` "block", only a block's first step encodes the whole sequence; the others renew
    the block and see the rest as it was then (the dual cache of Fast-dLLM, arXiv 2505.22618).

    `watch(t, trajectories so far)` is called after each step. The host waits for the device once a
    block (which rows have ended?), and in between only where `watch` does.
    """
    (N, P), J, R = prompt_NP.shape, cfg.block, cfg.C // cfg.T
    mask = policy.config.mask_id
    greedy = greedy or u_NT2J is None
    token_NC = prompt_NP.new_full((N, cfg.C), mask)
    when_NC = torch.full_like(token_NC, cfg.T)
    logp_NC = torch.zeros((N, cfg.C), device=prompt_NP.device)
    entropy_NC, drawn_NTJ = torch.zeros_like(logp_NC), token_NC.new_full((N, cfg.T, J), mask)
    roll = Rollout(prompt_NP, real_NP, token_NC, when_NC, logp_NC, entropy_NC, drawn_NTJ, cfg.T)
    for first in range(0, cfg.C, J):
        rows = unfinished(torch.isin(token_NC[:, :first], policy.ends).any(1), cfg.shard)
        prompt_nP, real_nL = prompt_NP[rows], with_completion(real_NP[rows], cfg.C)
        at_J = P + first + torch.arange(J, device=rows.device)
        cache = [[] for _ in policy.blocks] if cfg.cache == "block" else None
        for t in range(first // R, (first + J) // R):
            if len(rows) == 0:
                break
            ids_nL = torch.cat((prompt_nP, token_NC[rows]), dim=1)
            at_nM = places(ids_nL[:, at_J] == mask, first + J - t * R)  # every row hides as many
            h_nMD = pick(policy.features(ids_nL, real_nL, at_J, cache), at_nM)
            u_nM = place_nM = None
            if u_NT2J is not None:
                u_nM, place_nM = (u_nJ.gather(1, at_nM) for u_nJ in u_NT2J[rows, t].unbind(1))
            temperature = 1.0 if greedy else cfg.temperature
            drawn = draw(policy, h_nMD, None if greedy else u_nM, temperature)
            token_nM, logp_nM, sure_nM, entropy_nM = drawn
            best_nR = reveal(place_nM if cfg.order == "random" else sure_nM, R)
            cells = rows[:, None], first + at_nM.gather(1, best_nR)
            token_NC[cells] = token_nM.gather(1, best_nR)
            when_NC[cells] = t
            logp_NC[cells] = logp_nM.gather(1, best_nR)
            entropy_NC[cells] = entropy_nM.gather(1, best_nR)
            drawn_NTJ[rows[:, None], t, at_nM] = token_nM
            roll.forwards += len(rows)
            if watch:
                watch(t, roll)
    cut_at_the_end(roll, J, policy.ends, policy.config.eos_id)
    return roll


def unfinished(done_N: Tensor, shard: bool) -> Tensor:
    """The rows to decode: those that have not ended, and others up to the next quarter of N, so
    that the batch has at most four sizes. What rows that have ended decode is thrown away. With
    `shard` all of them: every rank must call the network equally often."""
    quarter = -(-len(done_N) // 4)
    live = len(done_N) if shard else int((~done_N).sum())
    return done_N.int().argsort(stable=True)[: -(-live // quarter) * quarter]


def cut_at_the_end(roll: Rollout, J: int, ends: Tensor, end: int) -> None:
    """Fill the blocks after a row's first end token with end tokens that no step has revealed."""
    ended_NX = torch.isin(roll.token_NC, ends).unflatten(1, (-1, J)).any(2).cumsum(1).bool()
    before_NX = torch.cat((torch.zeros_like(ended_NX[:, :1]), ended_NX[:, :-1]), dim=1)
    after_NC = before_NX.repeat_interleave(J, dim=1)
    roll.token_NC = roll.token_NC.masked_fill(after_NC, end)
    roll.when_NC = roll.when_NC.masked_fill(after_NC, roll.T)
    roll.logp_NC = roll.logp_NC.masked_fill(after_NC, 0)
    roll.entropy_NC = roll.entropy_NC.masked_fill(after_NC, 0)


def reveal(score_NM: Tensor, R: int) -> Tensor:
    """Which R of the M hidden positions have the highest score [N, R], surest first; ties go to the
    earlier one."""
    return score_NM.sort(dim=1, descending=True, stable=True).indices[:, :R]


# ---- choose --------------------------------------------------------------------------------------


def select_steps(entropy_NT: Tensor, K: int, how: str, u_NT: Tensor | None = None) -> Tensor:
    """The K steps of each trajectory that learn [N, K].

    The gradient lost by leaving a step out is bounded by its entropy (section 4), so `entropy`
    keeps the K largest. `uniform` takes the last of each of K equal parts, `random` any K (`u_NT`),
    all in order of time; steps after a row's end (entropy -inf) come last, and only where nothing
    else is. `all` takes every step, dead ones too. `sampled` draws K times with the chances of
    `step_chances`: one may come twice, and they stay unsorted: a slot's mean is a baseline only if
    it cannot tell the time.
    """
    live_NT = entropy_NT > -math.inf
    t = torch.arange(entropy_NT.shape[1], device=entropy_NT.device)
    if how == "all":
        return t.expand_as(entropy_NT)
    if how == "sampled":
        chance_SX = step_chances(entropy_NT).repeat_interleave(K, dim=0)
        return invert(chance_SX, u_NT[:, :K].flatten())[0].view(-1, K)
    if how == "uniform":
        n_N1 = live_NT.sum(1, keepdim=True)
        part_NT, next_NT = ((t + i) * K // n_N1 for i in (0, 1))
        score_NT = ((next_NT > part_NT) | (n_N1 <= K)).float()  # the K lasts, or all there are
    else:
        score_NT = entropy_NT if how == "entropy" else u_NT
    score_NT = torch.where(live_NT, score_NT, -math.inf)
    return score_NT.sort(dim=1, descending=True, stable=True).indices[:, :K].sort(dim=1).values


def step_chances(entropy_NT: Tensor, floor: float = 0.1) -> Tensor:
    """How likely `sampled` draws each step [N, T]: by its entropy, but for a tenth of the chance,
    which all live steps share, so that no weight exceeds 10 (AGRPO, arXiv 2510.04019)."""
    even_NT = (entropy_NT > -math.inf).to(entropy_NT)
    share_NT = even_NT * entropy_NT.clamp(min=1e-6)
    share_NT, even_NT = (x_NT / x_NT.sum(1, keepdim=True) for x_NT in (share_NT, even_NT))
    return (1 - floor) * share_NT + floor * even_NT


class Moves(NamedTuple):
    """S moves to learn from: what was seen, what was done, and what it is worth.

    The R tokens of a move share U = 1 ratio. For diffu_grpo a row is one move of R = C tokens, and
    each has a ratio of its own, U = C.
    """

    prompt_SP: Tensor
    real_SP: Tensor
    state_SC: Tensor  # completion before the move: masks where hidden
    at_SR: Tensor  # positions in the completion
    token_SR: Tensor
    live_SU: Tensor  # False: the row had ended, or a filler
    nth_S: Tensor  # its turn to learn among the trajectory's: by entropy, 0 the highest
    drawn_SJ: Tensor | None = None  # what was drawn in its block, losers included; else the mask
    t_S: Tensor | None = None  # when it was made
    weight_SU: Tensor | None = None  # makes up for the chance that it was selected
    rollout_SU: Tensor | None = None  # log-prob in the rollout, which may use a cache
    old_SU: Tensor | None = None  # log-prob under the policy that moved; None: the present one
    ref_SU: Tensor | None = None  # log-prob of its tokens under the reference
    guess_SC: Tensor | None = None  # greedy one-step completion of the state
    early_S: Tensor | None = None  # its reward
    cache_SU: Tensor | None = None  # importance weight of a move drawn with a cache
    adv_SU: Tensor | None = None  # advantage, weights included
    ratio_SU: Tensor | None = None  # before its last update

    def take(self, rows: Tensor) -> Moves:
        return Moves(*(None if x is None else x[rows] for x in self))


def choose_moves(roll: Rollout, cfg: Config, policy: nn.Module, step: int, rows: range) -> Moves:
    """The moves of this rollout that learn."""
    device = roll.token_NC.device
    if cfg.method == "diffu_grpo":
        u_NKP = uniform((cfg.mu, cfg.P), rows, cfg.seed, step, "hide").to(device)
        return one_step_moves(roll, policy, u_NKP[..., -roll.prompt_NP.shape[1] :])
    u_NT = None
    if cfg.select in ("random", "sampled"):
        u_NT = uniform((cfg.T,), rows, cfg.seed, step, "select").to(device)
    t_NK = select_steps(roll.entropy_NT, cfg.K, cfg.select, u_NT)
    moves = gather_moves(roll, t_NK, policy.config.mask_id)
    if cfg.select != "sampled":
        return moves
    chance_NK = step_chances(roll.entropy_NT).gather(1, t_NK)
    drawn_S = torch.arange(cfg.K, device=device).repeat(len(t_NK))  # by entropy would be a choice
    return moves._replace(weight_SU=1 / (cfg.T * chance_NK).view(-1, 1), nth_S=drawn_S)


def gather_moves(roll: Rollout, t_NK: Tensor, mask: int) -> Moves:
    """The moves made at the selected steps, trajectory by trajectory: S = N*K rows."""
    K, R, t_S1 = t_NK.shape[1], roll.token_NC.shape[1] // roll.T, t_NK.reshape(-1, 1)
    token_SC, when_SC, logp_SC, prompt_SP, real_SP = (
        x.repeat_interleave(K, dim=0)
        for x in (roll.token_NC, roll.when_NC, roll.logp_NC, roll.prompt_NP, roll.real_NP)
    )
    at_SR = places(when_SC == t_S1, R)
    n_S = torch.arange(len(t_NK), device=t_NK.device).repeat_interleave(K)
    order_NK = roll.entropy_NT.gather(1, t_NK).argsort(dim=1, descending=True, stable=True)
    return Moves(
        prompt_SP,
        real_SP,
        state_SC=torch.where(when_SC < t_S1, token_SC, mask),
        at_SR=at_SR,
        token_SR=token_SC.gather(1, at_SR),
        live_SU=(when_SC == t_S1).any(1, keepdim=True),
        nth_S=order_NK.argsort(dim=1).flatten(),
        drawn_SJ=roll.drawn_NTJ[n_S, t_S1.squeeze(1)],
        t_S=t_S1.squeeze(1),
        rollout_SU=logp_SC.gather(1, at_SR).sum(1, keepdim=True),
    )


def one_step_moves(roll: Rollout, policy: nn.Module, u_NKP: Tensor, hide: float = 0.15) -> Moves:
    """diffu_grpo (d1, arXiv 2504.12216): score the answer from a fully masked completion.

    Once for each of K updates, and each time another 15 % of the prompt's tokens are masked. Tokens
    after the first end token do not count.
    """
    (N, K), mask = u_NKP.shape[:2], policy.config.mask_id
    every_C = torch.arange(roll.token_NC.shape[1], device=u_NKP.device)
    live_NC = (every_C <= roll.lengths(policy.ends)[:, None]) & (roll.when_NC < roll.T)
    token_SC, prompt_SP, real_SP, live_SC = (
        x.repeat_interleave(K, dim=0)
        for x in (roll.token_NC, roll.prompt_NP, roll.real_NP, live_NC)
    )
    hidden_SP = (u_NKP.flatten(0, 1) < hide) & real_SP
    return Moves(
        torch.where(hidden_SP, mask, prompt_SP),
        real_SP,
        state_SC=torch.full_like(token_SC, mask),
        at_SR=every_C.expand_as(token_SC),
        token_SR=token_SC,
        live_SU=live_SC,
        nth_S=torch.arange(K, device=u_NKP.device).repeat(N),
    )


# ---- credit --------------------------------------------------------------------------------------


def early_rewards(run: Run, problems: list[data.Problem], guess_SC: Tensor | None) -> Tensor | None:
    """r_hat: the reward of the guess at each selected step [S], by the same function as r."""
    if guess_SC is None:
        return None
    guesses = texts(guess_SC, run.tokenizer, run.policy.ends)
    asked = [problem for problem in problems for _ in range(len(guesses) // len(problems))]
    return torch.tensor(run.judge(guesses, asked).result(), device=guess_SC.device)


def credit(moves: Moves, reward_N: Tensor, cfg: Config) -> Moves:
    """The moves with their advantage, which is the same for all ratios of a move."""
    live_NK = moves.live_SU.any(1).view(len(reward_N), -1)
    early_NK = None if moves.early_S is None else moves.early_S.view(live_NK.shape)
    adv_NK = stepwise_advantages(reward_N, early_NK, live_NK, cfg.G, cfg.lam, cfg.normalise)
    adv_SU = adv_NK.reshape(-1, 1).expand_as(moves.live_SU)
    if moves.weight_SU is not None:
        adv_SU = adv_SU * moves.weight_SU
    if cfg.cache == "block":
        moves = moves._replace(cache_SU=cache_weight(moves))
        adv_SU = adv_SU * moves.cache_SU
    return moves._replace(adv_SU=adv_SU)


def stepwise_advantages(
    reward_N: Tensor, early_NK: Tensor | None, live_NK: Tensor, G: int, lam: float, normalise=False
) -> Tensor:
    """Advantage of each selected move [N, K] (section 5).

    Return G_t = (r + lam (r - r_hat_t)) / (1 + lam), minus the group's mean in the same slot; 0
    where the row had ended. Such a row counts in the mean, as its own guess: G_t = r. (A mean of
    the others alone would weigh late slots by how many are left.) Without early rewards G_t = r,
    which is EGSPO. With `normalise` divided by the standard deviation of the group's rewards, as
    GRPO does.
    """
    return_NK = reward_N[:, None].expand_as(live_NK)
    if early_NK is not None:
        early_NK = torch.where(live_NK, early_NK, return_NK)
        return_NK = (return_NK + lam * (return_NK - early_NK)) / (1 + lam)
    return_BGK = return_NK.unflatten(0, (-1, G))
    return_BGK = return_BGK - return_BGK[:, :1]  # so that equal ones leave exactly 0
    adv_BGK = return_BGK - return_BGK.mean(1, keepdim=True)
    adv_BGK = torch.where(live_NK.unflatten(0, (-1, G)), adv_BGK, 0)
    if normalise:
        adv_BGK = adv_BGK / (reward_N.view(-1, G, 1).std(1, keepdim=True) + 1e-4)
    return adv_BGK.flatten(0, 1)


def cache_weight(moves: Moves, cap: float = 2.0) -> Tensor:
    """min(pi(a) / pi_cached(a), cap) [S, U]: a cached rollout draws from a slightly different
    policy. This corrects the draw of the move itself, not of the states before and after it."""
    return (moves.old_SU - moves.rollout_SU).exp().clamp(max=cap)


# ---- learn ---------------------------------------------------------------------------------------


def minibatches(moves: Moves, cfg: Config) -> Iterator[Tensor]:
    """Which moves each optimizer step of this rollout learns: `mu` passes over all, each shared by
    `minibatches`, those of highest entropy first (sampled: as they were drawn)."""
    order_S = moves.nth_S.argsort(stable=True)
    for _ in range(cfg.repeats):
        yield from order_S.tensor_split(cfg.updates_a_pass)


def log_probs(policy: nn.Module, moves: Moves, cfg: Config, guess: bool = False):
    """Log-prob under `policy` of each move and of its tokens, both [S, U]; with `guess` also its
    guess [S, C]. Old ones are taken with gradients on, as the update's are: without, other kernels
    run, which round otherwise, and the first ratio would not be 1."""
    parts = [looked_at(policy, mb, cfg, guess) for mb in micro_batches(moves, cfg)]
    return tuple(None if x[0] is None else spread(x, moves, cfg) for x in zip(*parts))


def looked_at(policy: nn.Module, mb: Moves, cfg: Config, guess: bool):
    """`log_probs` of one micro-batch; its graph is gone before the next."""
    h_SCD = completion_features(policy, mb)
    logp_SU, token_SU = move_logp(policy, h_SCD, mb, cfg)
    guess_SC = greedy_guess(policy, h_SCD, mb.state_SC) if guess else None
    return logp_SU.detach(), token_SU.detach(), guess_SC


def update(policy, optimizer, moves: Moves, cfg: Config, ranks: Ranks, tally: Tally) -> Tensor:
    """One optimizer step on these moves; the result depends on neither `micro` nor the ranks.

    Returns the ratios [S, U] before the step. Raises Halt where a number is not finite.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    count = ranks.sum(moves.live_SU.sum().float())
    if count == 0:  # of all ranks: every row had ended, and old momentum is no reason to move
        return torch.ones_like(moves.adv_SU)
    ratios = []
    for mb in micro_batches(moves, cfg):
        logp_SU, token_SU = move_logp(policy, completion_features(policy, mb), mb, cfg)
        loss_SU, stats = clipped_loss(logp_SU, token_SU, mb, cfg)
        (torch.where(mb.live_SU, loss_SU, 0).sum() / count).backward()
        for name, value_SU in stats.items():
            tally.add(name, value_SU, mb.live_SU)
        ratios.append(stats["ratio/mean"])
        tally.peak("ratio/max", torch.where(mb.live_SU, ratios[-1], 0))
    norm = sum_and_clip(parameters, cfg, ranks)
    demand_finite("gradient norm", norm, ranks)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    tally.add("grad_norm", norm.detach())
    tally.add("lr", optimizer.param_groups[0]["lr"])
    return spread(ratios, moves, cfg)


FARTHEST = 10.0  # nats between two policies; beyond, a number is held there and has no gradient


def clipped_loss(logp_SU: Tensor, token_SU: Tensor, mb: Moves, cfg: Config) -> tuple[Tensor, dict]:
    """The surrogate of section 4 [S, U], and its statistics by name, each [S, U].

    [-min(ratio A, clip(ratio) A) + beta k3] / R, where ratio = exp(logp - old) and k3 is of the
    tokens, whatever the likelihood counts. R is the tokens of a ratio: a constant, as published.
    """
    old_SU = logp_SU.detach() if mb.old_SU is None else mb.old_SU
    ratio_SU = (logp_SU - old_SU).clamp(-FARTHEST, FARTHEST).exp()
    clipped_SU = ratio_SU.clamp(1 - cfg.eps_low, 1 + cfg.eps_high)
    loss_SU = -torch.minimum(ratio_SU * mb.adv_SU, clipped_SU * mb.adv_SU)
    stats = {
        "ratio/mean": ratio_SU,
        "clip_hi": ((ratio_SU > 1 + cfg.eps_high) & (mb.adv_SU > 0)).float(),
        "clip_lo": ((ratio_SU < 1 - cfg.eps_low) & (mb.adv_SU < 0)).float(),
    }
    if mb.ref_SU is not None:
        stats["kl"] = k3(mb.ref_SU, token_SU)
        loss_SU = loss_SU + cfg.beta * stats["kl"]
    loss_SU = loss_SU / (mb.at_SR.shape[1] // logp_SU.shape[1])
    stats["loss"] = loss_SU
    return loss_SU, {name: value_SU.detach() for name, value_SU in stats.items()}


def k3(ref: Tensor, logp: Tensor) -> Tensor:
    """Schulman's estimate, in nats, never negative: over draws of the policy its mean is KL(policy,
    reference), and its gradient that of KL(reference, policy), as in GRPO. Low-confidence moves are
    no such draws: of them it is a penalty, and evaluation's kl/uniform the measure."""
    away = (ref - logp).clamp(max=FARTHEST)
    return away.expm1() - away  # of nearly equal ones 0, where exp would leave its rounding


def move_logp(policy: nn.Module, h_SCD: Tensor, mb: Moves, cfg: Config) -> tuple[Tensor, Tensor]:
    """log pi(a_t | s_t) at the sampling temperature [S, U], of features of the completion, and the
    same of the tokens alone. Two different numbers with `exact` only."""
    if cfg.counts_losers:
        first_S1 = mb.at_SR[:, :1] // cfg.block * cfg.block
        at_SJ = first_S1 + torch.arange(cfg.block, device=first_S1.device)
        logits_SJV = logits_at(policy, pick(h_SCD, at_SJ))
        hidden_SJ = mb.state_SC.gather(1, at_SJ) == policy.config.mask_id
        inside = mb.at_SR - first_S1, mb.token_SR, mb.drawn_SJ
        logp_S, token_S = exact_logp(logits_SJV, cfg.temperature, hidden_SJ, *inside)
        return logp_S[:, None], token_S[:, None]
    logits_SRV = logits_at(policy, pick(h_SCD, mb.at_SR))
    logp_SRV = torch.log_softmax(logits_SRV / cfg.temperature, dim=-1)
    logp_SR = logp_SRV.gather(-1, mb.token_SR[..., None]).squeeze(-1)
    logp_SU = logp_SR.unflatten(1, (mb.live_SU.shape[1], -1)).sum(2)
    return logp_SU, logp_SU


def exact_logp(logits_SJV, temperature: float, hidden_SJ, at_SR, token_SR, drawn_SJ):
    """Log-prob [S] of a low-confidence move: its tokens, and that these positions won; and [S] of
    its tokens alone.

    log pi = sum_revealed log p_i(x_i) + sum_losers log F_j(c_min): positions draw independently, so
    each loser must have drawn something no surer, at temperature 1, than the least sure winner
    (ties go to the earlier position). What a loser did draw counts always: under another policy or
    another precision it may be surer than the floor, and F_j would fall to nothing. It is then not
    the probability of the move, but of what may stand in for it. Differentiable almost everywhere:
    which tokens count for F is piecewise constant.
    """
    logp_SJV = torch.log_softmax(logits_SJV / temperature, dim=-1)
    sure_SJV = torch.log_softmax(logits_SJV.detach(), dim=-1)
    logp_SR, sure_SR = (
        pick(x_SJV, at_SR).gather(-1, token_SR[..., None]).squeeze(-1)
        for x_SJV in (logp_SJV, sure_SJV)
    )
    floor_S1 = sure_SR.amin(1, keepdim=True)
    last_S1 = torch.where(sure_SR == floor_S1, at_SR, -1).amax(1, keepdim=True)
    position_J1 = torch.arange(logp_SJV.shape[1], device=at_SR.device)[:, None]
    tie_SJV = (sure_SJV == floor_S1[..., None]) & (position_J1 > last_S1[..., None])
    below_SJV = (sure_SJV < floor_S1[..., None]) | tie_SJV
    below_SJV = below_SJV.scatter(-1, drawn_SJ[..., None], True)
    loser_SJ = hidden_SJ.scatter(1, at_SR, False)
    below_SJV = below_SJV | ~loser_SJ[..., None]  # F is 1 where nobody lost: no gradient of log 0
    log_F_SJ = torch.where(below_SJV, logp_SJV, -math.inf).logsumexp(-1)
    token_S = logp_SR.sum(1)
    return token_S + torch.where(loser_SJ, log_F_SJ, 0).sum(1), token_S


@torch.no_grad()
def greedy_guess(policy: nn.Module, h_SCD: Tensor, state_SC: Tensor) -> Tensor:
    """The one-step completion [S, C]: the most probable token wherever the state is hidden."""
    hidden_SC = state_SC == policy.config.mask_id
    return state_SC.masked_scatter(hidden_SC, most_probable(policy, h_SCD[hidden_SC]))


def completion_features(policy: nn.Module, mb: Moves) -> Tensor:
    """What the head reads of the completion [S, C, D]."""
    ids_SL = torch.cat((mb.prompt_SP, mb.state_SC), dim=1)
    real_SL = with_completion(mb.real_SP, mb.state_SC.shape[1])
    return policy.features(ids_SL, real_SL)[:, mb.prompt_SP.shape[1] :]


def passed(moves: Moves, cfg: Config) -> Tensor:
    """Which moves pass through the network [S]: the live ones, and the first, so that every rank
    has gradients. With --shard all, for the ranks gather the weights together."""
    passed_S = moves.live_SU.any(1) | cfg.shard
    passed_S[:1] = True
    return passed_S


def micro_batches(moves: Moves, cfg: Config) -> Iterator[Moves]:
    """Slices of exactly `micro` that pass (static shapes); fillers at the end are not live."""
    for part in passed(moves, cfg).nonzero().squeeze(1).split(cfg.micro):
        mb = moves.take(torch.cat((part, part.new_zeros(cfg.micro - len(part)))))
        real = torch.arange(cfg.micro, device=part.device) < len(part)
        yield mb._replace(live_SU=mb.live_SU & real[:, None])


def spread(parts: Sequence[Tensor], moves: Moves, cfg: Config) -> Tensor:
    """What micro-batches gave, for all moves [S, ...]: one that did not pass repeats the one before
    it, of the same trajectory but where none of its own has passed."""
    return torch.cat(tuple(parts))[passed(moves, cfg).cumsum(0) - 1]


# ---- evaluate ------------------------------------------------------------------------------------


def evaluate(run: Run, problems: list, cfg: Config, samples=0, said: list | None = None) -> dict:
    """Decode every problem: accuracy with its Wilson 95 % interval, rewards, and what it cost.

    Greedy, or with `samples` that many draws a problem and pass@k (the interval is of as many
    problems); `said` gets each (problem, answer, reward) of this rank. The ranks share the
    problems; a last batch is filled up with repeats that do not count, so that the shapes are the
    rollout's and every rank decodes as many batches.
    """
    policy, ranks, n = run.policy, run.ranks, max(1, samples)
    mine, tally = problems[ranks.rank :: ranks.world], Tally()
    size = max(1, cfg.B * cfg.G // n)
    began = time.monotonic()
    longest = len(problems[:: ranks.world])
    for first in running.progress(range(0, longest, size), "evaluating", ranks):
        chunk = mine[first : first + size]
        filled = itertools.islice(itertools.cycle(chunk or problems), size)
        asked = [problem for problem in filled for _ in range(n)]
        numbers = (ranks.rank + ranks.world * i for i in range(first, first + size))
        rows = [number * n + i for number in numbers for i in range(n)]
        u_NT2J = uniform((cfg.T, 2, cfg.block), rows, cfg.seed, "evaluate").to(ranks.device)
        roll = rollout(policy, *run.prompts(asked), cfg, u_NT2J, greedy=not samples)
        real = slice(len(chunk) * n)
        answers = texts(roll.token_NC, run.tokenizer, policy.ends)
        rewards = run.judge(answers[real], asked[real]).result()
        if said is not None:
            said += zip(asked, answers, rewards)
        for reward in rewards:
            tally.add("accuracy", float(reward.correct))
            tally.add("reward", float(reward))
            for name, value in reward.parts.items():
                tally.add(f"reward/{name}", value)
        if samples:
            running.pass_at(tally, rewards, n)
        if run.reference:
            tally.add("kl/uniform", kl_of_a_step(run, roll, rows, cfg)[real])
        tally.add("tokens", roll.lengths(policy.ends)[real])
        tally.add("forwards", torch.full((len(chunk),), roll.forwards / len(asked)))
    m = tally.means(ranks.gather) | {"n": len(problems), "seconds": time.monotonic() - began}
    lo, hi = running.wilson(m["accuracy"], m["n"])
    return {**m, "lo": lo, "hi": hi, "tok_s": m["tokens"] * m["n"] * n / m["seconds"]}


@torch.no_grad()
def kl_of_a_step(run: Run, roll: Rollout, rows: list[int], cfg: Config) -> Tensor:
    """KL(policy, reference) in nats a token [N], of the tokens revealed at one live step of each
    row, drawn uniformly: comparable whatever a run selects, along the decodings evaluated."""
    live_N = (roll.entropy_NT > -math.inf).sum(1)
    u_N = uniform((), rows, cfg.seed, "kl").to(live_N.device)
    moves, parts = gather_moves(roll, (u_N * live_N).long()[:, None], run.policy.config.mask_id), []
    for mb in micro_batches(moves, cfg):
        logps = []
        for held in (contextlib.nullcontext(run.policy), run.reference()):
            with held as net:
                logits_SRV = logits_at(net, pick(completion_features(net, mb), mb.at_SR))
                logps.append(torch.log_softmax(logits_SRV / cfg.temperature, dim=-1))
        logp_SRV, ref_SRV = logps
        away_SRV = torch.where(run.policy.never_V, 0, logp_SRV - ref_SRV)
        parts.append((logp_SRV.exp() * away_SRV).sum(-1).mean(1))
    return torch.cat(parts)[: len(live_N)]


# ---- main ----------------------------------------------------------------------------------------


def main() -> int:
    """Train, or what a mode asks for instead; returns the exit code.

    Only the opening turns a ValueError into a line about bad input: what goes wrong later on is a
    mistake in the code, perhaps in what you edited, and keeps its traceback.
    """
    try:
        cfg, mode = parse(sys.argv[1:])
        if mode.dry_run:
            return plan.dry_run(cfg)
        if mode.merge:
            return running.merge(cfg)
        run, start = running.open_run(cfg, Ranks(), mode)
    except (ValueError, OSError) as error:
        return running.complain(error)
    except KeyboardInterrupt:
        return 130
    if mode.eval_only:
        running.evaluate_only(run, mode, evaluate)
    else:
        with running.closing(run):
            train(run, start)
    return 0


if __name__ == "__main__":
    sys.exit(main())
