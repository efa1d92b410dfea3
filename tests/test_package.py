"""What ships, and what importing costs."""

import ast
import importlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from types_check import faults, judged

import cemq
from cemq.pipelines.opening import BUILTINS, locate

ROOT = Path(__file__).parents[1]


def test_every_public_name_can_be_had():
    for name in cemq.__all__:
        assert getattr(cemq, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = cemq.nothing


def test_editors_see_every_public_name_where_it_lives():
    module = ast.parse(Path(cemq.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in module.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.asname or alias.name: line.module for line in block.body for alias in line.names}
    assert sorted(cemq.__all__) == sorted({"__version__", *seen})
    for name, home in seen.items():
        assert getattr(cemq, name) is getattr(importlib.import_module(home), name)
    assert (Path(cemq.__file__).parent / "py.typed").is_file()


def report_of(*known):
    symbols = [{"name": f"cemq.n{n}", "isExported": True, "isTypeKnown": each} for n, each in enumerate(known)]
    counts = {"withKnownType": sum(known), "withAmbiguousType": 0, "withUnknownType": len(known) - sum(known)}
    score = sum(known) / len(known) if known else 0.0
    return {"typeCompleteness": {"completenessScore": score, "exportedSymbolCounts": counts, "symbols": symbols}}


def test_the_share_of_known_types_is_judged_and_what_is_unknown_named():
    said, enough = judged(report_of(*[True] * 19, False))
    assert enough
    assert said == "not wholly known: cemq.n19\ntypes of 19 of 20 public names are known: 95.0%"
    assert not judged(report_of(*[True] * 18, False, False))[1]
    assert judged(report_of()) == ("no public names found: is cemq/py.typed there?", False)


def fault_at(line, **more):
    place = {"file": "/repo/cemq/a.py", "range": {"start": {"line": line, "character": 0}}}
    return place | {"severity": "error", "message": "no int", "rule": "reportArgumentType"} | more


def test_what_a_type_checker_finds_is_said_line_by_line_and_nothing_checked_is_no_success():
    report = {"generalDiagnostics": [fault_at(2), fault_at(4, rule=None)], "summary": {"filesAnalyzed": 7}}
    del report["generalDiagnostics"][1]["rule"]
    said, clean = faults(report, Path("/repo"))
    assert not clean
    assert said.splitlines() == [
        "cemq/a.py:3: no int (reportArgumentType)", "cemq/a.py:5: no int (error)", "2 type errors in 7 files",
    ]  # fmt: skip
    assert faults({"generalDiagnostics": [], "summary": {"filesAnalyzed": 7}}) == ("0 type errors in 7 files", True)
    assert not faults({"generalDiagnostics": [], "summary": {"filesAnalyzed": 0}})[1]


@pytest.mark.slow  # no public name is that of a folder by now, and this waits for all imports
def test_evaluate_stays_a_function_whatever_was_imported_before():
    code = "import cemq.evaluation.report, cemq.build, cemq; assert callable(cemq.evaluate)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_built_in_models_are_small_and_hold_no_pickle():
    files = [path for name in BUILTINS for path in locate(f"builtin:{name}").folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 45e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt"}


def test_the_wheel_holds_models_recipes_calibration_texts_and_the_mark_of_types():
    wheels = sorted((ROOT / "dist").glob("*.whl"))
    if not wheels:
        pytest.skip("no wheel built: `make wheel`")
    names = set(zipfile.ZipFile(wheels[-1]).namelist())
    for wanted in (
        "cemq/builtin/dit-digits/transformer/diffusion_pytorch_model.safetensors",
        "cemq/builtin/sd3-digits/tokenizer/tokenizer_config.json",
        "cemq/builtin/emoji/card.json",
        "cemq/builtin/emoji/text_encoder_2/model.safetensors",
        "cemq/builtin/moving-digits/vae/diffusion_pytorch_model.safetensors",
        "cemq/recipes/dit-digits.yaml",
        "cemq/calib_data/prompts.txt",
        "cemq/evaluation/page.html.jinja",
        "cemq/evaluation/play.html.jinja",
        "cemq/evaluation/look.css.jinja",
        "cemq/py.typed",
    ):
        assert wanted in names
    assert wheels[-1].stat().st_size < 45e6


def test_pre_commit_lints_with_the_pinned_ruff():
    pinned = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ruff==")]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["additional_dependencies"] for hook in hooks] == [pinned, pinned]
