"""model.py against stored logits, against a slow twin written from the papers, and against PEFT."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file

import model
from toy import toy_model

FIXTURES = Path(__file__).parent / "fixtures"

LLADA = dict(
    model_type="llada", d_model=32, n_heads=4, n_kv_heads=4, n_layers=2, mlp_hidden_size=48,
    vocab_size=60, embedding_size=64, rope_theta=500000.0, rms_norm_eps=1e-5, weight_tying=False,
    mask_token_id=50, eos_token_id=51, pad_token_id=51, block_type="llama", activation_type="silu",
    layer_norm_type="rms", multi_query_attention=None, include_bias=False, rope=True,
)  # fmt: skip
DREAM = dict(
    model_type="Dream", hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
    num_hidden_layers=2, intermediate_size=48, vocab_size=64, rope_theta=1000000.0,
    rms_norm_eps=1e-6, tie_word_embeddings=False, mask_token_id=50, eos_token_id=51,
    pad_token_id=52, hidden_act="silu",
)  # fmt: skip
VARIANTS = {
    "llada": LLADA,
    "llada grouped-query": LLADA | dict(n_kv_heads=2),
    "llada multi-query": LLADA | dict(n_kv_heads=None, multi_query_attention=True),
    "llada tied": LLADA | dict(weight_tying=True),
    "llada scaled logits": LLADA | dict(scale_logits=True),
    "llada all biases": LLADA | dict(include_bias=True, bias_for_layer_norm=None),
    "llada q/k/v biases": LLADA | dict(include_qkv_bias=True, bias_for_layer_norm=False),
    "llada other eps, theta, mlp_ratio": LLADA
    | dict(rms_norm_eps=0.1, rope_theta=100.0, mlp_hidden_size=None, mlp_ratio=3),
    "dream": DREAM,
    "dream tied, all heads": DREAM | dict(tie_word_embeddings=True, num_key_value_heads=4),
}
SEVEN = {
    "llada": ["q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"],
    "decoder": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def make(raw: dict, seed: int = 0, **kwargs) -> model.Transformer:
    """A network whose every tensor, norms and biases included, is far from its initial value."""
    torch.manual_seed(seed)
    net = model.from_config(raw, **kwargs)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return net


def some_ids(rows: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


def shift(raw_NLV: torch.Tensor) -> torch.Tensor:
    """Dream's published logits, aligned as its own sampler aligns them."""
    return torch.cat((raw_NLV[:, :1], raw_NLV[:, :-1]), dim=1)


class Twin(nn.Module):
    """The published module tree as PEFT sees it, computed head by head and position by position.

    Reads the published config and tensors, nothing of model.py. Unshifted logits.
    """

    names = {
        "llada": "wte blocks ln_f ff_out attn_norm q_proj k_proj v_proj attn_out"
        " ff_norm ff_proj up_proj ff_out",
        "dream": "embed_tokens layers norm lm_head input_layernorm self_attn.q_proj"
        " self_attn.k_proj self_attn.v_proj self_attn.o_proj post_attention_layernorm"
        " mlp.gate_proj mlp.up_proj mlp.down_proj",
    }

    def __init__(self, raw: dict, tensors: dict[str, torch.Tensor]):
        super().__init__()
        self.raw, self.llada = raw, raw["model_type"] == "llada"
        for name in sorted(tensors, key=lambda name: name.endswith("bias")):
            tensor = tensors[name]
            *path, leaf = name.split(".")
            here = self
            for i, part in enumerate(path):
                if part not in here._modules:
                    child = nn.Module()
                    if i == len(path) - 1 and leaf == "weight" and tensor.dim() == 2:
                        out, into = tensor.shape
                        embeds = part in ("wte", "embed_tokens")
                        biased = name.removesuffix("weight") + "bias" in tensors
                        child = nn.Embedding(out, into) if embeds else nn.Linear(into, out, biased)
                    here.add_module(part, child)
                here = here._modules[part]
            here.register_parameter(leaf, nn.Parameter(tensor.clone(), requires_grad=False))

    def norm(self, path: str, x: torch.Tensor) -> torch.Tensor:
        m, eps = self.get_submodule(path), self.raw["rms_norm_eps"]
        y = x / (x.pow(2).mean() + eps).sqrt() * m.weight
        return y + m.bias if hasattr(m, "bias") else y

    def attention(self, q_LD, k_LD, v_LD):
        raw = self.raw
        heads = raw["n_heads"] if self.llada else raw["num_attention_heads"]
        size = q_LD.shape[1] // heads
        share = q_LD.shape[1] // k_LD.shape[1]
        turn = raw["rope_theta"] ** (-2 * torch.arange(size // 2, dtype=torch.float64) / size)

        def spin(x, place):
            pair = torch.complex(*(half.double() for half in x.chunk(2)))
            pair = pair * torch.polar(torch.ones_like(turn), place * turn)
            return torch.cat((pair.real, pair.imag))

        rows = []
        for i in range(len(q_LD)):
            row = []
            for head in range(heads):
                mine = slice(head * size, (head + 1) * size)
                theirs = slice(head // share * size, (head // share + 1) * size)
                q = spin(q_LD[i, mine], i)
                score = [(q @ spin(k_LD[j, theirs], j)) / size**0.5 for j in range(len(q_LD))]
                weight = torch.stack(score).softmax(0)
                row.append(sum(w * v_LD[j, theirs].double() for j, w in enumerate(weight)))
            rows.append(torch.cat(row))
        return torch.stack(rows).float()

    def row(self, ids: torch.Tensor) -> torch.Tensor:
        top = "model.transformer." if self.llada else "model."
        names = self.names["llada" if self.llada else "dream"].split()
        embed, blocks, last, head, norm_1, *maps_1, norm_2, gate, up, down = names
        embedding = self.get_submodule(top + embed)
        stream = list(embedding(ids))
        for n in range(self.raw["n_layers" if self.llada else "num_hidden_layers"]):
            at = f"{top}{blocks}.{n}."
            h = torch.stack([self.norm(at + norm_1, x) for x in stream])
            q, k, v, out = (self.get_submodule(at + name) for name in maps_1)
            mixed = out(self.attention(q(h), k(h), v(h)))
            stream = [x + m for x, m in zip(stream, mixed)]
            for i, x in enumerate(stream):
                h = self.norm(at + norm_2, x)
                g = self.get_submodule(at + gate)(h)
                g = g * torch.sigmoid(g) * self.get_submodule(at + up)(h)
                stream[i] = x + self.get_submodule(at + down)(g)
        h = torch.stack([self.norm(top + last, x) for x in stream])
        if self.raw.get("weight_tying") or self.raw.get("tie_word_embeddings"):
            logits = h @ embedding.weight.T
        else:
            logits = self.get_submodule(top + head if self.llada else head)(h)
        return logits / self.raw["d_model"] ** 0.5 if self.raw.get("scale_logits") else logits

    @torch.no_grad()
    def forward(self, ids_NL: torch.Tensor) -> torch.Tensor:
        logits = torch.stack([self.row(ids) for ids in ids_NL])
        return logits if self.llada else shift(logits)


def twin_of(folder: Path) -> Twin:
    raw = json.loads((folder / "config.json").read_text())
    return Twin(raw, load_file(folder / "model.safetensors"))


# ---- the forward pass ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_logits_equal_those_of_the_published_code(family):
    net = model.load(FIXTURES / f"{family}-tiny")
    stored = load_file(FIXTURES / f"{family}-tiny" / "expected.safetensors")
    expected = stored["logits"] if family == "llada" else shift(stored["logits"])
    with torch.no_grad():
        assert (net(stored["input_ids"]) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["llada-8b-instruct", "dream-7b-instruct"])
def test_every_tensor_of_the_published_index_is_there_and_no_other(name):
    index = json.loads((FIXTURES / name / "model.safetensors.index.json").read_text())
    net = model.from_config(FIXTURES / name, device="meta", dtype=torch.bfloat16)
    ours = {model.published(n, net.config.family): p for n, p in net.named_parameters()}
    assert ours.keys() == index["weight_map"].keys()
    assert sum(p.nbytes for p in ours.values()) == index["metadata"]["total_size"]
    c = net.config
    d_kv = c.d_head * c.n_kv_heads
    square, wide, tall = (c.d_model, c.d_model), (c.d_mlp, c.d_model), (c.d_model, c.d_mlp)
    narrow = (d_kv, c.d_model)
    shapes = dict(zip(SEVEN[c.family], [square, narrow, narrow, square, wide, wide, tall]))
    for n, p in ours.items():
        *path, last, kind = n.split(".")
        if ".0." in n and kind == "weight" and last in shapes:
            assert tuple(p.shape) == shapes[last], n


@pytest.mark.parametrize(
    "n_kv_heads, multi_query, expected",
    [(None, None, 4), (2, None, 2), (None, True, 1), (1, True, 1), (None, False, 4), (4, False, 4)],
)
def test_key_value_heads_follow_both_fields_of_the_published_config(
    n_kv_heads, multi_query, expected
):
    fields = dict(n_kv_heads=n_kv_heads, multi_query_attention=multi_query)
    net = model.from_config(LLADA | fields, device="meta")
    assert net.config.n_kv_heads == expected and net.blocks[0].k.weight.shape == (8 * expected, 32)


def test_biases_stand_where_the_published_config_puts_them():
    def biased(**fields):
        names = [n for n, _ in model.from_config(LLADA | fields, "meta").named_parameters()]
        return {n.split(".")[-2] for n in names if n.endswith("bias")}

    norms, rest = {"attn_norm", "mlp_norm", "norm"}, {"out", "gate", "up", "down", "unembed"}
    assert biased() == set()
    assert biased(include_qkv_bias=True) == {"q", "k", "v"}
    assert biased(include_bias=True) == norms | rest | {"q", "k", "v"}
    assert biased(include_bias=True, bias_for_layer_norm=False) == rest | {"q", "k", "v"}
    assert biased(bias_for_layer_norm=True) == norms


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_a_slow_twin_written_in_loops(variant, tmp_path):
    net = make(VARIANTS[variant])
    model.save(net, tmp_path)
    expected = twin_of(tmp_path)(some_ids())
    with torch.no_grad():
        got = model.load(tmp_path)(some_ids())
    assert got.shape == (2, 9, 64) and got.dtype == torch.float32
    assert (got - expected).abs().max() < 1e-4
    assert expected.std() > 0.01


@pytest.mark.parametrize("variant", ["llada grouped-query", "dream"])
def test_a_left_padded_row_equals_the_row_alone_whatever_the_padding_holds(variant):
    net, ids = make(VARIANTS[variant]), some_ids(rows=3)
    pad = [0, 2, 5]
    length = ids.shape[1] + max(pad)
    padded = torch.full((3, length), 7)
    real = torch.zeros(3, length, dtype=torch.bool)
    for row, n in enumerate(pad):
        padded[row, max(pad) - n :] = torch.cat((torch.full((n,), 3), ids[row]))
        real[row, max(pad) :] = True
    with torch.no_grad():
        got = net(padded, real)[:, max(pad) :]
        for row in range(3):
            assert (got[row] - net(ids[row : row + 1])[0]).abs().max() < 1e-5
        assert torch.equal(net(ids), net(ids, torch.ones_like(ids, dtype=torch.bool)))


@pytest.mark.parametrize("variant", ["llada", "dream"])
def test_a_position_is_predicted_from_both_sides(variant):
    net, ids = make(VARIANTS[variant]), some_ids(rows=1)
    with torch.no_grad():
        before = net(ids)[0, 4]
        for place in (0, 8):
            other = ids.clone()
            other[0, place] = (other[0, place] + 1) % 50
            assert (net(other)[0, 4] - before).abs().max() > 1e-4


@pytest.mark.parametrize("variant", ["llada scaled logits", "dream"])
def test_asking_for_positions_gives_the_rows_of_the_full_answer(variant):
    net, ids, at = make(VARIANTS[variant]), some_ids(), torch.tensor([[8, 0, 3], [1, 1, 7]])
    with torch.no_grad():
        full, some = net(ids), net(ids, at_NR=at)
        assert some.shape == (2, 3, 64)
        for n in range(2):
            for r in range(3):
                assert (some[n, r] - full[n, at[n, r]]).abs().max() < 1e-5
        h = net.features(ids)
        assert torch.allclose(net.head(h[:, 4]), full[:, 4], atol=1e-5)


@pytest.mark.parametrize("variant", ["llada", "llada grouped-query", "dream"])
def test_a_cache_renews_only_the_positions_asked_for(variant):
    """In one layer keys and values are those of the tokens alone: there, a cached pass is exact."""
    layers = "num_hidden_layers" if variant == "dream" else "n_layers"
    ids_NL, at_J = some_ids(length=12), torch.arange(4, 7)
    real_NL = torch.ones_like(ids_NL, dtype=torch.bool)
    real_NL[0, :3] = False
    inside, outside = ids_NL.clone(), ids_NL.clone()
    inside[:, 4:7], outside[:, 9] = 7, 7
    for depth in (1, 2):
        net = make(VARIANTS[variant] | {layers: depth})
        cache = [[] for _ in net.blocks]
        with torch.no_grad():
            full = net.features(ids_NL, real_NL)[:, 4:7]
            seen = lambda ids: net.features(ids, real_NL, at_J, cache)
            assert torch.equal(seen(ids_NL), full)
            assert torch.allclose(seen(ids_NL), full, atol=1e-5)
            assert torch.allclose(seen(outside), full, atol=1e-5)
            exact = net.features(inside, real_NL)[:, 4:7]
            assert torch.allclose(seen(inside), exact, atol=1e-5) == (depth == 1)
            assert not torch.allclose(full, exact, atol=1e-2)


@pytest.mark.parametrize("variant", ["llada", "dream"])
def test_bf16_weights_give_float32_logits_near_the_exact_ones(variant, tmp_path):
    exact = model.from_config(VARIANTS[variant])
    model.save(exact.to(torch.bfloat16), tmp_path)
    wide, narrow = model.load(tmp_path), model.load(tmp_path, dtype=torch.bfloat16)
    assert narrow.blocks[0].q.weight.dtype == torch.bfloat16
    with torch.no_grad():
        a, b = wide(some_ids()), narrow(some_ids())
    assert b.dtype == torch.float32
    assert 0 < (a - b).abs().max() < 0.05 * a.abs().max()


def test_rotary_angles_keep_float32_at_far_positions_in_bf16():
    cos, _ = model.rotary(torch.tensor([[2000, 2001]]), model.parse_config(LLADA))
    assert cos.dtype == torch.float32 and abs(cos[0, 0, 1, 0] - torch.tensor(2001.0).cos()) < 1e-5


def test_a_new_network_is_unsure_of_every_token():
    torch.manual_seed(0)
    net = model.from_config(LLADA | dict(n_layers=6))
    with torch.no_grad():
        logp = net(some_ids(rows=8)).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    assert entropy.mean() > 0.98 * torch.tensor(64.0).log()


@pytest.mark.parametrize("variant", ["llada", "dream"])
def test_checkpointing_changes_no_value_and_no_gradient(variant):
    grads = []
    for checkpointing in (False, True):
        net = make(VARIANTS[variant])
        net.checkpointing = checkpointing
        real = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9], dtype=torch.bool)
        net(some_ids(), real).logsumexp(-1).sum().backward()
        grads.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_saving_and_loading_gives_the_same_tensors_and_config(variant, tmp_path):
    net = make(VARIANTS[variant])
    model.save(net, tmp_path)
    again = model.load(tmp_path)
    assert again.config == net.config
    assert json.loads((tmp_path / "config.json").read_text()) == VARIANTS[variant]
    for (name, p), (other, q) in zip(net.named_parameters(), again.named_parameters()):
        assert name == other and torch.equal(p, q)
    names = load_file(tmp_path / "model.safetensors").keys()
    heads = {"lm_head.weight", "model.transformer.ff_out.weight"}
    assert ("tied" in variant) == (not names & heads)


def shard(folder: Path, n: int = 3) -> None:
    """Cut model.safetensors in n, as large models are published."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = [f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
    weight_map = {name: files[i % n] for i, name in enumerate(tensors)}
    for file in files:
        part = {name: t for name, t in tensors.items() if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=weight_map)))


def test_a_sharded_checkpoint_loads_like_a_single_file(tmp_path):
    net = make(LLADA)
    model.save(net, tmp_path)
    shard(tmp_path)
    with torch.no_grad():
        assert torch.equal(model.load(tmp_path)(some_ids()), net(some_ids()))


def test_a_loaded_network_does_not_live_in_its_file(tmp_path):
    model.save(make(LLADA), tmp_path)
    net = model.load(tmp_path)
    before = net.embed.weight.clone()
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as f:
        f.seek(-64 * 32 * 4 * 4, os.SEEK_END)
        f.write(b"\0" * 64 * 32 * 4 * 4)
    assert torch.equal(net.embed.weight, before)


def test_loading_needs_little_more_than_the_network_and_one_shard(tmp_path):
    raw = LLADA | dict(d_model=512, mlp_hidden_size=2048, n_layers=12, n_heads=8, n_kv_heads=8)
    model.save(model.from_config(raw), tmp_path)
    shard(tmp_path)
    total = sum(f.stat().st_size for f in tmp_path.glob("*.safetensors"))
    code = (
        "import resource, sys, torch, model\n"
        "model.load(sys.argv[2])\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak(); net = model.load(sys.argv[1]); print(peak() - before)"
    )
    small = tmp_path / "small"
    model.save(model.from_config(LLADA), small)
    root = Path(model.__file__).parent
    command = [sys.executable, "-c", code, str(tmp_path), str(small)]
    used = int(subprocess.run(command, cwd=root, capture_output=True, check=True, text=True).stdout)
    assert used < total * 4 / 3 + 30e6 < 2 * total, f"{used / 1e6:.0f} MB for {total / 1e6:.0f} MB"


def edit_config(**changes):
    def damage(folder):
        raw = json.loads((folder / "config.json").read_text()) | changes
        raw = {key: value for key, value in raw.items() if value != "absent"}
        (folder / "config.json").write_text(json.dumps(raw))

    return damage


def edit_tensors(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def cut_short(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def lose_a_shard(folder):
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()


WTE = "model.transformer.wte.weight"
DAMAGE = {
    "unknown architecture": (edit_config(model_type="gpt2"), ValueError, "gpt2"),
    "no architecture": (edit_config(model_type="absent"), ValueError, "config.json: model_type"),
    "missing size": (edit_config(d_model="absent"), ValueError, "'d_model' is missing"),
    "unserved feature": (edit_config(alibi=True), ValueError, "alibi True"),
    "unserved activation": (edit_config(activation_type="gelu"), ValueError, "'gelu'"),
    "no layers": (edit_config(n_layers=0), ValueError, "n_layers 0"),
    "not an object": (lambda f: (f / "config.json").write_text("[]"), ValueError, "not a JSON obj"),
    "two numbers of heads": (
        edit_config(multi_query_attention=True), ValueError, "n_kv_heads 4 and multi_query_att",
    ),
    "heads that do not divide": (edit_config(n_heads=5), ValueError, "5 heads"),
    "mask outside": (edit_config(mask_token_id="absent"), ValueError, "126336"),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), ValueError, "is not JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), FileNotFoundError, "config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "no model"),
    "cut short": (cut_short, ValueError, "cut short"),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), ValueError, "damaged"),
    "missing tensor": (edit_tensors(lambda t: t.pop(WTE)), ValueError, "1 tensors.*wte"),
    "extra tensor": (edit_tensors(lambda t: t.update(x=torch.ones(1))), ValueError, "tensor x "),
    "wrong shape": (
        edit_tensors(lambda t: t.update({WTE: t[WTE][:-1].clone()})), ValueError, r"\(63, 32\)",
    ),
    "missing shard": (lose_a_shard, FileNotFoundError, "model-00002-of-00003.safetensors is miss"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_folder_is_one_clear_line_that_names_the_file(damage, tmp_path):
    apply, error, words = DAMAGE[damage]
    model.save(make(LLADA), tmp_path)
    apply(tmp_path)
    with pytest.raises(error, match=words) as caught:
        model.load(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["no-such-owner/no-such-model", "runs/nowhere/checkpoints/latest"])
def test_a_model_that_is_not_to_be_had_says_what_to_put_where(path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=f"{path}.*config.json.*FOLDER") as caught:
        model.load(f"{path}@v1")
    assert "\n" not in str(caught.value)


def test_a_revision_that_is_not_to_be_had_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="from the hub at revision v1") as caught:
        model.find_folder("no-such-owner/no-such-model@v1")
    assert "https://huggingface.co/no-such-owner/no-such-model into" in str(caught.value)
    with pytest.raises(FileNotFoundError) as caught:
        model.find_folder("no-such-owner/no-such-model")
    assert "revision" not in str(caught.value) and "\n" not in str(caught.value)


# ---- LoRA ----------------------------------------------------------------------------------------


def with_adapter(net: model.Transformer, seed: int = 1) -> model.Transformer:
    """Seven adapters a block, none of them zero."""
    model.add_lora(net, r=3, alpha=6)
    generator = torch.Generator().manual_seed(seed)
    for lora in model.adapters(net).values():
        lora.lora_B.data.normal_(0, 0.3, generator=generator)
    return net


def saved_base(raw: dict, folder: Path) -> model.Transformer:
    model.save(make(raw), folder)
    return model.load(folder)


@pytest.mark.parametrize("family, raw", [("llada", LLADA), ("decoder", DREAM)])
def test_lora_adapts_the_seven_maps_of_each_block_and_not_the_head(family, raw):
    net = make(raw)
    plain = net(some_ids())
    model.add_lora(net, r=3, alpha=6)
    names = {model.published(name, family).split(".")[-1] for name in model.adapters(net)}
    assert names == set(SEVEN[family]) and len(model.adapters(net)) == 14
    assert isinstance(net.unembed, nn.Linear)
    assert torch.equal(net(some_ids()), plain), "B is zero at first"
    net(some_ids()).sum().backward()
    for name, p in net.named_parameters():
        assert p.requires_grad == ("lora" in name) == (p.grad is not None), name
        assert p.dtype == torch.float32
    with pytest.raises(ValueError, match="already"):
        model.add_lora(net, r=3, alpha=6)


def test_adapters_of_a_bf16_network_stay_float32_and_learn():
    net = with_adapter(make(LLADA, dtype=torch.bfloat16))
    net(some_ids()).logsumexp(-1).sum().backward()
    for lora in model.adapters(net).values():
        assert lora.lora_A.grad.dtype == torch.float32 and lora.lora_A.grad.abs().max() > 0


def test_as_reference_is_the_base_exactly_and_ends_even_after_an_error():
    base, net = make(LLADA), with_adapter(make(LLADA))
    with torch.no_grad():
        adapted = net(some_ids())
        assert not torch.allclose(adapted, base(some_ids()), atol=0.1)
        with pytest.raises(RuntimeError), model.as_reference(net):
            assert torch.equal(net(some_ids()), base(some_ids()))
            raise RuntimeError
        assert torch.equal(net(some_ids()), adapted)
    with pytest.raises(ValueError, match="no adapter"), model.as_reference(base):
        pass


def test_the_reference_between_forward_and_backward_disturbs_neither():
    grads = []
    for interrupted in (False, True):
        net = with_adapter(make(LLADA))
        net.checkpointing = True
        loss = net(some_ids()).logsumexp(-1).sum()
        if interrupted:
            with torch.no_grad(), model.as_reference(net):
                net(some_ids())
        loss.backward()
        grads.append([lora.lora_B.grad for lora in model.adapters(net).values()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_compiled_it_is_one_graph_with_adapters_and_one_without():
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    net = with_adapter(make(DREAM))
    ids, real = some_ids(), torch.ones(2, 9, dtype=torch.bool)
    with torch.no_grad():
        expected = net(ids, real)
        net.compile(backend=count, fullgraph=True)
        for _ in range(3):
            assert torch.allclose(net(ids, real), expected, atol=1e-5)
            with model.as_reference(net):
                assert not torch.allclose(net(ids, real), expected, atol=0.1)
    assert len(graphs) == 2
    assert not any("_orig_mod" in name for name in net.state_dict())


@pytest.mark.parametrize("family, raw", [("llada", LLADA), ("decoder", DREAM)])
def test_a_saved_adapter_loads_in_peft_with_the_same_outputs(family, raw, tmp_path):
    net = with_adapter(saved_base(raw, tmp_path / "base"))
    model.save(net, tmp_path / "adapter")
    twin = peft.PeftModel.from_pretrained(twin_of(tmp_path / "base"), tmp_path / "adapter")
    adapted = [n for n, m in twin.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(adapted) == 14
    with torch.no_grad():
        assert (net(some_ids()) - twin(some_ids())).abs().max() < 1e-4

    again = model.load(tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(some_ids()), net(some_ids()))
        base = model.load(model.adapter_base(tmp_path / "adapter"))
        assert not model.adapters(base)
        with model.as_reference(net):
            assert torch.equal(base(some_ids()), net(some_ids()))
    assert again.origin == net.origin == (str((tmp_path / "base").resolve()), None)


# the last list adapts LLaDA's head too, as PEFT matches names by their ending
PEFT_TARGETS = {
    "dream, all seven": (DREAM, SEVEN["decoder"]),
    "llada, Qwen's names, of which it has four": (LLADA, SEVEN["decoder"]),
    "llada, all seven": (LLADA, r".*\.blocks\.\d+\.\w+_(proj|out)"),
    "llada, one block": (LLADA, r".*\.blocks\.1\.ff_out"),
    "llada, all seven and the head": (LLADA, SEVEN["llada"]),
}


@pytest.mark.parametrize("case", PEFT_TARGETS)
@pytest.mark.filterwarnings("error:Found missing adapter keys:UserWarning")
def test_an_adapter_made_by_peft_loads_with_the_same_outputs_and_back(case, tmp_path):
    raw, targets = PEFT_TARGETS[case]
    saved_base(raw, tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=targets, init_lora_weights=False)
    twin = peft.get_peft_model(twin_of(tmp_path / "base"), config)
    twin.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    twin.save_pretrained(tmp_path / "adapter")
    net = model.load(tmp_path / "adapter")
    with torch.no_grad():
        expected = twin(some_ids())
        assert (net(some_ids()) - expected).abs().max() < 1e-4
        with model.as_reference(net):
            assert (net(some_ids()) - expected).abs().max() > 1e-2
        model.save(net, tmp_path / "again")
        twin = peft.PeftModel.from_pretrained(twin_of(tmp_path / "base"), tmp_path / "again")
        assert (twin(some_ids()) - expected).abs().max() < 1e-4
    model.merge_lora(net)
    model.save(net, tmp_path / "merged")
    assert (twin_of(tmp_path / "merged")(some_ids()) - expected).abs().max() < 1e-4


def test_full_weights_written_where_an_adapter_was_are_what_is_read(tmp_path):
    folder = toy_model(tmp_path / "base")
    net = model.load(folder, "cpu")
    model.add_lora(net, 2, 2)
    model.save(net, tmp_path / "out")
    assert model.adapter_rank(tmp_path / "out") == 2
    model.save(model.load(folder, "cpu"), tmp_path / "out")
    again = model.load(tmp_path / "out", "cpu")
    assert not model.adapters(again) and not model.adapter_rank(tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    assert file.stat().st_mode == file.with_name("config.json").stat().st_mode  # not ours alone


@pytest.mark.parametrize("content", ["{}", "no json", None])
def test_a_tokenizer_that_cannot_be_read_is_one_line_that_names_its_folder(tmp_path, content):
    folder = toy_model(tmp_path / "toy")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    if content:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError) as caught:
        model.load_tokenizer(folder)
    assert str(caught.value).startswith(f"{folder}: no tokenizer") and "\n" not in str(caught.value)


def test_a_chat_template_that_refuses_is_one_line(tmp_path):
    tokenizer = model.load_tokenizer(toy_model(tmp_path / "toy"))
    tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(ValueError, match="the chat template of .*toy: no system message"):
        model.chat_ids(["?"], tokenizer, system="Be brief.")


def test_a_bad_adapter_is_one_clear_line(tmp_path):
    net = with_adapter(saved_base(LLADA, tmp_path / "base"))
    folder = tmp_path / "adapter"
    model.save(net, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.transformer.blocks.0.q_proj.lora_B.weight"

    def check(words, changes=None, weights=tensors):
        (folder / "adapter_config.json").write_text(json.dumps(config | (changes or {})))
        save_file(weights, folder / "adapter_model.safetensors")
        with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
            model.load(folder)
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)

    check("base_model_name_or_path", dict(base_model_name_or_path=None))
    elsewhere = dict(base_model_name_or_path=str(tmp_path / "elsewhere"))
    check("adapter_config.json, base_model.*elsewhere", elsewhere)
    check("use_dora", dict(use_dora=True))
    check("r or lora_alpha", dict(r=None))
    check("shape", dict(r=5))
    check(f"{name} is missing", weights={k: t for k, t in tensors.items() if k != name})
    check("not an adapter", weights=tensors | {name.replace("q_proj", "z_proj"): torch.ones(1)})


# ---- quantised base ------------------------------------------------------------------------------


def test_a_quantised_base_is_small_and_near_and_trains(tmp_path):
    exact = model.from_config(LLADA | dict(d_model=128, mlp_hidden_size=256, include_bias=True))
    for name, p in exact.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p, 0, 0.1)
    model.save(exact, tmp_path / "base")
    shard(tmp_path / "base")
    net = model.load(tmp_path / "base", quantize="nf4")
    weights = [m.weight for block in net.blocks for _, m in model.linears(block)]
    count = sum(p.numel() for b in exact.blocks for p in b.parameters() if p.dim() == 2)
    assert 8 * sum(w.nbytes for w in weights) <= 4.6 * count
    assert net.unembed.weight.dtype == torch.float32, "the head is not quantised"
    with torch.no_grad():
        wanted, got = exact(some_ids()), net(some_ids())
        assert 0 < (got - wanted).norm() < 0.3 * wanted.norm()

    net = with_adapter(net)
    net.checkpointing = True
    loss = net(some_ids()).logsumexp(-1).sum()
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in net.parameters() if p.requires_grad)
    with torch.no_grad(), model.as_reference(net):
        assert torch.equal(net(some_ids()), got)
    with torch.no_grad():
        tuned = net(some_ids())
        assert torch.equal(net.eval()(some_ids()), tuned), "rollout and update are one function"

    model.save(net, tmp_path / "adapter")
    again = model.load(tmp_path / "adapter", quantize="nf4")
    with torch.no_grad():
        assert torch.equal(again(some_ids()), tuned)
    model.merge_lora(net)
    model.save(net, tmp_path / "merged")
    with torch.no_grad():
        assert (model.load(tmp_path / "merged")(some_ids()) - tuned).norm() < 0.03 * tuned.norm()


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_file_is_let_go_of_before_the_next_is_read(tmp_path, monkeypatch, quantize):
    model.save(make(LLADA), tmp_path)
    shard(tmp_path, 8)  # some of them end in a map that is quantised
    opened, mapped = model.opened, []

    def watched(file):
        mapped.append(".safetensors" in Path("/proc/self/maps").read_text())
        return opened(file)

    monkeypatch.setattr(model, "opened", watched)
    model.load(tmp_path, quantize=quantize)
    assert len(mapped) > 8 and not any(mapped)


def test_a_4_bit_weight_counts_in_full():
    made = [model.from_config(LLADA, quantize=kind) for kind in ("none", "nf4")]
    exact, packed = (sum(p.numel() for p in net.parameters()) for net in made)
    assert packed < exact
    assert [model.count(net)[0] for net in made] == [exact, exact]
    for net in made:
        model.add_lora(net, r=3, alpha=6)
    adapters = sum(p.numel() for n, p in made[1].named_parameters() if "lora" in n)
    assert [model.count(net) for net in made] == [(exact + adapters, adapters)] * 2


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_a_quantised_linear_is_its_dense_weight_forward_and_backward(dtype, error):
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    made = model.quantized(copy.deepcopy(linear).to(dtype), linear.weight.data, "cpu")
    x, out = torch.randn(2, 5, 64, requires_grad=True), torch.randn(2, 5, 32)
    y = made(x)
    y.backward(out)
    weight = model.dense(made)
    assert 0 < (weight - linear.weight).norm() < 0.1 * linear.weight.norm()
    for got, wanted in ((y, x @ weight.T + linear.bias), (x.grad, out @ weight)):
        assert (got - wanted).norm() < error * wanted.norm()


def test_a_row_through_a_quantised_linear_does_not_depend_on_an_outlier_beside_it():
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    made = model.quantized(linear, linear.weight.data, "cpu").eval()
    x = torch.randn(4, 64)
    x[0, 7] = 100.0
    assert (made(x)[1:] - made(x[1:])).norm() < 0.002 * made(x[1:]).norm()


def test_a_random_network_can_be_quantised_but_not_saved_whole(tmp_path):
    net = model.from_config(LLADA | dict(include_bias=True), quantize="nf4")
    assert net(some_ids()).isfinite().all()
    with pytest.raises(ValueError, match="quantised"):
        model.save(net, tmp_path)


def test_quantising_where_it_cannot_be_is_refused_before_anything_is_read(tmp_path):
    model.save(make(LLADA), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="nf4.*mps"):
        model.load(tmp_path, device="mps", quantize="nf4")
    with pytest.raises(ValueError, match="nf3"):
        model.load(tmp_path, quantize="nf3")
