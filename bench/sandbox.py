"""What does it cost to judge a program, and does anything leak?

    python bench/sandbox.py [--programs 10000] [--data-dir DIR]

Prints programs a second and CPU a program (trainer, zygote, worker and judge together), each also
as a ratio to a bare `python -I -S -c pass` timed just before it in the same run, so that the
figures of a busy machine compare with those of an idle one. With --data-dir it judges HumanEval's
references too. Then --programs programs, one in ten of them hostile. Exits 1 if a reference fails,
or if a process or a descriptor is left over. (Both sets' references, and programs that return None:
bench/calibrate.py.)
"""

import argparse
import gzip
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
from sandbox import Sandbox


def job(code: str, *tests: str) -> dict:
    return dict(code=code, names=["f"], before="", setup="", tests=list(tests))


TRIVIAL = job("def f(x):\n    return x + 1", "assert f(1) == 2", "assert f(-1) == 0")
HOSTILE = [
    job(code, "assert f(1) == 2")
    for code in (
        "import os; os._exit(0)",
        "import os\nos.closerange(0, 99)",
        "import ctypes; ctypes.string_at(0)",
        "import os\ndef f(x): return os.fork()",
        "def f(x): return [f] * 1000",
        "f = (",
        "def f(x): return f(x)",
        "import os\ndef f(x): os.kill(os.getppid(), 9)",
        "import os\nos.write(3, b'\\xff' * 9)",
        "def f(x): return bytearray(1 << 31)",
    )
]


def humaneval(folder: Path) -> list[dict]:
    jobs = []
    for line in gzip.open(folder / "HumanEval.jsonl.gz", "rt"):
        row = json.loads(line)
        jobs.append(job(row["prompt"] + row["canonical_solution"], f"check({row['entry_point']})"))
        jobs[-1].update(names=[row["entry_point"]], before=row["prompt"], setup=row["test"])
    return jobs


def cpu_seconds(pids: list[int]) -> float:
    """Of this process and of `pids`, the children that they have waited for included."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += sum(map(int, fields[11:15]))
    return own.ru_utime + own.ru_stime + ticks / os.sysconf("SC_CLK_TCK")


def bare(n: int = 50) -> float:
    """CPU seconds of an interpreter that does nothing: the price of one process per program."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in range(n):
        subprocess.run([sys.executable, "-I", "-S", "-c", "pass"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / n


def throughput(box: Sandbox, label: str, jobs: list[dict]) -> bool:
    """Print it; whether all programs pass."""
    interpreter = bare()
    pids = [slot.process.pid for slot in box.slots]
    cpu, wall = cpu_seconds(pids), time.perf_counter()
    verdicts = box.run(jobs)
    wall, cpu = time.perf_counter() - wall, (cpu_seconds(pids) - cpu) / len(jobs)
    passed = sum(all(verdict["ok"]) for verdict in verdicts)
    print(
        f"{label}: {passed}/{len(jobs)} pass, {len(jobs) / wall:.0f} programs/s, "
        f"{1e3 * cpu:.1f} ms CPU a program = {cpu / interpreter:.2f} x a bare python -I -S "
        f"({1e3 * interpreter:.1f} ms)",
        flush=True,
    )
    return passed == len(jobs)


def living(pids: list[int]) -> list[int]:
    """All descendants of `pids`, zombies too."""
    found = []
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            found += map(int, task.read_text().split())
    return found + living(found) if found else []


def descriptors(pids: list[int]) -> int:
    """Open files of this process, and of `pids` where /proc may be read (root only: they hide)."""
    count = 0
    for pid in ["self", *pids]:
        try:
            count += len(os.listdir(f"/proc/{pid}/fd"))
        except PermissionError:
            pass
    return count


def leaks(box: Sandbox, n: int) -> bool:
    mixed = itertools.cycle([*[TRIVIAL] * 9, None])
    hostile = itertools.cycle(HOSTILE)
    jobs = [job or next(hostile) for job in itertools.islice(mixed, n)]
    pids = [slot.process.pid for slot in box.slots]
    before = descriptors(pids)
    wall = time.perf_counter()
    wrong = sum(all(v["ok"]) is not (j is TRIVIAL) for j, v in zip(jobs, box.run(jobs)))
    wall = time.perf_counter() - wall
    left, after = living(pids), descriptors(pids)
    status = [Path(f"/proc/{pid}/status").read_text() for pid in pids]
    memory = [int(text.split("VmRSS:")[1].split()[0]) / 1024 for text in status]
    print(
        f"{n} programs, one in ten hostile, in {wall:.0f} s: {wrong} wrong verdicts, "
        f"{box.restarts} restarts, {len(left)} processes left, descriptors {before} before and "
        f"{after} after, {max(memory):.0f} MB a zygote",
        flush=True,
    )
    return bool(wrong or left or after > before or box.restarts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", type=int, default=10_000)
    parser.add_argument("--data-dir", type=Path, help="a folder with HumanEval.jsonl.gz")
    args = parser.parse_args()
    workers = data.cores()
    with Sandbox(workers) as box:
        python = sys.version.split()[0]
        print(f"Python {python}, {workers} workers, missing: {box.missing or 'none'}", flush=True)
        box.run([TRIVIAL] * 20)
        fine = throughput(box, "trivial programs", [TRIVIAL] * 500)
        if args.data_dir:
            fine &= throughput(box, "HumanEval's references", humaneval(args.data_dir))
        fine &= not leaks(box, args.programs)
    left = living(["self"])
    print(f"{len(left)} processes left after closing")
    return int(not fine or bool(left))


if __name__ == "__main__":
    sys.exit(main())
