"""Did this untrusted program pass these tests?"""

from __future__ import annotations

import builtins
import ctypes
import fcntl
import gc
import importlib
import json
import math
import operator
import os
import queue
import random
import re
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

MAX_CODE = 256 << 10  # characters of a program
MAX_FRAME = 8 << 20  # bytes of a message between any two of the processes
MAX_WHY = 300  # characters of a verdict's reason


# ---- messages ------------------------------------------------------------------------------------
# Four bytes of length, then JSON. Never pickle: a pickled reply runs code in whoever reads it.


def send(fd: int, message: object) -> None:
    data = json.dumps(message).encode()
    if len(data) > MAX_FRAME:
        raise OverflowError(f"a message of {len(data)} bytes; at most {MAX_FRAME} pass")
    data = memoryview(struct.pack("<I", len(data)) + data)
    while data:
        data = data[os.write(fd, data) :]


def receive(fd: int) -> object:
    def exactly(size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            chunk = os.read(fd, min(size - len(data), 1 << 20))
            if not chunk:
                raise EOFError("the other side is gone")
            data += chunk
        return bytes(data)

    (size,) = struct.unpack("<I", exactly(4))
    if size > MAX_FRAME:
        raise OverflowError(f"a message of {size} bytes; at most {MAX_FRAME} pass")
    return json.loads(exactly(size))


def encode(x: object, other: Callable) -> object:
    """Plain data as JSON, each non-JSON type under a one-letter tag; `other(x)` encodes the rest.
    A subclass becomes its base class, so its methods stay behind."""
    if x is None or isinstance(x, bool):
        return x
    if isinstance(x, int):
        return int(x) if abs(x) < 1 << 53 else {"i": hex(x)}
    if isinstance(x, float):
        return float(x)
    if isinstance(x, str):
        return str.__str__(x)
    if isinstance(x, complex):
        return {"c": [x.real, x.imag]}
    if isinstance(x, bytes):
        return {"b": x.hex()}
    if isinstance(x, list):
        return [encode(v, other) for v in x]
    if isinstance(x, dict):
        return {"d": [[encode(k, other), encode(v, other)] for k, v in x.items()]}
    for tag, kind in ("t", tuple), ("s", set), ("f", frozenset):
        if isinstance(x, kind):
            return {tag: [encode(v, other) for v in x]}
    for tag, kind in ("r", range), ("l", slice):
        if isinstance(x, kind):
            return {tag: [encode(v, other) for v in (x.start, x.stop, x.step)]}
    return other(x)


def decode(j: object, handle: Callable) -> object:
    """The exact built-in objects that `encode` wrote; `handle(n)` gives object number n."""
    if isinstance(j, list):
        return [decode(v, handle) for v in j]
    if not isinstance(j, dict):
        return j
    ((tag, v),) = j.items()
    if tag == "h":
        return handle(v)
    if tag == "i":
        return int(v, 16)
    if tag == "b":
        return bytes.fromhex(v)
    if tag == "d":
        return {decode(k, handle): decode(w, handle) for k, w in v}
    return DECODE[tag]([decode(w, handle) for w in v])


DECODE = {
    "t": tuple,
    "s": set,
    "f": frozenset,
    "n": iter,
    "c": lambda v: complex(*v),
    "r": lambda v: range(*v),
    "l": lambda v: slice(*v),
}


# ---- worker: holds the program -------------------------------------------------------------------

OPERATIONS = {
    "call": lambda f, args, kwargs: f(*args, **kwargs),
    "get": getattr,
    "set": setattr,
    "item": operator.getitem,
    "put": operator.setitem,
    "iter": iter,
    "next": next,
    "len": len,
    "str": str,
    "repr": repr,
    "bool": bool,
}


def work(link: int) -> None:
    """Run the program as module `solution` and answer questions about it until the link closes.
    Nothing here is trusted: the program can rewrite all of it, and then answer as it likes."""
    solution = sys.modules["solution"] = types.ModuleType("solution")
    objects, numbers = [solution], {id(solution): 0}

    def other(x: object) -> dict:
        if id(x) not in numbers:
            numbers[id(x)] = len(objects)
            objects.append(x)
        return {"h": numbers[id(x)]}

    def handle(n: int | str) -> object:
        return getattr(builtins, n) if isinstance(n, str) else objects[n]

    def run(code: str) -> None:
        exec(compile(code, "solution.py", "exec"), solution.__dict__)

    operations = OPERATIONS | {"run": run}
    while True:
        operation, args = receive(link)
        try:
            reply = ["value", encode(operations[operation](*decode(args, handle)), other)]
            send(link, reply)
        except BaseException as e:  # whatever the program raises is an answer, SystemExit included
            kind = next(c for c in type(e).__mro__ if c.__module__ == "builtins")
            text = e.args[0] if len(e.args) == 1 and isinstance(e.args[0], str) else str(e)
            send(link, ["error", [kind.__name__, text[:1000]]])


# ---- judge: holds the tests ----------------------------------------------------------------------


class Program:
    """The judge's link to the worker; once `dead`, no test can pass any more."""

    def __init__(self, link: int) -> None:
        self.link, self.dead, self.standins = link, "", {}

    def ask(self, operation: str, *args: object) -> object:
        args = [encode(a, self.other) for a in args]
        try:
            if self.dead:
                raise EOFError(self.dead)
            send(self.link, [operation, args])
            kind, value = receive(self.link)
            value = decode(value, self.standin)
            if kind == "error":
                value = as_exception(*value, stop=operation == "next")
            elif kind != "value":
                raise ValueError("neither a value nor an error")
        except Exception as e:  # dead, or talking nonsense: either way it has failed for good
            self.dead = self.dead or f"the program is gone ({type(e).__name__})"
            raise RuntimeError(self.dead) from None
        if kind == "error":
            raise value
        return value

    def standin(self, n: int) -> Standin:
        if type(n) is not int:
            raise ValueError("a handle is a number")
        if n not in self.standins:
            self.standins[n] = Standin(self, n)
        return self.standins[n]

    def other(self, x: object) -> dict:
        if type(x) is Standin:
            return {"h": object.__getattribute__(x, "_n")}
        if getattr(builtins, getattr(x, "__name__", ""), None) is x:  # int, len, ValueError, ...
            return {"h": x.__name__}
        if hasattr(x, "__next__"):
            return {"n": [encode(v, self.other) for v in x]}
        raise TypeError(f"a test cannot hand the program a {type(x).__name__}")


def as_exception(name: str, text: str, stop: bool) -> Exception:
    """A built-in exception. StopIteration only where it is asked for: out of f it would end
    `map(f, ...)` early, and with it the test's loop."""
    kind = vars(builtins).get(name)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        kind, text = RuntimeError, f"{name}: {text}"
    if kind is StopIteration and not stop:
        kind = RuntimeError
    for kind in kind.__mro__:
        try:
            return kind(str(text))
        except TypeError:  # UnicodeDecodeError and the like want five arguments
            pass


class Standin:
    """An object of the program as the tests see it. It is never compared (`==` is identity) and
    takes no part in arithmetic: an object that answers those itself passes any test."""

    __slots__ = ("_program", "_n")

    def __init__(self, program: Program, n: int) -> None:
        object.__setattr__(self, "_program", program)
        object.__setattr__(self, "_n", n)

    def __call__(self, *args, **kwargs):
        return self._program.ask("call", self, args, kwargs)

    def __getattr__(self, name):
        if name.startswith("__"):  # protocols such as copy's look these up behind the test's back
            raise AttributeError(name)
        return self._program.ask("get", self, name)

    def __setattr__(self, name, value):
        self._program.ask("set", self, name, value)

    def __getitem__(self, key):
        return self._program.ask("item", self, key)

    def __setitem__(self, key, value):
        self._program.ask("put", self, key, value)

    def __iter__(self):
        return self._program.ask("iter", self)

    def __next__(self):
        return self._program.ask("next", self)

    def __len__(self):
        return self._program.ask("len", self)

    def __str__(self):
        return self._program.ask("str", self)

    def __repr__(self):
        return self._program.ask("repr", self)

    def __bool__(self):
        return self._program.ask("bool", self)


def judge(link: int, pulse: int, trainer: int) -> None:
    """Read the job and write one digit a test, then the reason of the first failure."""
    job = receive(trainer)
    os.write(pulse, b"r")
    program = Program(link)
    space = {"__name__": "tests"}

    def passes(step: str, do: Callable, *args: object) -> bool:
        nonlocal why
        try:
            do(*args)
            reason = program.dead
        except BaseException as e:  # a test may raise anything; not to raise is to pass
            reason = program.dead or f"{type(e).__name__}: {e}"
        if reason and not why:
            why = f"{step}: {reason}"
        return not reason

    def execute(code: str) -> None:
        exec(compile(code, "tests.py", "exec"), space)

    def bind() -> None:
        module = sys.modules["solution"] = types.ModuleType("solution")
        for name in job["names"]:
            space.pop(name, None)  # a stub from the prompt must not stand in for the program
            try:
                space[name] = program.ask("get", program.standin(0), name)
            except AttributeError:
                continue
            setattr(module, name, space[name])

    why = ""
    if (
        passes("before", execute, job["before"])
        and passes("program", program.ask, "run", job["code"])
        and passes("names", bind)
        and passes("setup", execute, job["setup"])
    ):
        for i, test in enumerate(job["tests"]):
            os.write(trainer, b"1" if passes(f"test {i}", execute, test) else b"0")
    os.write(trainer, b" " + printable(why).encode())


def printable(text: str) -> str:
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text[:MAX_WHY])


# ---- locks ---------------------------------------------------------------------------------------
# Each is tried on its own; one that is not to be had is named in every verdict.

SYSCALLS = """
read 0 63, write 1 64, close 3 57, lseek 8 62, mmap 9 222, mprotect 10 226, munmap 11 215, brk 12 214,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, sched_yield 24 124, mremap 25 216,
madvise 28 233, nanosleep 35 101, getpid 39 172, exit 60 93, gettimeofday 96 169, getrusage 98 165,
times 100 153, getuid 102 174, geteuid 107 175, getppid 110 173, sigaltstack 131 132, gettid 186 178,
futex 202 98, restart_syscall 219 128, clock_gettime 228 113, clock_getres 229 114,
clock_nanosleep 230 115, exit_group 231 94, getrandom 318 278
"""  # name, number on x86-64, number on aarch64
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH_*


def libc(name: str, *args: object) -> int:
    result = getattr(ctypes.CDLL(None, use_errno=True), name)(*args)
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


def prctl(option: int, *args: object) -> None:
    libc("prctl", option, *(list(args) + [0] * (4 - len(args))))


def drop_user(cfg: dict) -> None:
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def drop_capabilities(cfg: dict) -> None:
    libc("capset", struct.pack("<Ii", 0x20080522, 0), bytes(24))


def forbid_new_privileges(cfg: dict) -> None:
    prctl(38, 1)  # PR_SET_NO_NEW_PRIVS


def hide_memory(cfg: dict) -> None:
    prctl(4, 0)  # PR_SET_DUMPABLE: no ptrace, no /proc/PID/mem, no /proc/PID/fd


def limit_resources(cfg: dict) -> None:
    limits = {"CPU": max(1, math.ceil(cfg["cpu_s"])), "CORE": 0, "FSIZE": 0, "NOFILE": 8, "NPROC": 0}
    for name, value in (limits | {"AS": 1 << 30}).items():
        which = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))


def landlock(cfg: dict) -> None:
    """An empty rule set: no file opened, no TCP, and from ABI 6 no signal to a process outside."""
    abi = libc("syscall", 444, None, 0, 1)
    files = 0x1FFF | (abi >= 2) << 13 | (abi >= 3) << 14 | (abi >= 5) << 15
    rules = struct.pack("<QQQ", files, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = libc("syscall", 444, rules, len(rules), 0)
    try:
        libc("syscall", 446, ruleset, 0)
    finally:
        os.close(ruleset)


def seccomp(cfg: dict) -> None:
    """Only SYSCALLS; any other call fails with EPERM, one of another architecture kills."""
    column, architecture = ARCHITECTURES[os.uname().machine]
    numbers = [int(line.split()[1 + column]) for line in SYSCALLS.split(",")]
    load, equal, give = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, 0x80000000), (load, 0, 0, 0)]
    code += [(equal, len(numbers) - i, 0, n) for i, n in enumerate(numbers)]
    code += [(give, 0, 0, 0x00050000 | 1), (give, 0, 0, 0x7FFF0000)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in code))
    prctl(22, 2, struct.pack("<HxxxxxxQ", len(code), ctypes.addressof(program)))


ZYGOTE_LOCKS = {
    "setuid": drop_user,
    "capabilities": drop_capabilities,
    "no_new_privs": forbid_new_privileges,
    "non_dumpable": hide_memory,
}
CHILD_LOCKS = {"rlimits": limit_resources, "landlock": landlock, "seccomp": seccomp}


def close_locks(locks: dict[str, Callable], cfg: dict) -> list[str]:
    missing = []
    for name, close in locks.items():
        try:
            if name in cfg["off"]:
                raise OSError("turned off")
            close(cfg)
        except (OSError, ValueError, AttributeError, KeyError):
            missing.append(name)
    return missing


# ---- zygote: forks a worker and a judge for each job ---------------------------------------------

MODULES = """
abc argparse array ast base64 bisect calendar cmath codecs collections collections.abc contextlib
copy csv ctypes dataclasses datetime decimal difflib enum fnmatch fractions functools hashlib heapq
html inspect io ipaddress itertools json keyword locale logging math numbers operator os.path pprint
queue random re secrets socket statistics string struct subprocess sys tempfile textwrap threading
time timeit tokenize traceback types typing unicodedata unittest uuid warnings zlib _strptime
encodings.ascii encodings.latin_1 encodings.utf_16 encodings.utf_32 encodings.idna
"""


def zygote(cfg: dict) -> None:
    for name in MODULES.split():
        importlib.import_module(name)
    time.localtime()
    null = os.open(os.devnull, os.O_RDWR)
    missing = close_locks(ZYGOTE_LOCKS, cfg)
    trainer = socket.socket(fileno=0)

    def fork(task: Callable, *keep: int) -> int:
        """A locked child with the descriptors `keep` as 3, 4, ... and no others."""
        pid = os.fork()
        if pid:
            return pid
        try:
            high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 64) for fd in keep]
            for fd, source in enumerate([null] * 3 + high):
                os.dup2(source, fd)
            os.closerange(3 + len(keep), 256)
            random.seed()  # a sibling must not foresee the other's random numbers
            task(*range(3, 3 + len(keep)))
        finally:
            os._exit(99)

    def probe() -> None:
        lacking = close_locks(CHILD_LOCKS, cfg)
        os._exit(sum(1 << i for i, name in enumerate(CHILD_LOCKS) if name in lacking))

    status = os.waitstatus_to_exitcode(os.waitpid(fork(probe), 0)[1])
    lacking = [name for i, name in enumerate(CHILD_LOCKS) if status < 0 or status >> i & 1]

    def locked(task: Callable) -> Callable:
        def start(*fds: int) -> None:
            if close_locks(CHILD_LOCKS, cfg) == lacking:
                task(*fds)

        return start

    gc.freeze()
    os.write(1, json.dumps(missing + lacking).encode() + b"\n")
    while trainer.recv(1, socket.MSG_PEEK):
        ours, theirs = socket.socketpair()
        alive, pulse = os.pipe()
        children = [fork(locked(work), theirs.fileno())]
        children += [fork(locked(judge), ours.fileno(), pulse, 0)]
        ours.close()
        theirs.close()
        os.close(pulse)
        read, why = wait(alive, cfg["wall_s"])
        os.close(alive)
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        if not read:
            return
        os.write(1, why + b"\n")


def wait(alive: int, seconds: float) -> tuple[bool, bytes]:
    """Until the judge ends, the time is over or the trainer is gone."""
    poll = select.poll()
    poll.register(alive, select.POLLIN)
    poll.register(0, 0)  # reports a hang-up only
    deadline = time.monotonic() + seconds
    read = False
    while events := dict(poll.poll(max(0, deadline - time.monotonic()) * 1000)):
        if 0 in events:
            return False, b""
        if not os.read(alive, 1):
            return read, b""
        read = True
    return read, b" out of time"


# ---- trainer's side ------------------------------------------------------------------------------


class Slot:
    """One zygote and the socket to it."""

    def __init__(self, cfg: dict) -> None:
        self.cfg = cfg
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-I", "-S", os.path.abspath(__file__), json.dumps(self.cfg)]
        self.socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                command, stdin=theirs, stdout=theirs, cwd="/", env={}, start_new_session=True
            )
        self.missing = json.loads(self.ask(b"", 60))

    def ask(self, data: bytes, seconds: float) -> bytes:
        """Send a job, return the line that answers it. Raises OSError or EOFError."""
        deadline = time.monotonic() + seconds
        self.socket.settimeout(seconds)
        self.socket.sendall(data)
        line = b""
        while not line.endswith(b"\n"):
            self.socket.settimeout(max(0.001, deadline - time.monotonic()))
            chunk = self.socket.recv(1 << 16)
            if not chunk:
                raise EOFError("the zygote is gone")
            line += chunk
        return line[:-1]

    def stop(self, gently: bool = True) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        try:
            self.process.wait(2 if gently else 0)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Sandbox:
    """`workers` programs at a time, each with `cpu_s` seconds of CPU and `wall_s` of waiting."""

    def __init__(self, workers: int = 2, cpu_s: float = 5, wall_s: float = 10,
                 unsafe: bool = False, off: Iterable[str] = ()) -> None:
        self.cfg = {"cpu_s": cpu_s, "wall_s": wall_s, "off": list(off)}
        self.restarts, self.closed, self.lock = 0, False, threading.Lock()
        self.pool = ThreadPoolExecutor(workers, "sandbox")
        self.slots = list(self.pool.map(Slot, [self.cfg] * workers))
        self.missing = self.slots[0].missing
        self.free = queue.SimpleQueue()
        for slot in self.slots:
            self.free.put(slot)
        if {"seccomp", "landlock"} <= set(self.missing) and not unsafe:
            self.close()
            raise ValueError(
                "neither seccomp nor Landlock is available here: programs written by a model would "
                "run nearly unconfined; --unsafe-code (unsafe=True) accepts that"
            )
        if self.missing:
            warnings.warn(f"the code sandbox runs without {', '.join(self.missing)}", stacklevel=2)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def run(self, jobs: Iterable[dict]) -> list[dict]:
        return list(self.pool.map(self.judge, jobs))

    def judge(self, job: dict) -> dict:
        frame = json.dumps({k: job[k] for k in ("code", "names", "before", "setup", "tests")}).encode()
        if len(job["code"]) > MAX_CODE or len(frame) > MAX_FRAME:
            return self.verdict(job, b" program too long")
        slot = self.free.get()
        try:
            for _ in range(2):
                try:
                    data = struct.pack("<I", len(frame)) + frame
                    return self.verdict(job, slot.ask(data, self.cfg["wall_s"] + 5))
                except (OSError, EOFError):
                    self.restart(slot)
            return self.verdict(job, b" the zygote died twice")
        finally:
            self.free.put(slot)

    def verdict(self, job: dict, line: bytes) -> dict:
        digits, _, why = line.decode("ascii", "replace").partition(" ")
        ok = [digit == "1" for digit in digits][: len(job["tests"])]
        if len(ok) < len(job["tests"]):
            why = why or "the program or its judge died"
        ok += [False] * (len(job["tests"]) - len(ok))
        return {"ok": ok, "why": printable(why), "missing": list(self.missing)}

    def restart(self, slot: Slot) -> None:
        with self.lock:
            if self.closed:
                raise RuntimeError("the sandbox is closed")
            self.restarts += 1
            slot.stop(gently=False)
            slot.socket.close()
            slot.start()

    def close(self) -> None:
        with self.lock:
            self.closed = True
        self.pool.shutdown(wait=False, cancel_futures=True)
        for slot in self.slots:
            slot.stop()
        self.pool.shutdown()
        for slot in self.slots:
            slot.socket.close()


if __name__ == "__main__":
    zygote(json.loads(sys.argv[1]))
