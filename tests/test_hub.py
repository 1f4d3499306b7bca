"""The clients of the hub, as they are, against a server on the loopback address."""

import json
import os
import re
import subprocess
import sys

import pytest

import data
import model
from hub import Hub
from processes import REPO
from test_model import shard, with_adapter
from toy import toy_model

CARD = """---
configs:
- config_name: NAME
  data_files:
  - {split: train, path: main/train.jsonl}
  - {split: test, path: main/test.jsonl}
---
"""
# the client reads its settings once, when imported; and where a download breaks off it waits
# between five attempts, so that goes on beside the rest
SCRIPT = """
import concurrent.futures, contextlib, io, json, sys
import data, egspo, model
def fetch(name):
    try:
        model.find_folder(name) if "/" in name else data.read(name, None)
    except FileNotFoundError as error:
        return str(error)
commands, names = json.loads(sys.argv[1])
with concurrent.futures.ThreadPoolExecutor() as beside:
    said, told = beside.map(fetch, names), []
    for words in commands:
        sys.argv, out, err = ["egspo.py", *words], io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = egspo.main()
        told.append([code, out.getvalue(), err.getvalue()])
print(json.dumps([told, *said]))
"""
SMALL = "--task gsm8k --C 8 --T 4 --block 8 --K 2 --eval-n 4 --no-compile --out x".split()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model in three shards, an adapter on it without a tokenizer, and a data set."""
    tmp = tmp_path_factory.mktemp("hub")
    net = with_adapter(model.load(toy_model(tmp / "toy")))
    net.origin = "someone/toy", "v1"
    model.save(net, tmp / "adapter")
    shard(tmp / "toy")
    read = lambda folder: {file.name: file.read_bytes() for file in folder.iterdir()}
    rows = lambda n: "".join(
        json.dumps(dict(question=f"What is {i} and 1?", answer=f"#### {i + 1}")) + "\n"
        for i in range(n)
    )
    sets = {"main/train.jsonl": rows(300), "main/test.jsonl": rows(5)}
    return read(tmp / "toy"), read(tmp / "adapter"), {p: t.encode() for p, t in sets.items()}


def client(hub: Hub, folder, commands: list, names: list) -> list:
    """Exit code, output and errors of each command; then what is said of each name."""
    env = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "cache"), "PYTHONPATH": str(REPO),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0",
    }  # fmt: skip
    command = [sys.executable, "-c", SCRIPT, json.dumps([commands, names])]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_models_adapters_and_data_sets_come_from_the_hub_or_one_line_says_why_not(files, tmp_path):
    toy, adapter, rows = files
    sets = {name: data.SOURCES[name].hub.split("@") for name in data.SOURCES}
    card = lambda name: {"README.md": CARD.replace("NAME", name).encode()}
    at = lambda name: f"datasets/{sets[name][0]}"
    hub = Hub(
        {
            "models/someone/toy": {"v2": {"config.json": b"{}"}, "v1": toy},
            "models/someone/adapter": {"v1": adapter},
            "models/someone/cut": {"v1": toy},
            at("gsm8k_test"): {sets["gsm8k_test"][1]: rows | card("main")},
            at("math_train"): {sets["math_train"][1]: rows | card("default")},
            at("mbpp_test"): {"another": rows},
        },
        gated={"models/someone/gated": 403, "models/someone/locked": 401, at("math_test"): 403},
        broken=(
            "models/someone/cut/model-00002-of-00003.safetensors",
            f"{at('math_train')}/main/train.jsonl",
        ),
    )
    models = "toy@v1 toy toy@v9 gated locked nothing".split()
    commands = [["--model", f"someone/{name}", "--dry-run"] for name in models]
    commands.append(["--model", "someone/adapter", "--eval-only", *SMALL])
    names = ["someone/cut", "math_train", "math_test", "mbpp_test", "kodcode_train"]
    (fits, newer, *refused, evaluated), *said = client(hub, tmp_path, commands, names)

    assert fits[0] == 0 and "someone/toy@v1: 0.0 M parameters" in fits[1], fits[2]
    assert "model_type None is not llada" in newer[2], "main is another revision"
    told = json.loads((tmp_path / "x" / "test-gsm8k.json").read_text())
    assert re.fullmatch("someone/adapter@[0-9a-f]{40}", told[0]["model"]), "the state that was read"
    assert evaluated[0] == 0 and "4 test problems of gsm8k" in evaluated[1], evaluated[2]
    expected = [
        "--model someone/toy@v9: .*the hub has no revision v9 of it; put .*/someone/toy into",
        "--model someone/gated: .*gated on the hub: ask for access there",
        "--model someone/locked: .*gated on the hub: ask for access there",
        "--model someone/nothing: .*not on the hub, or private there",
        "--model someone/cut: .*could not be fetched from the hub .RemoteProtocolError",
        "MATH-lighteval .*closed connection.*: download its train split .* as math_train.jsonl",
        "MATH-500 .*gated dataset.*: download its test split .* as math500.jsonl",
        "mbpp .*Revision '4bb6404f.* doesn't exist.*--data-dir as mbpp_sanitized.jsonl",
        "KodCode-Light-RL-10K .*doesn't exist on the Hub.* as kodcode.jsonl",
    ]
    for words, line in zip(expected, [err for _, _, err in refused] + said, strict=True):
        assert re.search(words, line) and line.strip().count("\n") == 0, line
    assert [code for code, _, _ in refused] == [2, 2, 2, 2]
