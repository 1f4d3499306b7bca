"""What does the monitor cost? Runs tui.py in a real pseudo-terminal and prints one figure a line.

python bench/monitor.py            # about a minute
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import os
import pty
import re
import select
import signal
import struct
import sys
import tempfile
import termios
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import fake_run  # noqa: E402


class Session:
    """tui.py in a terminal of its own: what it prints, and what it costs."""

    def __init__(self, *args: str, size: tuple[int, int] = (120, 40), **environment: str):
        self.began, self.seen = time.time(), b""
        self.pid, self.file = pty.fork()
        if not self.pid:
            env = dict(os.environ, TERM="xterm-256color", COLORTERM="truecolor", LANG="C.UTF-8")
            env |= environment
            env.pop("CI", None)
            os.execve(sys.executable, [sys.executable, str(ROOT / "tui.py"), *args], env)
        fcntl.ioctl(self.file, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))

    def read(self, seconds: float, until: bytes | None = None) -> float:
        """Take output in for so long, or until all of `until` was seen; the seconds that took."""
        began = time.time()
        while time.time() - began < seconds:
            if select.select([self.file], [], [], 0.02)[0]:
                try:
                    self.seen += os.read(self.file, 1 << 16)
                except OSError:  # the program has ended
                    break
            if until and until in re.sub(rb"\x1b\[[\d;?<>=]*[A-Za-z]", b"", self.seen):
                break
        return time.time() - began

    def cpu(self) -> float:
        """Seconds of processor time so far."""
        words = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        """MiB resident."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def costs(self, seconds: float) -> tuple[float, float]:
        """(share of a processor, bytes a second) over the next seconds."""
        cpu, size = self.cpu(), len(self.seen)
        took = self.read(seconds)
        return (self.cpu() - cpu) / took, (len(self.seen) - size) / took

    def close(self, number: int = signal.SIGTERM) -> bytes:
        """End it, return everything it printed."""
        os.kill(self.pid, number)
        self.read(1)
        os.waitpid(self.pid, 0)
        os.close(self.file)
        return self.seen


def measure() -> dict[str, float]:
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        small = fake_run.write(Path(folder, "small"), iters=60)
        large = fake_run.write(Path(folder, "large"), iters=1300)
        session = Session(str(small))
        figures["first frame s"] = session.read(30, until=b"60/60")
        session.read(2)
        figures["MiB"] = session.memory()
        figures["idle cpu"], figures["idle bytes/s"] = session.costs(10)
        session.close()

        session = Session(str(large))
        figures["large log MB"] = large.stat().st_size / 1e6
        figures["first frame of the large log s"] = session.read(30, until=b"1300/1300")
        session.read(2)
        figures["MiB with the large log"] = session.memory()
        session.close()

        live = Path(folder, "live", "events.jsonl")
        live.parent.mkdir()
        events = enumerate(fake_run.events(iters=100, start=time.time(), name="live"))
        write = open(live, "ab", buffering=0).write
        for q, event in itertools.islice(events, 400):
            write(fake_run.encode(event | {"ts": time.time()}, q))
        session = Session(str(live))
        session.read(3)
        cpu, size, began = session.cpu(), len(session.seen), time.time()
        for q, event in itertools.islice(events, 150):
            write(fake_run.encode(event | {"ts": time.time()}, q))
            session.read(0.1)
        took = time.time() - began
        figures["tailing events/s"] = 150 / took
        figures["tailing cpu"] = (session.cpu() - cpu) / took
        figures["tailing KiB/s"] = (len(session.seen) - size) / took / 1024
        session.read(1)
        began, size = time.time(), len(session.seen)
        q, event = next((q, event) for q, event in events if event["e"] == "denoise")
        write(fake_run.encode(event | {"ts": time.time()}, q))
        while len(session.seen) == size and time.time() < began + 5:
            session.read(0.02)
        figures["event to screen s"] = time.time() - began
        session.close()
    return {name: float(f"{value:.3g}") for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON line")
    args, figures = parser.parse_args(), measure()
    if args.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:<32} {value:g}")


if __name__ == "__main__":
    main()
