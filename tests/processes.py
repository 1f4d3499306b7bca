"""Programs as tests start them, each a process of its own, and what a run leaves behind.

Importing torch and the rest takes five seconds of CPU, a small run less than one. So a server
imports once what all of them import, and is forked for each. A forked program is a real process:
it has a pid, arguments, an environment, an exit code, stdout and stderr of its own, takes signals
and can be killed. What it does not show is a start from nothing, with hashes of its own and
torchrun: `command` is what a user types.
"""

import atexit
import json
import multiprocessing
import os
import resource
import runpy
import subprocess
import sys
import tempfile
import threading
from multiprocessing import forkserver
from pathlib import Path

import torch
from safetensors.torch import load_file

import letters  # noqa: F401  the task of SMALL, for tests that call egspo.main

REPO = Path(__file__).parents[1]
LETTERS = REPO / "tests" / "letters.py"
SMALL = (
    "--task letters --C 12 --T 6 --block 12 --B 2 --G 2 --K 2 --micro 4 --no-compile --lr 1e-2 "
    "--eval-every 4 --save-every 2 --eval-n 4 --precision float32 --minibatches 1"
).split()


def command(*words, script: Path = LETTERS, ranks: int = 0) -> list[str]:
    """What a user types, for subprocess; torchrun's for some `ranks`."""
    start = [sys.executable]
    if ranks:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*start, str(script), *map(str, words)]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more


# ---- forked programs -----------------------------------------------------------------------------

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(  # what a run imports, its late imports too
    ["letters", "sft", "tyro", "typeguard", "torch._dynamo", "transformers.models.auto"]
)
PATIENCE = 300  # seconds; a program that hangs is killed then


def serve() -> None:
    """Start the server if there is none. It takes over our environment as it is now, and ends with
    this process."""
    ours = dict(os.environ)
    os.environ.update(environment(PYTHONPATH=f"{REPO}:{REPO / 'tests'}"))
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(ours)


class Forked:
    """`python script words`, running. `stdout` is read as it comes.

    file_size: the most bytes of a file that it can write, for the part of a full disk.
    """

    def __init__(self, script: Path, words, cwd=None, file_size: int | None = None, **variables):
        serve()
        self.args = [str(script), *map(str, words)]
        self.stderr = tempfile.NamedTemporaryFile("w+")  # no pipe: it would fill up unread
        reader, writer = SERVER.Pipe(duplex=False)
        surroundings = (environment(**variables), str(cwd or Path.cwd()), file_size)
        self.process = SERVER.Process(
            target=become, args=(self.args, *surroundings, writer, self.stderr.name), daemon=True
        )
        self.process.start()
        writer.close()
        self.pid, self.stdout = self.process.pid, open(os.dup(reader.fileno()))
        self.timer = threading.Timer(PATIENCE, self.process.kill)
        self.timer.start()

    def wait(self) -> subprocess.CompletedProcess:
        """Its end; stdout is what has not been read."""
        with self.stdout, self.stderr:
            told = self.stdout.read()
            self.process.join()
            self.timer.cancel()
            return subprocess.CompletedProcess(
                self.args, self.process.exitcode, told, self.stderr.read()
            )


def become(args, variables, folder, file_size, stdout, stderr) -> None:
    """In the forked process: be the program."""
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    os.dup2(stdout.fileno(), 1)
    stdout.close()
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_APPEND), 2)
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    sys.argv = args
    try:
        runpy.run_path(args[0], run_name="__main__")
    except Exception:
        sys.excepthook(*sys.exc_info())  # multiprocessing does not ask it
        raise SystemExit(1) from None
    finally:
        atexit._run_exitfuncs()  # which multiprocessing does not


def run(*words, script: Path = LETTERS, ranks: int = 0, **more) -> subprocess.CompletedProcess:
    """A program from its start to its end; of several `ranks`, what they told together."""
    if not ranks:
        return Forked(script, words, **more).wait()
    done = [rank.wait() for rank in start_ranks(*words, script=script, ranks=ranks, **more)]
    stdout, stderr = ("".join(getattr(one, name) for one in done) for name in ("stdout", "stderr"))
    code = next((one.returncode for one in done if one.returncode), 0)
    return subprocess.CompletedProcess(done[0].args, code, stdout, stderr)


def start_ranks(*words, ranks: int, script: Path = LETTERS, **more) -> list[Forked]:
    """One program a rank, with the environment and the store that torchrun would give them."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    group = dict(
        WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port),
        TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0",
    )  # fmt: skip
    started = [
        Forked(script, words, **more, **group, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(ranks)
    ]
    started[0].store = store  # lives as long as they do
    return started


def train(model: Path, out: Path, *words, **more) -> subprocess.CompletedProcess:
    """A small run that ends well."""
    done = run("--model", model, *SMALL, "--out", out, *words, **more)
    assert done.returncode == 0, done.stderr
    return done


# ---- what a run leaves behind --------------------------------------------------------------------


def events(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / "latest" / "model.safetensors")


def trainer(out: Path) -> dict:
    """The step and the optimizer's numbers, flat."""
    state = torch.load(out / "checkpoints" / "latest" / "trainer.pt", weights_only=True)
    moments = state["optimizer"]["state"]
    flat = {(i, name): x for i, each in moments.items() for name, x in each.items()}
    return flat | {"step": torch.tensor(state["step"])}


def same(a: dict, b: dict, atol: float = 0.0) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=0, atol=atol) for k in a)
