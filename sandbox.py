"""Did this untrusted program pass these tests?

    with Sandbox(workers=2, cpu_s=5, wall_s=10) as box:
        [verdict] = box.run([{"code": "def f(x): return x + 1", "names": ["f"], "before": "",
                              "setup": "", "tests": ["assert f(1) == 2", "assert f(-1) == 0"]}])

The program was written by a policy that is rewarded for passing, so it lies wherever a lie pays. It
never shares an interpreter with its tests, and only copies of plain data cross between the two (so
what it does to an argument in place is not seen):

    trainer --job--> zygote (own session, empty environment, nobody when root) forks for each job
                       worker   holds the program, a socket to the judge, /dev/null and nothing else
                       judge    reads the job, asks the worker, compares, writes one digit per test

The judge sees the program through stand-ins, which can be called, read, written, indexed, iterated,
measured and printed, but never compared. No exit status, no printed word and no object of the
program's own is ever a verdict; whatever goes wrong fails the test at hand, and all after it if the
program is gone.

Seven locks hold the processes, each tried on its own; `missing` in a verdict names those that a
machine lacks. Every row here is a test; what takes a lock to stop is tried with every subset:

    attack                                   stopped by any one of          with those open
    forge replies, equal anything, patch     two processes, plain data      always stopped
      builtins, redefine helpers and tests
    break the judge: size, nesting, tags     each reply is checked          always stopped
    leave early: exit, kill or close all     fail closed                    always stopped
    end a test's loop early: StopIteration,  the former arrives as a        always stopped
      a length unlike the items                RuntimeError, the latter fails
                                               if nothing was called in between
    sleep, loop for ever                     rlimits (CPU), the clock       always stopped
    leave a daemon behind                    the zygote adopts and kills    always stopped
    read a file, list a folder               landlock, seccomp              as its user may
    write a file                             landlock, seccomp, rlimits     as its user may
    create or delete a file                  landlock, seccomp              as its user may
    read the trainer's environment           landlock, seccomp, setuid,     reads its tokens
                                               capabilities if root
    read the judge's memory, trace it        landlock, seccomp, setuid or   reads the tests
                                               capabilities with non_dumpable  and forges
    kill judge or zygote                     landlock (ABI 6), seccomp      one retry, then failed
    fork, start a thread or a program        seccomp, rlimits unless root   it dies with the job
    listen on or connect to a TCP port       landlock (ABI 4), seccomp      has the network
    UDP, UNIX sockets, stat, namespaces,     seccomp                        has them
      32-bit calls
    take a gigabyte of memory                rlimits                        has it

Not stopped: tests that are weak, shown in the prompt, or leave the judging to the program's own
class; faults of the kernel within SYSCALLS; the memory of all slots together (no cgroups). On macOS
there are the two processes, setuid and rlimits only, and that takes `unsafe=True`.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import fcntl
import functools
import gc
import importlib
import json
import math
import operator
import os
import queue
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
GRACE = 5  # seconds beyond wall_s after which a zygote counts as stuck


# ---- messages ------------------------------------------------------------------------------------
# Four bytes of length, then JSON. Not pickle: reading a pickle runs code of whoever wrote it.


def frame(message: object) -> bytes:
    data = json.dumps(message).encode()
    if len(data) > MAX_FRAME:
        raise OverflowError(f"a message of {len(data)} bytes, the limit is {MAX_FRAME}")
    return struct.pack("<I", len(data)) + data


def send(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def receive(fd: int) -> object:
    (size,) = struct.unpack("<I", read(fd, 4))
    if size > MAX_FRAME:
        raise OverflowError(f"a message of {size} bytes, the limit is {MAX_FRAME}")
    return json.loads(read(fd, size))


def read(fd: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        chunk = os.read(fd, min(size - len(data), 1 << 20))
        if not chunk:
            raise EOFError("the other side is gone")
        data += chunk
    return bytes(data)


TAGS = {  # what JSON lacks: type, its parts, and the way back from the list of parts
    "i": (int, lambda x: [hex(x)], lambda parts: int(parts[0], 16)),
    "b": (bytes, lambda x: [x.hex()], lambda parts: bytes.fromhex(parts[0])),
    "c": (complex, lambda x: [x.real, x.imag], lambda parts: complex(*parts)),
    "r": (range, lambda x: [x.start, x.stop, x.step], lambda parts: range(*parts)),
    "t": (tuple, list, tuple),
    "s": (set, list, set),
    "f": (frozenset, list, frozenset),
    "d": (dict, lambda x: [[k, v] for k, v in x.items()], dict),
    "n": ((), list, iter),  # an iterator among a test's arguments
}


def encode(x: object, other: Callable[[object], object]) -> object:
    """Data as JSON; `other(x)` encodes what is not data. A subclass becomes its base class."""
    if x is None or isinstance(x, bool):
        return x
    if isinstance(x, str):
        return str.__str__(x)
    if isinstance(x, float):
        return float(x)
    if isinstance(x, int) and abs(x) < 1 << 53:
        return int(x)
    if isinstance(x, list):
        return [encode(part, other) for part in x]
    for tag, (kind, split, _) in TAGS.items():
        if isinstance(x, kind):
            return {tag: [encode(part, other) for part in split(x)]}
    return other(x)


def decode(j: object, handle: Callable[[object], object]) -> object:
    """The exact built-in objects behind the JSON; `handle(n)` is the object with handle n."""
    if isinstance(j, list):
        return [decode(part, handle) for part in j]
    if not isinstance(j, dict):
        return j
    ((tag, parts),) = j.items()
    return handle(parts) if tag == "h" else TAGS[tag][2]([decode(part, handle) for part in parts])


# ---- worker: holds the program -------------------------------------------------------------------

OPERATIONS = {
    "call": lambda f, args, kwargs: f(*args, **kwargs),
    "get": getattr,
    "set": setattr,
    "item": operator.getitem,
    "put": operator.setitem,
    "isinstance": lambda kind, x: isinstance(x, kind),
} | {f.__name__: f for f in (iter, next, len, str, repr, bool)}


def work(link: int) -> None:
    """Run the program as module `solution` and answer questions about it until the link closes.
    Nothing here is trusted: the program may rewrite it all and answer what it likes."""
    solution = sys.modules["solution"] = types.ModuleType("solution")
    objects, numbers = [solution], {id(solution): 0}

    def park(x: object) -> dict:
        if id(x) not in numbers:
            numbers[id(x)] = len(objects)
            objects.append(x)
        return {"h": numbers[id(x)]}

    def handle(n: int | str) -> object:
        return getattr(builtins, n) if isinstance(n, str) else objects[n]

    def run(code: str) -> None:
        exec(compile(code, "solution.py", "exec", dont_inherit=True), solution.__dict__)

    def said(error: BaseException) -> str:
        with contextlib.suppress(BaseException):  # its words are the program's too
            return str(error)
        return ""

    operations = OPERATIONS | {"run": run}
    while True:
        operation, args = receive(link)
        try:
            reply = frame(["value", encode(operations[operation](*decode(args, handle)), park)])
        except BaseException as e:  # whatever the program raises is an answer, SystemExit included
            kind = next(c for c in type(e).__mro__ if c.__module__ == "builtins")
            text = e.args[0] if len(e.args) == 1 and type(e.args[0]) is str else said(e)
            reply = frame(["error", [kind.__name__, text[:1000]]])
        send(link, reply)


# ---- judge: holds the tests ----------------------------------------------------------------------


class Program:
    """The judge's end of the link. Once `dead` has a reason, no test can pass any more, whatever
    the test does with the exception."""

    def __init__(self, link: int) -> None:
        self.link, self.dead = link, ""
        self.standins: dict[int, Standin] = {}
        self.sizes: dict[tuple[int, str], int] = {}  # shown since the program last ran

    def ask(self, operation: str, *args: object) -> object:
        request = frame([operation, encode(list(args), self.handle)])
        if operation in ("call", "set", "put"):
            self.sizes.clear()
        try:
            if self.dead:
                raise EOFError
            send(self.link, request)
            kind, reply = receive(self.link)
            reply = decode(reply, self.standin)
            if kind == "error":
                reply = as_exception(*reply, stop=operation == "next")
            elif kind != "value":
                raise ValueError
        except Exception as e:  # gone, or talking nonsense: failed for good either way
            self.dead = self.dead or f"the program is gone ({type(e).__name__})"
            raise RuntimeError(self.dead) from None
        if kind == "error":
            raise reply
        return reply

    def standin(self, n: int) -> Standin:
        if type(n) is not int:
            raise ValueError
        return self.standins.setdefault(n, Standin(self, n))

    def check_size(self, n: int, how: str, size: int) -> int:
        """An object of three items by `len` and none by iteration would pass a test that compares
        them with `zip`."""
        self.sizes[n, how] = size
        if self.sizes.get((n, "len"), size) != self.sizes.get((n, "iter"), size):
            self.dead = "the length and the items of an object disagree"
            raise RuntimeError(self.dead)
        return size

    def handle(self, x: object) -> dict:
        if type(x) is Standin:
            return {"h": x._Standin__n}
        if hasattr(x, "__next__"):
            return {"n": [encode(part, self.handle) for part in x]}
        if vars(builtins).get(getattr(x, "__name__", None)) is x:  # int, len, ValueError, ...
            return {"h": x.__name__}
        raise TypeError(f"a test cannot hand the program a {type(x).__name__}")


def as_exception(name: str, text: str, stop: bool) -> Exception:
    """A built-in exception. StopIteration only in answer to `next`: raised by a function of the
    program it would end `map(f, ...)` early and with it the test's loop."""
    kind = vars(builtins).get(name)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        kind, text = RuntimeError, f"{name}: {text}"
    if kind is StopIteration and not stop:
        kind = RuntimeError
    try:
        return kind(str(text))
    except TypeError:  # UnicodeDecodeError wants five arguments, its base class does not
        return kind.__base__(str(text))


def asks(operation: str) -> Callable:
    return lambda self, *args: self._Standin__program.ask(operation, self, *args)


class Standin:
    """An object of the program as the tests see it. It takes no part in comparison (`==` is
    identity) or arithmetic: one that answered those itself would pass any test."""

    __slots__ = ("__program", "__n")

    def __init__(self, program: Program, n: int) -> None:
        object.__setattr__(self, "_Standin__program", program)
        object.__setattr__(self, "_Standin__n", n)

    def __call__(self, *args, **kwargs):
        return self.__program.ask("call", self, args, kwargs)

    def __getattr__(self, name):
        if name.startswith("__"):  # copy, pickle and others look these up behind the test's back
            raise AttributeError(name)
        return self.__program.ask("get", self, name)

    def __len__(self):
        return self.__program.check_size(self.__n, "len", self.__program.ask("len", self))

    def __iter__(self):
        iterator, size = self.__program.ask("iter", self), 0
        with contextlib.suppress(StopIteration):
            while True:
                item = self.__program.ask("next", iterator)
                size += 1
                yield item
        self.__program.check_size(self.__n, "iter", size)

    __setattr__ = asks("set")
    __getitem__ = asks("item")
    __setitem__ = asks("put")
    __instancecheck__ = asks("isinstance")
    __next__ = asks("next")
    __str__ = asks("str")
    __repr__ = asks("repr")
    __bool__ = asks("bool")


def judge(link: int, pulse: int, trainer: int) -> None:
    """Read the job, write a digit per test and then the reason of the first failure."""
    job = receive(trainer)
    os.write(pulse, b"r")
    program = Program(link)
    known = {k: v for k, v in vars(builtins).items() if k not in job["names"]}  # `max` may be one
    space = {"__name__": "tests", "__builtins__": known}
    why = ""

    def passes(step: str, do: Callable, *args: object) -> bool:
        nonlocal why
        try:
            do(*args)
            reason = program.dead
        except BaseException as e:  # a test may raise anything; only not to raise is to pass
            reason = program.dead or f"{type(e).__name__}: {e}"
        if reason and not why:
            why = f"{step}: {reason}"
        return not reason

    def execute(code: str) -> None:
        exec(compile(code, "tests.py", "exec", dont_inherit=True), space)

    def bind() -> None:
        solution = sys.modules["solution"] = types.ModuleType("solution")
        for name in job["names"]:
            space.pop(name, None)  # the prompt's stub must not answer for the program
            with contextlib.suppress(AttributeError):
                space[name] = program.ask("get", program.standin(0), name)
                setattr(solution, name, space[name])

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

SYSCALLS = """
read 0 63, write 1 64, close 3 57, lseek 8 62, mmap 9 222, mprotect 10 226, munmap 11 215,
brk 12 214, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, sched_yield 24 124,
mremap 25 216, madvise 28 233, nanosleep 35 101, getpid 39 172, exit 60 93, gettimeofday 96 169,
getrusage 98 165, times 100 153, getuid 102 174, geteuid 107 175, getppid 110 173,
sigaltstack 131 132, gettid 186 178, futex 202 98, restart_syscall 219 128, clock_gettime 228 113,
clock_getres 229 114, clock_nanosleep 230 115, exit_group 231 94, getrandom 318 278
"""  # name, number on x86-64, number on aarch64
ARCHITECTURES = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}  # column, AUDIT_ARCH_*


@functools.cache
def c_library() -> ctypes.CDLL:
    if sys.platform != "linux":
        raise OSError("these locks are Linux's")
    return ctypes.CDLL(None, use_errno=True)


def libc(name: str, *args: object) -> int:
    result = getattr(c_library(), name)(*args)
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


def prctl(option: int, *args: object) -> int:
    return libc("prctl", option, *args, *[0] * (4 - len(args)))


def setuid(cfg: dict) -> None:
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def capabilities(cfg: dict) -> None:
    """Drop them all: what is left of root where setuid is not to be had."""
    libc("capset", struct.pack("<Ii", 0x20080522, 0), bytes(24))


def no_new_privs(cfg: dict) -> None:
    prctl(38, 1)  # PR_SET_NO_NEW_PRIVS


def non_dumpable(cfg: dict) -> None:
    prctl(4, 0)  # PR_SET_DUMPABLE: no ptrace, no /proc/PID/mem, /proc/PID/fd, /proc/PID/environ


def rlimits(cfg: dict) -> None:
    limits = {"CORE": 0, "FSIZE": 0, "NOFILE": 8, "NPROC": 0, "AS": 1 << 30}
    for name, value in (limits | {"CPU": max(1, math.ceil(cfg["cpu_s"]))}).items():
        which = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))


def landlock(cfg: dict) -> None:
    """An empty rule set: no file, no TCP port and, from ABI 6, no signal to a process outside."""
    abi = libc("syscall", 444, None, 0, 1)
    files = 0x1FFF | (abi >= 2) << 13 | (abi >= 3) << 14 | (abi >= 5) << 15
    rules = struct.pack("<QQQ", files, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = libc("syscall", 444, rules, len(rules), 0)
    libc("syscall", 446, ruleset, 0)
    os.close(ruleset)


def seccomp(cfg: dict) -> None:
    """Only SYSCALLS: any other call fails with EPERM, one of another architecture kills."""
    column, architecture = ARCHITECTURES[os.uname().machine]
    numbers = [int(entry.split()[column]) for entry in SYSCALLS.split(",")]
    load, equal, give = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, 0x80000000), (load, 0, 0, 0)]
    code += [(equal, len(numbers) - i, 0, n) for i, n in enumerate(numbers)]
    code += [(give, 0, 0, 0x00050000 | 1), (give, 0, 0, 0x7FFF0000)]  # EPERM, ALLOW
    program = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in code))
    prctl(22, 2, struct.pack("<HxxxxxxQ", len(code), ctypes.addressof(program)))


ZYGOTE_LOCKS = (setuid, capabilities, no_new_privs, non_dumpable)  # inherited by what it forks
CHILD_LOCKS = (rlimits, landlock, seccomp)
LOCKS = [lock.__name__ for lock in ZYGOTE_LOCKS + CHILD_LOCKS]


def close_locks(locks: tuple[Callable, ...], cfg: dict) -> list[str]:
    """The names of those that would not close."""
    missing = []
    for lock in locks:
        try:
            if lock.__name__ in cfg["off"]:
                raise OSError("turned off")
            lock(cfg)
        except (OSError, ValueError, AttributeError, KeyError):
            missing.append(lock.__name__)
    return missing


# ---- zygote: forks a worker and a judge for each job ---------------------------------------------

MODULES = """
argparse array ast base64 bisect calendar cmath collections.abc concurrent.futures contextlib copy
csv dataclasses datetime decimal difflib enum fractions functools gzip hashlib heapq html inspect io
ipaddress itertools logging mmap numbers pathlib pickle pprint random re secrets statistics string
tempfile textwrap timeit tokenize traceback typing unicodedata unittest urllib.parse uuid weakref
zlib _strptime encodings.ascii encodings.cp1252 encodings.hex_codec encodings.idna
encodings.latin_1 encodings.rot_13 encodings.utf_8_sig encodings.utf_16 encodings.utf_16_be
encodings.utf_16_le encodings.utf_32
"""  # imported beforehand: behind the locks no file can be opened


def zygote(cfg: dict) -> None:
    for name in MODULES.split():
        with contextlib.suppress(ImportError):  # a Python may be built without zlib, say
            importlib.import_module(name)
    time.localtime()  # reads the time zone's file
    null = os.open(os.devnull, os.O_RDWR)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as f:
        f.write("1000")  # out of memory, the kernel ends us rather than the trainer
    missing = close_locks(ZYGOTE_LOCKS, cfg)
    missing += try_in_child(cfg)
    with contextlib.suppress(OSError):
        prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphans of a program come to us
    gc.freeze()  # a child that collects garbage would copy our pages
    os.write(1, json.dumps(missing).encode() + b"\n")

    def fork(task: Callable, *keep: int) -> int:
        """A locked child with the descriptors `keep` as 3, 4, ... and no others."""
        pid = os.fork()
        if pid:
            return pid
        try:
            with contextlib.suppress(OSError):
                prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 64) for fd in keep]
            for fd, source in enumerate([null] * 3 + high):
                os.dup2(source, fd)
            os.closerange(3 + len(keep), 256)
            if set(close_locks(CHILD_LOCKS, cfg)) <= set(missing):
                task(*range(3, 3 + len(keep)))
        finally:
            os._exit(1)

    trainer = socket.socket(fileno=0)
    while trainer.recv(1, socket.MSG_PEEK):  # a job is there, for the judge to read; b"": the end
        ours, theirs = socket.socketpair()
        alive, pulse = os.pipe()
        with ours, theirs:
            children = [fork(work, theirs.fileno()), fork(judge, ours.fileno(), pulse, 0)]
        os.close(pulse)
        was_read, why = wait(alive, cfg["wall_s"])
        os.close(alive)
        while children:
            for pid in reversed(children):  # the judge first: it has nothing more to say
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            children = orphans()
        if not was_read:  # half a job may be left in the socket: begin anew
            return
        os.write(1, why + b"\n")


def try_in_child(cfg: dict) -> list[str]:
    """The locks of a child cannot be tried in the zygote, which could not undo them."""
    out, into = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(into, json.dumps(close_locks(CHILD_LOCKS, cfg)).encode())
        os._exit(0)
    os.close(into)
    missing = os.read(out, 4096)
    os.close(out)
    os.waitpid(pid, 0)
    return json.loads(missing)


def wait(alive: int, seconds: float) -> tuple[bool, bytes]:
    """Until the judge ends, the time is over or the trainer is gone: was the job read, and what
    ended it. The zygote itself reads neither job nor verdict: its memory is the next worker's."""
    poll = select.poll()
    poll.register(alive, select.POLLIN)
    poll.register(0, 0)  # reports a hang-up only
    deadline = time.monotonic() + seconds
    was_read = False
    while events := dict(poll.poll(max(0, deadline - time.monotonic()) * 1000)):
        if 0 in events:
            return False, b""
        if not os.read(alive, 1):
            return was_read, b""
        was_read = True
    return was_read, b" out of time"


def orphans() -> list[int]:
    with contextlib.suppress(OSError), open(f"/proc/self/task/{os.getpid()}/children") as f:
        return [int(pid) for pid in f.read().split()]
    return []


# ---- the trainer's side --------------------------------------------------------------------------


class Slot:
    """A zygote and the socket to it. It is a fresh interpreter, never a fork of the trainer with
    its GPU, tokens and threads."""

    def __init__(self, cfg: dict) -> None:
        command = [sys.executable, "-I", "-S", os.path.abspath(__file__), json.dumps(cfg)]
        env = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
        self.socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                command, stdin=theirs, stdout=theirs, cwd="/", env=env, start_new_session=True
            )
        try:
            self.missing = json.loads(self.ask(b"", 60))
        except (OSError, EOFError) as error:
            raise ValueError(f"the sandbox's {sys.executable} does not start: {error}") from None

    def ask(self, data: bytes, seconds: float) -> str:
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
        return line[:-1].decode("ascii", "replace")

    def stop(self, seconds: float) -> None:
        """Hang up, which ends a healthy zygote and what it forked; after `seconds`, kill them."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(subprocess.TimeoutExpired):
            if seconds:
                self.process.wait(seconds)
        if self.process.returncode is None:  # not waited for yet, so the group is still its own
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Sandbox:
    """Judges programs, `workers` at a time; each may use `cpu_s` seconds of CPU and take `wall_s`.

    `missing` names the locks that this machine lacks, `restarts` counts zygotes that died or hung.
    `off` turns locks off, for tests. Raises ValueError when neither seccomp nor Landlock is to be
    had, unless `unsafe`. Close it (or use `with`), or its processes stay until the trainer ends."""

    def __init__(
        self,
        workers: int = 2,
        cpu_s: float = 5,
        wall_s: float = 10,
        unsafe: bool = False,
        off: Iterable[str] = (),
    ) -> None:
        self.cfg = {"cpu_s": cpu_s, "wall_s": wall_s, "off": sorted(off)}
        if unknown := set(self.cfg["off"]) - set(LOCKS):
            raise ValueError(f"no such lock: {', '.join(unknown)}; there are {', '.join(LOCKS)}")
        self.restarts, self.closed, self.lock = 0, False, threading.Lock()
        self.pool = ThreadPoolExecutor(workers, "sandbox")
        self.slots = list(self.pool.map(Slot, [self.cfg] * workers))
        self.missing = self.slots[0].missing
        self.free = queue.SimpleQueue()
        for i in range(workers):
            self.free.put(i)
        if {"seccomp", "landlock"} <= set(self.missing) and not unsafe:
            self.close()
            raise ValueError(
                "neither seccomp nor Landlock is available, so nothing would keep a program from "
                "files and network; --unsafe-code (unsafe=True) runs it all the same"
            )
        if self.missing:
            warnings.warn(f"the sandbox runs without {', '.join(self.missing)}", stacklevel=2)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        with self.lock:
            self.closed = True
        self.pool.shutdown(wait=False, cancel_futures=True)
        for slot in self.slots:
            slot.stop(2)
        self.pool.shutdown()
        for slot in self.slots:
            slot.socket.close()

    def run(self, jobs: Iterable[dict]) -> list[dict]:
        """Verdicts in the order of the jobs.

        A job is dict(code, names, before, setup, tests). `code` is the program; `names` are those
        of its top-level names that the tests use, and all that they see of it; `before` is source
        for the judge (imports, helpers of the prompt), run before the names are bound; `setup` is
        source run after; `tests` are statements. A verdict is dict(ok, why, missing): a bool per
        test, the reason of the first failure (printable, at most MAX_WHY characters, empty when
        all passed), the locks that were not closed."""
        return list(self.pool.map(self._judge, jobs))

    def _judge(self, job: dict) -> dict:
        tests = len(job["tests"])
        try:
            if len(job["code"]) > MAX_CODE:
                raise OverflowError(f"a program of {len(job['code'])} characters")
            data = frame({key: job[key] for key in ("code", "names", "before", "setup", "tests")})
        except OverflowError as e:
            return self._verdict(f" {e}", tests)
        i = self.free.get()
        try:
            for _ in range(2):
                try:
                    return self._verdict(self.slots[i].ask(data, self.cfg["wall_s"] + GRACE), tests)
                except (OSError, EOFError):
                    self._restart(i)
            return self._verdict(" the zygote died twice", tests)
        finally:
            self.free.put(i)

    def _restart(self, i: int) -> None:
        with self.lock:
            if self.closed:
                raise RuntimeError("the sandbox was closed")
            self.restarts += 1
            self.slots[i].stop(0)
            self.slots[i].socket.close()
            self.slots[i] = Slot(self.cfg)

    def _verdict(self, line: str, tests: int) -> dict:
        digits, _, why = line.partition(" ")
        ok = [digit == "1" for digit in digits.ljust(tests, "0")[:tests]]
        why = why or ("" if len(digits) == tests else "the judge died")
        return {"ok": ok, "why": printable(why), "missing": list(self.missing)}


if __name__ == "__main__":
    with contextlib.suppress(ConnectionError):  # the trainer ended in the middle of something
        zygote(json.loads(sys.argv[1]))
