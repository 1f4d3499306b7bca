"""What must stay true of sandbox.py: right programs pass, nothing else does, nothing is left over.

Attacks run in a throwaway jail (new user, process and network namespaces), because some of them,
with the locks turned off to see what each lock is for, do what they set out to do.
"""

import ast
import gzip
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import pytest

import sandbox
from sandbox import LOCKS, Sandbox

ROOT = Path(__file__).resolve().parents[1]
EXCERPTS = Path(__file__).resolve().with_name("data")  # ten rows of each public data set
linux = pytest.mark.skipif(sys.platform != "linux", reason="these locks are Linux's")

PLUS_ONE = [
    "assert f(1) == 2",
    "assert f(41) == 42",
    "assert [f(i) for i in range(3)] == [1, 2, 3]",
    "assert math.isclose(f(0.5), 1.5)",
    "assert not f(-1)",
    "assert len(str(f(9))) == 2",
]


def job(code, *tests, names=("f",), before="import math", setup=""):
    return dict(code=code, names=list(names), before=before, setup=setup, tests=list(tests))


GOOD = job("def f(x): return x + 1", *PLUS_ONE)


@pytest.fixture(scope="module")
def box():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Sandbox(workers=2, cpu_s=1, wall_s=4, unsafe=sys.platform != "linux") as box:
            yield box


def check(box, *args, **kwargs):
    (verdict,) = box.run([job(*args, **kwargs)])
    return verdict


# ---- right programs ------------------------------------------------------------------------------


def test_every_test_gets_its_own_verdict_and_the_first_failure_its_reason(box):
    verdict = check(box, "def f(x): return 2", *PLUS_ONE)
    assert verdict["ok"] == [True, False, False, False, False, False]
    assert verdict["why"].startswith("test 1: AssertionError")
    assert verdict["missing"] == box.missing
    verdict = box.run([GOOD])[0]
    assert verdict["ok"] == [True] * 6 and verdict["why"] == ""


@pytest.mark.parametrize(
    "value",
    ["None", "True", "-3", "2**53", "-(2**70)", "0.1", "-0.0", "1e308 * 10", "1 - 2j",
     "'\\ud800é\\0'", "b'\\xff'", "[1, [2]]", "(1, (2, []))", "()", "set()", "{1, 'a', (2,)}",
     "frozenset({1})", "{'h': 1, (1, 2): {'i': '0x1'}, None: 0}", "range(1, 9, 3)", "{'t': [1]}"],
)  # fmt: skip
def test_data_crosses_both_ways_with_its_exact_type(box, value):
    tests = [
        f"got, want = f({value}), {value}\nassert got == want and type(got) is type(want)",
        f"assert repr(f([{value}])) == repr([{value}])",
        f"assert g({value!r}) is True",
    ]
    code = f"def f(x): return x\ndef g(s): return s == {value!r}"
    assert check(box, code, *tests, names=["f", "g"])["ok"] == [True] * 3


def test_a_subclass_arrives_as_its_base_class(box):
    code = """
import collections, enum
class Colour(enum.IntEnum):
    red = 7
class Text(str):
    __eq__ = lambda self, other: True
    __hash__ = str.__hash__
def f(n):
    return [collections.Counter("aab"), collections.namedtuple("P", "x y")(1, 2), Colour.red,
            Text("a"), collections.OrderedDict(a=1), collections.defaultdict(int, a=1)][n]
"""
    tests = [f"assert f({i}) == {w} and type(f({i})) is {t}" for i, (w, t) in enumerate([
        ("{'a': 2, 'b': 1}", "dict"), ("(1, 2)", "tuple"), ("7", "int"), ("'a'", "str"),
        ("{'a': 1}", "dict"), ("{'a': 1}", "dict")])]  # fmt: skip
    assert check(box, code, *tests, "assert f(3) != 'b'")["ok"] == [True] * 7


def test_an_object_of_the_program_can_be_used_but_not_compared(box):
    code = """
class Node:
    def __init__(self, value, next=None): self.value, self.next = value, next
    def __iter__(self):
        while self: yield self.value; self = self.next
    def __len__(self): return sum(1 for _ in self)
    def __getitem__(self, i): return list(self)[i]
    def __setitem__(self, i, value): self.value = value
    def __str__(self): return "->".join(map(str, self))
    def __eq__(self, other): return True
    def __bool__(self): return True
    def tail(self, n=1): return self.next if n == 1 else self.next.tail(n - 1)
"""
    setup = "a = Node(1)\na.next = Node(value=2, next=Node(3))"
    tests = ["assert a.value == 1 and a.next.value == 2", "assert list(a) == [1, 2, 3] and 3 in a",
             "assert len(a) == 3 and str(a) == '1->2->3' and a", "assert a[1] == 2",
             "a[0] = 9\nassert a.value == 9", "assert a.next is a.tail()",
             "assert a.tail(n=2).value == 3", "assert isinstance(a, Node)", "assert a != a.next",
             "assert not a == 1", "b = a.next\nassert b in [1, b]",
             "import copy\nassert max(a) == 9"]  # fmt: skip
    verdict = check(box, code, *tests, names=["Node"], setup=setup)
    assert verdict["ok"] == [True] * len(tests), verdict["why"]
    wrong = ["assert a + 1", "assert a > 0", "assert abs(a - 1) < 2", "assert a in [1, 2]",
             "assert int(a)", "assert a == 1", "assert math.isclose(a, 1)", "assert round(a)",
             "assert {a} == {1}", "import copy\nassert copy.deepcopy(a)"]  # fmt: skip
    for name in "add sub float index int round deepcopy".split():
        code += f"    __{name}__ = lambda *a: 1\n"
    assert not any(check(box, code, *wrong, names=["Node"], setup=setup)["ok"])


def test_an_object_whose_length_and_items_disagree_fails_the_test(box):
    code = """
class Sly:
    def __init__(self, items): self.items = items
    def __len__(self): return len(self.items) or 3
    def __iter__(self): return iter(self.items)
    def push(self, x): self.items.append(x)
def f(n): return Sly(list(range(n)))
"""
    loop = "for got, want in zip(r, [0, 1, 2]):\n    assert got == want\n"
    for size, passes in (0, False), (3, True):
        for test in f"assert len(r) == 3\n{loop}", f"{loop}assert len(r) == 3":
            assert check(box, code, f"r = f({size})\n{test}")["ok"] == [passes]
    grows = "r = f(2)\nassert list(r) == [0, 1]\nr.push(2)\nassert list(r) == [0, 1, 2]"
    assert check(box, code, grows)["ok"] == [True]


def test_iterators_and_builtins_can_be_handed_to_the_program(box):
    code = "def f(items, key=None): return sorted(items, key=key)\ndef g(n):\n yield from range(n)"
    tests = ["assert f(iter([2, 1])) == [1, 2]", "assert list(g(3)) == [0, 1, 2]",
             "assert f((x for x in 'ba'), key=str) == ['a', 'b']",
             "it = g(2)\nassert [next(it), next(it, 5), next(it, 5)] == [0, 1, 5]"]  # fmt: skip
    verdict = check(box, code, *tests, names=["f", "g"])
    assert verdict["ok"] == [True] * 4, verdict["why"]


def test_an_exception_arrives_as_the_nearest_builtin_one(box):
    code = """
class Mine(KeyError): pass
def f(n):
    if n == 0: raise ValueError("zero")
    if n == 1: raise Mine("one")
    if n == 2: return b"\\xff".decode()
    if n == 3: raise SystemExit(3)
    if n == 4: raise Mute(4, 4)
class Mute(KeyError):
    def __str__(self): raise self
"""
    test = "try: f({})\nexcept {} as e: assert type(e) is {} and {!r} in str(e)\nelse: assert 0"
    cases = [(0, "ValueError", "ValueError", "zero"), (1, "LookupError", "KeyError", "one"),
             (2, "ValueError", "UnicodeError", "codec"),
             (4, "KeyError", "KeyError", ""),
             (3, "RuntimeError", "RuntimeError", "SystemExit")]  # fmt: skip
    verdict = check(box, code, *[test.format(*case) for case in cases])
    assert verdict["ok"] == [True] * 5, verdict["why"]


def test_tests_may_import_from_solution(box):
    verdict = check(box, "def f(x): return x + 1", "from solution import f as g\nassert g(1) == 2")
    assert verdict["ok"] == [True]


def test_ordinary_modules_work_behind_the_locks(box):
    code = """
import datetime, decimal, fractions, hashlib, itertools, json, random, re, statistics, string
import time, threading, typing, uuid
from dataclasses import dataclass
@dataclass
class P: x: typing.List[int]
def f(x):
    time.sleep(0.01); print(x, flush=True); random.shuffle([1, 2]); uuid.uuid4(); threading.Lock()
    datetime.datetime.now()
    day = str(datetime.datetime.strptime("2024-02-29", "%Y-%m-%d").date())
    return [day, hashlib.md5(b"").hexdigest()[:4], float(decimal.Decimal("1.5")), P([1]).x,
            "é".encode("latin-1"), "a".encode("utf-16-le"), statistics.mean([1, 3])]
"""
    want = "['2024-02-29', 'd41d', 1.5, [1], b'\\xe9', b'a\\0', 2]"
    verdict = check(box, code, f"assert f(1) == {want}")
    assert verdict["ok"] == [True], verdict["why"]
    code = "def f(x: int): return f.__annotations__ == {'x': int}"  # no __future__ of the sandbox's
    assert check(box, code, "assert f(1)")["ok"] == [True]


def test_verdicts_come_in_the_order_of_the_jobs(box):
    code = "import time\ndef f(): time.sleep({} / 50); return {}"
    tests = "assert f() == {}", "assert 0, f()"
    jobs = [job(code.format(i * 7 % 5, i), *(t.format(i) for t in tests)) for i in range(12)]
    verdicts = box.run(jobs)
    assert [v["why"] for v in verdicts] == [f"test 1: AssertionError: {i}" for i in range(12)]
    assert box.run([]) == []


# ---- real data sets ------------------------------------------------------------------------------


def humaneval(wrong):
    for line in gzip.decompress((EXCERPTS / "HumanEval.jsonl.gz").read_bytes()).splitlines():
        row = json.loads(line)
        name = row["entry_point"]
        code = row["prompt"] + ("    return None\n" if wrong else row["canonical_solution"])
        yield job(code, f"check({name})", names=[name], before=row["prompt"], setup=row["test"])


def mbpp(wrong):
    for line in (EXCERPTS / "mbpp.jsonl").read_bytes().splitlines():
        row = json.loads(line)
        tree = ast.parse(row["code"])
        tests = [row["test_setup_code"], *row["test_list"]]
        used = {getattr(n, "id", "") for test in tests for n in ast.walk(ast.parse(test))}
        made = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        imports = [ast.unparse(n) for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        nothing = "\n".join(f"def {name}(*args, **kwargs): return None" for name in made)
        yield job(nothing if wrong else row["code"], *row["test_list"], names=sorted(used & made),
                  before="\n".join(imports), setup=row["test_setup_code"])  # fmt: skip


@pytest.mark.parametrize("jobs", [humaneval, mbpp])
def test_references_of_the_public_sets_pass_and_no_program_that_returns_none(box, jobs):
    for wrong in (False, True):
        verdicts = box.run(jobs(wrong))
        assert [all(verdict["ok"]) for verdict in verdicts] == [not wrong] * 10


# ---- wrong and hostile input ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    ["", "\0", "def f(x): return x + 1\0", "'\ud800'", "x = " + "-" * 100_000 + "1", "(" * 5000,
     "x = " + "[" * 300_000, "def f(x) return x", "\x0c\ufeff", "x=" + "9" * 200_000, "f = 1",
     "while 1: pass", "import nowhere", "exit()", "# coding: rot13", "f = [f := 1, (f)]",
     "\r" * 1000, "class f: __slots__ = 1"],
    ids=lambda code: ascii(code[:20]),
)  # fmt: skip
def test_any_text_as_a_program_gives_a_failed_verdict(box, code):
    verdict = check(box, code, *PLUS_ONE)
    assert verdict["ok"] == [False] * 6
    why = verdict["why"]
    assert 0 < len(why) <= sandbox.MAX_WHY and why.isprintable() and why.isascii()


def test_reasons_are_short_and_printable(box):
    code = "class E(Exception): pass\ndef f(x): raise E('\\x1b[2J\\n\\u202e' + 'y' * 10**6)"
    why = check(box, code, "f(1)")["why"]
    assert len(why) <= sandbox.MAX_WHY and why.isascii() and why.isprintable() and "yyyy" in why


def test_a_name_the_program_lacks_is_not_answered_by_the_prompt(box):
    verdict = check(box, "def g(x): return 1", "assert not f(1)", before="def f(x):\n    'stub'")
    assert verdict["ok"] == [False]
    verdict = check(box, "", "assert max([1, 2]) == 2", "assert min([1, 2]) == 1", names=["max"])
    assert verdict["ok"] == [False, True]  # nor by a builtin of that name


def test_a_helper_of_the_prompt_is_the_prompts_and_not_the_programs(box):
    code = "def double(x): return 0\nimport math\nmath.fabs = lambda x: 0\ndef f(x): return 0"
    before = "import math\ndef double(x): return 2 * x"
    verdict = check(box, code, "assert math.fabs(f(3) - double(3)) < 1e-4", before=before)
    assert verdict["ok"] == [False]


def test_what_passed_before_the_time_was_over_still_counts(box):
    code = "import time\ndef f(x):\n while x: time.sleep(9) if x > 1 else 0\n return 1"
    verdict = check(box, code, "assert f(0) == 1", "f(1)", "assert f(0)")
    assert verdict["ok"] == [True, False, False]
    assert verdict["why"] in ("test 1: the program is gone (EOFError)", "out of time")  # if busy
    with Sandbox(workers=1, wall_s=0.5, unsafe=True) as box:
        verdict = check(box, code, "assert f(0) == 1", "f(2)", "assert f(0)")
    assert verdict["ok"] == [True, False, False] and verdict["why"] == "out of time"


def test_a_test_that_swallows_everything_does_not_hide_the_programs_death(box):
    tests = ["try:\n    f(1)\nexcept BaseException:\n    pass", "assert True"]
    assert check(box, "import os\ndef f(x): os._exit(0)", *tests)["ok"] == [False, False]


@pytest.mark.parametrize("kind", ["StopIteration", "StopAsyncIteration", "GeneratorExit"])
def test_no_exception_of_the_program_ends_a_tests_loop_early(box, kind):
    loops = ["for got, want in zip(map(f, [1, 2]), [2, 3]):\n    assert got == want",
             "assert all(got == 2 for got in map(f, [1]))", "assert list(map(f, [1])) == []",
             "assert all(f(i) == 2 for i in [1])",
             "assert not [1 for _ in iter(lambda: f(1), 2)]"]  # fmt: skip
    assert not any(check(box, f"def f(x): raise {kind}", *loops)["ok"])


def test_broken_tests_fail(box):
    code = "def f(x): return 1"
    tests = ["assert f(1) == (", "raise SystemExit(0)", "f(lambda: 0)", "assert f(1)"]
    assert check(box, code, *tests)["ok"] == [False, False, False, True]
    verdict = check(box, code, "assert f(1)", setup="1 / 0")
    assert verdict["ok"] == [False] and verdict["why"].startswith("setup: ZeroDivisionError")


# ---- attacks -------------------------------------------------------------------------------------

ANSWER = """
import json, os, struct
def answer(reply, replies=('["value", null]', '["value", {"h": 1}]')):  # to "run" and to "get f"
    def write(reply):
        data = reply if isinstance(reply, bytes) else reply.encode()
        os.write(3, struct.pack("<I", len(data)) + data)
    write(replies[0])
    for reply in [*replies[1:], *[reply if isinstance(reply, bytes) else json.dumps(reply)] * 99]:
        rest = struct.unpack("<I", os.read(3, 4))[0]
        while rest: rest -= len(os.read(3, rest))
        write(reply)
"""  # a program that does its own talking on the link to the judge

FORGERIES = r"""
## equals everything
class E:
 __eq__ = lambda s, o: True
 __ne__ = lambda s, o: False
 __hash__ = lambda s: 2
def f(x): return E()
## is equal by metaclass
class M(type):
 __eq__ = lambda s, o: True
 __hash__ = lambda s: 2
class E(metaclass=M): pass
def f(x): return E
## claims to be an int
class E:
 __class__ = int
 __eq__ = lambda s, o: True
 __index__ = lambda s: 2
def f(x): return E()
## does any arithmetic
class E: pass
ops = "eq lt gt le ge add sub radd rsub float int abs index round contains getattr"
for n in ops.split(): setattr(E, f"__{n}__", lambda s, *a: True)
def f(x): return E()
## patches every builtin
import builtins
for n in dir(builtins):
 try: setattr(builtins, n, lambda *a, **k: True)
 except Exception: pass
def f(x): return 2
## redefines AssertionError
import builtins
class A(Exception):
 def __new__(c, *a): return None
builtins.AssertionError = A
def f(x): return None
## patches the worker's operations
import sys
m = sys.modules['__main__']
m.OPERATIONS.clear()
m.encode = lambda x, o: True
def f(x): return 2
## patches json
import json
json.dumps = lambda m: '["value", {"h": "all"}]'
def f(x): return 2
## patches time and random
import time, random
time.time = time.monotonic = lambda: 0
random.random = lambda: 0
def f(x): return 2
## answers true to all
answer(["value", True])
## answers a handle to all
answer(["value", {"h": 1}])
## answers builtins by name
answer(["value", {"h": "all"}])
## answers a bool as handle
answer(["value", {"h": True}])
## answers nan
answer(["value", float("nan")])
## answers unhashable keys
answer(["value", {"d": [[[], 1]]}])
## answers an unknown tag
answer(["value", {"__class__": []}])
## answers two tags
answer(["value", {"t": [], "s": []}])
## answers an unknown kind
answer(["pass", 2])
## answers no pair
answer([])
## answers a string
answer("ok")
## answers a StopIteration
answer(["error", ["StopIteration", ""]])
## answers a SystemExit
answer(["error", ["SystemExit", "0"]])
## answers a GeneratorExit
answer(["error", ["GeneratorExit", ""]])
## answers an error of no class
answer(["error", [[], {}]])
## answers an error named print
answer(["error", ["print", "x"]])
## answers an error that is a handle
answer(["error", [{"h": 0}, {"h": 0}]])
## answers garbage
answer(b"\xff\x00")
## answers nothing
answer(b"")
## answers verdicts
answer({"ok": [True] * 6, "why": ""})
## answers 4300 digits
answer(b'["value", ' + b"9" * 5000 + b"]")
## answers a huge number
answer(["value", {"i": ["0x" + "f" * 7000000]}])
## answers a huge range
answer(["value", {"r": [{"i": ["-0x" + "f" * 99]}, {"i": ["0x" + "f" * 99]}, 1]}])
## answers three million lists
answer(b'["value", [' + b"[]," * 2600000 + b"[]]]")
## answers deep nesting
answer(b"[" * 900 + b"]" * 900)
## talks without being asked
import os, struct
d = b'["value", 2]'
os.write(3, (struct.pack('<I', len(d)) + d) * 99)
def f(x): return 2
## announces a frame and stops
import os, time
os.write(3, b'\xff\xff\x7f\x00[')
os.close(3)
def f(x): return 2
## writes digits everywhere
import os
for fd in range(9):
 try: os.write(fd, b'111111 \n' * 9)
 except OSError: pass
def f(x): return 2
## prints a verdict
import sys
print('111111', file=sys.stderr)
print('111111')
print('{"ok": true}', flush=True)
raise SystemExit(0)
## leaves by signal
import os, signal
os.kill(os.getpid(), signal.SIGTERM)
def f(x): return 2
## leaves by exit in f
import os
def f(x): os._exit(0)
## leaves by atexit
import atexit, os
atexit.register(os._exit, 0)
import sys
sys.exit(0)
## segfaults
import ctypes
def f(x): return ctypes.string_at(0)
## ends the loop with StopIteration
def f(x): raise StopIteration
## ends the loop with StopAsyncIteration
def f(x): raise StopAsyncIteration
## ends the loop with GeneratorExit
def f(x): raise GeneratorExit
## raises KeyboardInterrupt
def f(x): raise KeyboardInterrupt
## raises what has no text
class E(Exception):
 def __str__(s): raise s
def f(x): raise E
## raises what poses as builtin
E = type('SystemExit', (BaseException,), {'__module__': 'builtins'})
def f(x): raise E(0)
## yields everything
import itertools
def f(x): return itertools.count(-9)
## has any length
class E:
 __len__ = lambda s: 1 << 99
 __iter__ = lambda s: s
 __next__ = lambda s: 2
 __str__ = lambda s: 'xx'
 __eq__ = lambda s, o: True
def f(x): return E()
## is true for ever
class E:
 def __bool__(s):
  while 1: pass
def f(x): return E()
## looks for the tests in memory
import gc, sys
def f(x):
 found = [o for o in gc.get_objects() if 'ert f(4' + '1)' in str(o)[:99999]]
 return 2 if found else None
## looks for the tests in frames
import sys
def f(x):
 fr = sys._getframe()
 while fr:
  for v in list(fr.f_locals.values()):
   if isinstance(v, dict) and 'tests' in v: return x + 1
  fr = fr.f_back
## rewrites its arguments
def f(x):
 global n
 n = x
 return None
## answers with its own class
class f:
 def __new__(c, *a): return c
 __class_getitem__ = __call__ = lambda *a: 2
## is a module
import sys
class M(type(sys)):
 def __getattr__(s, n): return lambda *a: None
sys.modules['solution'].__class__ = M
## contains itself
def f(x):
 l = []
 l.append(l)
 return l
## doubles itself
def f(x):
 l = [1]
 for _ in range(60): l = [l, l]
 return l
"""  # stopped by the two processes and the protocol, with every lock open
FORGERIES = dict(part.split("\n", 1) for part in FORGERIES[4:].split("\n## "))
for base in "int str float tuple list dict bytes complex frozenset".split():
    FORGERIES[f"{base} that equals everything"] = f"""
class E({base}):
    __eq__ = lambda s, o: True
    __ne__ = lambda s, o: False
    __hash__ = {base}.__hash__
def f(x): return E()"""
for name, code in FORGERIES.items():
    if code.startswith("answer("):
        FORGERIES[name] = ANSWER + code

STAND_FAST = [
    *PLUS_ONE,
    "got = list(map(f, [1, 2]))\nassert got == [2, 3]",
    "assert sum(1 for a, b in zip(map(f, [1, 2]), [2, 3]) if a == b) == 2",
    "for got, want in zip(map(f, [1, 2]), [2, 3]):\n    assert got == want",
    "assert all(a == 2 for a in map(f, [1]))",
]

ESCAPES = {  # what f does, and the sets of locks that stop it, each set on its own
    "read a file": ("open('/etc/passwd').read(1)", "landlock", "seccomp"),
    "list a folder": ("os.listdir('/')", "landlock", "seccomp"),
    "write a file": (
        "os.write(os.open(f'/tmp/{os.getpid()}', os.O_CREAT | os.O_WRONLY), b'x')",
        "landlock", "seccomp", "rlimits"),
    "create a file": ("os.open(f'/tmp/{os.getpid()}', os.O_CREAT) + 1", "landlock", "seccomp"),
    "read the trainer's environment": (
        "open(f'/proc/{open(f\"/proc/{os.getppid()}/stat\").read().split()[3]}/environ').read()",
        "landlock", "seccomp", "setuid", "capabilities"),
    "open the judge's memory": (
        "open(f'/proc/{os.getpid() + 1}/mem', 'rb')",
        "landlock", "seccomp", "non_dumpable capabilities"),
    "trace the judge": (  # PTRACE_SEIZE
        "ctypes.CDLL(None).ptrace(0x4206, os.getpid() + 1, 0, 0) == 0",
        "landlock", "seccomp", "non_dumpable capabilities"),
    "kill the zygote": ("os.kill(os.getppid(), 9)", "landlock", "seccomp"),
    "kill the judge": ("os.kill(os.getpid() + 1, 9)", "landlock", "seccomp"),
    "fork": ("os.fork() or os._exit(0)", "seccomp", "rlimits"),
    "start a thread": ("threading.Thread(target=int).start() or 1", "seccomp", "rlimits"),
    "start a program": ("os.system('true') == 0", "seccomp", "rlimits", "landlock"),
    "listen on a port": ("socket.create_server(('0.0.0.0', 0))", "landlock", "seccomp"),
    "open a datagram socket": (
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).bind(('', 0)) or 1", "seccomp"),
    "open a UNIX socket": ("socket.socket(socket.AF_UNIX)", "seccomp"),
    "stat a file": ("os.stat('/etc/passwd')", "seccomp"),
    "make a namespace": ("ctypes.CDLL(None).unshare(0x10000000) == 0", "seccomp"),
    "run 32-bit calls": (  # mov eax, 20 (getpid); int 0x80; ret
        "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer("
        "(m := mmap.mmap(-1, 4096, prot=7), "
        "m.write(b'\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3'))[0])))() > 0",
        "seccomp"),
    "take a gigabyte": ("mmap.mmap(-1, 1 << 30)", "rlimits"),
}  # fmt: skip
DAEMON = """
import os, time
def f(x):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(60)
        os._exit(0)
    return x + 1
"""


def jail(function, *args, timeout=60):
    """The result of `function(*args)`, run as process 1 of namespaces that end with it."""
    if not shutil.which("unshare"):
        pytest.skip("no unshare here")
    command = "unshare --user --map-root-user --pid --fork --kill-child --net --mount-proc".split()
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("unshare is not permitted here")
    command += [sys.executable, "-W", "ignore", __file__, function.__name__, json.dumps(args)]
    env = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, timeout=timeout, check=True)
    return json.loads(done.stdout)


def living():
    """All processes but this one, zombies apart."""
    states = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            states[int(pid)] = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:  # gone meanwhile
            pass
    return {pid for pid, state in states.items() if state != "Z"} - {os.getpid()}


def attack(jobs, off):
    """In the jail: what passed, where the next job on the slot suffered, what was left running."""
    jobs = dict(jobs)
    with Sandbox(workers=2, cpu_s=1, wall_s=3, unsafe=True, off=off) as box:
        verdicts = box.run([j for a in jobs.values() for j in (a, GOOD)])
        left = len(living() - {slot.process.pid for slot in box.slots})
    passed = [name for name, v in zip(jobs, verdicts[::2]) if all(v["ok"])]
    hurt = [name for name, v in zip(jobs, verdicts[1::2]) if not all(v["ok"])]
    left += len(living())
    return dict(passed=passed, hurt=hurt, left=left, missing=box.missing, restarts=box.restarts)


def forgeries(off):
    jobs = {name: job(code, *STAND_FAST) for name, code in FORGERIES.items()}
    right = attack({"right": job("def f(x): return x + 1", *STAND_FAST)}, off)["passed"]
    return dict(attack(jobs, off), right=right)


def stored_attacks(groups, off):
    rows = json.loads((EXCERPTS / "attacks.json").read_text())
    rows = [row for row in rows if row["group"] in groups]
    jobs = {row["name"]: job(row["code"], *row["tests"], names=row["names"]) for row in rows}
    return attack(jobs, off)


def escapes(subsets):
    """In the jail: for each set of locks turned off, which ones closed and what happened."""
    prelude = "import ctypes, mmap, os, socket, threading\ndef f(): return bool("
    results = []
    for off in subsets:
        with Sandbox(workers=1, cpu_s=1, wall_s=2, unsafe=True, off=off) as box:
            happened = []
            for name, (expression, *_) in ESCAPES.items():
                before = box.restarts
                verdict = check(box, f"{prelude}{expression})", "assert f()")
                killed = "the judge died" if name == "kill the judge" else None
                if verdict["ok"] == [True] or verdict["why"] == killed or box.restarts > before:
                    happened.append(name)
            fine = all(box.run([job(DAEMON, "f(1)"), GOOD])[1]["ok"])
            left = len(living() - {slot.process.pid for slot in box.slots})
        on = [lock for lock in LOCKS if lock not in box.missing]
        results.append(dict(on=on, happened=happened, fine=fine, left=left))
    return results


@linux
@pytest.mark.parametrize("off", [[], [*{*LOCKS} - {"rlimits"}]], ids=["locked", "open"])
def test_no_forgery_passes_with_all_locks_closed_or_all_open(off):
    """rlimits stay: without them some of these programs would only use the machine up."""
    result = jail(forgeries, off)
    assert result["passed"] == result["hurt"] == [] and result["right"] == ["right"]
    assert result["left"] == 0 and set(off) <= set(result["missing"])


@linux
def test_no_stored_attack_passes():
    result = jail(
        stored_attacks, ["break out", "break the judge", "forge the verdict", "waste"], []
    )
    assert result["passed"] == result["hurt"] == [] and result["left"] == result["restarts"] == 0


@linux
def test_stored_attacks_on_the_verdict_fail_without_seccomp_landlock_and_setuid():
    groups, off = ["break the judge", "forge the verdict"], ["seccomp", "landlock", "setuid"]
    result = jail(stored_attacks, groups, off)
    assert result["passed"] == result["hurt"] == [] and result["left"] == 0


def some_subsets():
    some = "landlock", "seccomp", "rlimits", "capabilities non_dumpable"
    for closed in "", *some, " ".join(LOCKS):
        yield [lock for lock in LOCKS if lock not in closed.split()]


def all_subsets():
    return itertools.chain(*(itertools.combinations(LOCKS, n) for n in range(len(LOCKS) + 1)))


@linux
@pytest.mark.parametrize(
    "subsets", [some_subsets, pytest.param(all_subsets, marks=pytest.mark.slow)]
)
def test_each_escape_is_stopped_by_the_locks_of_the_table_and_by_no_other(subsets):
    subsets = [list(off) for off in subsets()]
    abi = sandbox.libc("syscall", 444, None, 0, 1)
    weaker = {"kill the zygote": 6, "kill the judge": 6, "listen on a port": 4}  # needs ABI
    for off, result in zip(subsets, jail(escapes, subsets, timeout=20 * len(subsets))):
        on = set(result["on"])
        assert not on & set(off) and result["fine"] and result["left"] == 0
        for name, (_, *alternatives) in ESCAPES.items():
            if abi < weaker.get(name, 0):
                alternatives = [a for a in alternatives if a != "landlock"]
            if name in ("fork", "start a thread", "start a program") and os.getuid() == 0:
                alternatives = [a for a in alternatives if a != "rlimits"]  # root may always fork
            stopped = any(set(a.split()) <= on for a in alternatives)
            if stopped:
                assert name not in result["happened"], (name, on)
            elif name not in restricted_here():
                assert name in result["happened"], (name, on)


def restricted_here():
    """What other locks of the machine may stop even where ours are off."""
    yield "run 32-bit calls" if platform.machine() != "x86_64" else ""
    yield "make a namespace"
    yama = Path("/proc/sys/kernel/yama/ptrace_scope")
    if yama.exists() and yama.read_text().strip() != "0":
        yield from ("open the judge's memory", "trace the judge")


@linux
def test_the_program_runs_as_nobody_when_root_starts_it(box):
    uid = 65534 if os.getuid() == 0 else os.getuid()
    assert check(box, "import os\nf = os.getuid", f"assert f() == {uid}")["ok"] == [True]


@linux
def test_it_refuses_to_run_without_seccomp_and_landlock_unless_told_to():
    with pytest.raises(ValueError, match="--unsafe-code"):
        Sandbox(workers=1, off=["seccomp", "landlock"])
    with pytest.warns(UserWarning, match="without landlock, seccomp") as caught:
        with Sandbox(workers=1, unsafe=True, off=["seccomp", "landlock"]) as box:
            verdict = dict(ok=[True] * 6, why="", missing=["landlock", "seccomp"])
            assert box.run([GOOD] * 3) == [verdict] * 3
    assert len(caught) == 1
    with pytest.raises(ValueError, match="no such lock: secomp"):
        Sandbox(off=["secomp"])


# ---- processes -----------------------------------------------------------------------------------


def descendants(pid):
    tasks = Path(f"/proc/{pid}/task").glob("*/children")  # a child belongs to a thread
    children = [child for task in tasks for child in task.read_text().split()]
    return [int(c) for c in children] + [d for c in children for d in descendants(c)]


def eventually(condition):
    """Wait until it is true: a busy machine may take its time."""
    deadline = time.monotonic() + 30
    while not (result := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return result


def gone(pids):
    return eventually(lambda: not living() & set(pids))


@linux
def test_a_dead_zygote_is_replaced_and_counted_and_its_job_run_again():
    with Sandbox(workers=1, cpu_s=2, wall_s=5) as box:
        assert all(box.run([GOOD])[0]["ok"]) and box.restarts == 0
        os.kill(box.slots[0].process.pid, signal.SIGKILL)
        assert all(box.run([GOOD])[0]["ok"]) and box.restarts == 1
        first = box.slots[0].process.pid
        slow = job("import time\ndef f(x): time.sleep(0.5); return x", "assert f(1) == 1")
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(box.run, [slow])
            assert eventually(lambda: descendants(first))
            os.kill(first, signal.SIGKILL)  # in the middle of a job
            assert all(running.result()[0]["ok"]) and box.restarts == 2


@linux
def test_a_stuck_zygote_is_replaced_and_counted(monkeypatch):
    monkeypatch.setattr(sandbox, "GRACE", 0.5)
    with Sandbox(workers=1, cpu_s=1, wall_s=0.5) as box:
        os.kill(stuck := box.slots[0].process.pid, signal.SIGSTOP)
        assert all(box.run([GOOD])[0]["ok"]) and box.restarts == 1
        assert gone([stuck])


@linux
def test_closing_ends_all_processes_even_in_the_middle_of_a_job():
    box = Sandbox(workers=2, cpu_s=5, wall_s=30)
    jobs = [job("import time\ntime.sleep(30)", "assert f()")] * 6
    zygotes = [slot.process.pid for slot in box.slots]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(box.run, jobs)
        assert eventually(lambda: sum(len(descendants(pid)) for pid in zygotes) == 4)
        pids = zygotes + [d for pid in zygotes for d in descendants(pid)]
        box.close()  # ends two zygotes, each with a worker and a judge
        with pytest.raises((CancelledError, RuntimeError)):
            running.result()
    assert len(pids) == 6 and gone(pids)
    box.close()


@linux
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_outlives_the_trainer_however_it_ends(sign):
    code = (
        "import sandbox, signal\nbox = sandbox.Sandbox(workers=2, wall_s=60)\n"
        "signal.signal(2, signal.default_int_handler)\n"  # a background job's ignores it
        "print('ready', flush=True)\n"
        "job = dict(code='import time; time.sleep(60)', names=[], before='', setup='')\n"
        "job['tests'] = ['1']\n"
        "with box: box.run([job] * 4)"
    )
    trainer = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert trainer.stdout.readline() == b"ready\n"
    assert eventually(lambda: len(descendants(trainer.pid)) == 6)
    pids = descendants(trainer.pid)
    trainer.send_signal(sign)
    trainer.communicate(timeout=30)
    assert gone(pids)


@linux
def test_it_works_beside_busy_threads_and_from_several_of_them_and_leaks_nothing(box):
    stop = threading.Event()
    busy = threading.Thread(target=lambda: all(not stop.is_set() for _ in itertools.count()))
    busy.start()
    counts = []
    try:
        for _ in range(3):
            with ThreadPoolExecutor(4) as callers:
                results = sum(callers.map(box.run, [[GOOD] * 5] * 4), [])
            assert len(results) == 20 and all(all(v["ok"]) for v in results)
            pids = ["self", *(slot.process.pid for slot in box.slots)]
            readable = pids if os.getuid() == 0 else pids[:1]  # a zygote hides its own
            counts.append([len(os.listdir(f"/proc/{pid}/fd")) for pid in readable])
            assert not any(descendants(pid) for pid in pids[1:])
    finally:
        stop.set()
        busy.join()
    assert counts[1] == counts[2] and box.restarts == 0


if __name__ == "__main__":  # inside the jail
    print(json.dumps(globals()[sys.argv[1]](*json.loads(sys.argv[2]))))
