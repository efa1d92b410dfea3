"""What ships, and what importing costs."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import cemq
from cemq.pipelines.opening import BUILTINS, locate

ROOT = Path(__file__).parents[1]


def test_every_public_name_can_be_had():
    for name in cemq.__all__:
        assert getattr(cemq, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = cemq.nothing


def test_evaluate_stays_a_function_whatever_was_imported_before():
    code = "import cemq.evaluation.report, cemq.build, cemq; assert callable(cemq.evaluate)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_built_in_models_are_small_and_hold_no_pickle():
    files = [path for name in BUILTINS for path in locate(f"builtin:{name}").folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 14e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt"}


def test_the_wheel_holds_models_recipes_and_calibration_texts():
    wheels = sorted((ROOT / "dist").glob("*.whl"))
    if not wheels:
        pytest.skip("no wheel built: `make wheel`")
    names = set(zipfile.ZipFile(wheels[-1]).namelist())
    for wanted in (
        "cemq/builtin/dit-digits/transformer/diffusion_pytorch_model.safetensors",
        "cemq/builtin/sd3-digits/tokenizer/tokenizer_config.json",
        "cemq/recipes/dit-digits.yaml",
        "cemq/calib_data/prompts.txt",
    ):
        assert wanted in names
    assert wheels[-1].stat().st_size < 14e6


def test_the_docs_link_only_to_files_that_are_there():
    import re

    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+\.\w+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
