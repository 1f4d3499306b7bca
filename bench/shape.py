"""Does a step of a real shape take of a CPU's memory what `--dry-run` says, and what does loading?

    python bench/shape.py [--family llada|dream] [--layers N] [--write]

Writes a random model in the published layout (config.json and the shards of the published index:
16 GB of disk for 8B) and runs one step of nf4 through egspo.py, without compiling. Prints the
planned peak, the measured one and that of loading, in GB; --write appends them to
bench/throughput.jsonl.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

import torch
from safetensors.torch import save_file

import egspo
import model
import plan
import run as running
from config import parse
from toy import byte_tokenizer

PUBLISHED = {"llada": "llada-8b-instruct", "dream": "dream-7b-instruct"}
STEP = (  # little of it: without AVX512-BF16 a CPU needs minutes for a pass of the whole shape
    "--task countdown --train-set generated --quantize nf4 --optimizer adamw8bit --steps 1 "
    "--eval-n 2 --no-test --no-compile --B 1 --G 2 --C 4 --T 2 --block 4 --K 1 --micro 2 "
    "--minibatches 1 --lam 0 --beta 0 --P 48"
)


def write(folder: Path, family: str, layers: int) -> None:
    """config.json, tokenizer and shards; of fewer layers, what the published index has of them."""
    published = REPO / "tests" / "fixtures" / PUBLISHED[family]
    raw = json.loads((published / "config.json").read_text())
    name = "n_layers" if family == "llada" else "num_hidden_layers"
    raw[name] = layers or raw[name]
    (folder / "config.json").write_text(json.dumps(raw))
    byte_tokenizer().save_pretrained(folder)
    net = model.skeleton(model.parse_config(raw), torch.bfloat16)
    index = json.loads((published / "model.safetensors.index.json").read_text())
    shards = defaultdict(dict)
    for ours, p in net.named_parameters():
        theirs = model.published(ours, net.config.family)
        shards[index["weight_map"][theirs]][theirs] = p
    index["weight_map"] = {theirs: file for file, shard in shards.items() for theirs in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, shard in shards.items():
        weights = {name: torch.randn(p.shape, dtype=p.dtype) * 0.02 for name, p in shard.items()}
        save_file(weights, folder / file, metadata={"format": "pt"})


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def step() -> None:
    """In a process of its own: the run, and its peaks after loading and at the end."""
    load = model.load

    def watched(*args, **kwargs):
        net = load(*args, **kwargs)
        print(f"loaded {peak()}", flush=True)
        return net

    model.load = watched
    sys.argv[:2] = ["egspo.py"]
    code = egspo.main()
    print(f"ended {peak()}")
    sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=PUBLISHED, default="llada")
    parser.add_argument("--layers", type=int, default=0, help="fewer than published, to try it")
    parser.add_argument("--write", action="store_true", help="append to bench/throughput.jsonl")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "model")
        folder.mkdir()
        write(folder, args.family, args.layers)
        asked, out = Path(place, "prompt.txt"), Path(place, "run")
        asked.write_text("[user]\n{question}\n")
        words = f"{STEP} --model {folder} --out {out} --prompt {asked}".split()
        cfg, _ = parse(words)
        bf16 = running.use_bf16(cfg.precision, torch.device("cpu"))
        planned = plan.plan(cfg, bf16, device="cpu")
        done = subprocess.run(
            [sys.executable, __file__, "step", *words], stdout=subprocess.PIPE, text=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
        if done.returncode:
            sys.exit(done.stdout + f"egspo.py ended with {done.returncode}")
    lines = done.stdout.splitlines()
    loaded, ended = (
        float(next(line.split()[1] for line in lines if line.startswith(word)))
        for word in ("loaded ", "ended ")
    )
    figures = dict(planned_gb=planned.peak / 1e9, measured_gb=ended, loading_gb=loaded)
    figures = {name: round(value, 2) for name, value in figures.items()}
    shape = dict(part="shape", family=args.family, layers=args.layers or "all")
    line = json.dumps(shape | figures | dict(planned_moment=planned.worst))
    print(line)
    if args.write:
        with open(REPO / "bench" / "throughput.jsonl", "a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    step() if sys.argv[1:2] == ["step"] else main()
