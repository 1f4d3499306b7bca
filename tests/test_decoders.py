"""model.py on the layouts of Llama, Qwen2 and Qwen3 against transformers' own classes, which attend
to everything where a mask of ones in four dimensions says so; and what it refuses, and why."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

import model
from processes import run, train
from test_model import SEVEN, shard, shift, some_ids, with_adapter
from toy import byte_tokenizer

SIZES = dict(
    vocab_size=300, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    num_hidden_layers=2, intermediate_size=48, eos_token_id=51, pad_token_id=52,
    rope_parameters=dict(rope_type="default", rope_theta=5000.0),
)  # fmt: skip
LLAMA3 = dict(  # of the four pairs of a head of 8, one is kept, one blended, two are slowed down
    rope_type="llama3", rope_theta=5000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=96,
)  # fmt: skip
STOCK = {  # two queries share a key; the last three's heads are wider together than the network
    "llama": LlamaConfig(**SIZES, rms_norm_eps=1e-5),
    "llama tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama 3": LlamaConfig(**SIZES | dict(rope_parameters=LLAMA3)),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2 tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "llama biases": LlamaConfig(**SIZES | dict(head_dim=12), attention_bias=True, mlp_bias=True),
    "qwen3": Qwen3Config(**SIZES | dict(head_dim=16)),
    "qwen3 tied, biases": Qwen3Config(
        **SIZES | dict(head_dim=16), tie_word_embeddings=True, attention_bias=True
    ),
}


def edit(folder: Path, **fields) -> None:
    file = folder / "config.json"
    raw = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({key: value for key, value in raw.items() if value != "absent"}))


def stock(name: str, folder: Path, **fields):
    """One of transformers' networks, every tensor of it random, as transformers saves it, in a
    folder that says more than it knows: what the mask is."""
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(STOCK[name]).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    made.save_pretrained(folder)
    edit(folder, **dict(mask_token_id=50) | fields)
    return made


@torch.no_grad()
def whole(stocked, ids, real=None):
    """Its logits where every position sees every real one; positions count real tokens."""
    real = torch.ones_like(ids, dtype=torch.bool) if real is None else real
    seen = real[:, None, None, :].expand(-1, 1, ids.shape[1], -1)
    place = (real.cumsum(1) - 1).clamp(min=0)
    return stocked(input_ids=ids, attention_mask=seen, position_ids=place).logits


# ---- the forward pass ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", STOCK)
def test_logits_equal_those_of_transformers_where_all_is_seen(name, tmp_path):
    theirs, ids = stock(name, tmp_path), some_ids(rows=3)
    expected = whole(theirs, ids)
    assert (expected - theirs(input_ids=ids).logits).abs().max() > 0.1, "not what it does causally"
    with torch.no_grad():
        assert (model.load(tmp_path)(ids) - shift(expected)).abs().max() < 1e-5
        edit(tmp_path, shift_logits=False)
        assert (model.load(tmp_path)(ids) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen2 tied", "qwen3"])
@pytest.mark.parametrize("shifted", [False, True])
def test_padded_rows_equal_those_of_transformers(name, shifted, tmp_path):
    theirs, pad = stock(name, tmp_path, shift_logits=shifted), (0, 2, 5)
    ids, real = torch.full((3, 14), 7), torch.zeros(3, 14, dtype=torch.bool)
    for row, n in enumerate(pad):
        ids[row, n:], real[row, n:] = some_ids(1, 14 - n, seed=row)[0], True
    expected = whole(theirs, ids, real)
    with torch.no_grad():
        got = model.load(tmp_path)(ids, real)
    for row, n in enumerate(pad):
        wanted = expected[row : row + 1, n:]
        wanted = shift(wanted) if shifted else wanted
        assert (got[row, n:] - wanted[0]).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["llama biases", "qwen3"])
@pytest.mark.parametrize("shifted", [False, True])
def test_a_cached_pass_renews_the_positions_asked_for(name, shifted, tmp_path):
    stock(name, tmp_path, shift_logits=shifted)
    net, ids, at_J = model.load(tmp_path), some_ids(length=12), torch.arange(4, 7)
    cache = [[] for _ in net.blocks]
    with torch.no_grad():
        full = net.features(ids)[:, 4:7]
        assert torch.equal(net.features(ids, None, at_J, cache), full)
        assert torch.allclose(net.features(ids, None, at_J, cache), full, atol=1e-5)


@pytest.mark.parametrize(
    "published, kind, parameters",
    [
        (
            dict(hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, head_dim=128,
                 num_key_value_heads=8, intermediate_size=3072, vocab_size=151936),
            Qwen3Config, 596_049_920,  # Qwen3-0.6B
        ),
        (
            dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14,
                 num_key_value_heads=2, intermediate_size=4864, vocab_size=151936),
            Qwen2Config, 494_032_768,  # Qwen2.5-Coder-0.5B
        ),
        (
            dict(hidden_size=576, num_hidden_layers=30, num_attention_heads=9,
                 num_key_value_heads=3, intermediate_size=1536, vocab_size=49152),
            LlamaConfig, 134_515_008,  # SmolLM2-135M
        ),
    ],
)  # fmt: skip
def test_tensors_are_those_of_transformers_at_published_sizes(published, kind, parameters):
    c = kind(**published, tie_word_embeddings=True, eos_token_id=2, mask_token_id=4)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(c)
    net = model.from_config(c.to_dict(), "meta")
    ours = {model.published(n, net.config.family): p.shape for n, p in net.named_parameters()}
    assert ours == {name: p.shape for name, p in theirs.named_parameters()}
    assert model.count(net)[0] == parameters


# ---- config.json ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, shifted", [
    ("Dream", True), ("qwen2", True), ("qwen3", True), ("llama", True), ("llada", False),
    ("a2d-qwen2", False), ("a2d-qwen3", False), ("a2d-llama", False),
])  # fmt: skip
def test_what_kept_its_name_kept_its_shift_unless_the_config_says_otherwise(kind, shifted):
    raw = STOCK["qwen2"].to_dict() | dict(model_type=kind, mask_token_id=50)
    raw |= dict(d_model=32, n_heads=4, n_layers=2, mlp_hidden_size=48, rope_theta=1e4)
    assert model.parse_config(raw).shifted == shifted
    assert model.parse_config(raw | dict(shift_logits=not shifted)).shifted != shifted
    with pytest.raises(ValueError, match="shift_logits 1 is neither true nor false"):
        model.parse_config(raw | dict(shift_logits=1))


def test_the_base_of_the_rotation_stands_in_either_place():
    raw = STOCK["qwen2"].to_dict() | dict(mask_token_id=50)
    assert model.parse_config(raw).rope_theta == 5000
    older = raw | dict(rope_parameters=None, rope_scaling=None)
    assert model.parse_config(older | dict(rope_theta=1e6)).rope_theta == 1e6
    with pytest.raises(ValueError, match="rope_theta"):
        model.parse_config(older)


WINDOW = dict(use_sliding_window=False, sliding_window=64, layer_types=["full_attention"] * 2)
REFUSED = {
    "LLaDA-MoE": (dict(model_type="llada", num_experts=64), "num_experts 64 is not supported"),
    "LLaDA2.x": (dict(model_type="llada2_moe"), "'llada2_moe' is not served: it has experts, and"),
    "SDAR": (dict(model_type="sdar"), "'sdar' is not served: its attention is causal from block"),
    "Fast-dLLM": (dict(model_type="Fast_dLLM_Qwen"), "'Fast_dLLM_Qwen' is not served: its att"),
    "DiffusionGemma": (dict(model_type="diffusion_gemma"), "not served: it has no mask token"),
    "another": (dict(model_type="gpt2"), "'gpt2' is not llada, Dream, qwen2, qwen3, llama or a2d"),
    "llama3 scaling without its factors": (
        dict(rope_parameters=dict(rope_type="llama3", rope_theta=5e5, factor=8.0)),
        "'low_freq_factor' is missing",
    ),
    "longrope": (
        dict(rope_parameters=dict(rope_type="longrope", rope_theta=5e5, factor=8.0)),
        "rope_type 'longrope' is not supported, only 'default'",
    ),
    "older scaling": (dict(rope_parameters=None, rope_scaling=dict(type="yarn")), "rope_type 'yar"),
    "windows": (WINDOW | dict(use_sliding_window=True), "use_sliding_window True"),
    "some windows": (
        dict(layer_types=["full_attention", "sliding_attention"]),
        "layer_types 'sliding_attention' is not supported, only 'full_attention'",
    ),
    "autoregressive": (
        dict(mask_token_id="absent"),
        "no mask_token_id.*autoregressive model must first be adapted.*sft.py",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused_in_one_line_that_says_why(name, tmp_path):
    fields, words = REFUSED[name]
    stock("qwen2", tmp_path, **WINDOW)
    model.load(tmp_path)
    edit(tmp_path, **fields)
    with pytest.raises(ValueError, match=words) as caught:
        model.load(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("folder", [
    "Qwen3-0.6B-diffusion-bd3lm-v0.1",
    "models--dllm-hub--Qwen3-0.6B-diffusion-bd3lm-v0.1/snapshots/0123456789abcdef",
])  # fmt: skip
def test_block_diffusion_whose_config_is_no_different_is_known_by_its_name(folder, tmp_path):
    stock("qwen3", tmp_path / folder, model_type="a2d-qwen3")
    with pytest.raises(ValueError, match="bd3lm-v0.1: block diffusion.*is not served.*causal from"):
        model.load(tmp_path / folder)


# ---- tokenizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["<|mask|>", "[MASK]", "<|MASK|>", "<whatever>"])
def test_the_tokenizer_says_what_the_mask_is_where_the_config_does_not(mask, tmp_path):
    stock("qwen3", tmp_path, model_type="a2d-qwen3", mask_token_id="absent")
    byte_tokenizer(mask, said=mask == "<whatever>").save_pretrained(tmp_path)
    assert (model.load_tokenizer(tmp_path).mask_token == mask) == (mask == "<whatever>")
    net = model.load(tmp_path)
    assert net.config.mask_id == 257 and net.never_V[257]
    model.save(net, tmp_path / "again")  # without a tokenizer beside it
    assert model.load(tmp_path / "again").config == net.config
    byte_tokenizer("<whatever>", said=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must first be adapted"):
        model.load(tmp_path)


def test_a_template_that_can_think_is_told_not_to():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{{ messages[0]['content'] }}{% if enable_thinking is defined and enable_thinking is false"
        " %}<think>\n\n</think>\n\n{% endif %}"  # as Qwen3's template does it
    )
    ids = model.chat_ids(["hi"], tokenizer, answer="so")[0]
    assert tokenizer.decode(ids) == "hi<think>\n\n</think>\n\nso"


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STOCK)
def test_a_saved_network_is_the_published_one_bit_for_bit_and_loads_there(name, tmp_path):
    theirs = stock(name, tmp_path / "published", shift_logits=False)
    net = model.load(tmp_path / "published")
    model.save(net, tmp_path / "again")
    weights = lambda at: load_file(tmp_path / at / "model.safetensors")
    before, after = weights("published"), weights("again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    read = lambda at: json.loads((tmp_path / at / "config.json").read_text())
    assert read("again") == read("published")
    again = type(theirs).from_pretrained(tmp_path / "again")
    assert torch.equal(whole(again, some_ids()), whole(theirs, some_ids()))


def test_a_head_stored_although_tied_must_be_the_embedding(tmp_path):
    stock("qwen3 tied, biases", tmp_path)
    with torch.no_grad():
        expected = model.load(tmp_path)(some_ids())
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    for how in (lambda folder: None, shard):
        save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
        how(tmp_path)
        with torch.no_grad():
            assert torch.equal(model.load(tmp_path)(some_ids()), expected)
    head[3, 3] += 1
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is not the embedding, but tied to it") as caught:
        model.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    del tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="1 tensors are missing, first model.embed_tokens.weight"):
        model.load(tmp_path)


# ---- LoRA ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error:Found missing adapter keys:UserWarning")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning")  # PEFT's use
@pytest.mark.parametrize("name", ["llama biases", "qwen2 tied", "qwen3"])
def test_adapters_mean_the_same_in_peft_and_here(name, tmp_path):
    stock(name, tmp_path / "base", shift_logits=False)
    bare = lambda: transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    net = with_adapter(model.load(tmp_path / "base"))
    model.save(net, tmp_path / "ours")
    with torch.no_grad():
        twin = peft.PeftModel.from_pretrained(bare(), tmp_path / "ours")
        assert (whole(twin, some_ids()) - net(some_ids())).abs().max() < 1e-5
        assert len([n for n, _ in twin.named_parameters() if "lora_A" in n]) == 14

    for targets in (SEVEN["decoder"], r".*layers\.1\.(self_attn\.q_proj|mlp\.down_proj)"):
        config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=targets, init_lora_weights=False)
        twin = peft.get_peft_model(bare(), config)
        twin.save_pretrained(tmp_path / "theirs")
        expected = whole(twin, some_ids())
        net = model.load(tmp_path / "theirs")
        with torch.no_grad():
            assert (net(some_ids()) - expected).abs().max() < 1e-5
        model.save(net, tmp_path / "back")  # PEFT must find no more maps than were adapted
        back = peft.PeftModel.from_pretrained(bare(), tmp_path / "back")
        assert (whole(back, some_ids()) - expected).abs().max() < 1e-5
        model.merge_lora(net)
        model.save(net, tmp_path / "merged")
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert (whole(merged.eval(), some_ids()) - expected).abs().max() < 1e-5


# ---- a run ---------------------------------------------------------------------------------------


def test_a_qwen3_trains_an_adapter_on_4_bits_and_is_merged_into_its_own_layout(tmp_path):
    stock("qwen3", tmp_path / "base", mask_token_id="absent", eos_token_id=256, pad_token_id=258)
    byte_tokenizer().save_pretrained(tmp_path / "base")
    lora = ["--lora-r", 4, "--quantize", "nf4"]
    done = run("--model", tmp_path / "base", "--dry-run", *lora)
    assert done.returncode == 0 and "0.0 M parameters" in done.stdout, done.stderr
    train(tmp_path / "base", tmp_path / "run", *lora, "--steps", 1)
    checkpoint = tmp_path / "run" / "checkpoints" / "latest"
    done = run("--model", checkpoint, "--merge", "--out", tmp_path / "full")
    assert done.returncode == 0, done.stderr
    merged = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path / "full").eval()
    net = model.load(checkpoint)
    assert net.config.mask_id == 257 and net.config.shifted
    with torch.no_grad():
        assert (net(some_ids()) - shift(whole(merged, some_ids()))).abs().max() < 1e-4
