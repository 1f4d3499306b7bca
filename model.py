"""Given tokens, what are the logits; how do weights get in and out?

One bidirectional transformer serves two families of masked diffusion language models:

  llada    LLaDA-8B-Base, LLaDA-8B-Instruct, LLaDA-1.5 (arXiv 2502.09992)
  decoder  what was adapted from an autoregressive model, in the layout of Qwen2, Qwen3 or Llama:
           Dream-v0-Instruct-7B (arXiv 2508.15487), DiffuCoder, open-dcoder, dllm-hub's a2d-*

Logits at position i are for the token there, or for i + 1 where the shift of the autoregressive
model was kept; `features` undoes that, so all are aligned here. Shifted are Dream and what still
calls itself qwen2, qwen3 or llama, not LLaDA and a2d-*; `shift_logits` in config.json overrides.

Written by hand so that no code comes from a hub, every shape is static (torch.compile sees one
graph) and a row's result does not depend on its batch-mates. No dropout.
Files keep the published layout: config.json and the tensor names of the authors, and PEFT's format
for adapters, so that what was trained here loads elsewhere and the other way round.

Shapes: N rows, L positions, D width, A attention heads, E width of each, J or R positions asked
for, V rows of the head, B prompts of at most P tokens, C tokens of a completion. Bad files raise
one line: FileNotFoundError if absent, ValueError for the rest.
"""

import ctypes
import importlib.util
import itertools
import json
import logging
import math
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import jinja2
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Quantize = Literal["none", "nf4"]

# ---- config.json ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """What the network needs of a published config.json; `raw` is the file, for `save`."""

    family: str  # "llada" or "decoder": which published names
    vocab_size: int  # rows of the embedding and of the head
    n_tokens: int  # of these, ids that stand for a token; the rest only rounds the matrices up
    mask_id: int
    eos_id: int
    pad_id: int
    d_model: int
    d_mlp: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    rope_theta: float
    rope_llama3: tuple[float, ...] | None  # factor, low, high and length of Llama 3's scaling
    norm_eps: float
    tied: bool  # the head is the embedding
    shifted: bool  # what the head says at i is for i + 1
    scale_logits: bool  # divide the logits by sqrt(d_model)
    qk_norm: bool  # queries and keys are normalised, head by head
    biased: frozenset[str]  # which of qkv, out, mlp, unembed and norm have biases
    raw: dict = field(repr=False, compare=False)


# fields that select an architecture: the one value this network is written for
FIXED = {
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "hidden_act": "silu",
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_types": "full_attention",
    "num_experts": 0,  # LLaDA-MoE calls itself llada
    "rope": True,
    "rope_type": "default",
    "use_sliding_window": False,
}
LLAMA3 = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
STOCK = "qwen2", "qwen3", "llama"  # model_types of autoregressive models, if nothing says a mask
SHIFTED = "dream", *STOCK  # of the decoder layout, by alignment
ALIGNED = "a2d-qwen2", "a2d-qwen3", "a2d-llama"
BLOCKWISE = "its attention is causal from block to block"
UNSERVED = {  # how a model_type begins, and why this network cannot be that model
    "llada2": f"it has experts, and {BLOCKWISE}",
    "sdar": BLOCKWISE,
    "fast_dllm": BLOCKWISE,
    "diffusion_gemma": "it has no mask token, and starts from random ones",
}
MASKS = "<|mask|>", "[MASK]", "<|MASK|>"  # what tokenizers call it where they do not say which


class NoMask(ValueError):
    """Nothing says what the mask is: an autoregressive model."""


def read_config(file: Path, mask_id: int | None = None) -> Architecture:
    """A published config.json. Where it does not say what the mask is, the tokenizer beside it
    does, or else `mask_id`, and `raw` says so from then on."""
    raw, folder = read_json(file), file.parent
    published_as = folder.parents[1].name if folder.parent.name == "snapshots" else folder.name
    if "bd3lm" in published_as.lower():  # whose config.json is no different
        raise ValueError(f"{published_as}: block diffusion (bd3lm) is not served: {BLOCKWISE}")
    kind = str(raw.get("model_type")).lower()
    if kind in SHIFTED + ALIGNED and raw.get("mask_token_id") is None:
        with suppress(Exception):  # none there, or a damaged one: so there is no mask
            tokenizer = load_tokenizer(folder)
            ids = [tokenizer.mask_token_id, *map(tokenizer.get_added_vocab().get, MASKS)]
            raw["mask_token_id"] = next(i for i in (*ids, mask_id) if i is not None)
    return parse_config(raw, str(file))


def parse_config(raw: dict, source: str = "config") -> Architecture:
    """Read a published config. ValueError names the field that is missing or not served here."""
    kind, rope = str(raw.get("model_type")).lower(), rope_of(raw)
    for start, why in UNSERVED.items():
        if kind.startswith(start):
            raise ValueError(f"{source}: model_type {raw['model_type']!r} is not served: {why}")
    if kind not in ("llada", *SHIFTED, *ALIGNED):
        known = "llada, Dream, qwen2, qwen3, llama or a2d-..."
        raise ValueError(f"{source}: model_type {raw.get('model_type')!r} is not {known}")
    windows = [layer for layer in raw.get("layer_types") or () if layer != "full_attention"]
    layers, rope_type = (windows or [None])[0], rope.get("rope_type", rope.get("type"))
    rope_type = None if rope_type == "llama3" and kind != "llada" else rope_type
    said = raw | dict(layer_types=layers, rope_type=rope_type)
    for key, value in FIXED.items():
        if said.get(key) not in (None, value):
            raise ValueError(f"{source}: {key} {said[key]!r} is not supported, only {value!r}")
    shifted = raw.get("shift_logits", kind in SHIFTED)
    if not isinstance(shifted, bool):
        raise ValueError(f"{source}: shift_logits {shifted!r} is neither true nor false")
    family, parts = ("llada", _llada) if kind == "llada" else ("decoder", _decoder)
    try:
        eos_id, pad_id = raw["eos_token_id"], raw.get("pad_token_id")
        eos_id = eos_id[0] if isinstance(eos_id, list) and eos_id else eos_id
        pad_id = eos_id if pad_id is None else pad_id
        rest = dict(family=family, shifted=shifted, eos_id=eos_id, pad_id=pad_id, raw=raw)
        c = Architecture(**parts(raw), **rest)
    except KeyError as missing:
        raise ValueError(f"{source}: {missing} is missing") from None
    except ValueError as contradiction:
        raise ValueError(f"{source}: {contradiction} contradict each other") from None
    if c.mask_id is None:
        raise NoMask(
            f"{source}: no mask_token_id, and no tokenizer there that has a mask token: an"
            " autoregressive model must first be adapted to masked diffusion, with sft.py --adapt"
        )
    for name in ("vocab_size", "d_model", "d_mlp", "n_layers", "n_heads", "n_kv_heads"):
        if not isinstance(getattr(c, name), int) or getattr(c, name) < 1:
            raise ValueError(f"{source}: {name} {getattr(c, name)!r} is not a positive number")
    d_head = c.d_head or c.d_model / c.n_heads
    if d_head % 2 or c.n_heads % c.n_kv_heads:
        raise ValueError(
            f"{source}: width {c.d_model}, {c.n_heads} heads, {c.n_kv_heads} key/value heads: each"
            " must be a multiple of the next, and a head's width even"
        )
    for name, token in (("mask", c.mask_id), ("eos", eos_id), ("pad", pad_id)):
        if not isinstance(token, int) or not 0 <= token < c.vocab_size:
            raise ValueError(f"{source}: {name}_token_id {token} is not below {c.vocab_size}")
    return replace(c, d_head=int(d_head))


def rope_of(raw: dict) -> dict:
    """What is said of the rotation beside rope_theta; transformers 5 puts that there too."""
    return raw.get("rope_parameters") or raw.get("rope_scaling") or {}


def _llada(raw: dict) -> dict:
    n_kv_heads, multi_query = raw.get("n_kv_heads"), raw.get("multi_query_attention")
    if multi_query is not None:  # the older field: one for all, or one for each
        shared = 1 if multi_query else raw["n_heads"]
        if n_kv_heads not in (None, shared):
            raise ValueError(f"n_kv_heads {n_kv_heads} and multi_query_attention {multi_query}")
        n_kv_heads = shared
    bias, bias_norm = raw.get("include_bias", False), raw.get("bias_for_layer_norm")
    biased = {"qkv", "out", "mlp", "unembed"} if bias else set()
    biased |= {"qkv"} if raw.get("include_qkv_bias") else set()
    biased |= {"norm"} if (bias if bias_norm is None else bias_norm) else set()
    return dict(
        vocab_size=raw.get("embedding_size") or raw["vocab_size"],
        n_tokens=raw["vocab_size"],
        mask_id=raw.get("mask_token_id", 126336),
        d_model=raw["d_model"],
        d_mlp=raw.get("mlp_hidden_size") or raw["mlp_ratio"] * raw["d_model"],
        n_layers=raw["n_layers"],
        n_heads=raw["n_heads"],
        n_kv_heads=n_kv_heads or raw["n_heads"],
        d_head=None,
        rope_theta=raw["rope_theta"],
        rope_llama3=None,
        norm_eps=raw.get("rms_norm_eps", 1e-5),
        tied=raw.get("weight_tying", False),
        scale_logits=raw.get("scale_logits", False),
        qk_norm=False,
        biased=frozenset(biased),
    )


def _decoder(raw: dict) -> dict:
    kind, rope = raw["model_type"].lower().removeprefix("a2d-"), rope_of(raw)
    if kind in ("dream", "qwen2"):
        biased = {"qkv"}
    else:
        biased = {"qkv", "out"} if raw.get("attention_bias") else set()
        biased |= {"mlp"} if raw.get("mlp_bias") and kind == "llama" else set()
    return dict(
        vocab_size=raw["vocab_size"],
        n_tokens=raw["vocab_size"],
        mask_id=raw.get("mask_token_id", 151666 if kind == "dream" else None),
        d_model=raw["hidden_size"],
        d_mlp=raw["intermediate_size"],
        n_layers=raw["num_hidden_layers"],
        n_heads=raw["num_attention_heads"],
        n_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        d_head=raw.get("head_dim") or (128 if kind == "qwen3" else None),
        rope_theta=rope.get("rope_theta") or raw["rope_theta"],
        rope_llama3=tuple(rope[name] for name in LLAMA3) if "llama3" in rope.values() else None,
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        tied=raw.get("tie_word_embeddings", False),
        scale_logits=False,
        qk_norm=kind == "qwen3",
        biased=frozenset(biased),
    )


def read_json(file: Path) -> dict:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{file} is not a JSON object")
    return fields


# ---- the network ---------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float, bias: bool):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        # float32 inside, rounded before the weight: the published order, which matters in bf16
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        scaled = self.weight * wide.to(x.dtype)
        return scaled if self.bias is None else scaled + self.bias


def rotary(place_NL: Tensor, c: Architecture) -> tuple[Tensor, Tensor]:
    """Cosines and sines [N, 1, L, E] of each position's angles (arXiv 2104.09864), in float32:
    bf16 cannot tell position 256 from 257. Llama 3 slows down by a factor what turns less than
    `low` times over a length, leaves what turns more than `high` times, and blends between."""
    pair = torch.arange(0, c.d_head, 2, device=place_NL.device, dtype=torch.float32)
    speed = 1.0 / c.rope_theta ** (pair / c.d_head)  # radians a position
    if c.rope_llama3:
        factor, low, high, length = c.rope_llama3
        kept = ((length * speed / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        speed = speed * (kept + (1 - kept) / factor)
    angle = place_NL[:, None, :, None].float() * speed
    angle = torch.cat((angle, angle), dim=-1)  # a pair is (e, e + E/2), not (2e, 2e + 1)
    return angle.cos(), angle.sin()


def turn(x_NALE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x_NALE.float()
    left, right = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-right, left), dim=-1) * sin).to(x_NALE.dtype)


def attend(q_NALE: Tensor, k_NALE: Tensor, v_NALE: Tensor, seen: Tensor | None) -> Tensor:
    """Softmax attention [N, A, L, E]; `seen` is False where a key is padding.

    Written out for short sequences on CPUs where there is a backward pass, for which the fused
    kernel takes twice as long.
    """
    if q_NALE.device.type != "cpu" or q_NALE.shape[2] > 128 or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q_NALE, k_NALE, v_NALE, attn_mask=seen)
    weight_NALL = (q_NALE @ k_NALE.transpose(2, 3)).float() / math.sqrt(q_NALE.shape[-1])
    if seen is not None:
        weight_NALL = weight_NALL.masked_fill(~seen, -math.inf)
    return weight_NALL.softmax(-1).to(v_NALE.dtype) @ v_NALE


def any_rows(*tensors: Tensor | None) -> None:
    """Let torch.compile make one graph for all counts of rows: early ends and micro-batches have
    several. (One row, which also stands for all, stays a case of its own.)"""
    for tensor in tensors:
        if tensor is not None and len(tensor) > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)


class Block(nn.Module):
    """Pre-norm attention and gated MLP; every position sees every real one, before and after."""

    def __init__(self, c: Architecture):
        super().__init__()
        self.d_head = c.d_head
        self.group = c.n_heads // c.n_kv_heads  # query heads that share a key/value head
        d_q, d_kv = c.d_head * c.n_heads, c.d_head * c.n_kv_heads
        qkv, out, mlp, norm = (part in c.biased for part in ("qkv", "out", "mlp", "norm"))
        self.attn_norm = RMSNorm(c.d_model, c.norm_eps, norm)
        self.q = nn.Linear(c.d_model, d_q, bias=qkv)
        self.k = nn.Linear(c.d_model, d_kv, bias=qkv)
        self.v = nn.Linear(c.d_model, d_kv, bias=qkv)
        self.q_norm, self.k_norm = (
            RMSNorm(c.d_head, c.norm_eps, False) if c.qk_norm else nn.Identity() for _ in range(2)
        )
        self.out = nn.Linear(d_q, c.d_model, bias=out)
        self.mlp_norm = RMSNorm(c.d_model, c.norm_eps, norm)
        self.gate = nn.Linear(c.d_model, c.d_mlp, bias=mlp)
        self.up = nn.Linear(c.d_model, c.d_mlp, bias=mlp)
        self.down = nn.Linear(c.d_mlp, c.d_model, bias=mlp)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, seen: Tensor | None,
        at_J: Tensor | None = None, cache: list[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        h = self.attn_norm(x)
        qkv = self.q(h), self.k(h), self.v(h)
        q, k, v = (t.unflatten(-1, (-1, self.d_head)).transpose(1, 2) for t in qkv)
        q, k = turn(self.q_norm(q), cos, sin), turn(self.k_norm(k), cos, sin)
        if cache:  # x holds the positions at_J only; the others' keys and values are old
            k, v = (old.index_copy_(2, at_J, new) for old, new in zip(cache, (k, v)))
        elif cache is not None:
            cache += k, v
        if self.group > 1:  # copied out: with a mask, fused attention takes no groups everywhere
            k, v = k.repeat_interleave(self.group, dim=1), v.repeat_interleave(self.group, dim=1)
        mixed = attend(q, k, v, seen)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Transformer(nn.Module):
    def __init__(self, config: Architecture):
        super().__init__()
        self.config = config
        self.origin: tuple[str | None, str | None] = (None, None)  # folder or hub id, and commit
        self.checkpointing = False  # recompute each block in backward: less memory, same values
        self.bf16 = False  # compute the blocks in bf16 (autocast), whatever the weights' dtype
        self.compiled = False  # the blocks are, each for all counts of rows
        self.register_buffer("never_V", None, persistent=False)  # ids that are never to be emitted
        self.register_buffer("ends", None, persistent=False)  # ids that end a turn
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps, "norm" in config.biased)
        self.unembed = None
        if not config.tied:
            bias = "unembed" in config.biased
            self.unembed = nn.Linear(config.d_model, config.vocab_size, bias=bias)

    def features(
        self, ids_NL: Tensor, real_NL: Tensor | None = None,
        at_J: Tensor | None = None, cache: list[list[Tensor]] | None = None,
    ) -> Tensor:  # fmt: skip
        """What the head reads [N, L, D], aligned: h[:, i] predicts the token at position i.

        `real_NL` is False at padding, which is never attended to; positions count real tokens, so
        a padded row equals the same row alone. What stands at padding itself means nothing.

        With `at_J`, the features of these neighbouring positions only [N, J, D]. A `cache` (an
        empty list for each block) keeps all keys and values of its first call; later calls compute
        the positions at_J alone, and see of the others what was there then. Not for training.
        """
        with torch.autocast(ids_NL.device.type, torch.bfloat16, enabled=self.bf16):
            return self._features(ids_NL, real_NL, at_J, cache)

    def _features(self, ids_NL, real_NL, at_J, cache) -> Tensor:
        c = self.config
        if real_NL is None:
            place_NL, seen = torch.arange(ids_NL.shape[1], device=ids_NL.device)[None], None
        else:
            place_NL, seen = real_NL.cumsum(1) - 1, real_NL[:, None, None, :]
        cos, sin = rotary(place_NL, c)
        x, narrow = self.embed(ids_NL), bool(cache and cache[0])
        if narrow:
            if c.shifted:  # the feature before the first is needed too
                at_J = torch.cat((at_J[:1] - 1, at_J))
            x, place_NL = x[:, at_J], place_NL[:, at_J]
            cos, sin = cos[:, :, at_J], sin[:, :, at_J]
        again = dict(use_reentrant=False, preserve_rng_state=False)  # nothing here is random
        for block, kept in zip(self.blocks, cache or itertools.repeat(None)):
            if self.compiled:
                any_rows(x, cos, sin, seen, *(kept or ()))
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, seen, **again)
            else:
                x = block(x, cos, sin, seen, at_J, kept)
        x = self.norm(x)
        if c.shifted:  # says at i - 1 what stands at i; the first has only itself to ask
            x = torch.where(place_NL[..., None] > 0, x.roll(1, dims=1), x)
            x = x[:, 1:] if narrow else x
        return x if at_J is None or narrow else x[:, at_J]

    def head(self, h: Tensor) -> Tensor:
        """Float32 logits [..., V] of features [..., D], whatever the weights' dtype. A frozen bf16
        head has rounded them first, as the published code has: by 0.06 between 16 and 32."""
        logits = F.linear(h, self.embed.weight) if self.unembed is None else self.unembed(h)
        logits = logits.float()
        return logits / math.sqrt(self.config.d_model) if self.config.scale_logits else logits

    def forward(
        self, ids_NL: Tensor, real_NL: Tensor | None = None, at_NR: Tensor | None = None
    ) -> Tensor:
        """Float32 logits [N, L, V], or [N, R, V] at the positions `at_NR` only (cheaper)."""
        h = self.features(ids_NL, real_NL)
        if at_NR is not None:
            h = h.gather(1, at_NR[..., None].expand(-1, -1, h.shape[-1]))
        return self.head(h)


def from_config(
    config: dict | str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    quantize: Quantize = "none",
) -> Transformer:
    """A random network of a published config (a dict, a config.json or its folder).

    On the "meta" device it has names and shapes and takes no memory: use it to count.
    """
    if isinstance(config, dict):
        parsed = parse_config(config)
    else:
        file = Path(config) / "config.json" if Path(config).is_dir() else Path(config)
        if not file.is_file():
            raise FileNotFoundError(f"--model {config}: no config.json there")
        parsed = read_config(file)
    check_quantize(quantize, device)
    net = skeleton(parsed, dtype).to_empty(device=device)
    initialise(net)
    net.never_V, net.ends = never_emitted(parsed, device), torch.tensor([parsed.eos_id]).to(device)
    for block in net.blocks if quantize != "none" else ():
        for name, linear in linears(block):
            setattr(block, name, quantized(linear, linear.weight.data.cpu(), device))
    return net


def skeleton(config: Architecture, dtype: torch.dtype) -> Transformer:
    """The network on the meta device, to be filled."""
    with torch.device("meta"):
        return Transformer(config).to(dtype)


@torch.no_grad()
def initialise(net: Transformer) -> None:
    """GPT-2's: normal(0.02), less for the maps that add to the residual stream, 2 a block."""
    for name, p in net.named_parameters():
        if name.endswith("bias"):
            p.zero_()
        elif "norm" in name:
            p.fill_(1.0)
        elif name.endswith(("out.weight", "down.weight")):
            p.normal_(0.0, 0.02 / math.sqrt(2 * net.config.n_layers))
        else:
            p.normal_(0.0, 0.02)


def never_emitted(c: Architecture, device: str | torch.device) -> Tensor:
    """True for the mask, for padding that is not the end, and for rows that are no token [V]."""
    never_V = torch.arange(c.vocab_size, device=device) >= c.n_tokens
    never_V[c.mask_id] = True
    if c.pad_id != c.eos_id:
        never_V[c.pad_id] = True
    return never_V


@torch.no_grad()
def set_mask(net: Transformer, mask_id: int) -> None:
    """Let this token, or a new one at the end of the vocabulary, hide others: its vector becomes
    the mean of all. Of a network without adapters, in place; config.json will say so."""
    for module in filter(None, (net.embed, net.unembed)):
        weight = module.weight
        mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
        if mask_id == len(weight):
            weight = module.weight = nn.Parameter(torch.cat((weight, mean)))
        weight[mask_id] = mean
    V = len(net.embed.weight)
    said = dict(mask_token_id=mask_id, shift_logits=net.config.shifted, vocab_size=V)
    net.config = parse_config(net.config.raw | said)
    net.never_V = never_emitted(net.config, net.embed.weight.device)


def size(p: Tensor) -> int:
    """Numbers in a weight; a 4-bit one holds two in a byte."""
    return math.prod(p.quant_state.shape) if hasattr(p, "quant_state") else p.numel()


def count(net: Transformer) -> tuple[int, int]:
    """Parameters in all, and of these trained."""
    parameters = list(net.parameters())
    return sum(map(size, parameters)), sum(size(p) for p in parameters if p.requires_grad)


def use_bf16(precision: str, device: torch.device) -> bool:
    """`auto`: where the hardware multiplies it faster than float32."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = torch.cpu.get_capabilities()
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


def linears(block: Block) -> list[tuple[str, nn.Module]]:
    """The seven linear maps of a block: what LoRA adapts and quantisation shrinks."""
    return [(name, getattr(block, name)) for name in ("q", "k", "v", "out", "gate", "up", "down")]


# ---- drawing tokens ------------------------------------------------------------------------------
# Q positions in all, M hidden ones of a row, X or W numbers to choose from.


def logits_at(net: Transformer, h: Tensor) -> Tensor:
    """Logits of features [..., D], those of ids never emitted -inf."""
    return net.head(h).masked_fill(net.never_V, -math.inf)


def most_probable(net: Transformer, h_QD: Tensor) -> Tensor:
    """The most probable token at each position [Q]."""
    parts = [logits_at(net, h_QD[some]).argmax(-1) for some in slabs(h_QD, net.never_V)]
    return torch.cat(parts) if parts else h_QD.new_empty(0, dtype=torch.long)


def draw(net: Transformer, h_NMD: Tensor, u_NM: Tensor | None, temperature: float):
    """A token for every position; its log-prob; how sure the policy is of it, which is the same at
    temperature 1; and the entropy (nats) of what it was drawn from: four [N, M].

    Sampling inverts the distribution function at `u`: one random number a position whatever the
    vocabulary, and the tail is sampled. Without `u`, the most probable token.
    """
    h_QD, parts = h_NMD.flatten(0, 1), []
    for some in slabs(h_QD, net.never_V):
        logits_QV = logits_at(net, h_QD[some])
        logp_QV = torch.log_softmax(logits_QV / temperature, dim=-1)
        prob_QV = logp_QV.exp()
        token_Q = logp_QV.argmax(-1) if u_NM is None else sample(prob_QV, u_NM.flatten()[some])
        logp_Q, logit_Q = (
            x_QV.gather(1, token_Q[:, None]).squeeze(1) for x_QV in (logp_QV, logits_QV)
        )
        sure_Q = logp_Q if temperature == 1 else logit_Q - logits_QV.logsumexp(1)
        parts.append((token_Q, logp_Q, sure_Q, torch.special.entr(prob_QV).sum(1)))
    return [torch.cat(part).view(h_NMD.shape[:2]) for part in zip(*parts)]


def sample(prob_QV: Tensor, u_Q: Tensor, W: int = 512) -> Tensor:
    """The token [Q] at `u` of the distribution function: first which W tokens, then which of them.

    So that float64, which the tail needs, is paid for W numbers and not for the vocabulary.
    """
    prob_QXW = F.pad(prob_QV, (0, -prob_QV.shape[1] % W)).unflatten(1, (-1, W))
    part_Q, rest_Q = invert(prob_QXW.sum(2), u_Q)
    prob_QW = prob_QXW.gather(1, part_Q[:, None, None].expand(-1, 1, W)).squeeze(1)
    token_Q = part_Q * W + invert(prob_QW, rest_Q)[0]
    return token_Q.clamp(max=prob_QV.shape[1] - 1)  # where nan compares with nothing


def invert(prob_QX: Tensor, u_Q: Tensor) -> tuple[Tensor, Tensor]:
    """Where the running sum passes the share `u` of the total, and which share of the number there
    comes before that spot: two [Q]."""
    cdf_QX = prob_QX.double().cumsum(1)
    spot_Q1 = u_Q[:, None] * cdf_QX[:, -1:]
    at_Q1 = torch.searchsorted(cdf_QX, spot_Q1, right=True)
    at_Q1 = at_Q1.clamp(max=cdf_QX.shape[1] - 1)
    rest_Q1 = 1 - (cdf_QX.gather(1, at_Q1) - spot_Q1) / prob_QX.gather(1, at_Q1)
    return at_Q1.squeeze(1), rest_Q1.squeeze(1).clamp(min=0)


def slabs(h_QD: Tensor, never_V: Tensor) -> list[slice]:
    """Cut positions so that their logits stay small: memory without a knob.

    64 MiB a slab; 16 on a CPU, where malloc maps anything larger from the system each time.
    """
    most = 2**22 if never_V.device.type == "cpu" else 2**24
    size = max(1, most // len(never_V))
    return [slice(i, i + size) for i in range(0, len(h_QD), size)]


def places(where_NC: Tensor, count: int) -> Tensor:
    """The first `count` positions at which it is True [N, count], in order."""
    return where_NC.float().sort(dim=1, descending=True, stable=True).indices[:, :count]


def pick(x_SJD: Tensor, at_SR: Tensor) -> Tensor:
    """The vectors at these positions: [S, R, D]."""
    return x_SJD.gather(1, at_SR[..., None].expand(-1, -1, x_SJD.shape[-1]))


# ---- names and files -----------------------------------------------------------------------------

NAMES = {  # our word for a part of a tensor's name: LLaDA's, the decoders'; others are the same
    "embed": ("model.transformer.wte", "model.embed_tokens"),
    "blocks": ("model.transformer.blocks", "model.layers"),
    "attn_norm": ("attn_norm", "input_layernorm"),
    "q": ("q_proj", "self_attn.q_proj"),
    "k": ("k_proj", "self_attn.k_proj"),
    "v": ("v_proj", "self_attn.v_proj"),
    "q_norm": ("", "self_attn.q_norm"),
    "k_norm": ("", "self_attn.k_norm"),
    "out": ("attn_out", "self_attn.o_proj"),
    "mlp_norm": ("ff_norm", "post_attention_layernorm"),
    "gate": ("ff_proj", "mlp.gate_proj"),
    "up": ("up_proj", "mlp.up_proj"),
    "down": ("ff_out", "mlp.down_proj"),
    "norm": ("model.transformer.ln_f", "model.norm"),
    "unembed": ("model.transformer.ff_out", "lm_head"),
}


def published(name: str, family: str) -> str:
    """blocks.0.q.weight -> model.transformer.blocks.0.q_proj.weight, and the like."""
    column = ("llada", "decoder").index(family)
    return ".".join(NAMES[part][column] if part in NAMES else part for part in name.split("."))


SMALL = ("*.json", "*.txt", "*.jinja")  # files of a model, but for the weights
KINDS = (*SMALL, "*.safetensors")


def find_folder(path: str | Path, kinds: Iterable[str] = KINDS) -> Path:
    """The folder of a model: a folder, "tiny" (the embedded one), or a hub id (id@revision), of
    which the files that match `kinds` are fetched."""
    if str(path) == "tiny":
        return Path(__file__).parent / "tiny"
    if Path(path).is_dir():
        return Path(path)
    reason, source = "no such folder", "the model"
    name, _, revision = str(path).partition("@")
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        from huggingface_hub import snapshot_download

        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # the line below says it once
        try:
            return Path(snapshot_download(name, revision=revision or None, allow_patterns=[*kinds]))
        except Exception as error:  # offline, cut short, disk full: each has its own class
            source, kind = f"https://huggingface.co/{name}", type(error).__name__
            at = f" at revision {revision}" if revision else ""
            reason += ", and " + {
                "GatedRepoError": "gated on the hub: ask for access there, then `hf auth login`",
                "RepositoryNotFoundError": "not on the hub, or private there (`hf auth login`)",
                "RevisionNotFoundError": f"the hub has no revision {revision} of it",
            }.get(kind, f"could not be fetched from the hub{at} ({kind})")
    raise FileNotFoundError(
        f"--model {path}: {reason}; put config.json, the *.safetensors and the tokenizer files of"
        f" {source} into a folder and pass --model FOLDER"
    )


def pinned(path: str | Path) -> str:
    """A hub id with the commit that it stands for now, so that a run reads one state of it however
    long it takes; a folder as it is."""
    folder = find_folder(path, SMALL)
    return f"{str(path).partition('@')[0]}@{folder.name}" if cached(path, folder) else str(path)


def unpinned(path: str) -> str:
    """A hub id without the commit that `pinned` gave it."""
    return re.sub("@[0-9a-f]{40}$", "", path)


def stands_for(asked: str, path: str) -> bool:
    """Is this the hub id, with whatever revision, of a path that `pinned` gave a commit?"""
    return asked.partition("@")[0] == unpinned(path)


def cached(path: str | Path, folder: Path) -> bool:
    """Is it of the hub's cache, which names a snapshot by its commit?"""
    commit = re.fullmatch("[0-9a-f]{40}", folder.name)
    return folder != Path(path) and folder.parent.name == "snapshots" and commit is not None


def holds_weights(folder: str | Path) -> bool:
    """Is there a model that a new one, or a run, would write over?"""
    return any(Path(folder).glob("*.safetensors*"))


def adapter_rank(path: str | Path) -> int:
    """The rank of a folder's adapter; 0 where it holds none."""
    file = find_folder(path, SMALL) / "adapter_config.json"
    return read_json(file).get("r", 0) if file.is_file() else 0


def adapter_base(folder: Path) -> str:
    """The model that the adapter of this folder belongs to, as `find_folder` takes it."""
    lora = read_json(folder / "adapter_config.json")
    if not lora.get("base_model_name_or_path"):
        raise ValueError(f"{folder}/adapter_config.json: base_model_name_or_path is missing")
    return "@".join(filter(None, (lora["base_model_name_or_path"], lora.get("revision"))))


@contextmanager
def opened(file: Path) -> Iterator:
    """A safetensors file, read lazily; a damaged one is a ValueError that names it."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: download it into {file.parent}")
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut short ({error}): download it again") from None


def weight_files(folder: Path) -> list[Path]:
    """One file, or the shards of an index."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        raise FileNotFoundError(f"{folder} has no model.safetensors and no {index.name}")
    weight_map = read_json(index).get("weight_map")
    if not weight_map:
        raise ValueError(f"{index} has no weight_map")
    return [folder / name for name in sorted(set(weight_map.values()))]


def check_tensors(
    files: list[Path], shapes: dict[str, torch.Size], spare: str | None = None
) -> None:
    """ValueError unless the files hold exactly these tensors in these shapes (headers only); the
    `spare` one may be absent."""
    missing = {name: shape for name, shape in shapes.items() if name != spare}
    for file in files:
        with opened(file) as tensors:
            for name in tensors.keys():
                if name not in shapes:
                    raise ValueError(f"{file}: tensor {name} does not belong to this architecture")
                shape = tuple(tensors.get_slice(name).get_shape())
                if shape != tuple(shapes[name]):
                    raise ValueError(
                        f"{file}: {name} has shape {shape}, config.json says {tuple(shapes[name])}"
                    )
                missing.pop(name, None)
    if missing:
        place = files[0] if len(files) == 1 else files[0].parent
        raise ValueError(f"{place}: {len(missing)} tensors are missing, first {min(missing)}")


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    quantize: Quantize = "none",
    mask_id: int | None = None,
) -> Transformer:
    """The network of a folder or hub id, with the adapter if the folder is an adapter's.

    Read tensor by tensor straight to device and dtype: on the way no more than one file is mapped
    and one tensor copied. `quantize` makes bitsandbytes linears of the blocks' maps as they come.
    `mask_id`: where nothing there says what the mask is; without it, NoMask is raised.
    """
    folder = find_folder(path)
    if (folder / "adapter_config.json").is_file():
        try:
            net = load(adapter_base(folder), device, dtype, quantize)
        except FileNotFoundError as error:  # it may name a folder of whoever trained the adapter
            where = f"{folder}/adapter_config.json, base_model_name_or_path"
            raise FileNotFoundError(f"{where}: {error}") from None
        load_lora(net, folder)
        return net

    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(
            f"--model {folder}: no config.json there, so it is not a model's folder"
        )
    check_quantize(quantize, device)
    config = read_config(config_file, mask_id)
    net = skeleton(config, dtype)
    ours = {published(name, config.family): name for name, _ in net.named_parameters()}
    spare = published("unembed.weight", config.family) if config.tied else None
    if spare:  # some store the head although it is the embedding
        ours[spare] = "embed.weight"
    files = weight_files(folder)
    check_tensors(files, {name: net.get_parameter(ours[name]).shape for name in ours}, spare)
    for file in files:
        with opened(file) as tensors:
            for name in tensors.keys():
                parent, _, leaf = ours[name].rpartition(".")
                owner, tensor = net.get_submodule(parent), tensors.get_tensor(name)
                if quantize != "none" and parent.startswith("blocks.") and tensor.dim() == 2:
                    net.set_submodule(parent, quantized(owner, tensor, device))
                else:  # copied: on the CPU, what was read is a view of the mapped file
                    tensor, held = tensor.to(device, dtype, copy=True), getattr(owner, leaf)
                    if not held.is_meta and not torch.equal(held, tensor):
                        raise ValueError(f"{file}: {name} is not the embedding, but tied to it")
                    setattr(owner, leaf, nn.Parameter(tensor))
                del tensor  # a view: it would hold the whole file while the next one is read
        trim()
    net.never_V, net.ends = never_emitted(config, device), torch.tensor([config.eos_id]).to(device)
    if cached(path, folder):
        net.origin = str(path).partition("@")[0], folder.name
    else:
        net.origin = str(folder.resolve()), None
    return net


def trim() -> None:
    """Hand freed memory back to the system. glibc keeps what lies between tensors that live on:
    0.6 GB after quantising eight layers of LLaDA-8B."""
    with suppress(OSError, AttributeError):  # another libc
        ctypes.CDLL(None).malloc_trim(0)


def save(net: Transformer, folder: str | Path, whole: dict[str, Tensor] | None = None) -> None:
    """Write config.json and model.safetensors; of a network with an adapter, the adapter alone.

    Not atomic: write into a temporary folder and rename it. ValueError if weights are quantised.
    `whole`: the weights under their names in `net`, where it holds only a part of each.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(net.config.raw, indent=2) + "\n")
    if adapters(net):
        save_lora(net, folder)
        return
    weights = {}
    for name, p in (whole or dict(net.named_parameters())).items():
        if not p.is_floating_point():
            raise ValueError(f"{folder}: {name} is quantised; only an adapter on it can be saved")
        weights[published(name, net.config.family)] = p.detach().contiguous()
    for left in folder.glob("adapter_*"):  # `load` would take it for what is meant
        left.unlink()
    write(weights, folder / "model.safetensors")


def write(tensors: dict[str, Tensor], file: Path) -> None:
    """OSError where it cannot be; for whoever may read the config.json beside it."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file}: {error}") from None
    shutil.copymode(file.with_name("config.json"), file)


# ---- text and tokens -----------------------------------------------------------------------------


def load_tokenizer(path: str | Path):
    """The tokenizer of a model's folder, without remote code: Dream's own class is Qwen2's under
    another name."""
    from transformers import AutoTokenizer, Qwen2Tokenizer, logging

    logging.set_verbosity_error()  # it would warn that it does not know the network's class
    folder = base = find_folder(path)
    if adapter_rank(path):  # an adapter may come without tokenizer and config.json
        base = find_folder(adapter_base(folder))
        folder = folder if (folder / "tokenizer_config.json").is_file() else base
    dream = str(read_json(base / "config.json").get("model_type")).lower() == "dream"
    try:
        if dream:
            return Qwen2Tokenizer.from_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each kind has its own
        told = " ".join(str(error).split())
        raise ValueError(f"{folder}: no tokenizer there that can be read: {told}") from None


def chat_ids(
    prompts: Iterable[str], tokenizer, system: str = "", answer: str = ""
) -> list[list[int]]:
    """Token ids of each prompt in the model's own chat template, ready to be completed; after a
    system message, and with the beginning of the answer, where there are any."""
    first = [{"role": "system", "content": system}] if system else []
    chats = [[*first, {"role": "user", "content": prompt}] for prompt in prompts]
    try:
        texts = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=False, enable_thinking=False
        )  # Qwen3's template begins the answer with an empty thought; others ignore the last word
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template of {tokenizer.name_or_path}: {error}") from None
    return tokenizer([text + answer for text in texts], add_special_tokens=False)["input_ids"]


def padded_length(longest: int, most: int) -> int:
    """The length that a batch of prompts is padded to, at most `most`: few, for torch.compile.

    Multiples of 64, and above 512 of a quarter of the power of two that is not above it.
    """
    step = max(64, 1 << max(0, (longest - 1).bit_length() - 3))
    return min(most, -(-longest // step) * step)


def left_pad(rows: list[list[int]], P: int, pad: int) -> tuple[Tensor, Tensor]:
    """Ids [B, P] and where they are real. Prompts are never cut: none may be longer than P."""
    prompt_BP = torch.tensor([[pad] * (P - len(row)) + row for row in rows])
    real_BP = torch.tensor([[False] * (P - len(row)) + [True] * len(row) for row in rows])
    return prompt_BP, real_BP


def with_completion(real_BP: Tensor, C: int) -> Tensor:
    """Every position of the completion is real [B, L]."""
    return torch.cat((real_BP, real_BP.new_ones(len(real_BP), C)), dim=1)


def ends_file(path: str | Path) -> Path:
    """The generation_config.json of a model, or of the base of an adapter that has none."""
    folder = find_folder(path, SMALL)
    if not (folder / "generation_config.json").is_file() and adapter_rank(path):
        folder = find_folder(adapter_base(folder), SMALL)
    return folder / "generation_config.json"


def bring_ends(path: str | Path, out: str | Path) -> None:
    """Copy that file, if there is one, beside what was made of the model."""
    if (file := ends_file(path)).is_file():
        (Path(out) / file.name).write_bytes(file.read_bytes())


def end_ids(path: str | Path, config: Architecture, tokenizer, known: Iterable[str]) -> list[int]:
    """Every id that ends a turn: by config.json, by generation_config.json, by the tokenizer, and
    the `known` tokens that it has."""
    file = ends_file(path)
    said = [config.raw.get("eos_token_id"), tokenizer.eos_token_id]
    said.append(read_json(file).get("eos_token_id") if file.is_file() else None)
    ids = {config.eos_id}
    for some in said:
        ids.update(some if isinstance(some, list) else [] if some is None else [some])
    special = tokenizer.get_added_vocab()
    return sorted(ids | {special[token] for token in known if token in special})


def texts(token_NC: Tensor, tokenizer, ends: Tensor) -> list[str]:
    """Each completion as text, cut at its first end token."""
    stops = set(ends.tolist())
    cut = [
        list(itertools.takewhile(lambda token: token not in stops, row))
        for row in token_NC.tolist()
    ]
    return tokenizer.batch_decode(cut, skip_special_tokens=True, clean_up_tokenization_spaces=False)


# ---- quantised linears ---------------------------------------------------------------------------


def check_quantize(kind: Quantize, device: str | torch.device) -> None:
    """ValueError, before anything is read, where bitsandbytes cannot serve."""
    if kind not in ("none", "nf4"):
        raise ValueError(f"--quantize {kind}: none or nf4")
    if kind != "none" and torch.device(device).type not in ("cpu", "cuda", "xpu"):
        raise ValueError(f"--quantize {kind}: no kernels for {device}; use cuda, xpu or cpu")
    if kind != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"--quantize {kind}: needs bitsandbytes (pip install bitsandbytes)")


def quantized(linear: nn.Linear, weight: Tensor, device: str | torch.device) -> nn.Linear:
    """bitsandbytes' frozen 4-bit linear of this weight (on the CPU), quantised on `device`.

    nf4: blocks of 64 whose scales are quantised too (arXiv 2305.14314). Computes in the dtype of
    `linear`, for a CPU without bf16 in hardware multiplies it many times slower than float32.
    """
    import bitsandbytes as bnb

    made = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        device="meta",
        quant_type="nf4",
        compute_dtype=linear.weight.dtype,
    )
    weight = weight.to(linear.weight.dtype)
    params = bnb.nn.Params4bit(weight, quant_type="nf4", module=made)
    made.support_avx512bf16_for_cpu = False  # no second kernel in eval mode: rollout = update
    made.weight = params.to(device)
    made.bias = linear.bias
    return made


def dense(linear: nn.Linear) -> Tensor:
    """The weight of a linear in float32, quantised or not."""
    weight = linear.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).float()
    return weight.data.float()


# ---- LoRA ----------------------------------------------------------------------------------------


class LoRA(nn.Module):
    """base(x) + alpha / r * B A x, B = 0 at first (arXiv 2106.09685).

    A and B are kept in float32, so that small updates count; the products are in x's dtype.
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float):
        super().__init__()
        self.base, self.r, self.alpha, self.on = base, r, alpha, True
        self.start: tuple[Tensor, Tensor] | None = None  # A and B as they were, for `as_reference`
        like = dict(device=base.weight.device, dtype=torch.float32)
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        y, pair = self.base(x), (self.lora_A, self.lora_B) if self.on else self.start
        if pair is None:
            return y
        low = F.linear(x, pair[0].to(x.dtype)) * (self.alpha / self.r)
        return y + F.linear(low, pair[1].to(x.dtype))


def adapters(net: Transformer) -> dict[str, LoRA]:
    """The adapted maps by name; empty where `load` found, and `add_lora` made, none."""
    return {name: m for name, m in net.named_modules() if isinstance(m, LoRA)}


def add_lora(net: Transformer, r: int, alpha: float) -> None:
    """Adapt all seven maps of every block (never the head), in place; the rest is frozen."""
    if adapters(net):
        raise ValueError("the model already has an adapter: merge it, or train that one")
    net.requires_grad_(False)
    for block in net.blocks:
        for name, linear in linears(block):
            setattr(block, name, LoRA(linear, r, alpha))


def keep_start(net: Transformer, folder: str | Path) -> None:
    """Let `as_reference` go back to the adapter of this folder, which the network started with."""
    with opened(Path(folder) / "adapter_model.safetensors") as tensors:
        for name, lora in adapters(net).items():
            place = f"{PREFIX}{published(name, net.config.family)}"
            pair = (tensors.get_tensor(f"{place}.lora_{kind}.weight") for kind in "AB")
            lora.start = tuple(weight.to(lora.lora_A, copy=True) for weight in pair)


@contextmanager
def as_reference(net: Transformer) -> Iterator[Transformer]:
    """Yields the network as it started: inside, adapters are as `keep_start` found them, or else
    skipped, not multiplied by zero.

    A plain attribute, on which torch.compile guards: it keeps one graph with and one without, and
    switching between them compiles nothing. (A 0-d tensor in one graph would still pay for the
    adapters, and changing it between forward and backward is an error of autograd.)
    """
    loras = adapters(net).values()
    if not loras:
        raise ValueError("the model has no adapter to switch off: keep a frozen copy instead")
    try:
        for lora in loras:
            lora.on = False
        yield net
    finally:
        for lora in loras:
            lora.on = True


@torch.no_grad()
def merge_lora(net: Transformer) -> None:
    """Fold the adapter into full weights in the network's dtype, in place.

    What a quantised base becomes is the rounded weight it was trained on, plus the adapter.
    """
    for name, lora in adapters(net).items():
        weight = dense(lora.base) + (lora.alpha / lora.r) * lora.lora_B @ lora.lora_A
        with torch.device("meta"):
            merged = nn.Linear(lora.base.in_features, lora.base.out_features, bias=False)
        merged.weight = nn.Parameter(weight.to(net.embed.weight.dtype), requires_grad=False)
        merged.bias = lora.base.bias
        net.set_submodule(name, merged)


PREFIX = "base_model.model."  # PEFT's, before the published path of the module it adapts


def save_lora(net: Transformer, folder: Path) -> None:
    """adapter_model.safetensors and adapter_config.json, as PEFT reads them."""
    family, loras, tensors = net.config.family, adapters(net), {}
    for name, lora in loras.items():
        tensors[f"{PREFIX}{published(name, family)}.lora_A.weight"] = lora.lora_A.detach()
        tensors[f"{PREFIX}{published(name, family)}.lora_B.weight"] = lora.lora_B.detach()
    write(tensors, folder / "adapter_model.safetensors")
    source, revision = net.origin
    one, places = next(iter(loras.values())), sorted(published(name, family) for name in loras)
    excluded = None if "unembed" in loras else [published("unembed", family)]
    targets = sorted({place.split(".")[-1] for place in places})
    maps = [published(n, family) for n, m in net.named_modules() if isinstance(m, nn.Linear | LoRA)]
    meant = {place for place in maps if place.split(".")[-1] in targets} - set(excluded or ())
    config = dict(
        peft_type="LORA",
        task_type=None,  # any module tree: a task would make PEFT ask the model for `generate`
        base_model_name_or_path=source,
        revision=revision,
        r=one.r,
        lora_alpha=one.alpha,
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=False,
        inference_mode=True,
        # PEFT matches by ending, and LLaDA's head ends like a block's last map; endings would
        # make adapters of zeros where only some blocks are adapted
        target_modules=targets if meant == set(places) else places,
        exclude_modules=excluded,
    )
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_lora(net: Transformer, folder: str | Path) -> None:
    """Attach the PEFT adapter of a folder, whichever linear maps it adapts, and freeze the rest."""
    if adapters(net):
        raise ValueError(f"{folder}: the model already has an adapter")
    file = Path(folder) / "adapter_model.safetensors"
    config_file = Path(folder) / "adapter_config.json"
    config = read_json(config_file)
    for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save"):
        if config.get(key):
            raise ValueError(f"{config_file}: {key} {config[key]!r} is not supported")
    r, alpha = config.get("r"), config.get("lora_alpha")
    if not r or not alpha:
        raise ValueError(f"{config_file}: r or lora_alpha is missing")
    net.requires_grad_(False)
    family = net.config.family
    maps = {published(n, family): n for n, m in net.named_modules() if isinstance(m, nn.Linear)}
    with opened(file) as tensors:
        names = set(tensors.keys())
        for name in sorted(names):
            place, _, kind = name.removeprefix(PREFIX).rpartition(".lora_")
            if place not in maps or kind not in ("A.weight", "B.weight"):
                raise ValueError(f"{file}: {name} is not an adapter of a linear map of this model")
        for place, ours in maps.items():
            pair = [f"{PREFIX}{place}.lora_{kind}.weight" for kind in "AB"]
            if not names & set(pair):
                continue
            lora = LoRA(net.get_submodule(ours), r, alpha)
            for name, p in zip(pair, (lora.lora_A, lora.lora_B)):
                if name not in names:
                    raise ValueError(f"{file}: {name} is missing")
                tensor = tensors.get_tensor(name)
                if tensor.shape != p.shape:
                    shapes = f"{tuple(tensor.shape)}, not {tuple(p.shape)}"
                    raise ValueError(f"{file}: {name} has shape {shapes}")
                p.data.copy_(tensor)
            net.set_submodule(ours, lora)
