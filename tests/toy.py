"""A tiny random model in the published layout, with a tokenizer that spells everything in bytes."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import model

END, MASK, PAD = "<|end|>", "<|mask|>", "<|pad|>"
CONFIG = dict(
    model_type="llada", architectures=["LLaDAModelLM"], d_model=32, n_layers=2, n_heads=2,
    mlp_hidden_size=64, vocab_size=259, embedding_size=264, rope_theta=10000.0, rms_norm_eps=1e-5,
    weight_tying=False, eos_token_id=256, mask_token_id=257, pad_token_id=258,
)  # fmt: skip


def byte_tokenizer(mask: str = MASK, said: bool = True) -> PreTrainedTokenizerFast:
    """`said`: that this added token is the mask."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelling = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    spelling.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelling.decoder = decoders.ByteLevel()
    spelling.add_special_tokens([END, mask, PAD])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=spelling, eos_token=END, pad_token=PAD, mask_token=mask if said else None
    )
    tokenizer.chat_template = "{{ messages[0]['content'] + '\n' }}"
    return tokenizer


def toy_model(folder: Path, seed: int = 0, **changes) -> Path:
    """Write the model and its tokenizer; the weights are larger than usual so that rows differ."""
    torch.manual_seed(seed)
    net = model.from_config(CONFIG | changes)
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() > 1:
                p.mul_(5)
    folder.mkdir(parents=True, exist_ok=True)
    model.save(net, folder)
    defaults = {
        "lora_r": 0,
        "minibatches": 1,
        "checkpointing": False,
        "steps": 25,
        "max_grad_norm": 1.0,
        "beta": 0.01,
    }
    (folder / "defaults.json").write_text(json.dumps({"settings": defaults}))
    byte_tokenizer().save_pretrained(folder)
    return folder


def hasty(folder, **changes):
    """A toy model that often says the end, so that rows finish early and not together."""
    file = toy_model(folder, **changes) / "model.safetensors"
    tensors = load_file(file)
    for name in ("model.transformer.ff_out.weight", "model.transformer.wte.weight"):
        if name in tensors:
            tensors[name][256] *= 4
    save_file(tensors, file)
    return folder


def autoregressive(folder: Path, kind=LlamaConfig, idle="<|reserved_7|>", **changes) -> Path:
    """A random model as transformers saves it, and a tokenizer with one idle special token, or with
    `idle` END none. There are more rows than tokens."""
    sizes = dict(
        vocab_size=264, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_hidden_layers=2, intermediate_size=48, eos_token_id=256, pad_token_id=256,
    )  # fmt: skip
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(kind(**sizes | changes))
    made.save_pretrained(folder)
    byte_tokenizer(mask=idle, said=False).save_pretrained(folder)
    return folder
