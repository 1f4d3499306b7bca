"""Reinforcement learning of masked diffusion language models: EGSPO, EGSPO-SA (arXiv 2603.12554).

The decision process. A completion of C tokens starts as C masks. At each of T denoising steps the
policy draws a token for every hidden position of the current block and reveals R = C / T of them;
blocks are decoded from left to right; a revealed token is never masked again. So (token, when) is
the whole trajectory: the state before step t is "tokens with when < t, masks elsewhere", the move
at t is "positions with when == t". Time here is generation order: t = 0 sees only masks (the
diffusion literature counts the other way). The reward comes at the end.

The gradient. grad J = sum_t E[A_t grad log pi(a_t | s_t)], A_t = r - V(s_t): exact for any baseline
V that looks only at the state, and no likelihood of a sequence is needed.

  act      rollout              x_i ~ softmax(logits_i / temperature), the R surest are revealed
  choose   select_steps         the K steps of highest entropy H_t carry most of the gradient
  credit   stepwise_advantages  G_t = (r + lam (r - r_hat_t)) / (1 + lam), minus the group's mean
  learn    clipped_loss         -min(ratio A, clip(ratio) A) + beta k3, summed over moves, over R
  tell     EventLog             events.jsonl, which `python tui.py` shows

r_hat_t is the reward of the greedy one-step completion of s_t. lam = 0 is EGSPO, above it EGSPO-SA.

Where this file departs from the paper or from its released code, and why:

 1. A move is scored at the sampling temperature; all that follows the logits is float32 or more.
 2. `--likelihood exact` is the probability of the whole move, the choice of positions included;
    the product of token probabilities (`tokens`, the paper's) is exact only for random order.
 3. The greedy completion is read off the forward pass that gives the old log-probability of a
    selected move: K wide heads a trajectory rather than T, and no forward pass of its own.
 4. The final and the one-step reward are the same function: no format bonus leaks into r - r_hat.
 5. The advantage is not divided by the group's standard deviation. A slot's baseline (the group's
    mean at its k-th selected step) mixes different times, and r_hat_t stays in the return.
 6. The old log-probability comes from the same function, shapes and mode as the new one: the first
    ratio is 1. There is no dropout anywhere.
 7. Padding is never attended to and positions count from the first real token, everywhere.
 8. A row that holds the end token in a finished block is done: nothing after it is decoded,
    selected or scored, in training and evaluation alike.
 9. Randomness is a function of (seed, step, row): it depends on neither ranks nor batches, and a
    resumed run continues exactly.
10. `--cache block` (not in the paper) encodes what lies outside a block once a block. It draws from
    a policy that is slightly another: its moves carry a truncated importance weight, and the run
    logs how far the two are apart (cache/kl, cache/weight).

Names end in their dimensions: B prompts of this rank, G samples a prompt, N = B*G rows
(prompt-major), T denoising steps, K selected ones, S = N*K moves, R tokens a step, J positions of a
block and H hidden ones, P prompt, C completion, L = P + C, V vocabulary, D width.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import (
    Callable, Iterator, Literal, NamedTuple, Sequence, get_args, get_origin, get_type_hints,
)  # fmt: skip

import torch
import torch.distributed as dist
from torch import Tensor, nn

import data
import model
from plumbing import (
    EventLog, Halt, Ranks, StopSignal, Tally, accelerate, can_compile, compact, complain,
    demand_finite, describe_run, dry_run, freeze, last_checkpoint, load_shards, make_optimizer,
    model_name, note_evaluation, progress, restarted, save_checkpoint, say, set_learning_rate,
    shard, use_bf16,
)  # fmt: skip

HERE = Path(__file__).resolve().parent

# ---- settings ------------------------------------------------------------------------------------


@dataclass
class Config:
    """Train a masked diffusion language model by reinforcement learning (EGSPO, EGSPO-SA)."""

    task: str = "sudoku"  # what to learn: sudoku countdown toycode gsm8k math humaneval mbpp
    model: str = "GSAI-ML/LLaDA-8B-Instruct"  # a folder, a hub id, or tiny (embedded)
    revision: str = ""  # commit, tag or branch of a hub id
    out: str = ""  # run folder (default: runs/<task>-<model>-<time>)
    steps: int = 1000  # optimizer's outer steps: one rollout each
    seed: int = 0
    resume: bool = False  # continue the run in --out
    eval_only: bool = False  # evaluate --model on the test split and stop
    dry_run: bool = False  # print parameters, memory and FLOPs from the shapes, and stop
    merge: bool = False  # write --model with its adapter folded in to --out, and stop
    eval_every: int = 50  # steps between evaluations on the validation split
    eval_n: int = 0  # problems of an evaluation; 0: the whole split
    test: bool = True  # evaluate the test split once, after the last step
    lengths: tuple[int, ...] = ()  # with --eval-only: completion lengths, 2 tokens a step
    samples: int = 0  # with --eval-only: sample so many answers a problem, for pass@k; 0: greedy
    keep: int = 3  # newest checkpoints kept, beside the best on the validation split
    save_every: int = 50  # steps between checkpoints

    method: Literal["egspo", "diffu_grpo"] = "egspo"  # diffu_grpo: the one-step baseline of d1
    select: Literal["entropy", "uniform", "random", "all"] = "entropy"  # which K steps learn
    likelihood: Literal["tokens", "exact"] = "tokens"  # exact: count the choice of positions too
    cache: Literal["none", "block"] = "none"  # block: encode the other blocks once, not T times
    order: Literal["low_confidence", "random"] = "low_confidence"  # which positions are revealed
    lam: float = 0.5  # weight of the stepwise advantage; 0 is EGSPO
    K: int = 8  # selected denoising steps of a trajectory
    G: int = 8  # samples a prompt
    B: int = 6  # prompts a rollout on each rank
    C: int = 256  # tokens of a completion
    T: int = 128  # denoising steps
    block: int = 32  # tokens of a block
    P: int = 0  # longest prompt in tokens; 0: the longest of the data
    temperature: float = 0.9  # of sampling, and so of scoring
    eps_low: float = 0.2  # clip: the ratio's lower bound is 1 - eps_low
    eps_high: float = 0.5  # clip: the ratio's upper bound is 1 + eps_high
    beta: float = 0.04  # weight of the KL to the reference

    lr: float = 3e-5  # learning rate after the warm-up, constant
    warmup: int = 10  # steps of linear warm-up
    mu: int = 1  # optimizer updates a rollout
    weight_decay: float = 0.1
    max_grad_norm: float = 0.2
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    micro: int = 8  # rows a backward; changes memory and speed, not the result
    lora_r: int = 128  # rank of the adapters; 0 trains all weights
    lora_alpha: float = 64.0
    quantize: Literal["none", "nf4", "int8"] = "none"  # of the frozen base, with --lora-r
    precision: Literal["auto", "bf16", "float32"] = "auto"  # auto: bf16 where the hardware has it
    compile: bool = True  # torch.compile the transformer's blocks
    checkpointing: bool = True  # recompute each block in backward: less memory, 1/3 more time
    shard: bool = False  # shard weights, gradients and optimizer over the ranks (FSDP2)

    data_dir: str = ""  # look here for data sets before the hub
    train_set: str = ""  # humaneval and mbpp learn from kodcode (default) or mbpp
    data: str = ""  # learn your own rows: a .jsonl file
    unsafe_code: bool = False  # run code rewards even without seccomp and Landlock
    log_live: float = 4.0  # live denoising events a second; 0 turns them off

    def __post_init__(self):
        """Fail at the door: every value is checked here, once, and named in the message."""

        def check(holds: bool, flag: str, want: str):
            if not holds:
                value = getattr(self, flag)
                raise ValueError(f"--{flag.replace('_', '-')} {value}: {want}")

        check(self.task in data.TASKS, "task", f"choose one of {' '.join(data.TASKS)}")
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal:
                choices = " ".join(get_args(hint))
                check(getattr(self, name) in get_args(hint), name, f"choose one of {choices}")
        for flag in "steps eval_every save_every K B C T block micro mu keep".split():
            check(getattr(self, flag) >= 1, flag, "must be at least 1")
        for flag in ("lr", "temperature", "max_grad_norm", "lora_alpha"):
            check(0 < getattr(self, flag) < math.inf, flag, "must be above 0 and finite")
        for flag in ("lam", "beta", "weight_decay", "eps_high", "log_live"):
            check(0 <= getattr(self, flag) < math.inf, flag, "must be at least 0 and finite")
        for flag in ("P", "seed", "lora_r", "warmup", "eval_n", "samples"):
            check(getattr(self, flag) >= 0, flag, "must be at least 0")
        check(0 <= self.eps_low < 1, "eps_low", "must be in [0, 1)")
        check(not self.data_dir or Path(self.data_dir).is_dir(), "data_dir", "no such folder")
        check(self.G >= 2, "G", "a group needs at least 2 samples to compare")
        check(self.C % self.block == 0, "block", f"must divide --C {self.C}")
        check(self.C % self.T == 0, "T", f"must divide --C {self.C}, so that each step reveals C/T")
        check(
            self.block % (self.C // self.T) == 0, "block",
            f"must be a multiple of C/T = {self.C // self.T}, so that a block takes whole steps",
        )  # fmt: skip
        check(
            self.cache == "none" or self.likelihood == "tokens" or self.order == "random", "cache",
            "the rollout does not know the exact probability of a move: take --likelihood tokens",
        )  # fmt: skip
        check(
            self.cache == "none" or self.method == "egspo", "cache",
            "diffu_grpo does not score the moves that were made: take --method egspo",
        )  # fmt: skip
        check(self.K <= self.T, "K", f"cannot select more steps than --T {self.T}")
        if self.select == "all":
            self.K = self.T
        for flag in ("lengths", "samples"):
            check(self.eval_only or not getattr(self, flag), flag, "goes with --eval-only")
        for length in self.lengths:
            block = min(self.block, length)
            fits = length > 0 and block % 2 == 0 and length % block == 0
            check(fits, "lengths", f"each, and --block {self.block} if shorter, must be even; "
                  "a longer length must be a multiple of the block")  # fmt: skip
        check(
            self.quantize == "none" or self.lora_r > 0, "quantize",
            "quantised weights are frozen: train adapters with --lora-r 128",
        )  # fmt: skip
        check(
            not self.shard or self.optimizer == "adamw"
            and not (self.lora_r or self.eval_only or self.merge), "shard",
            "needs --lora-r 0 and --optimizer adamw; not with --eval-only or --merge",
        )  # fmt: skip


# What a small model wants instead of the paper's settings for an 8B one
SMALL = dict(
    steps=25, eval_every=5, save_every=5, B=16, C=24, T=12, block=24, K=4, lr=1e-4, warmup=2,
    max_grad_norm=1.0, micro=128, lora_r=0, checkpointing=False, beta=0.01, weight_decay=0.0,
)  # fmt: skip
EMBEDDED = {  # what the embedded model was made for, and what each task wants otherwise
    "sudoku": {},
    "countdown": dict(steps=50, T=24, block=8),  # one operator a step; eight tokens say it all
    "toycode": {},
}
LONG = {  # prompts fifty times longer
    name: dict(B=2, G=4, micro=8) for name in ("gsm8k", "math", "humaneval", "mbpp")
}


# ---- act -----------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """N trajectories. `when` is the step that revealed a token, T where the row had ended."""

    prompt_NP: Tensor
    real_NP: Tensor  # False at padding
    token_NC: Tensor
    when_NC: Tensor
    sure_NC: Tensor  # log-prob of each token when it was revealed
    entropy_NC: Tensor  # nats, of the distribution it was drawn from
    T: int
    forwards: int  # forward passes times rows, for the cost

    def per_step(self, value_NC: Tensor) -> Tensor:
        """Mean over the tokens revealed at each step [N, T]; -inf where the row had ended."""
        size = (len(value_NC), self.T + 1)
        total_NT = value_NC.new_zeros(size).scatter_add(1, self.when_NC, value_NC)
        count_NT = value_NC.new_zeros(size).scatter_add(1, self.when_NC, torch.ones_like(value_NC))
        return torch.where(count_NT > 0, total_NT / count_NT, -math.inf)[:, : self.T]

    def lengths(self, end: int) -> Tensor:
        """Tokens before the first end token [N]."""
        return ((self.token_NC == end).cumsum(1) == 0).sum(1)

    @property
    def entropy_NT(self) -> Tensor:
        return self.per_step(self.entropy_NC)


def uniform(shape: tuple[int, ...], rows: Sequence[int], *key) -> Tensor:
    """Uniform numbers [len(rows), *shape] in float64, a function of `key` and the row alone.

    Each row of the whole step's rollout has its own stream, so neither ranks nor batch-mates change
    what it draws, and there is no generator state to save.
    """
    streams = []
    for row in rows:
        digest = hashlib.blake2b(repr((*key, row)).encode(), digest_size=8).digest()
        stream = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        streams.append(torch.rand(shape, dtype=torch.float64, generator=stream))
    return torch.stack(streams)


def log_policy(policy: nn.Module, h: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) of hidden states [..., D], ids never emitted left out."""
    logits = policy.head(h).masked_fill(policy.never_V, -math.inf)
    return torch.log_softmax(logits / temperature, dim=-1)


def draw(policy: nn.Module, h_NHD: Tensor, u_NH: Tensor | None, temperature: float):
    """A token for every position, its log-prob and the entropy (nats) there: three [N, H].

    Sampling inverts the distribution function at `u`: one random number a position whatever the
    vocabulary, and the tail is sampled. Without `u`, the most probable token.
    """
    h_MD, parts = h_NHD.flatten(0, 1), []  # M positions in all
    for some in slabs(h_MD, policy.never_V):
        logp_MV = log_policy(policy, h_MD[some], temperature)
        prob_MV = logp_MV.exp()
        token_M = logp_MV.argmax(-1) if u_NH is None else sample(prob_MV, u_NH.flatten()[some])
        sure_M = logp_MV.gather(1, token_M[:, None]).squeeze(1)
        parts.append((token_M, sure_M, torch.special.entr(prob_MV).sum(1)))
    return [torch.cat(part).view(h_NHD.shape[:2]) for part in zip(*parts)]


def sample(prob_MV: Tensor, u_M: Tensor, W: int = 512) -> Tensor:
    """The token [M] at `u` of the distribution function: first which W tokens, then which of them.

    So that float64, which the tail needs, is paid for W numbers and not for the vocabulary.
    """
    prob_MXW = nn.functional.pad(prob_MV, (0, -prob_MV.shape[1] % W)).unflatten(1, (-1, W))
    part_M, rest_M = invert(prob_MXW.sum(2), u_M)
    prob_MW = prob_MXW.gather(1, part_M[:, None, None].expand(-1, 1, W)).squeeze(1)
    token_M = part_M * W + invert(prob_MW, rest_M)[0]
    return token_M.clamp(max=prob_MV.shape[1] - 1)  # nan finds no place


def invert(prob_MX: Tensor, u_M: Tensor) -> tuple[Tensor, Tensor]:
    """Where the running sum passes the share `u` of the total, and which share of the number there
    comes before that spot: two [M]."""
    cdf_MX = prob_MX.double().cumsum(1)
    spot_M1 = u_M[:, None] * cdf_MX[:, -1:]
    at_M1 = torch.searchsorted(cdf_MX, spot_M1, right=True)
    at_M1 = at_M1.clamp(max=cdf_MX.shape[1] - 1)
    rest_M1 = 1 - (cdf_MX.gather(1, at_M1) - spot_M1) / prob_MX.gather(1, at_M1)
    return at_M1.squeeze(1), rest_M1.squeeze(1).clamp(min=0)


def slabs(h_MD: Tensor, never_V: Tensor) -> list[slice]:
    """Cut positions so that their logits stay small: memory without a knob.

    64 MiB a slab, and 16 on a CPU, whose allocator asks the system anew for anything larger.
    """
    most = 2**22 if never_V.device.type == "cpu" else 2**24
    size = max(1, most // len(never_V))
    return [slice(i, i + size) for i in range(0, len(h_MD), size)]


def reveal(score_NH: Tensor, R: int) -> Tensor:
    """Which R of the H hidden positions have the highest score [N, R], surest first; ties go to the
    earlier one."""
    return score_NH.sort(dim=1, descending=True, stable=True).indices[:, :R]


def places(where_NC: Tensor, count: int) -> Tensor:
    """The first `count` positions at which it is True [N, count], in order."""
    return where_NC.float().sort(dim=1, descending=True, stable=True).indices[:, :count]


@torch.no_grad()
def rollout(
    policy: nn.Module,
    prompt_NP: Tensor,
    real_NP: Tensor,
    cfg: Config,
    u_NT2J: Tensor | None = None,
    watch: Callable[[int, Rollout], None] | None = None,
) -> Rollout:
    """Complete each prompt in T denoising steps (section 3); greedy at temperature 1 without noise.

    With `cfg.cache` "block", only a block's first step encodes the whole sequence; the others renew
    the block and see the rest as it was then (the dual cache of Fast-dLLM, arXiv 2505.22618).

    `watch(t, trajectories so far)` is called after each step. The host waits for the device once a
    block (which rows have ended?), and in between only where `watch` does.
    """
    (N, P), J, R = prompt_NP.shape, cfg.block, cfg.C // cfg.T
    end, mask = policy.config.eos_id, policy.config.mask_id
    temperature = 1.0 if u_NT2J is None else cfg.temperature
    token_NC = prompt_NP.new_full((N, cfg.C), mask)
    sure_NC = torch.zeros((N, cfg.C), device=prompt_NP.device)
    roll = Rollout(
        prompt_NP, real_NP, token_NC, torch.full_like(token_NC, cfg.T),
        sure_NC, torch.zeros_like(sure_NC), cfg.T, forwards=0,
    )  # fmt: skip
    for first in range(0, cfg.C, J):
        done_N = (token_NC[:, :first] == end).any(1)
        # sharded, every rank calls the network equally often: what has ended is decoded in vain
        rows = torch.arange(N, device=done_N.device) if cfg.shard else unfinished(done_N)
        prompt_nP, real_nL = prompt_NP[rows], with_completion(real_NP[rows], cfg.C)
        at_J = P + first + torch.arange(J, device=rows.device)
        cache = [[] for _ in policy.blocks] if cfg.cache == "block" else None
        for t in range(first // R, (first + J) // R):
            if len(rows) == 0:
                break
            ids_nL = torch.cat((prompt_nP, token_NC[rows]), dim=1)
            at_nH = places(ids_nL[:, at_J] == mask, first + J - t * R)  # every row hides as many
            h_nHD = pick(policy.hidden(ids_nL, real_nL, at_J, cache), at_nH)
            u_nH = place_nH = None
            if u_NT2J is not None:
                u_nH, place_nH = (u_nJ.gather(1, at_nH) for u_nJ in u_NT2J[rows, t].unbind(1))
            token_nH, sure_nH, entropy_nH = draw(policy, h_nHD, u_nH, temperature)
            random_order = cfg.order == "random" and place_nH is not None
            best_nR = reveal(place_nH if random_order else sure_nH, R)
            cells = rows[:, None], first + at_nH.gather(1, best_nR)
            token_NC[cells] = token_nH.gather(1, best_nR)
            roll.when_NC[cells] = t
            roll.sure_NC[cells] = sure_nH.gather(1, best_nR)
            roll.entropy_NC[cells] = entropy_nH.gather(1, best_nR)
            roll.forwards += len(rows)
            if cfg.shard:
                forget(roll, done_N, slice(first, first + J), mask)
            if watch:
                watch(t, roll)
    roll.token_NC = torch.where(roll.when_NC == cfg.T, end, token_NC)
    return roll


def unfinished(done_N: Tensor) -> Tensor:
    """The rows still to decode, the first of them repeated up to a quarter of the batch.

    So the batch takes at most four sizes, and torch.compile sees four shapes. A repeated row draws
    with its own noise: it is written twice with the same tokens.
    """
    live = (~done_N).nonzero().squeeze(1)
    quarter = -(-len(done_N) // 4)
    size = -(-len(live) // quarter) * quarter
    return live[torch.arange(min(size, len(done_N)), device=live.device) % max(1, len(live))]


def forget(roll: Rollout, done_N: Tensor, block: slice, mask: int) -> None:
    """Hide again what was decoded in rows that had ended, as if they had left the batch."""
    fields = (roll.token_NC, mask), (roll.when_NC, roll.T), (roll.sure_NC, 0), (roll.entropy_NC, 0)
    for x_NC, blank in fields:
        x_NC[:, block].masked_fill_(done_N[:, None], blank)


def with_completion(real_NP: Tensor, C: int) -> Tensor:
    """Every position of the completion is real: [N, L]."""
    return torch.cat((real_NP, real_NP.new_ones(len(real_NP), C)), dim=1)


# ---- choose --------------------------------------------------------------------------------------


def select_steps(entropy_NT: Tensor, K: int, how: str, u_NT: Tensor | None = None) -> Tensor:
    """The K steps of each trajectory that learn [N, K], in order of time.

    The gradient lost by leaving a step out is bounded by its entropy (section 4), so `entropy`
    keeps the K largest. `uniform` takes the middle of K equal parts, `random` any (`u_NT`), `all`
    every step. Steps after a row's end (entropy -inf) come last, and only where nothing else is.
    """
    live_NT = entropy_NT > -math.inf
    if how == "all":
        return torch.arange(entropy_NT.shape[1], device=entropy_NT.device).expand_as(entropy_NT)
    if how == "uniform":
        t = torch.arange(entropy_NT.shape[1], device=entropy_NT.device)
        n_N1 = live_NT.sum(1, keepdim=True)
        part_NT, next_NT = (((t + i) * K / n_N1 + 0.5).floor() for i in (0, 1))
        score_NT = ((next_NT > part_NT) | (n_N1 <= K)).float()  # the K middles, or all there are
    else:
        score_NT = entropy_NT if how == "entropy" else u_NT
    score_NT = torch.where(live_NT, score_NT, -math.inf)
    return score_NT.sort(dim=1, descending=True, stable=True).indices[:, :K].sort(dim=1).values


class Moves(NamedTuple):
    """S moves to learn from: what was seen, what was done, and what it is worth.

    For diffu_grpo R is C and live, adv, old and ref have a column for each token.
    """

    prompt_SP: Tensor
    real_SP: Tensor
    state_SC: Tensor  # completion before the move: masks where hidden
    at_SR: Tensor  # positions in the completion
    token_SR: Tensor
    live_S: Tensor  # False: the row had ended, or a filler
    adv_S: Tensor | None = None
    old_S: Tensor | None = None  # log-prob under the policy that moved
    ref_S: Tensor | None = None  # log-prob under the reference
    drawn_S: Tensor | None = None  # log-prob of its tokens in the rollout, which may use a cache

    def take(self, rows: Tensor) -> Moves:
        return Moves(*(None if x is None else x[rows] for x in self))

    def inputs(self) -> tuple[Tensor, Tensor]:
        """What the network reads: ids and where they are real, [S, L] each."""
        ids_SL = torch.cat((self.prompt_SP, self.state_SC), dim=1)
        return ids_SL, with_completion(self.real_SP, self.state_SC.shape[1])


def gather_moves(roll: Rollout, t_NK: Tensor, mask: int) -> Moves:
    """The selected moves, trajectory by trajectory: S = N*K rows."""
    K, R = t_NK.shape[1], roll.token_NC.shape[1] // roll.T
    token_SC, when_SC, prompt_SP, real_SP = (
        x.repeat_interleave(K, dim=0)
        for x in (roll.token_NC, roll.when_NC, roll.prompt_NP, roll.real_NP)
    )
    t_S1 = t_NK.reshape(-1, 1)
    at_SR = places(when_SC == t_S1, R)
    return Moves(
        prompt_SP, real_SP,
        state_SC=torch.where(when_SC < t_S1, token_SC, mask),
        at_SR=at_SR,
        token_SR=token_SC.gather(1, at_SR),
        live_S=(when_SC == t_S1).any(1),
        drawn_S=roll.sure_NC.repeat_interleave(K, dim=0).gather(1, at_SR).sum(1),
    )  # fmt: skip


# ---- credit --------------------------------------------------------------------------------------


def stepwise_advantages(
    reward_N: Tensor, early_NK: Tensor, live_NK: Tensor, G: int, lam: float
) -> Tensor:
    """Advantage of each selected move [N, K] (section 5).

    Return G_t = (r + lam (r - r_hat_t)) / (1 + lam), minus the mean of the group's live moves
    in the same slot; 0 where the row had ended. No division by the standard deviation.
    """
    reward_N1 = reward_N[:, None]
    return_NK = (reward_N1 + lam * (reward_N1 - early_NK)) / (1 + lam)
    return_BGK = return_NK.unflatten(0, (-1, G))
    live_BGK = live_NK.unflatten(0, (-1, G))
    total_B1K = torch.where(live_BGK, return_BGK, 0).sum(1, keepdim=True)
    mean_B1K = total_B1K / live_BGK.sum(1, keepdim=True).clamp(min=1)
    return torch.where(live_BGK, return_BGK - mean_B1K, 0).flatten(0, 1)


def cache_weight(moves: Moves, cap: float = 2.0) -> Tensor:
    """min(pi(a) / pi_cached(a), cap) [S]: a cached rollout draws from a policy that is slightly
    another, and this truncated importance weight of its moves brings back the exact one."""
    return (moves.old_S - moves.drawn_S).exp().clamp(max=cap)


@torch.no_grad()
def greedy_guess(policy: nn.Module, h_SCD: Tensor, state_SC: Tensor) -> Tensor:
    """The one-step completion [S, C]: the most probable token wherever the state is hidden."""
    hidden_SC, parts = state_SC == policy.config.mask_id, []
    h_MD = h_SCD[hidden_SC]  # M masks in all
    for some in slabs(h_MD, policy.never_V):
        logits_MV = policy.head(h_MD[some]).masked_fill(policy.never_V, -math.inf)
        parts.append(logits_MV.argmax(-1))
    return state_SC.masked_scatter(hidden_SC, torch.cat(parts)) if parts else state_SC


# ---- learn ---------------------------------------------------------------------------------------


def move_logp(policy: nn.Module, h_SCD: Tensor, mb: Moves, cfg: Config) -> Tensor:
    """log pi(a_t | s_t) [S], of each token [S, C] for diffu_grpo, at the sampling temperature."""
    if cfg.method == "egspo" and cfg.likelihood == "exact" and cfg.order == "low_confidence":
        first_S1 = mb.at_SR[:, :1] // cfg.block * cfg.block
        at_SJ = first_S1 + torch.arange(cfg.block, device=first_S1.device)
        logp_SJV = log_policy(policy, pick(h_SCD, at_SJ), cfg.temperature)
        hidden_SJ = mb.state_SC.gather(1, at_SJ) == policy.config.mask_id
        return exact_logp(logp_SJV, hidden_SJ, mb.at_SR - first_S1, mb.token_SR)
    logp_SRV = log_policy(policy, pick(h_SCD, mb.at_SR), cfg.temperature)
    logp_SR = logp_SRV.gather(-1, mb.token_SR[..., None]).squeeze(-1)
    return logp_SR.sum(1) if cfg.method == "egspo" else logp_SR


def exact_logp(logp_SJV: Tensor, hidden_SJ: Tensor, at_SR: Tensor, token_SR: Tensor) -> Tensor:
    """Log-prob [S] of a low-confidence move: its tokens, and that these positions won.

    log pi = sum_revealed log p_i(x_i) + sum_losers log F_j(c_min): positions draw independently, so
    each loser must have drawn something no surer than the least sure winner (ties go to the earlier
    position). Differentiable almost everywhere: which tokens count for F is piecewise constant.
    """
    sure_SR = pick(logp_SJV, at_SR).gather(-1, token_SR[..., None]).squeeze(-1)
    floor_S1 = sure_SR.detach().amin(1, keepdim=True)
    last_S1 = torch.where(sure_SR == floor_S1, at_SR, -1).amax(1, keepdim=True)
    position_J1 = torch.arange(logp_SJV.shape[1], device=at_SR.device)[:, None]
    below_SJV = logp_SJV < floor_S1[..., None]
    tie_SJV = (logp_SJV == floor_S1[..., None]) & (position_J1 > last_S1[..., None])
    prob_SJ = torch.where(below_SJV | tie_SJV, logp_SJV.exp(), 0).sum(-1)
    loser_SJ = hidden_SJ.scatter(1, at_SR, False)
    # a policy that moved far may leave a loser no token to draw: the smallest number, not log 0
    log_F_SJ = prob_SJ.clamp_min(torch.finfo(prob_SJ.dtype).tiny).log()
    return sure_SR.sum(1) + torch.where(loser_SJ, log_F_SJ, 0).sum(1)


def pick(x_SJD: Tensor, at_SR: Tensor) -> Tensor:
    """The vectors at these positions: [S, R, D]."""
    return x_SJD.gather(1, at_SR[..., None].expand(-1, -1, x_SJD.shape[-1]))


def clipped_loss(
    logp_S: Tensor, mb: Moves, cfg: Config, count: Tensor
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """The surrogate of section 4, a sum over these moves divided by R and by the `count` of all.

    ratio = exp(logp - old); -min(ratio A, clip(ratio) A) + beta k3, k3 = exp(ref - logp) - (ref -
    logp) - 1. Also the statistics, name -> (values, where they count).
    """
    ratio_S = (logp_S - mb.old_S).exp()
    clipped_S = ratio_S.clamp(1 - cfg.eps_low, 1 + cfg.eps_high)
    gain_S = torch.minimum(ratio_S * mb.adv_S, clipped_S * mb.adv_S)
    away_S = mb.ref_S - logp_S
    kl_S = away_S.exp() - away_S - 1
    R = cfg.C // cfg.T if cfg.method == "egspo" else 1
    loss_S = (cfg.beta * kl_S - gain_S) / R
    stats = {
        "loss": loss_S,
        "kl": kl_S,
        "ratio/mean": ratio_S,
        "clip_hi": ((ratio_S > 1 + cfg.eps_high) & (mb.adv_S > 0)).float(),
        "clip_lo": ((ratio_S < 1 - cfg.eps_low) & (mb.adv_S < 0)).float(),
    }
    stats = {name: (value.detach(), mb.live_S) for name, value in stats.items()}
    return torch.where(mb.live_S, loss_S, 0).sum() / count, stats


def one_step_moves(roll: Rollout, mask: int, u_NP: Tensor, hide: float = 0.15) -> Moves:
    """diffu_grpo (d1, arXiv 2504.12216): score the answer from a fully masked completion, once.

    The prompt loses 15 % of its tokens to masks, so that the mean-field estimate varies.
    """
    hidden_NP = (u_NP < hide) & roll.real_NP
    every_C = torch.arange(roll.token_NC.shape[1], device=u_NP.device)
    return Moves(
        torch.where(hidden_NP, mask, roll.prompt_NP), roll.real_NP,
        state_SC=torch.full_like(roll.token_NC, mask),
        at_SR=every_C.expand_as(roll.token_NC),
        token_SR=roll.token_NC,
        live_S=roll.when_NC < roll.T,
    )  # fmt: skip


def choose_moves(roll: Rollout, cfg: Config, mask: int, step: int, rows: range):
    """The selected steps t_NK (None for diffu_grpo) and the moves made there."""
    device = roll.token_NC.device
    if cfg.method == "diffu_grpo":
        u_NP = uniform(roll.prompt_NP.shape[1:], rows, cfg.seed, step, "hide").to(device)
        return None, one_step_moves(roll, mask, u_NP)
    u_NT = None
    if cfg.select == "random":
        u_NT = uniform((cfg.T,), rows, cfg.seed, step, "select").to(device)
    t_NK = select_steps(roll.entropy_NT, cfg.K, cfg.select, u_NT)
    return t_NK, gather_moves(roll, t_NK, mask)


def features(policy: nn.Module, mb: Moves) -> Tensor:
    """Hidden states of the completion [S, C, D]."""
    return policy.hidden(*mb.inputs())[:, mb.prompt_SP.shape[1] :]


def minibatches(moves: Moves, micro: int) -> Iterator[Moves]:
    """Slices of exactly `micro` rows (static shapes); fillers at the end are not live."""
    S = len(moves.live_S)
    for first in range(0, S, micro):
        rows = torch.arange(first, first + micro, device=moves.live_S.device)
        mb = moves.take(rows % S)
        live_S = mb.live_S.clone()
        live_S[rows >= S] = False
        yield mb._replace(live_S=live_S)


@torch.no_grad()
def score(policy: nn.Module, moves: Moves, cfg: Config, guess: bool = False):
    """Log-prob of each move [S] under `policy`; with `guess` also its greedy completion [S, C]."""
    S, logps, guesses = len(moves.live_S), [], []
    for mb in minibatches(moves, cfg.micro):
        h_SCD = features(policy, mb)
        logps.append(move_logp(policy, h_SCD, mb, cfg))
        if guess:
            guesses.append(greedy_guess(policy, h_SCD, mb.state_SC))
    return torch.cat(logps)[:S], torch.cat(guesses)[:S] if guess else None


def update(policy: nn.Module, optimizer, moves: Moves, cfg: Config, ranks: Ranks, tally: Tally):
    """One optimizer step on all moves; the result depends on neither `micro` nor the rank count.

    Returns the ratio of each move [S] before the step. Raises Halt where a number is not finite.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    count = ranks.sum(moves.live_S.sum().float())
    ratios = []
    for mb in minibatches(moves, cfg.micro):
        logp_S = move_logp(policy, features(policy, mb), mb, cfg)
        loss, stats = clipped_loss(logp_S, mb, cfg, count)
        loss.backward()
        for name, (value, where) in stats.items():
            tally.add(name, value, where)
        ratios.append(stats["ratio/mean"][0])
    if not cfg.shard:  # else backward has summed them
        ranks.sum_gradients(parameters)
    norm = nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
    norm = norm.full_tensor() if cfg.shard else norm
    demand_finite("gradient norm", norm, ranks)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    tally.add("grad_norm", norm.detach())
    tally.add("lr", optimizer.param_groups[0]["lr"])
    return torch.cat(ratios)[: len(moves.live_S)]


# ---- prompts and rewards -------------------------------------------------------------------------


def chat_ids(problems: list[data.Problem], tokenizer) -> list[list[int]]:
    """Token ids of each prompt in the model's own chat template, ready to be completed."""
    chats = [[{"role": "user", "content": problem.prompt}] for problem in problems]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def encode(problems: list[data.Problem], tokenizer, P: int, pad: int) -> tuple[Tensor, Tensor]:
    """Left-padded prompts [B, P] and where they are real. Prompts are never cut."""
    ids = chat_ids(problems, tokenizer)
    prompt_BP = torch.tensor([[pad] * (P - len(row)) + row for row in ids])
    real_BP = torch.tensor([[False] * (P - len(row)) + [True] * len(row) for row in ids])
    return prompt_BP, real_BP


def batch(problems: list[data.Problem], B: int, step: int, seed: int, ranks: Ranks):
    """This rank's B problems of a step.

    Every epoch is a permutation of its own; nothing is drawn and thrown away.
    """
    first = (step * ranks.world + ranks.rank) * B
    return [
        problems[permutation(len(problems), seed, i // len(problems))[i % len(problems)]]
        for i in range(first, first + B)
    ]


@functools.lru_cache(maxsize=2)
def permutation(n: int, seed: int, epoch: int) -> list[int]:
    return uniform((n,), range(1), seed, "epoch", epoch)[0].argsort().tolist()


def texts(token_NC: Tensor, tokenizer, end: int) -> list[str]:
    """Each completion as text, cut at its first end token."""
    cut = [row[: row.index(end)] if end in row else row for row in token_NC.tolist()]
    return tokenizer.batch_decode(cut, skip_special_tokens=True, clean_up_tokenization_spaces=False)


# ---- evaluate ------------------------------------------------------------------------------------


def evaluate(run: Run, problems: list[data.Problem], cfg: Config) -> dict[str, float]:
    """Decode every problem: accuracy with its Wilson 95 % interval, rewards, and what it cost.

    Greedy, or with `samples` that many draws a problem and pass@k. The ranks share the problems; a
    last batch is filled up with repeats that do not count, so that the shapes are the rollout's and
    every rank decodes as many batches.
    """
    policy, ranks, end, n = run.policy, run.ranks, run.policy.config.eos_id, max(1, cfg.samples)
    mine, tally = problems[ranks.rank :: ranks.world], Tally()
    size = max(1, cfg.B * cfg.G // n)
    began = time.monotonic()
    longest = len(problems[:: ranks.world])
    for first in progress(range(0, longest, size), "evaluating", ranks):
        chunk = mine[first : first + size]
        filled = itertools.islice(itertools.cycle(chunk or problems), size)
        asked = [problem for problem in filled for _ in range(n)]
        u_NT2J = None
        if cfg.samples:
            numbers = (ranks.rank + ranks.world * i for i in range(first, first + size))
            rows = [number * n + i for number in numbers for i in range(n)]
            u_NT2J = uniform((cfg.T, 2, cfg.block), rows, cfg.seed, "evaluate")
            u_NT2J = u_NT2J.to(ranks.device)
        roll = rollout(policy, *run.prompts(asked), cfg, u_NT2J)
        real = slice(len(chunk) * n)
        answers = texts(roll.token_NC, run.tokenizer, end)
        rewards = data.TASKS[cfg.task].rewards(answers[real], asked[real])
        for reward in rewards:
            tally.add("accuracy", float(reward.correct))
            tally.add("reward", float(reward))
            for name, value in reward.parts.items():
                tally.add(f"reward/{name}", value)
        for i in range(0, len(rewards), n) if cfg.samples else ():
            wrong = sum(not reward.correct for reward in rewards[i : i + n])
            for k in sorted({k for k in (1, 2, 5, 10, 20, 50, 100, n) if k <= n}):
                tally.add(f"pass@{k}", 1 - math.comb(wrong, k) / math.comb(n, k))
        tally.add("tokens", roll.lengths(end)[real])
        tally.add("forwards", torch.full((len(chunk),), roll.forwards / len(asked)))
    m = tally.means(ranks)
    seconds = time.monotonic() - began
    lo, hi = wilson(m["accuracy"], len(problems))
    speed = m["tokens"] * len(problems) * n / seconds
    return {**m, "lo": lo, "hi": hi, "n": len(problems), "seconds": seconds, "tok_s": speed}


def wilson(p: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % score interval of a share `p` of `n` (Wilson 1927)."""
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


# ---- train ---------------------------------------------------------------------------------------


@dataclass
class Run:
    """What a training run holds; everything that changes is in `policy` and `optimizer`."""

    cfg: Config
    policy: nn.Module
    tokenizer: object
    ranks: Ranks
    reference: Callable | None = None  # () -> context manager: the network without what was learnt
    optimizer: torch.optim.Optimizer | None = None
    train_set: list[data.Problem] = ()
    val_set: list[data.Problem] = ()
    test_set: list[data.Problem] = ()
    log: EventLog | None = None
    stop: StopSignal | None = None
    background: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))  # rewards

    def prompts(self, problems: list[data.Problem]) -> tuple[Tensor, Tensor]:
        pair = encode(problems, self.tokenizer, self.cfg.P, self.policy.config.pad_id)
        return tuple(x.to(self.ranks.device) for x in pair)


def train(run: Run, start: int) -> None:
    """Act, choose, credit, learn, tell, until cfg.steps are done."""
    cfg, policy, log, ranks = run.cfg, run.policy, run.log, run.ranks
    mask, end = policy.config.mask_id, policy.config.eos_id
    rows = ranks.rows(cfg.B * cfg.G)
    for step in itertools.count(start):
        between_steps(run, step, start)
        if step == cfg.steps:
            return
        tally = Tally()
        problems = batch(run.train_set, cfg.B, step, cfg.seed, ranks)
        problems = [problem for problem in problems for _ in range(cfg.G)]

        with log.phase(step, "rollout"):  # act
            u_NT2J = uniform((cfg.T, 2, cfg.block), rows, cfg.seed, step, "draw").to(ranks.device)
            watch = log.watcher(step, run, problems[0].prompt)
            roll = rollout(policy, *run.prompts(problems), cfg, u_NT2J, watch)
            demand_finite("entropy of the rollout's logits", roll.entropy_NC.sum(), ranks)
            answers = texts(roll.token_NC, run.tokenizer, end)
            judged = run.background.submit(data.TASKS[cfg.task].rewards, answers, problems)

        with log.phase(step, "logp"):  # choose
            t_NK, moves = choose_moves(roll, cfg, mask, step, rows)
            old_S, guess_SC = score(policy, moves, cfg, guess=cfg.method == "egspo" and cfg.lam > 0)
            with run.reference() as reference:
                ref_S, _ = score(reference, moves, cfg)
            moves = moves._replace(old_S=old_S, ref_S=ref_S)

        with log.phase(step, "score"):  # credit
            rewards, early_NK = judged.result(), judge_guesses(run, problems, guess_SC)
            adv_S = advantages(torch.tensor(rewards, device=ranks.device), early_NK, moves, cfg)
            moves = moves._replace(adv_S=adv_S)

        with log.phase(step, "update"):  # learn
            set_learning_rate(run.optimizer, cfg, step)
            for _ in range(cfg.mu):
                ratio_S = update(policy, run.optimizer, moves, cfg, ranks, tally)

        measure(tally, cfg, roll, rewards, t_NK, moves, ratio_S, end)  # tell
        log.step(step, tally.means(ranks), roll, t_NK)
        log.samples(run, problems, answers, rewards, roll, t_NK, moves, ratio_S, early_NK, guess_SC)


def between_steps(run: Run, step: int, start: int) -> None:
    """With `step` optimizer steps done: save, evaluate, and stop if somebody asked for it."""
    cfg, last = run.cfg, step == run.cfg.steps
    stopping = run.ranks.any(run.stop.signal is not None)
    if step > start and (step % cfg.save_every == 0 or last or stopping):
        with run.log.phase(step, "save"):
            save_checkpoint(run, step)
    if stopping:
        again = f"go on with: python egspo.py --out {cfg.out} --resume"
        raise Halt(f"stopped by a signal; {again}", code=128 + (run.stop.signal or 15))
    if step % cfg.eval_every == 0 or last:
        with run.log.phase(step, "eval"):
            m = evaluate(run, run.val_set, cfg)
        run.log.eval(step, m, "val")
        if run.ranks.rank == 0:
            note_evaluation(cfg.out, step, m)
    if last and run.test_set:
        with run.log.phase(step, "eval"):
            m = evaluate(run, run.test_set, cfg)
        run.log.eval(step, m, "test")


def judge_guesses(run: Run, problems: list[data.Problem], guess_SC: Tensor | None) -> Tensor | None:
    """Reward of the greedy completion at each selected step [N, K], by the same function."""
    if guess_SC is None:
        return None
    guesses = texts(guess_SC, run.tokenizer, run.policy.config.eos_id)
    asked = [problem for problem in problems for _ in range(len(guesses) // len(problems))]
    early_S = torch.tensor(data.TASKS[run.cfg.task].rewards(guesses, asked))
    return early_S.to(guess_SC.device).view(len(problems), -1)


def advantages(reward_N: Tensor, early_NK: Tensor | None, moves: Moves, cfg: Config) -> Tensor:
    """The advantage of each move, in the shape of `moves.live_S`; the group's for diffu_grpo."""
    if cfg.method == "diffu_grpo":
        one_N1 = torch.ones_like(reward_N[:, None])
        adv_N1 = stepwise_advantages(reward_N, one_N1, one_N1 > 0, cfg.G, lam=0)
        return adv_N1.expand_as(moves.live_S)
    live_NK = moves.live_S.view(len(reward_N), -1)
    if early_NK is None:
        early_NK = torch.zeros_like(live_NK, dtype=reward_N.dtype)  # lam is 0: not looked at
    adv_S = stepwise_advantages(reward_N, early_NK, live_NK, cfg.G, cfg.lam).flatten()
    return adv_S * cache_weight(moves) if cfg.cache == "block" else adv_S


def measure(
    tally: Tally, cfg: Config, roll: Rollout, rewards: list[data.Reward],
    t_NK: Tensor | None, moves: Moves, ratio_S: Tensor, end: int,
) -> None:  # fmt: skip
    """What a step's record says beside the loss's own statistics."""
    value_N = torch.tensor(rewards, dtype=torch.float64)
    tally.add("reward/mean", value_N)
    tally.add("reward/square", value_N**2)
    tally.add("correct", torch.tensor([float(reward.correct) for reward in rewards]))
    for name in rewards[0].parts:
        tally.add(f"reward/{name}", torch.tensor([reward.parts[name] for reward in rewards]))
    live_NT = roll.entropy_NT > -math.inf
    tally.add("entropy/mean", roll.entropy_NT, live_NT)
    if t_NK is not None:
        live_NK = moves.live_S.view(t_NK.shape)
        tally.add("entropy/sel", roll.entropy_NT.gather(1, t_NK), live_NK)
    tally.add("adv/abs", moves.adv_S.abs(), moves.live_S)
    if cfg.cache == "block" and cfg.method == "egspo":
        tally.add("cache/weight", cache_weight(moves), moves.live_S)
        tally.add("cache/kl", moves.drawn_S - moves.old_S, moves.live_S)
    idle_B = (moves.adv_S.reshape(len(rewards) // cfg.G, -1).abs() < 1e-6).all(1)
    tally.add("zero_adv_frac", idle_B.float())
    tally.peak("ratio/max", torch.where(moves.live_S, ratio_S, 0))
    length_N = roll.lengths(end)
    tally.add("len/mean", length_N)
    tally.peak("len/max", length_N)
    tally.add("trunc_frac", (length_N == cfg.C).float())


# ---- the run and the command line ----------------------------------------------------------------


def open_run(cfg: Config, ranks: Ranks, stop: StopSignal) -> tuple[Run, int]:
    """Load everything and say what was chosen. Returns the run and the step it starts from."""
    out, checkpoint, log = Path(cfg.out), None, None
    if cfg.shard and ranks.world == 1:
        raise ValueError("--shard: one rank has nothing to share; start with torchrun")
    if cfg.resume:
        log = EventLog(cfg, ranks)  # first of all: nobody else may be writing this run
        latest = out / "checkpoints" / "latest"
        checkpoint = latest.resolve() if latest.exists() else None
        if checkpoint and (checkpoint / "sharded").exists() != cfg.shard:
            raise ValueError(f"--{'no-' * cfg.shard}shard: so was {checkpoint} written; resume so")
    train_set, val_set = load_problems(cfg, "train"), load_problems(cfg, "val", cfg.eval_n)
    test_set = load_problems(cfg, "test", cfg.eval_n) if cfg.test else []
    policy, tokenizer = load_policy(cfg, str(checkpoint or cfg.model), ranks)
    cfg.P = prompt_length(cfg, train_set + val_set + test_set, tokenizer)
    if cfg.shard:  # before the reference is loaded: never two whole networks at a time
        shard(policy, cfg, ranks)
    if cfg.lora_r > 0:
        reference = functools.partial(model.as_reference, policy)
    else:
        again = checkpoint or cfg.shard
        frozen = load_policy(cfg, cfg.model, ranks)[0] if again else copy.deepcopy(policy)
        freeze(frozen, cfg, ranks.device)
        if cfg.shard:
            shard(frozen, cfg, ranks)
        reference = functools.partial(contextlib.nullcontext, accelerate(frozen, cfg, ranks.device))
    optimizer, start = make_optimizer(policy, cfg), 0
    if checkpoint:
        state = torch.load(checkpoint / "trainer.pt", map_location=ranks.device, weights_only=True)
        start = state["step"]
        if start > cfg.steps:
            raise ValueError(f"--steps {cfg.steps}: the run in {out} has done {start}")
        if cfg.shard:
            load_shards(policy, optimizer, checkpoint / "sharded")
        else:
            optimizer.load_state_dict(state["optimizer"])
    accelerate(policy, cfg, ranks.device)
    log = log or EventLog(cfg, ranks)
    if ranks.rank == 0:
        describe_run(cfg, out)
    log.meta(resume=start if cfg.resume else None)
    introduce(cfg, policy, ranks, start)
    run = Run(
        cfg, policy, tokenizer, ranks, reference, optimizer, train_set, val_set, test_set, log, stop
    )  # fmt: skip
    return run, start


def load_problems(cfg: Config, split: str, most: int = 0) -> list[data.Problem]:
    if data.TASKS[cfg.task].judge_all is data.code_judge_all:
        data.sandbox()  # says now, before a model is loaded, what this machine lacks
    problems = data.TASKS[cfg.task].load(
        split, cfg.data_dir or None, cfg.train_set or None, cfg.data or None
    )
    if not problems:
        raise ValueError(f"--task {cfg.task}: the {split} split holds no problem")
    return problems[: most or None]


def load_policy(cfg: Config, path: str, ranks: Ranks) -> tuple[nn.Module, object]:
    """The network with its adapters and the ids it must never emit, and its tokenizer.

    A frozen base may be bf16. Weights that are trained stay float32 and are read as bf16 by
    autocast: added to a bf16 weight, an update of 1e-6 of it would be rounded away.
    """
    cfg.lora_r = model.adapter_rank(path, cfg.revision or None) or cfg.lora_r  # what is there
    if cfg.shard and cfg.lora_r:
        raise ValueError(f"--shard: {path} is an adapter, and adapters are not sharded")
    frozen = cfg.lora_r > 0
    dtype = torch.bfloat16 if frozen and use_bf16(cfg, ranks.device) else torch.float32
    device = "cpu" if cfg.shard else ranks.device  # `shard` moves a block at a time
    net = model.load(path, device, dtype, cfg.quantize, cfg.revision or None)
    if cfg.lora_r > 0 and not model.adapters(net):
        torch.manual_seed(cfg.seed)  # the adapters start alike on all ranks
        model.add_lora(net, cfg.lora_r, cfg.lora_alpha)
    net.checkpointing = cfg.checkpointing
    tokenizer = model.load_tokenizer(path, cfg.revision or None)
    net.register_buffer("never_V", never_emitted(net, tokenizer).to(ranks.device), persistent=False)
    return net, tokenizer


def never_emitted(net: nn.Module, tokenizer) -> Tensor:
    """True for the mask, for padding that is not the end, and for rows that are no token [V]."""
    c = net.config
    never_V = torch.arange(c.vocab_size) >= min(c.n_tokens, len(tokenizer))
    never_V[c.mask_id] = True
    if c.pad_id != c.eos_id:
        never_V[c.pad_id] = True
    return never_V


def model_folder(path: str) -> str:
    """A run folder stands for its best checkpoint by validation accuracy, or else its latest;
    links are followed at once, for they move."""
    for folder in (Path(path) / "checkpoints" / name for name in ("best", "latest")):
        if folder.exists():
            return str(folder.resolve())
    return str(Path(path).resolve()) if Path(path).is_symlink() else path


def evaluate_only(cfg: Config, ranks: Ranks) -> int:
    """The test split, once: a table on the terminal, its numbers in a file in --out (by default
    beside the weights)."""
    problems = load_problems(cfg, "test", cfg.eval_n)
    policy, tokenizer = load_policy(cfg, cfg.model, ranks)
    cfg.P = prompt_length(cfg, problems, tokenizer)
    accelerate(policy, cfg, ranks.device)
    run = Run(cfg, policy, tokenizer, ranks)
    validation, folder = Path(cfg.model) / "validation.json", Path(cfg.out)
    if validation.exists():
        m = json.loads(validation.read_text())
        say(f"{cfg.model}: validation accuracy {m['accuracy']} after {m['step']} steps")
    how = f"{cfg.samples} samples each" if cfg.samples else "greedy"
    say(f"{len(problems)} test problems of {cfg.task}, {how}")
    say("length  steps  accuracy  [95 % interval]  reward  tokens  tokens/s  forwards  seconds")
    results = []
    for length in cfg.lengths or (cfg.C,):
        shape = dict(C=length, T=length // 2, block=min(cfg.block, length)) if cfg.lengths else {}
        at = dataclasses.replace(cfg, **shape, K=1, lengths=())
        m = evaluate(run, problems, at)
        results.append({"task": cfg.task, "split": "test", "length": at.C, "T": at.T, **m})
        say(
            f"{at.C:>6}  {at.T:>5}  {m['accuracy']:>8.3f}  [{m['lo']:.3f}, {m['hi']:.3f}]  "
            f"{m['reward']:>7.3f}  {m['tokens']:>6.1f}  {m['tok_s']:>8.0f}  {m['forwards']:>8.1f}  "
            f"{m['seconds']:>7.1f}"
        )
        for name in (name for name in m if name.startswith("pass@")):
            say(f"        {name} {m[name]:.3f}")
    if ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"test-{cfg.task}{'-samples' * bool(cfg.samples)}.json"
        file.write_text(json.dumps(compact(results), indent=1) + "\n")
        say(f"written: {file}")
    return 0


def merge(cfg: Config, ranks: Ranks) -> int:
    """Fold the adapter of --model into full weights, a model folder of its own in --out: float32,
    or bf16 with --precision bf16. On the CPU, whose memory holds the whole."""
    if ranks.rank > 0:
        return 0
    if not model.adapter_rank(cfg.model, cfg.revision or None):
        raise ValueError(f"--merge: {cfg.model} has no adapter")
    dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    policy = model.load(cfg.model, "cpu", dtype, revision=cfg.revision or None)
    model.merge_lora(policy)
    model.save(policy, cfg.out)
    model.load_tokenizer(cfg.model, cfg.revision or None).save_pretrained(cfg.out)
    say(f"written: {cfg.out}")
    return 0


def prompt_length(cfg: Config, problems: list[data.Problem], tokenizer) -> int:
    """--P, or the longest prompt; ValueError where a prompt would have to be cut."""
    sizes = [len(ids) for ids in chat_ids(problems, tokenizer)]
    if cfg.P == 0:
        return max(sizes)
    longer = sum(size > cfg.P for size in sizes)
    if longer:
        raise ValueError(
            f"--P {cfg.P}: {longer} of {len(sizes)} prompts are longer (the longest has "
            f"{max(sizes)} tokens), and prompts are never cut; raise --P, or 0 for the longest"
        )
    return cfg.P


def introduce(cfg: Config, policy: nn.Module, ranks: Ranks, start: int) -> None:
    sizes = [(p.numel(), p.requires_grad) for p in policy.parameters()]
    total, trained = sum(n for n, _ in sizes), sum(n for n, grad in sizes if grad)
    precision = "bf16" if use_bf16(cfg, ranks.device) else "float32"
    speed = "compiled" if cfg.compile else "eager"
    count = f"{total / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained"
    say(f"{cfg.task} with {cfg.model}: {count}")
    say(f"{ranks.world} x {ranks.device.type}, {precision}, {speed}; {cfg.method}, lam {cfg.lam}")
    say(
        f"a step: {cfg.B * ranks.world} prompts x {cfg.G} samples, P {cfg.P}, C {cfg.C} in {cfg.T} "
        f"denoising steps, {cfg.K} of them learn"
    )
    if is_small(cfg.model) and cfg.task in LONG:
        say(f"so small a model scores about zero on {cfg.task}: this run only shows that it works")
    if start:
        say(f"resuming after {start} of {cfg.steps} steps")
    say(f"watch it: python tui.py {cfg.out}")


def given(argv: list[str], flag: str) -> str | None:
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(flag + "="):
            return word.partition("=")[2]
    return None


def preset(argv: list[str]) -> Config:
    """The defaults that fit: those of the run to resume, or those of the model's size."""
    if "--resume" in argv:
        out = given(argv, "--out")
        if not out:
            raise ValueError("--resume: say which run with --out runs/<name>")
        file = Path(out) / "config.json"
        if not file.exists():
            raise ValueError(f"--resume: no run in --out {out} (no config.json there)")
        cfg = Config()
        for name, value in model.read_json(file).items():  # checked with the flags, which may mend
            if not hasattr(cfg, name):
                raise ValueError(f"{file}: not of this version (no setting is called {name})")
            setattr(cfg, name, tuple(value) if isinstance(value, list) else value)
        return cfg
    default = "GSAI-ML/LLaDA-8B-Instruct" if torch.cuda.is_available() else "tiny"
    path = model_folder(given(argv, "--model") or default)
    run, same = Path(path).parent.parent / "config.json", {}
    if "--eval-only" in argv and Path(path).parent.name == "checkpoints" and run.exists():
        raw = model.read_json(run)
        if given(argv, "--task") in (None, raw["task"]):  # evaluated as it was trained
            same = {name: raw[name] for name in ("task", "C", "T", "block", "B", "G", "K")}
    task = given(argv, "--task") or same.get("task", "sudoku")
    own = SMALL | (EMBEDDED | LONG).get(task, {}) if is_small(path) else {}
    return Config(model=path, **(own | same))


def is_small(path: str) -> bool:
    file = (HERE / "tiny" if path == "tiny" else Path(path)) / "config.json"
    if not file.exists():
        return False
    raw = model.read_json(file)
    return raw.get("d_model", raw.get("hidden_size", 4096)) < 1024


def parse(argv: list[str]) -> Config:
    """The command line as a checked Config; ValueError, in one line, where something is wrong."""
    import tyro

    if "--resume" not in argv and restarted(Path(given(argv, "--out") or "nowhere")):
        argv = [*argv, "--resume"]
    errors, default = io.StringIO(), preset(argv)
    try:
        with contextlib.redirect_stderr(errors):
            cfg = tyro.cli(Config, args=argv, default=default, prog="egspo.py")
    except SystemExit as leaving:
        if not leaving.code:
            raise  # --help
        body = [line.strip("│ ") for line in errors.getvalue().splitlines()[1:]]
        told = itertools.takewhile(lambda line: line.strip("─╰╯"), body)  # up to the first rule
        raise ValueError(" ".join(told).removeprefix("Error parsing Config: ")) from None
    if cfg.resume and cfg.task != default.task:
        raise ValueError(f"--task {cfg.task}: the run in --out {cfg.out} learns {default.task}")
    cfg.model = model_folder(cfg.model)
    if not cfg.out and cfg.eval_only and cfg.model != "tiny" and Path(cfg.model).is_dir():
        cfg.out = cfg.model
    elif not cfg.out:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        cfg.out = f"runs/{cfg.task}-{model_name(cfg.model)}-{stamp}"
    out = Path(cfg.out)
    if not cfg.resume and not cfg.eval_only and (out / "events.jsonl").exists():
        raise ValueError(f"--out {out} holds a run: continue it with --resume, or name another")
    if cfg.compile and not can_compile():
        say("warning: no C++ compiler (g++ or clang++) found: --no-compile, 4 times slower")
        cfg.compile = False
    return cfg


def main() -> int:
    ranks = run = stop = out = None
    try:
        cfg = parse(sys.argv[1:])
        data.SANDBOX_OPTIONS["unsafe"] = cfg.unsafe_code
        if cfg.dry_run:
            return dry_run(cfg)
        ranks = Ranks()
        if cfg.merge:
            return merge(cfg, ranks)
        if cfg.eval_only:
            return evaluate_only(cfg, ranks)
        stop = StopSignal()
        cfg.out = ranks.gather(cfg.out)[0]  # a default name holds the time, and clocks differ
        out = Path(cfg.out)
        out.mkdir(parents=True, exist_ok=True)
        run, start = open_run(cfg, ranks, stop)
    except (ValueError, OSError) as error:
        complain(error, stop)
        with contextlib.suppress(OSError):
            if out:
                out.rmdir()  # where nothing is in it
        return 2
    except KeyboardInterrupt:
        return 130
    try:
        train(run, start)
        run.log.end("finished")
        return 0
    except Halt as halt:
        run.log.end("stopped" if halt.code > 2 else "crashed", str(halt))
        say(f"egspo: step {run.log.it}: {halt}; {last_checkpoint(cfg.out)}", file=sys.stderr)
        return halt.code
    except BaseException as error:
        run.log.end("crashed", repr(error))
        if ranks.world > 1 and ("gloo" in str(error) or isinstance(error, dist.DistError)):
            return 1  # another rank has ended, and said why
        raise


if __name__ == "__main__":
    sys.exit(main())
