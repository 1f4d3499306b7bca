"""Given tokens, what are the logits; how do weights get in and out?

One bidirectional transformer serves both published families of masked diffusion language models:

  LLaDA (LLaDA-8B-Base, LLaDA-8B-Instruct, LLaDA-1.5; arXiv 2502.09992)
  Dream (Dream-v0-Instruct-7B; arXiv 2508.15487): Qwen2.5's layout, whose logits at position i are
  for the token at i + 1. The shift is undone here, so that `hidden` is aligned for both.

It is written by hand so that nothing runs from a hub, every shape is static (torch.compile sees
one graph) and a row's result does not depend on its batch-mates. No dropout, no cache.
Files keep the published layout: config.json and tensor names as their authors wrote them.

N rows, L positions, D width, R positions asked for, V vocabulary (rows of the head).
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# ---- config.json ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """What the network needs to know of a config.json; `raw` is the file, written back by `save`."""

    family: str  # "llada" or "dream": which published names and which alignment
    vocab_size: int  # rows of the embedding and of the head
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_ff: int
    rope_theta: float
    norm_eps: float
    tied: bool  # the head is the embedding
    scale_logits: bool  # divide logits by sqrt(d_model)
    bias_qkv: bool
    bias: bool  # of every other linear map
    bias_norm: bool
    mask_id: int
    eos_id: int
    pad_id: int
    raw: dict = field(repr=False, compare=False)


def parse_config(raw: dict, source: str = "config") -> Config:
    """Read a published config.json. ValueError names the field this network does not know."""
    model_type = str(raw.get("model_type")).lower()
    if model_type == "llada":
        d_model, n_heads = raw["d_model"], raw["n_heads"]
        n_kv_heads = raw.get("n_kv_heads") or (1 if raw.get("multi_query_attention") else n_heads)
        bias = raw.get("include_bias", False)
        norm_bias = raw.get("bias_for_layer_norm")
        config = dict(
            family="llada",
            vocab_size=raw.get("embedding_size") or raw["vocab_size"],
            n_layers=raw["n_layers"],
            d_ff=raw.get("mlp_hidden_size") or raw.get("mlp_ratio", 4) * d_model,
            rope_theta=raw.get("rope_theta", 500000.0),
            norm_eps=raw.get("rms_norm_eps", 1e-5),
            tied=raw.get("weight_tying", False),
            scale_logits=raw.get("scale_logits", False),
            bias_qkv=bias or raw.get("include_qkv_bias", False),
            bias=bias,
            bias_norm=bias if norm_bias is None else norm_bias,
            mask_id=raw.get("mask_token_id", 126336),
        )
    elif model_type == "dream":
        d_model, n_heads = raw["hidden_size"], raw["num_attention_heads"]
        n_kv_heads = raw.get("num_key_value_heads") or n_heads
        config = dict(
            family="dream",
            vocab_size=raw["vocab_size"],
            n_layers=raw["num_hidden_layers"],
            d_ff=raw["intermediate_size"],
            rope_theta=raw.get("rope_theta", 1000000.0),
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            tied=raw.get("tie_word_embeddings", False),
            scale_logits=False,
            bias_qkv=True,
            bias=False,
            bias_norm=False,
            mask_id=raw.get("mask_token_id", 151666),
        )
    else:
        raise ValueError(f"{source}: model_type {raw.get('model_type')!r} is not llada or Dream")
    eos_id = raw["eos_token_id"]
    pad_id = raw.get("pad_token_id")
    return Config(
        **config,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        eos_id=eos_id,
        pad_id=eos_id if pad_id is None else pad_id,
        raw=raw,
    )


def read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None


# ---- the network ---------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float, bias: bool):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        # float32 inside, rounded before the weight: the order the published code uses
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        scaled = self.weight * wide.to(x.dtype)
        return scaled if self.bias is None else scaled + self.bias


def rotate(x_NHLE: Tensor, cos_N1LE: Tensor, sin_N1LE: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) in float32, halves paired as in GPT-NeoX."""
    wide = x_NHLE.float()
    left, right = wide.chunk(2, dim=-1)
    turned = torch.cat((-right, left), dim=-1)
    return (wide * cos_N1LE + turned * sin_N1LE).to(x_NHLE.dtype)


class Block(nn.Module):
    """Pre-norm attention and gated MLP; every position sees every other real one."""

    def __init__(self, c: Config):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.d_head = c.n_heads, c.n_kv_heads, c.d_model // c.n_heads
        d_kv = self.n_kv_heads * self.d_head
        self.attn_norm = RMSNorm(c.d_model, c.norm_eps, c.bias_norm)
        self.q = nn.Linear(c.d_model, c.d_model, bias=c.bias_qkv)
        self.k = nn.Linear(c.d_model, d_kv, bias=c.bias_qkv)
        self.v = nn.Linear(c.d_model, d_kv, bias=c.bias_qkv)
        self.out = nn.Linear(c.d_model, c.d_model, bias=c.bias)
        self.mlp_norm = RMSNorm(c.d_model, c.norm_eps, c.bias_norm)
        self.gate = nn.Linear(c.d_model, c.d_ff, bias=c.bias)
        self.up = nn.Linear(c.d_model, c.d_ff, bias=c.bias)
        self.down = nn.Linear(c.d_ff, c.d_model, bias=c.bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, seen: Tensor | None) -> Tensor:
        h = self.attn_norm(x)
        q = self.q(h).unflatten(-1, (self.n_heads, self.d_head)).transpose(1, 2)
        k = self.k(h).unflatten(-1, (self.n_kv_heads, self.d_head)).transpose(1, 2)
        v = self.v(h).unflatten(-1, (self.n_kv_heads, self.d_head)).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.n_kv_heads < self.n_heads:
            # copied out because fused attention with a mask takes no grouped heads on every device
            k, v = (t.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1) for t in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Transformer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.checkpointing = False  # recompute each block in backward: less memory, same values
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps, config.bias_norm)
        self.unembed = None
        if not config.tied:
            self.unembed = nn.Linear(config.d_model, config.vocab_size, bias=config.bias)

    def hidden(self, ids_NL: Tensor, real_NL: Tensor | None = None) -> Tensor:
        """Hidden states [N, L, D], aligned: h[:, i] predicts the token at position i.

        `real_NL` is False at padding (on the left, by custom): never attended to, not counted.
        """
        c = self.config
        if real_NL is None:
            seen, place_NL = None, torch.arange(ids_NL.shape[1], device=ids_NL.device)[None]
        else:
            seen, place_NL = real_NL[:, None, None, :], real_NL.cumsum(1) - 1
        d_head = c.d_model // c.n_heads
        half = torch.arange(0, d_head, 2, device=ids_NL.device, dtype=torch.float32)
        angle = place_NL[:, None, :, None].float() / c.rope_theta ** (half / d_head)
        angle = torch.cat((angle, angle), dim=-1)  # float32: bf16 cannot tell position 256 from 257
        cos, sin = angle.cos(), angle.sin()

        x = self.embed(ids_NL)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(
                    block, x, cos, sin, seen, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = block(x, cos, sin, seen)
        x = self.norm(x)
        if c.family == "dream":
            # Dream says at i - 1 what stands at i; the first real position has only itself to ask
            before = x.roll(1, dims=1)
            x = torch.where((place_NL > 0)[..., None], before, x)
        return x

    def head(self, h: Tensor) -> Tensor:
        """Float32 logits [..., V] of hidden states [..., D]."""
        logits = F.linear(h, self.embed.weight) if self.unembed is None else self.unembed(h)
        logits = logits.float()
        return logits / math.sqrt(self.config.d_model) if self.config.scale_logits else logits

    def forward(
        self, ids_NL: Tensor, real_NL: Tensor | None = None, at_NR: Tensor | None = None
    ) -> Tensor:
        """Float32 logits [N, L, V], or [N, R, V] of the positions `at_NR` alone (cheaper)."""
        h = self.hidden(ids_NL, real_NL)
        if at_NR is not None:
            h = h.gather(1, at_NR[..., None].expand(-1, -1, h.shape[-1]))
        return self.head(h)


def from_config(
    config: dict | str | Path, device: str | torch.device = "cpu", dtype=torch.float32
) -> Transformer:
    """A randomly initialised network of a published config (dict, config.json or its folder)."""
    if not isinstance(config, dict):
        file = Path(config)
        file = file / "config.json" if file.is_dir() else file
        parsed = parse_config(read_json(file), str(file))
    else:
        parsed = parse_config(config)
    net = skeleton(parsed, dtype).to_empty(device=device)
    if torch.device(device).type != "meta":
        init(net)
    return net


def skeleton(config: Config, dtype: torch.dtype) -> Transformer:
    """The network on the meta device: shapes and names, no memory."""
    with torch.device("meta"):
        return Transformer(config).to(dtype)


@torch.no_grad()
def init(net: Transformer) -> None:
    """GPT-2's: normal(0.02), less for what adds to the residual stream so that its size stays."""
    for name, p in net.named_parameters():
        if name.endswith("bias"):
            p.zero_()
        elif "norm" in name:
            p.fill_(1.0)
        elif name.endswith(("out.weight", "down.weight")):
            p.normal_(0.0, 0.02 / math.sqrt(2 * net.config.n_layers))
        else:
            p.normal_(0.0, 0.02)


# ---- weights in and out --------------------------------------------------------------------------

# our word for each part of a tensor's name -> the published one
NAMES = {
    "llada": {
        "embed": "model.transformer.wte",
        "blocks": "model.transformer.blocks",
        "norm": "model.transformer.ln_f",
        "unembed": "model.transformer.ff_out",
        "q": "q_proj",
        "k": "k_proj",
        "v": "v_proj",
        "out": "attn_out",
        "mlp_norm": "ff_norm",
        "gate": "ff_proj",
        "up": "up_proj",
        "down": "ff_out",
    },
    "dream": {
        "embed": "model.embed_tokens",
        "blocks": "model.layers",
        "norm": "model.norm",
        "unembed": "lm_head",
        "attn_norm": "input_layernorm",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "out": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
}


def published(name: str, family: str) -> str:
    """The published name of one of our tensors: blocks.0.q.weight -> ...blocks.0.q_proj.weight."""
    return ".".join(NAMES[family].get(part, part) for part in name.split("."))


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    quantize: str = "none",
    revision: str | None = None,
) -> Transformer:
    folder = Path(path)
    config = parse_config(read_json(folder / "config.json"), str(folder / "config.json"))
    net = skeleton(config, dtype)
    state = {}
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        for name in net.state_dict():
            tensor = weights.get_tensor(published(name, config.family))
            state[name] = tensor.to(device=device, dtype=dtype, copy=True)
    net.load_state_dict(state, assign=True)
    return net


def save(net: Transformer, folder: str | Path) -> None:
    """Write model.safetensors and config.json in the published layout."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    family = net.config.family
    state = {published(name, family): t.contiguous() for name, t in net.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(net.config.raw, indent=2) + "\n")
