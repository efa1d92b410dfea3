"""The command line on streams of other encodings, and on ones that nobody reads."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.pipelines import make_dit
from support.processes import run_python
from typer.testing import CliRunner

import cemq
from cemq.cli import app, make_printable

TREE = {"PYTHONPATH": str(Path(cemq.__file__).parents[1])}


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("█·▌ ▁▇ ━", "#.+ 17 -"),
        ("seven.png", "seven.png"),
        ("é🐈", r"\xe9\U0001f408"),
        ("\udcff", r"\udcff"),  # of a file's name that is no UTF-8
    ],
)
def test_what_an_encoding_does_not_have_is_printed_otherwise(text, printed):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    make_printable(stream)
    stream.write(text)
    stream.flush()
    assert stream.buffer.getvalue().decode() == printed


def test_what_an_encoding_has_stays():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    make_printable(stream)
    stream.write("█·é🐈\udcff")
    stream.flush()
    assert stream.buffer.getvalue().decode() == "█·é🐈\\udcff"
    make_printable(None)  # a closed stream


def test_one_line_stays_one_whatever_a_file_is_called():
    done = CliRunner().invoke(app, ["inspect", "a\nb\u2028\x1b[31m🐈é"])
    assert done.stderr == r"cemq: 'a\nb\u2028\x1b[31m🐈é' is not a cemq bundle: no such folder" + "\n"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    root = tmp_path_factory.mktemp("streams")
    make_dit().save_pretrained(root / "pipeline")
    (root / "labels.txt").write_text("1\n2\n3\n")
    cemq.quantize_and_schedule(
        str(root / "pipeline"), root / "bundle", calib=str(root / "labels.txt"), steps=4, budget=2, samples=1,
        planning_samples=1, effort="quick", solver="uniform", rectify="none", rounding="nearest", device="cpu",
    )  # fmt: skip
    return root / "bundle"


def test_inspect_prints_ascii_where_that_is_all_there_is(bundle):
    done = subprocess.run(
        [sys.executable, "-m", "cemq", "inspect", bundle], capture_output=True, timeout=300,
        env=os.environ | TREE | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"#" in done.stdout
    assert not done.stderr


def test_commands_that_read_files_wait_for_no_torch(bundle):
    code = """
import sys
from typer.testing import CliRunner
from cemq.cli import app
for command in ("inspect", "export", "verify"):
    done = CliRunner().invoke(app, [command, sys.argv[1]])
    assert done.exit_code == 0, done.output
print(sorted({"torch", "diffusers", "transformers"} & sys.modules.keys()))
"""
    assert run_python(code, bundle, **TREE) == "[]"


def test_a_reader_that_has_seen_enough_ends_the_command_without_a_word(bundle):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "cemq", "export", bundle], stdout=write, stderr=subprocess.PIPE, timeout=300,
        env=os.environ | TREE,
    )  # fmt: skip
    os.close(write)
    assert done.returncode == 1
    assert not done.stderr
