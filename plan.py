"""Will it fit, and what does it cost? Memory and FLOPs of a run, from shapes alone.

`--dry-run` prints both; a run counts what its steps took by the same formulas (`step_cost`).
"""

from __future__ import annotations

import os

from torch import nn

import model
from config import Config
from events import say


def forward_flops(net: nn.Module, L: int, positions: int) -> float:
    """Of one row: each weight of a block times each token, attention, and the head where asked."""
    c, weights = net.config, sum(map(model.size, net.blocks.parameters()))
    attention = 4 * c.n_layers * c.n_heads * c.d_head * L**2
    return 2 * weights * L + attention + 2 * positions * c.d_model * c.vocab_size


def step_cost(
    cfg: Config, net: nn.Module, L: int, forwards: float, S: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Passes of a row through the network and FLOPs of a step, by phase: `forwards` of the rollout,
    S moves learnt. A backward pass counts as two passes, or as one where the weights are frozen."""
    R, frozen = cfg.C // cfg.T, any(not p.requires_grad for p in net.parameters())
    once, wide = forward_flops(net, L, R), forward_flops(net, L, R + cfg.C * cfg.stepwise)
    old, ref = S * cfg.looks_back, S * (cfg.beta > 0)
    learnt = cfg.repeats * S * ((2 if frozen else 3) + cfg.checkpointing)
    if cfg.method == "diffu_grpo":
        once = wide = forward_flops(net, L, cfg.C)
    inner = L if cfg.cache == "none" else cfg.block + (L - cfg.block) * cfg.C // cfg.block / cfg.T
    passes = {"rollout": forwards, "logp": old + ref, "update": learnt}
    flops = {
        "rollout": forwards * forward_flops(net, L, cfg.block) * inner / L,
        "logp": old * wide + ref * once,
        "update": learnt * once,
    }
    return passes, flops


def plan(cfg: Config, bf16: bool, ranks: int = 1) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes at the peak of a rank by part, FLOPs of its step by phase, from shapes alone."""
    folder = model.find_folder(cfg.model, model.SMALL)
    net = model.from_config(folder, "meta")
    wide, d_ff = 2 if bf16 else 4, net.blocks[0].up.out_features
    if cfg.lora_r:
        model.add_lora(net, cfg.lora_r, cfg.lora_alpha)
    c = net.config
    maps = sum(
        (linear.base if cfg.lora_r else linear).weight.numel()
        for block in net.blocks
        for _, linear in model.linears(block)
    )
    parameters, trained = model.count(net)
    other = parameters - maps - (trained if cfg.lora_r else 0)
    L, R = (cfg.P or 256) + cfg.C, cfg.C // cfg.T
    each = {"none": wide, "nf4": 0.516}[cfg.quantize]  # nf4: 4 bits and its scales
    d_attn = c.n_heads * c.d_head
    saved = cfg.micro * L * (7 * (c.d_model + d_attn) + 4 * d_ff) * wide  # kept for backward
    stream = cfg.micro * L * c.d_model * wide
    scored = cfg.C if cfg.method == "diffu_grpo" else cfg.block if cfg.likelihood == "exact" else R
    head = cfg.micro * scored * c.vocab_size * 4 * 5  # float32 logits, log-softmax, their gradients
    memory = {
        "weights": maps * each + other * wide + trained * 4 if cfg.lora_r else (maps + other) * 4,
        "reference": 0 if cfg.lora_r or cfg.beta == 0 else maps * wide + other * 4,
        "bf16 copies": 0 if cfg.lora_r or not bf16 else maps * 2,
        "gradients": trained * 4,
        "optimizer": trained * (8 if cfg.optimizer == "adamw" else 2.1),
        "activations": c.n_layers * stream + saved if cfg.checkpointing else c.n_layers * saved,
        "logits": max(head, min(2**24, cfg.B * cfg.G * cfg.block * c.vocab_size) * 40),
    }
    if cfg.shard:  # but what is gathered for one block at a time is small
        for part in ("weights", "reference", "gradients", "optimizer"):
            memory[part] /= ranks
        memory["bf16 copies"] /= c.n_layers
    N = cfg.B * cfg.G
    S = N * (cfg.K if cfg.method == "egspo" else cfg.mu)
    _, flops = step_cost(cfg, net, L, N * cfg.T, S)
    return {"parameters": maps + other, "trained": trained, **memory}, flops


def dry_run(cfg: Config) -> int:
    """Say what a run would take, and whether it fits."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    memory, flops = plan(cfg, cfg.precision != "float32", ranks)
    parameters, trained = memory.pop("parameters"), memory.pop("trained")
    total = sum(memory.values())
    say(f"{cfg.model}: {parameters / 1e6:,.1f} M parameters, {trained / 1e6:,.1f} M trained")
    P = cfg.P or "256 (assumed)"
    say(
        f"a step on each rank: {cfg.B} prompts x {cfg.G} samples, P {P}, C {cfg.C}, T {cfg.T}, "
        f"K {cfg.K}, micro {cfg.micro}"
    )
    for part, size in memory.items():
        say(f"  {part:<12} {size / 1e9:>8.2f} GB")
    fits = [f"{gb} GB: {'fits' if total < 0.92e9 * gb else 'no'}" for gb in (24, 48, 80, 141)]
    say(f"  {'peak':<12} {total / 1e9:>8.2f} GB    {'   '.join(fits)}")
    for phase, count in flops.items():
        say(f"  {phase:<12} {count / 1e12:>8.1f} TFLOP")
    return 0
