"""Will it fit, and what does it cost? Memory and FLOPs of a run, from shapes alone.

`--dry-run` prints both; a run counts what its steps took by the same formulas (`step_cost`).

Memory is that of the code as it is written, run eagerly, with every row alive and every prompt P
tokens long; compiled blocks keep less of what lies between two matrix products. What an allocator
wastes and what CUDA itself takes is not in it: "fits" leaves 8 % for them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import model
from config import Config
from events import say

# ---- FLOPs ---------------------------------------------------------------------------------------


def forward_flops(net: nn.Module, L: int, positions: int) -> float:
    """Of one row: each weight of a block times each token, attention, and the head where asked."""
    c, weights = net.config, sum(map(model.size, net.blocks.parameters()))
    attention = 4 * c.n_layers * c.n_heads * c.d_head * L**2
    return 2 * weights * L + attention + 2 * positions * c.d_model * c.vocab_size


def step_cost(
    cfg: Config, net: nn.Module, L: int, forwards: float, S: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Passes of a row through the network and FLOPs of a step, by phase: `forwards` of the rollout,
    S moves learnt. A backward pass counts as two, or as one where the weights are frozen; a guess
    as if every position were hidden."""
    frozen = any(not p.requires_grad for p in net.parameters())
    old, ref = S * cfg.looks_back, S * (cfg.beta > 0)
    learnt = cfg.repeats * S * ((2 if frozen else 3) + cfg.checkpointing)
    inner = L if cfg.cache == "none" else cfg.block + (L - cfg.block) * cfg.C // cfg.block / cfg.T
    hidden = (cfg.block + cfg.C // cfg.T) / 2  # positions of the block that are drawn, in the mean
    body, head = forward_flops(net, L, 0), forward_flops(net, 0, 1)
    passes = {"rollout": forwards, "logp": old + ref, "update": learnt}
    flops = {
        "rollout": forwards * (body * inner / L + hidden * head),
        "logp": (old + ref) * body
        + (old * (cfg.scored + cfg.C * cfg.stepwise) + ref * cfg.revealed) * head,
        "update": learnt * (body + cfg.scored * head),
    }
    return passes, flops


# ---- memory --------------------------------------------------------------------------------------

NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a number: 4 bits, its block's scale, the scales' own
ADAM = {"adamw": 8, "adamw8bit": 2 + 2 * 4 / 256}  # bytes a trained number: two moments
PYTHON = 0.4e9  # what Python and its libraries take of a CPU's memory
FILE = 5e9  # the largest files of a model on the hub

# How often logits are alive in float32 where most of what is made of them is, counted by the tests:
# log-probs, probabilities, masks of bytes. By whether a move's likelihood counts its losers too.
DRAWN, TWO_POLICIES = 5, 6  # `model.draw`; `egspo.kl_of_a_step`
SCORED = {False: 3, True: 4.5}  # without a graph
LEARNT = {False: 2, True: 4.25}  # in the backward pass of the loss, beside the logits themselves


@dataclass
class Plan:
    """Bytes of a rank: `held` all along, and what each of the `moments` adds, both by part."""

    parameters: int
    trained: int
    held: dict[str, float]
    moments: dict[str, dict[str, float]]
    flops: dict[str, float]  # of a step, by phase

    @property
    def worst(self) -> str:
        """The moment that adds most."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def peak(self) -> float:
        return sum(self.held.values()) + sum(self.moments[self.worst].values())


def plan(cfg: Config, bf16: bool, ranks: int = 1, device: str = "cuda") -> Plan:
    """What a run takes; P is 256 where only the data could tell."""
    net, folder, r, warm = shapes(cfg)
    c, (parameters, trained) = net.config, model.count(net)
    parameters -= trained * (r > 0)
    maps = sum(p.numel() for p in net.blocks.parameters() if p.dim() == 2) - trained * (r > 0)
    other = parameters - maps  # embedding, head, norms
    N, L, V, D, F = cfg.B * cfg.G, (cfg.P or 256) + cfg.C, c.vocab_size, c.d_model, c.d_mlp
    R, rows, share = cfg.C // cfg.T, cfg.micro * L, ranks if cfg.shard else 1
    losers, scored = cfg.counts_losers, cfg.scored
    wide = 2 if bf16 else 4  # bytes of a number inside a block
    stream = wide if r else 4  # and between two, which is the embedding's
    stored = NF4 if cfg.quantize == "nf4" else wide
    frozen = trained * 4 * warm if r else maps * wide + other * 4
    held = {
        "weights": maps * stored + other * wide + trained * 4 if r else parameters * 4 / share,
        "reference": frozen * (cfg.beta > 0) / share,
        "optimizer": trained * ADAM[cfg.optimizer] / share,
        "Python": PYTHON * (device == "cpu"),
    }

    # weights as they are multiplied, where they are stored otherwise; `again` in a backward pass
    of_block, root = maps / c.n_layers, 0
    if cfg.shard:  # gathered, with the buffer they arrive in; gradients leave in float32
        copies = again = 2 * of_block * wide
        root = other * 4
    elif cfg.quantize == "nf4":
        copies = again = D * F * wide
    else:  # autocast keeps them until the pass is over
        copies = maps * 2 * bf16 * (r == 0)
        again = (trained if r else maps) * 2 * bf16
        again = again / c.n_layers if cfg.checkpointing else again
    new = V * D * 4 * (r == 0)  # the largest gradient, before it is added to the others

    inside, kept = block_bytes(c, r > 0, wide, stream)
    inputs = c.n_layers * rows * (stream * D if cfg.checkpointing else kept)
    backward = rows * (kept * cfg.checkpointing + 2 * wide * F + 2 * stream * D)
    logits = cfg.micro * V * 4
    slab = min(2**22 if device == "cpu" else 2**24, N * cfg.block * V) * 4
    gradients = trained * 4 / share
    cache = 2 * c.n_kv_heads * c.d_head * wide * N * L * (cfg.cache == "block")

    files = [file.stat().st_size for file in folder.glob("*.safetensors")]
    read = max(files, default=min(FILE, parameters * 2))  # on a CPU it takes room, mapped
    read = max(0, read - held["optimizer"] - trained * 4 * (r > 0))  # which are not there yet

    forward = {"root": root, "copies": copies, "inputs of blocks": inputs}
    one_block = {"block": rows * inside * cfg.checkpointing}
    moments = {
        "loading": {
            "a file": read * (device == "cpu"),
            "quantising": 3 * D * F * 4 * (device == "cpu") * (cfg.quantize == "nf4"),
        },
        "rollout": {
            "keys and values": cache * (c.n_layers - 1),
            "root": root, "copies": copies, "block": N * L * inside,
        },
        "drawing": {"keys and values": cache * c.n_layers, "root": root, "logits": DRAWN * slab},
        "scoring": forward | one_block,
        "likelihood": forward
        | {"logits": logits * max(SCORED[losers] * scored, TWO_POLICIES * R)},
        "update": {"gradients": gradients} | forward | one_block,
        "loss": {
            "gradients": gradients, "root": root, "copies": again * (not cfg.checkpointing),
            "inputs of blocks": inputs,
            "logits": logits * scored + max(new, LEARNT[losers] * logits * scored),
        },
        "backward": {
            "gradients": gradients, "root": root, "copies": again,
            "new gradient": new if cfg.shard else D * F * (wide + 4) * (r == 0),
            "inputs of blocks": inputs, "block": backward,
        },
        "sum": {
            "gradients": gradients, "root": 2 * root,
            "new gradient": new * cfg.shard, "inputs of blocks": inputs * cfg.shard,
        },
    }  # fmt: skip
    S = N * (cfg.K if cfg.method == "egspo" else cfg.mu)
    _, flops = step_cost(cfg, net, L, N * cfg.T, S)
    return Plan(parameters, trained, held, moments, flops)


def shapes(cfg: Config) -> tuple[model.Transformer, Path, int, bool]:
    """The network without its numbers, its folder, and the rank of its adapters; are they there?"""
    folder = model.find_folder(cfg.model, model.SMALL)
    rank = model.adapter_rank(folder)
    base = model.find_folder(model.adapter_base(folder), model.SMALL) if rank else folder
    net = model.from_config(base, "meta")
    if rank or cfg.lora_r:
        model.add_lora(net, rank or cfg.lora_r, cfg.lora_alpha)
    return net, base, rank or cfg.lora_r, rank > 0


def block_bytes(c: model.Architecture, lora: bool, wide: int, stream: int) -> tuple[float, float]:
    """Bytes a token in a block: alive where most is (its map `up`), and kept for a backward pass.

    The first: its input, that plus attention, and a norm of it; queries, keys and values before and
    after rotation, what attention mixed; gate, up and their product, or up before and after its
    adapter; cosines and sines. The second: the inputs of maps that learn, the four of attention,
    the four of the gated MLP; of a norm its input in float32, and its output if its weight learns.
    """
    D, F, Q, KV = c.d_model, c.d_mlp, c.n_heads * c.d_head, c.n_kv_heads * c.d_head
    repeated = KV if c.n_kv_heads == c.n_heads else 2 * Q
    inside = 3 * D * stream + (3 * Q + 2 * KV + repeated + (4 if lora else 3) * F) * wide
    cast = 5 if stream > wide else 2  # autocast casts the input of each of five maps anew
    kept = (4 * Q + cast * D + 4 * F) * wide + 2 * 4 * D * (1 if lora else 2)
    return inside + 8 * c.d_head, kept


def dry_run(cfg: Config) -> int:
    """Say what a run would take, and whether it fits."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    bf16 = cfg.precision != "float32"
    p = plan(cfg, bf16, ranks)
    say(f"{cfg.model}: {p.parameters / 1e6:,.1f} M parameters, {p.trained / 1e6:,.1f} M trained")
    P = cfg.P or "256 (assumed)"
    say(
        f"a step on each rank: {cfg.B} prompts x {cfg.G} samples, P {P}, C {cfg.C}, T {cfg.T}, "
        f"K {cfg.K}, micro {cfg.micro}"
    )
    for part, size in p.held.items():
        if size:
            say(f"  {part:<12} {size / 1e9:>8.2f} GB")
    for moment, parts in p.moments.items():
        if not any(parts.values()):
            continue
        told = ", ".join(f"{part} {size / 1e9:.2f}" for part, size in parts.items() if size > 5e6)
        say(f"  + {moment:<10} {sum(parts.values()) / 1e9:>8.2f} GB    {told}")
    fits = [f"{gb} GB: {'fits' if p.peak < 0.92e9 * gb else 'no'}" for gb in (24, 48, 80, 141)]
    say(f"  {'peak':<12} {p.peak / 1e9:>8.2f} GB    {'   '.join(fits)}")
    here = model.use_bf16(cfg.precision, torch.device("cpu"))  # GPUs have it all
    cpu = plan(cfg, here, ranks, "cpu").peak
    kind = "bf16" if here else "float32"
    told = f"in {kind}, with Python, and a file while it is read"
    say(f"  {'on this CPU':<12} {cpu / 1e9:>8.2f} GB    {told}")
    for phase, count in p.flops.items():
        say(f"  {phase:<12} {count / 1e12:>8.1f} TFLOP")
    return 0
