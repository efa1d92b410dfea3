"""One thread draws, one loads pipelines of other dtypes, one plans, in one process: a server's day, in seconds."""

import threading
import time

import numpy as np
import pytest
import torch
from support.checks import draw, few_steps, plain_run, quantized
from support.families import FAMILIES
from support.priors import prior_of

from cemq.pipelines.opening import open_pipeline
from cemq.runtime import attach
from cemq.schedule import plan_schedule

DTYPES = ("bfloat16", "float16", "float32")


@pytest.fixture
def drawn():
    """Pipelines of both schemes that skip steps, and the picture that each draws when it is alone."""
    found = []
    for name, scheme in (("dit", "w8a8"), ("flux", "w4a8")):
        pipe = quantized(FAMILIES[name], scheme)
        _, trajectory = plain_run(pipe, FAMILIES[name])
        attach(pipe, few_steps(trajectory), trajectory.sampler)
        found.append((pipe, FAMILIES[name], draw(pipe, FAMILIES[name])))
    return found


@pytest.mark.parametrize("seconds", [3, pytest.param(600, marks=pytest.mark.slow)])
def test_no_picture_changes_while_others_load_and_plan(drawn, seconds, tmp_path):
    for name in ("dit", "flux"):
        FAMILIES[name].pipeline().save_pretrained(tmp_path / name)
    v = np.random.default_rng(0).normal(size=(60, 100)).cumsum(0)
    prior = prior_of(v + 0.1, v)
    expected_plan = plan_schedule(prior, budget=15)
    done, failures, end = dict.fromkeys(("draw", "load", "plan"), 0), [], time.monotonic() + seconds

    def draw_all():
        for pipe, family, picture in drawn:
            assert np.array_equal(draw(pipe, family), picture), f"{family.name} draws another picture"

    def load():
        name, dtype = ("dit", "flux")[done["load"] % 2], DTYPES[done["load"] % 3]
        pipe = open_pipeline(tmp_path / name, dtype=dtype, device="cpu")
        assert {p.dtype for p in pipe.transformer.parameters()} == {getattr(torch, dtype)}

    def plan():
        assert plan_schedule(prior, budget=15) == expected_plan

    def repeat(task):
        try:
            while time.monotonic() < end and not failures:
                task()
                done[task.__name__.partition("_")[0]] += 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=repeat, args=(task,)) for task in (draw_all, load, plan)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    assert all(done.values()), done
    print(f"rounds in {seconds} s: {done}")
