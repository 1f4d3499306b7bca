"""The README's pictures of the monitor, made from a run.

    python bench/pictures.py runs/NAME            # writes assets/*.png; needs rsvg-convert

With Pillow installed the files are a third as large: 256 colours.
Every picture is a frame of tui.py as it is on a terminal. The overview is the run as it was in the
middle of a rollout (the log up to there), the others show it at its end. The fonts of the machine
are used: DejaVu Sans Mono has all the characters.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import events  # noqa: E402
import tui  # noqa: E402


def load(path: Path) -> tui.Log:
    """A log as if looked at when its last event was a second old."""
    log = tui.Log(path, patience=0)
    log.clock = lambda: events.stamp(log.history.recent[-1]) + 1
    log.replayed = True  # whether that process still runs does not matter
    while log.poll():
        pass
    return log


def cut(path: Path, share: float, folder: str) -> Path:
    """A copy of a log that ends in the middle of the rollout about `share` of the way."""
    lines = path.read_bytes().splitlines(keepends=True)
    rollouts, this = [], []
    for i, line in enumerate(lines):
        if line.startswith(b'{"e":"denoise"'):
            this.append(i)
        elif this:
            rollouts, this = rollouts + [this], []
    middle = rollouts[int(share * (len(rollouts) - 1))]
    copy = Path(folder, "events.jsonl")
    copy.write_bytes(b"".join(lines[: middle[len(middle) * 3 // 5] + 1]))
    return copy


def picture(name: str, view: tui.View, size: tuple[int, int], folder: Path) -> None:
    svg = tui.svg(tui.frame(view, *size))
    target = folder / f"{name}.png"
    command = ["rsvg-convert", "--width", "2192", "-o", target]
    subprocess.run(command, input=svg.encode(), check=True)
    with contextlib.suppress(ImportError):
        from PIL import Image

        Image.open(target).quantize(256, Image.Quantize.FASTOCTREE).save(target, optimize=True)
    print(f"{target}  {target.stat().st_size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", help="run folder or events.jsonl")
    parser.add_argument("--out", type=Path, default=ROOT / "assets")
    parser.add_argument(
        "--share", type=float, default=0.6, help="how far into the run the overview is"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = tui.find(args.run)
    with tempfile.TemporaryDirectory() as folder:
        log = load(cut(path, args.share, folder))
        picture("overview", tui.View([log]), (120, 40), args.out)
    log = load(path)
    samples = log.history.samples
    late = [log.sample(it, s) for it in sorted(samples)[len(samples) // 2 :] for s in samples[it]]
    # the one from which training had most to learn
    sample = max((s for s in late if s and s.sel), key=lambda s: sum(map(abs, s.adv)))
    step = sorted(sample.sel)[len(sample.sel) // 2]
    view = tui.View([log], 3, sample.it, sample.s, step, follow=False)
    picture("trajectory", view, (120, 36 if sample.T > 24 else sample.T + 16), args.out)
    picture("entropy", tui.View([log], 2), (120, 40), args.out)
    picture("curves", tui.View([log], 5), (120, 40), args.out)


if __name__ == "__main__":
    main()
