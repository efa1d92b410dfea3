"""A pytest plugin: every call of a diffusers pipeline runs under a schedule that computes each of its steps.

For diffusers' own tests of its pipelines, run from a clone of it: whatever passes there must pass under cemq, too.
`docs/contributing.md` has the commands. With ``CEMQ_UNDER_SCHEDULE=0`` the calls are left as they are, for the list to
compare with. The small models and tokenizers that those tests fetch from the Hub are made here, so that most of them
run offline. How many calls ran under a schedule, and why others did not, is said at the end.

As a script it compares two files of ``--junitxml``, of runs without and with a schedule.
"""

from __future__ import annotations

import atexit
import functools
import inspect
import os
import shutil
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["HF_HUB_CACHE"] = tempfile.mkdtemp(prefix="cemq-hub-")  # before anything imports huggingface_hub
os.environ["HF_HUB_OFFLINE"] = "1"

import diffusers
import pytest
from support.families import t5, tokenizer, umt5

import cemq
from cemq.errors import CemqError

atexit.register(shutil.rmtree, os.environ["HF_HUB_CACHE"], ignore_errors=True)
CALLS: Counter[str] = Counter()
STAND_INS = {
    "hf-internal-testing/tiny-random-t5": lambda: (t5(), tokenizer("t5", 512)),
    "hf-internal-testing/tiny-random-umt5": lambda: (umt5(), tokenizer("t5", 512)),
    "hf-internal-testing/tiny-random-clip": lambda: (tokenizer("clip"),),
    "hf-internal-testing/tiny-random-Qwen2VLForConditionalGeneration": lambda: (tokenizer("qwen", 512),),
    "hf-internal-testing/dummy-gemma": lambda: (tokenizer("gemma", 512),),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": lambda: (tokenizer("llama", 512),),
}


def pytest_configure(config: pytest.Config) -> None:
    for name, make in STAND_INS.items():
        folder = Path(os.environ["HF_HUB_CACHE"], "models--" + name.replace("/", "--"))
        snapshot = folder / "snapshots" / "0"
        for part in make():
            part.save_pretrained(snapshot)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0")
    if os.environ.get("CEMQ_UNDER_SCHEDULE") != "0":
        for name in filter(lambda name: name.endswith("Pipeline"), dir(diffusers)):
            pipeline_class = getattr(diffusers, name)
            if "__call__" in vars(pipeline_class):
                pipeline_class.__call__ = _scheduled(pipeline_class.__call__)


def _scheduled(call: Any) -> Any:
    step_count = inspect.signature(call).parameters.get("num_inference_steps")

    @functools.wraps(call)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps = kwargs.get("num_inference_steps", getattr(step_count, "default", None))
        if not isinstance(steps, int) or steps < 1:
            CALLS["without: no step count"] += 1
            return call(self, *args, **kwargs)
        schedule = cemq.CacheSchedule(num_steps=steps, full_steps=tuple(range(steps)))
        try:
            hook = cemq.apply_schedule(self, schedule)
        except (CemqError, AttributeError) as refused:
            CALLS[f"without: {refused}"] += 1
            return call(self, *args, **kwargs)
        try:
            return call(self, *args, **kwargs)
        finally:
            CALLS["under a schedule" if hook.full_evaluations else "under a schedule that was never asked"] += 1
            cemq.detach(self)

    return __call__


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for what, count in CALLS.most_common():
        terminalreporter.write_line(f"under_schedule: {count} calls {what}")


def passed(report: Path) -> set[str]:
    cases = ElementTree.parse(report).iter("testcase")
    return {f"{case.get('classname')}::{case.get('name')}" for case in cases if not len(case)}


if __name__ == "__main__":
    without, under = (passed(Path(report)) for report in sys.argv[1:3])
    print(f"{len(without)} pass without a schedule, {len(without & under)} of these with one")
    if lost := sorted(without - under):
        raise SystemExit("\n".join(lost))
