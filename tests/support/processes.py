"""Fresh interpreters, and what several processes draw together and a test draws alone."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import torch

import cemq
from cemq.schedule import CacheSchedule
from support.pipelines import FLUX_CALL, STEPS, make_flux

SHARED_SCHEDULE = CacheSchedule(num_steps=STEPS, full_steps=(0, 2, 4), predictor="taylor1")


def run_python(code: str, *arguments: object, **variables: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def quantized_flux():
    pipe = make_flux()
    cemq.quantize_in_place(pipe.transformer, cemq.CemqConfig("w8a8"))
    return pipe


def draw_shared(pipe) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return pipe("a seven", num_inference_steps=STEPS, generator=generator, output_type="np", **FLUX_CALL).images
