"""The docs: whole, reachable, and true where a program can tell."""

import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from typer.main import get_command

import cemq
from cemq.cli import app
from cemq.errors import ModelError
from cemq.pipelines.batches import Batch, run
from cemq.predict.predictors import PREDICTORS, serving_matrix
from cemq.quantize import BACKENDS, SCHEMES, NativeLinear
from cemq.quantize.coded import CodedLinear
from cemq.quantize.kernels import KERNELS, choices
from cemq.quantize.layers import use_kernel
from cemq.recipe import Recipe
from cemq.runtime import schedule_hook
from cemq.runtime.policies import POLICIES
from cemq.runtime.policy_names import parse_policy

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [ROOT / "README.md", *PAGES]
OF_TODAY = [page for page in TEXTS if page.name != "changelog.md"]  # which names what has been renamed and removed
COMMANDS = get_command(app).commands
FILE = re.compile(r"(?<![\w./-])(?:cemq|docs|tests|recipes|calib_data)/[\w./-]+\.(?:py|md|yaml|txt|toml)\b")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.S | re.M)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def section(page: str, heading: str) -> str:
    """What stands under a heading of the second level, to the next."""
    text = read(DOCS / page)
    assert f"\n## {heading}\n" in text, f"{page} has no heading {heading!r}"
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def options_of(command: str) -> set[str]:
    parameters = [each for each in COMMANDS[command].params if each.param_type_name == "option" and not each.hidden]
    return {name for each in parameters for name in (*each.opts, *each.secondary_opts)} | {"-h", "--help"}


def anchors(path: Path) -> set[str]:
    """What headings of a page are linked to by; doubled ones, which get a number, are left out."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", read(path)), flags=re.M)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def pages_of(entry: object) -> Iterator[str]:
    """The files that a part of the navigation names."""
    if isinstance(entry, str):
        yield entry
        return
    for part in entry.values() if isinstance(entry, dict) else entry:
        yield from pages_of(part)


def examples(page: str, heading: str) -> list[str]:
    return [code for language, code in FENCE.findall(section(page, heading)) if language == "python"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_every_option_is_on_the_page_of_the_command_line(name):
    shown = section("cli.md", f"cemq {name}")
    heads = re.findall(r"^  (-.*?)(?:  |$)", shown, flags=re.M)
    assert {option for head in heads for option in re.findall(r"(?<!\S)--?[\w-]+", head)} == options_of(name)
    for argument in COMMANDS[name].params:
        assert argument.param_type_name == "option" or f"\n  {argument.metavar} " in shown
    assert f"Example: cemq {name}" in " ".join(shown.split())


def test_the_page_of_the_command_line_is_what_help_prints():
    pinned = re.search(r"^typer==(.+)$", read(ROOT / "constraints.txt"), flags=re.M)[1]
    if version("typer") != pinned:
        pytest.skip(f"typer {pinned} lays out the page, this is {version('typer')}")
    done = subprocess.run([sys.executable, DOCS / "cli.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_on_the_page_of_the_api():
    listed = re.findall(r"^::: (\S+)$", read(DOCS / "api.md"), flags=re.M)
    public = [getattr(cemq, name) for name in cemq.__all__ if name != "__version__"]
    assert sorted(listed) == sorted(f"{each.__module__}.{each.__qualname__}" for each in public)
    assert "`cemq.__version__`" in read(DOCS / "api.md")


def test_every_public_name_says_what_it_is():
    public = {name: getattr(cemq, name) for name in cemq.__all__ if name != "__version__"}
    assert [name for name, value in public.items() if not value.__doc__] == []


def test_every_page_is_in_the_navigation_once():
    navigation = yaml.safe_load(read(DOCS / "site" / "mkdocs.yml"))["nav"]
    assert sorted(pages_of(navigation)) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_every_link_leads_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", read(page)))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        found = page.parent / file if file else page
        assert found.is_file(), f"{target}: no such file"
        assert not anchor or anchor in anchors(found), f"{target}: no such heading"


@pytest.mark.parametrize("page", OF_TODAY, ids=name_of)
def test_every_module_name_and_file_that_is_named_exists(page):
    text = read(page)
    for path in FILE.findall(text):
        assert (ROOT / path).is_file(), path
    for path, name in re.findall(r"`(cemq/[\w/]+\.py)`, `(\w+)`", text):
        assert re.search(rf"^(?:def |class )?{name}\b", read(ROOT / path), flags=re.M), f"{path} has no {name}"
    for dotted in re.findall(r"(?<![\w./])cemq(?:\.\w+)+", text):
        if dotted.rpartition(".")[2] not in ("json", "yaml"):
            pkgutil.resolve_name(dotted)


@pytest.mark.parametrize("page", OF_TODAY, ids=name_of)
def test_every_command_that_is_shown_can_be_given(page):
    text = read(page)
    lines = [line for _, block in FENCE.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    shown = [line.partition("#")[0] for line in (*lines, *re.findall(r"`([^`\n]+)`", FENCE.sub("", text)))]
    for line in shown:
        if given := re.match(r"\s*(?:Example: |.* -m )?cemq ([a-z][\w-]*)\b(.*)", line):
            command, arguments = given.groups()
            assert command in COMMANDS, line
            assert set(re.findall(r"(?<!\S)--?[a-z][\w-]*", arguments)) <= options_of(command), line


def test_the_schedule_of_ones_own_runs_as_shown(dit, tmp_path, monkeypatch, capsys):
    run, predict = examples("extending.md", "A schedule of your own")
    calls, named = [], {"pipe": dit, "prompt": [1]}
    dit.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    exec(run, named)
    assert len(calls) == len(named["early"].full_steps) == 7
    with pytest.raises(ModelError, match="no cemq schedule is attached"):
        schedule_hook(dit)
    ones = np.ones((50, 50))
    prior = cemq.ErrorPrior(qq=1.25 * ones, qv=ones, vv=ones, step_sizes=np.ones(50))
    (tmp_path / "digits").mkdir()
    prior.save(tmp_path / "digits" / "prior.safetensors")
    monkeypatch.chdir(tmp_path)
    exec(predict, named)
    assert capsys.readouterr().out == f"{prior.final_error(named['early'].served)}\n"


def test_the_predictor_of_ones_own_serves_as_shown():
    (code,) = examples("extending.md", "A predictor")
    try:
        exec(code, {})
        served = serving_matrix(6, (0, 3), ("mean-of-two", "mean-of-two"))
    finally:
        PREDICTORS.pop("mean-of-two", None)
    assert served[1].tolist() == [1, 0, 0, 0, 0, 0]
    assert served[5].tolist() == [0.5, 0, 0, 0.5, 0, 0]


def test_the_policy_of_ones_own_decides_as_shown(dit):
    (code,) = examples("extending.md", "A policy")
    try:
        exec(code, {"pipe": dit, "__name__": "mine"})
        run(dit, Batch(conditions=(1,), seeds=(1,)), steps=7, call={})
        assert schedule_hook(dit).steps_run == (7, 3)
        assert parse_policy("every-nth:n=3") == schedule_hook(dit).run.policy
    finally:
        POLICIES.pop("every-nth", None)


def test_the_number_format_of_ones_own_stores_as_shown():
    (code,) = examples("extending.md", "A number format")
    names = ("w8a16-e4m3", "w8a8-e4m3")
    try:
        exec(code, {})
        layer = CodedLinear.from_linear(torch.nn.Linear(48, 32), SCHEMES[names[1]])
        values = torch.randn(64, 48)
        assert layer.integers.dtype == torch.uint8
        assert layer(values).isfinite().all()
    finally:
        for name in names:
            SCHEMES.pop(name, None)
            BACKENDS["native"].layers.pop(name, None)


def test_the_kernel_of_ones_own_multiplies_as_shown():
    (code,) = examples("extending.md", "A kernel")
    try:
        exec(code, {})
        for scheme in ("w8a8", "w4a8"):
            layer, values = NativeLinear.from_linear(torch.nn.Linear(48, 32), SCHEMES[scheme]), torch.randn(64, 48)
            use_kernel([layer], "cpu")
            expected = layer(values)
            use_kernel([layer], "floats")
            assert torch.allclose(layer(values), expected, rtol=1e-5, atol=1e-5)
            (made, *_) = (each for each in choices().made() if each.asked == "floats")
            assert made.choice.kernel == "floats"
    finally:
        KERNELS.pop("floats", None)
        choices().reset()


def test_every_kernel_is_in_the_table():
    rows = re.findall(r"^\| `([\w-]+)` \|", section("quantization.md", "Speed"), flags=re.M)
    assert rows == list(KERNELS)


def test_every_option_of_a_build_is_explained():
    page = read(DOCS / "options.md")
    described = [name for name, field in Recipe.model_fields.items() if field.description]
    assert [name for name in described if f"`--{name.replace('_', '-')}`" not in page] == []
