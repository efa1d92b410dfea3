"""Everything that is measured on a GPU, in one call of under ten minutes: ``python docs/benchmarks/gpu.py``.

Parts, in the order in which they run; ``--parts`` picks some of them:

* machine: the device's rates on large products and copies
* correctness: the tests that need a GPU, and layers, streams, graphs and placements against an exact reference
* steps: one block and one full step at the shapes of large models, bfloat16 against W8A8, W4A8, fp8, eager and compiled
* linears: single layers, every kernel that cemq chooses from, and those of other libraries
* skipping: a FLUX-size pipeline, 28 steps in full and 10 of them
* vram: the same under 8, 12, 16 and 24 GiB
* rounding: seconds to round one FLUX block, and to fit it by GPTQ
* building: a whole build of a built-in model beside the CPU's

A part runs in a process of its own and has a limit of seconds; a case that fails, crashes or hangs is a row that says
so, and the next one goes on. Every row is written down at once, to ``--output`` (gpu/DATE-DEVICE.json beside this file
if it is left out), and a page is drawn beside it. A file that is there keeps the parts that are not run. All weights
are random and nothing is downloaded; gpu_wheels.txt lists what is needed beside CUDA builds of torch and Triton.
``--tiny`` runs every part at the size of a toy, on a CPU too, in two minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_page import draw

if TYPE_CHECKING:
    from gpu_parts import Setting

HERE = Path(__file__).parent
TOTAL = 590  # seconds
SILENCE = 60  # seconds; compiling a step takes most of them
PATIENCE = 10  # times as long for a toy: it may share a slow CPU with others


@dataclass(frozen=True, kw_only=True)
class Part:
    """Seconds it may take, and whether every case needs a process of its own."""

    seconds: int
    alone: bool = False


PARTS = {
    "machine": Part(seconds=25),
    "correctness": Part(seconds=150),
    "steps": Part(seconds=180),
    "linears": Part(seconds=75),
    "skipping": Part(seconds=60),
    "vram": Part(seconds=90, alone=True),
    "rounding": Part(seconds=20),
    "building": Part(seconds=40),
}


# --- the process of a part


def run_part(name: str, first: int, device: str, tiny: bool, scratch: Path) -> None:
    """`run_cases` as a process: says on stdout what happens, a line of JSON each."""
    said = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print

    def say(**event: Any) -> None:
        print(json.dumps(event, default=str), file=said, flush=True)

    import diffusers
    import torch
    import transformers
    from gpu_parts import Setting

    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    torch.set_grad_enabled(False)
    run_cases(name, Setting(device=torch.device(device), tiny=tiny, scratch=scratch), first, say)


def run_cases(name: str, setting: Setting, first: int, say: Callable[..., None]) -> None:
    """Run the cases of a part from the ``first`` on, and tell ``say`` of each that it begins, its rows and its end.

    Ends after a case that must have been alone, or that has left the device unusable.
    """
    import torch

    from cemq.errors import first_line

    cases = importlib.import_module(f"gpu_parts.{name}").cases(setting)
    for index, case in enumerate(cases[first:], first):
        say(case=index, labels=case.labels)
        try:
            for row in case.measure():
                say(row=case.labels | row)
        except Exception as error:  # whatever libraries raise
            say(row=case.labels | {"failed": f"{type(error).__name__}: {first_line(error)}"})
            error.__traceback__ = None  # which would keep its tensors
        say(finished=index)
        if PARTS[name].alone or not usable(setting):
            return
        gc.collect()
        if "torch._dynamo" in sys.modules:  # else it takes seconds to import
            torch.compiler.reset()
        if setting.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    say(done=True)


def usable(setting: Setting) -> bool:
    """False once an illegal access has broken the process's context: everything fails from there on."""
    try:
        setting.synchronize()
    except RuntimeError:
        return False
    return True


# --- the driver


def measure(
    name: str, part: dict[str, Any], options: argparse.Namespace, scratch: Path, limit: float, save: Any
) -> None:
    """Fill a part's rows, by as many processes as it takes, until it is done or the limit is over."""
    deadline, first, done = time.monotonic() + limit, 0, False
    log = scratch / f"{name}.log"
    while not done:
        command = [sys.executable, __file__, "--run", name, str(first), options.device, str(scratch)]
        with log.open("w") as errors:
            process = subprocess.Popen(
                command + ["--tiny"] * options.tiny, stdout=subprocess.PIPE, stderr=errors, text=True,
                start_new_session=True,
            )  # fmt: skip
        labels, running, reached = {}, False, first
        with Watch(process, deadline) as watch:
            watch.allow(limit)  # importing everything is no silence
            for line in process.stdout:
                if not line.endswith("\n"):  # killed while it spoke
                    break
                watch.allow(options.silence)
                event = json.loads(line)
                if "row" in event:
                    part["rows"].append(event["row"])
                    save()
                elif "case" in event:
                    labels, running, reached = event["labels"], True, event["case"] + 1
                running &= "finished" not in event
                done |= "done" in event
            code = process.wait()
        if not done and time.monotonic() >= deadline:
            part["stopped"] = {"after_seconds": round(limit), "at": labels}
            return
        if not done and reached == first:  # not even one case was begun
            part["failed"] = f"exit code {code}: {last_line(log)}"
            return
        if running:
            ended = f"the process ended with {code}: {last_line(log)}"
            silent = f"stopped after {options.silence:g} s in which it said nothing"
            part["rows"].append(labels | {"failed": silent if watch.killed else ended})
            save()
        first = reached


class Watch:
    """Kills a process, and what it has started, that says nothing for too long, or that is left running at the end."""

    def __init__(self, process: subprocess.Popen, deadline: float):
        self.process, self.deadline, self.killed = process, deadline, False
        self.timer: threading.Timer | None = None

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: object) -> None:
        if self.timer:
            self.timer.cancel()
        kill(self.process)

    def allow(self, seconds: float) -> None:
        """From now on, and no later than the deadline."""
        if self.timer:
            self.timer.cancel()
        self.timer = threading.Timer(max(0.0, min(seconds, self.deadline - time.monotonic())), self._give_up)
        self.timer.daemon = True
        self.timer.start()

    def _give_up(self) -> None:
        self.killed = True
        kill(self.process)


def kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "nothing was said"


def write(path: Path, text: str) -> None:
    """Never half of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def default_output(tiny: bool) -> Path:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    name = re.sub(r"[^A-Za-z0-9]+", "-", device.removeprefix("NVIDIA ")).strip("-")
    return HERE / "gpu" / f"{datetime.date.today().isoformat()}-{name}{'-tiny' if tiny else ''}.json"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--device", help="cuda where there is one; cpu needs --tiny")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="for all parts together (%(default)s)")
    parser.add_argument("--stretch", type=float, help="times the limit of each part (1; a toy's 10)")
    parser.add_argument("--silence", type=float, help="seconds without a word that a case may take (60; a toy's 600)")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.run:
        name, first, device, scratch = options.run
        run_part(name, int(first), device, options.tiny, Path(scratch))
        return
    started, parts = time.monotonic(), options.parts.split(",")
    if unknown := [name for name in parts if name not in PARTS]:
        parser.error(f"no part is called {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    import torch

    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cpu" and not options.tiny:
        parser.error("no CUDA device here: --tiny runs every part at the size of a toy on a CPU")
    output = options.output or default_output(options.tiny)
    record = json.loads(output.read_text()) if output.exists() else {"parts": {}}
    record["tiny"] = options.tiny

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and end what runs, as after Ctrl-C
    patience = PATIENCE if options.tiny else 1
    stretch, total = options.stretch or patience, options.seconds * patience
    options.silence = options.silence or SILENCE * patience

    def save() -> None:
        write(output, json.dumps(record, indent=1) + "\n")

    with tempfile.TemporaryDirectory(dir=roomy()) as scratch:
        for name in parts:
            left = total - (time.monotonic() - started)
            part = {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "rows": []}
            record["parts"][name] = part
            before = time.monotonic()
            if left > 0:
                limit = min(left, stretch * PARTS[name].seconds)
                measure(name, part, options, Path(scratch), limit, save)
            else:
                part["failed"] = f"not begun: {total:g} seconds were over"
            part["seconds"] = round(time.monotonic() - before, 1)
            save()
            failed = sum("failed" in row for row in part["rows"])
            print(
                f"{name}: {part['seconds']} s, {len(part['rows'])} rows, {failed} failed",
                *filter(None, [part.get("failed"), "stopped" if "stopped" in part else ""]),
                flush=True,
            )
    write(output.with_suffix(".md"), draw(record))
    print(output)


def roomy() -> str | None:
    """A folder in memory for the scratch files, where there is one with room for a FLUX."""
    import shutil

    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > 50 << 30 else None


if __name__ == "__main__":
    main(sys.argv[1:])
