"""Options and fixtures; what they are made of, and all else that tests share, is in ``support``."""

from __future__ import annotations

from support.pipelines import make_dit, make_flux  # first, for then nothing asks a hub

# isort: split
import os

import pytest
import torch
from diffusers import DiTPipeline, DPMSolverMultistepScheduler, FluxPipeline

from cemq.pipelines.opening import locate, open_pipeline


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="Run the tests marked slow too.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Of every process: tests run side by side on all cores, and threads that wait for each other spin."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture
def dit() -> DiTPipeline:
    return make_dit()


@pytest.fixture
def dit_multistep() -> DiTPipeline:
    return make_dit(DPMSolverMultistepScheduler())


@pytest.fixture
def flux() -> FluxPipeline:
    return make_flux()


@pytest.fixture
def digits() -> DiTPipeline:
    """The trained class-conditional pipeline that ships with cemq."""
    pipe = open_pipeline(locate("builtin:dit-digits").folder, dtype="float32", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def dit_folder(tmp_path):
    folder = tmp_path / "pipeline"
    make_dit().save_pretrained(folder)
    return folder


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
