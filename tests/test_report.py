"""The page of HTML: whole by itself, true to `evaluate`, and there for every kind of bundle and of sample."""

import base64
import dataclasses
import hashlib
import io
import json
import math
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support.pipelines import CALL, save_dit
from typer.testing import CliRunner

import cemq
from cemq.bundle.manifest import read_bundle
from cemq.cli import app
from cemq.errors import BundleError, InputError
from cemq.evaluation.charts import Axis, Chart, as_colours
from cemq.evaluation.compare import run_both
from cemq.evaluation.page import curve_chart, page_of, render, rival_chart, samples_of, trial_chart, worst_first
from cemq.evaluation.report import describe
from cemq.evaluation.rivals.comparison import Comparison
from cemq.evaluation.rivals.contest import Row
from cemq.pipelines.batches import Batch
from cemq.prior.error_prior import ErrorPrior
from cemq.runtime.runner import Outcome

STEPS, SAMPLES = 6, 4
VOID = {"meta", "link", "img", "input", "source", "br", "hr"}


class Parsed(HTMLParser):
    """Every element's name and attributes, and the text; raises where one is closed that is not open."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self._open = [], "", []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] not in ("style", "script"):
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def built(folder, name, **settings):
    common = {
        "scheme": "w8a8",
        "calib": str(folder / "labels.txt"),
        "steps": STEPS,
        "call": CALL,
        "device": "cpu",
        "rounding": "nearest",
    }
    cemq.quantize_and_schedule(str(folder / "pipeline"), folder / name, **common | settings)
    return folder / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_dit(tmp_path_factory.mktemp("report"), labels=8)


@pytest.fixture(scope="module")
def instant(folder):
    return built(folder, "instant", budget=3, effort="instant")


@pytest.fixture(scope="module")
def planned(folder):
    return built(
        folder, "planned", budget=3, effort="quick", samples=2, planning_samples=2, also_steps=[], rectify="none",
    )  # fmt: skip


@pytest.fixture(scope="module")
def written(planned):
    """The page of a planned bundle, as text, and what was returned."""
    path = planned.parent / "page.html"
    found = cemq.report(planned, path, samples=SAMPLES, device="cpu")
    return path.read_text(encoding="utf-8"), found


def without_time(evaluation):
    return {name: value for name, value in evaluation.to_dict().items() if name != "wall_ratio"}


def test_the_samples_of_the_page_and_their_figures_are_those_of_evaluate(planned, written):
    text, found = written
    again = cemq.evaluate(planned, samples=SAMPLES, device="cpu")
    assert without_time(found) == without_time(again)
    figures = [each for each in Parsed(text).all("figure") if "data-seed" in each]
    assert sorted(int(each["data-seed"]) for each in figures) == list(again.seeds)
    psnr = [float(each["data-psnr"]) for each in figures]
    assert np.mean(psnr) == pytest.approx(again.psnr_db, abs=1e-4)
    told = again.scores["psnr_db"]
    assert (psnr[0], int(figures[0]["data-seed"])) == (pytest.approx(told["worst"], abs=1e-4), told["seed"])
    assert psnr[1] == pytest.approx(sorted(psnr)[SAMPLES // 2])
    for figure in (told["mean"], told["p5"], told["worst"]):
        assert f"{figure:.1f}" in Parsed(text).text


def test_the_page_is_whole_by_itself(written):
    text, _ = written
    page = Parsed(text)
    asked = [value for _, a in page.elements for name, value in a.items() if name in ("src", "href", "srcset")]
    assert len(asked) >= 2 * SAMPLES
    assert [value for value in asked if not value.startswith("data:image/")] == []
    assert not re.search(r"url\(|@import|https?://", text)
    assert not {name for name, _ in page.elements} & {"link", "iframe", "object", "form", "base"}
    (policy,) = (each["content"] for each in page.all("meta") if "http-equiv" in each)
    script = text.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    assert [each for each in page.all("img") if not each.get("alt")] == []
    assert [each for each in page.all("input") if not each.get("aria-label")] == []


def opened(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_pictures_are_embedded_without_loss(planned, written):
    both = run_both(planned, samples=SAMPLES, device="cpu")
    made = np.concatenate([each.images for each in both.references])
    assert len(made) == SAMPLES
    for sample, image in zip(samples_of(both), made, strict=True):
        assert np.array_equal(np.asarray(opened(sample.files[0])), (image.clip(0, 1) * 255).round().astype(np.uint8))
        assert all(file in written[0] for file in sample.files)


def test_prompts_are_text_and_nothing_else(planned):
    evil = "</figcaption><script>alert(1)</script>\" onload='x' {{ 7 * 7 }}"
    found = run_both(planned, samples=1, device="cpu")
    batch = Batch(conditions=(evil,), seeds=found.batches[0].seeds)
    hostile = SimpleNamespace(**vars(found) | {"batches": [batch]})
    text = render(page_of(planned, read_bundle(planned), describe(planned), hostile))
    page = Parsed(text)
    assert len(page.all("script")) == 1
    assert evil in page.text
    assert not [attributes for _, attributes in page.elements if "onload" in attributes]


def test_what_was_run_is_drawn(planned, written):
    said, evidence = describe(planned), json.loads((planned / "evidence.json").read_text())
    curve = curve_chart(said)
    assert [x for x, _ in curve.lines[0].points] == [point["budget"] for point in evidence["curve"]]
    assert curve.chosen == (evidence["winner"]["full_steps"], evidence["winner"]["psnr_db"])
    prior = ErrorPrior.load(planned / "prior.safetensors")
    trials = trial_chart(said, prior)
    assert len(trials.dots[0].points) == len(evidence["trials"])
    assert {y for _, y in trials.dots[0].points} == {trial["psnr_db"] for trial in evidence["trials"]}
    assert trials.chosen in trials.dots[0].points
    assert (list(trials.lines), prior.is_fitted) == ([], False)  # only then are both as high
    assert len(trial_chart(said, dataclasses.replace(prior, coherence=3.0)).lines) == 1
    for drawn in ("PSNR over budget", "Schedules that were run", "combined", "cache", "self", "Provenance"):
        assert drawn in Parsed(written[0]).text
    assert written[0].count('class="full"') == 3


def test_a_bundle_that_ran_nothing_says_what_is_left_out(instant, tmp_path):
    cemq.report(instant, tmp_path / "a.html", samples=1, device="cpu")
    said = Parsed((tmp_path / "a.html").read_text(encoding="utf-8")).text
    assert "No curve of fidelity over budget" in said
    assert "no schedule was run whose error the prior predicts" in said
    assert "Fidelity was not measured at build time" in said
    assert "Schedules that were run" not in said
    assert "median" not in said


def test_a_bundle_that_is_not_quantized_has_no_floor(folder, tmp_path):
    bundle = built(folder, "none", scheme="none", budget=3, effort="instant")
    cemq.report(bundle, tmp_path / "a.html", samples=1, device="cpu")
    assert "was left in float32" in Parsed((tmp_path / "a.html").read_text(encoding="utf-8")).text


def test_a_bundle_with_a_policy_has_no_strip(folder, tmp_path):
    bundle = built(folder, "policy", samples=2, policy="teacache:threshold=1.0")
    cemq.report(bundle, tmp_path / "a.html", samples=1, device="cpu")
    page = Parsed((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert "the policy teacache decides while a picture is drawn" in page.text
    assert "strip" not in [each.get("class") for each in page.all("svg")]


def test_evidence_of_before_is_drawn_as_far_as_it_goes(planned):
    said, prior = describe(planned), ErrorPrior.load(planned / "prior.safetensors")
    plain = {name: said["schedule"][name] for name in ("num_steps", "full_steps", "predictor", "solver")}
    trials = [{"psnr_db": 20.0, "schedule": plain}, {"schedule": plain}, {"psnr_db": 1.0, "schedule": {}}, {}]
    old = said | {"planning": {"trials": trials, "curve": [{"budget": 2, "predicted_error": 0.1}]}}
    assert [y for _, y in trial_chart(old, prior).dots[0].points] == [20.0]
    curve = curve_chart(old)
    assert (curve.lines[0].points, list(curve.dots[0].points), curve.chosen) == ([(2, pytest.approx(20))], [], None)
    assert curve_chart(said | {"planning": {}}) is None
    assert trial_chart(said | {"planning": {}}, prior) is None


def shown(left, right, rate=0.0):
    """Samples of one batch, as arrays."""
    outcomes = [Outcome(images=each, latents=torch.ones(len(each), 1), seconds=1.0) for each in (left, right)]
    batch = Batch(conditions=tuple(f"a cat {n}" for n in range(len(left))), seeds=tuple(range(len(left))))
    return list(
        samples_of(SimpleNamespace(batches=[batch], references=outcomes[:1], outcomes=outcomes[1:], frame_rate=rate))
    )


def test_a_video_is_one_file_in_which_both_move():
    rng = np.random.default_rng(0)
    video = rng.random((1, 3, 8, 10, 3)).astype(np.float32)
    (sample,) = shown(video, 1 - video, rate=8.0)
    moving, still = map(opened, sample.files)
    assert (sample.kind, sample.width, sample.height) == ("video", 10, 8)
    assert (moving.n_frames, moving.size, still.size) == (3, (20, 8), (20, 8))
    moving.seek(1)
    pixels = np.asarray(moving.convert("RGB"))
    assert np.array_equal(pixels[:, :10], (video[0, 1] * 255).round().astype(np.uint8))
    assert np.array_equal(pixels[:, 10:], ((1 - video[0, 1]) * 255).round().astype(np.uint8))


def test_audio_is_shown_as_spectrograms_one_channel_below_the_other():
    tone = np.sin(np.arange(2048) / 5)[None, None].repeat(2, 1).astype(np.float32)
    (sample,) = shown(tone, 0.9 * tone)
    assert (sample.kind, sample.height) == ("audio", 2 * 64)
    assert opened(sample.files[0]).size == (sample.width, sample.height)
    (sample,) = shown(*[np.zeros((1, 1, 1 << 20), dtype=np.float32)] * 2)  # wider than a file can be
    assert opened(sample.files[0]).size == (2048, 64)
    (sample,) = shown(*[np.full((1, 1, 20_000, 3), np.nan)] * 2)  # and a picture that is no number
    assert opened(sample.files[0]).size == (20_000, 1)


def test_the_worst_comes_first_and_the_median_second():
    black = np.zeros((5, 8, 8, 3))
    grey = np.array([0.1, 0.4, 0.2, 0.3, 0.05])[:, None, None, None] + black
    ranked = worst_first(shown(black, grey))
    assert [(each.seed, each.rank) for each in ranked] == [(1, "worst"), (2, "median"), (0, ""), (3, ""), (4, "")]
    assert [each.rank for each in worst_first(shown(black[:2], grey[:2]))] == ["worst", ""]


# --- other methods


def row(method="teacache", target=2.0, **changes):
    levels = {"psnr_db": 30.0, "p5_db": 20.0, "worst_db": 10.0}
    figures = {"setting": 0.1, "compute_ratio": target, "wall_ratio": 1.5, "ssim": 0.9, **levels}
    return {"method": method, "source": "", "scheme": "w8a8", "target": target, "status": "ok"} | figures | changes


def comparison(bundle, *rows, **changes):
    """What `cemq compare --json` prints of a bundle."""
    known = {"model": str(bundle), "original": read_bundle(bundle).model, "num_steps": STEPS, "samples": 16}
    return known | {"device": "cpu", "dtype": "float32", "rows": list(rows)} | changes


def test_other_methods_are_drawn_beside_the_bundle_and_listed(planned, tmp_path):
    failed = dict.fromkeys(("setting", "compute_ratio", "wall_ratio", "psnr_db", "p5_db", "worst_db", "ssim"))
    rows = (
        row("full compute", 1.0), row("cemq", 3.0, psnr_db=40.0), row("teacache", 3.0), row("<b>", 2.0, psnr_db=35.0),
        row("elsewhere", scheme="w4a8"), row("broken", 2.0, status="it <i>fails</i>", **failed),
    )  # fmt: skip
    (tmp_path / "compare.json").write_text(json.dumps(comparison(planned, *rows)))
    asked = ["report", str(planned), "-o", str(tmp_path / "a.html"), "--compare", str(tmp_path / "compare.json")]
    shown = CliRunner().invoke(app, [*asked, "--samples", "1", "--device", "cpu", "--quiet"])
    assert shown.exit_code == 0, shown.output
    page = Parsed((tmp_path / "a.html").read_text(encoding="utf-8"))
    dots = [each for each in page.all("circle") if each["class"] == "dot1"]
    assert len(dots) == 2
    for told in ("teacache, compute ratio 3.00: 30.0 dB, worst 10.0", "<b>, compute ratio 2.00", "it <i>fails</i>"):
        assert told in page.text
    assert "elsewhere" not in page.text
    table = page.text.partition("asked for")[2]
    names = ("full compute", "<b>", "broken", "cemq", "teacache")  # by ratio, then by PSNR
    assert [table.index(name) for name in names] == sorted(table.index(name) for name in names)


def test_the_bundle_stands_among_other_methods_where_this_page_has_it(planned, instant):
    for bundle in (planned, instant):
        found, said = run_both(bundle, samples=1, device="cpu"), describe(bundle)
        rows = tuple(Row(**each) for each in (row(target=3.0), row("cemq", 3.0), row("full compute", 1.0)))
        chart = rival_chart(said, Comparison(**comparison(bundle) | {"rows": rows}), found.evaluation)
        assert chart.chosen == (found.evaluation.full_steps, found.evaluation.psnr_db)
        best, *others = chart.dots
        assert bool(best.points) == (bundle is planned)  # of the other nothing was run
        assert [list(each.points) for each in others] == [[(STEPS / 3, 30.0)]] * 2
        assert chart.lines == []  # no run has taught the prior how high its errors are
        assert chart.x.low < STEPS / 3 < chart.x.high
        said["prior"]["coherence"] = 3.0
        assert len(rival_chart(said, Comparison(**comparison(bundle) | {"rows": rows}), found.evaluation).lines) == (
            bundle is planned
        )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"original": "builtin:dit-digits"}, "is of model builtin:dit-digits, this bundle of "),
        ({"num_steps": 20}, "is of step count 20, this bundle of 6"),
        ({"rows": [row(scheme="w4a8"), row(scheme="none")]}, "is of scheme none, w4a8, this bundle of w8a8"),
        ({"rows": []}, "is of scheme none, this bundle of w8a8"),
        ({"rows": [{}]}, "is not what cemq compare --json prints"),
        ({"rows": [row(psnr_db="high")]}, "is not what cemq compare --json prints"),
        ({"rows": [row(compute_ratio=0)]}, "ratios of teacache that are no positive numbers"),
        ({"rows": [row(worst_db=math.nan)]}, "levels of teacache that are no numbers"),
        ({"rows": [row(method=3)]}, "a row whose names are no texts"),
        ({"rows": 3}, "is not what cemq compare --json prints"),
        ({"more": 3}, "is not what cemq compare --json prints"),
    ],
)
def test_a_comparison_of_something_else_is_one_line(planned, tmp_path, changes, said, monkeypatch):
    monkeypatch.setattr(cemq.Runner, "run_one", lambda *_: pytest.fail("something was run"))
    (tmp_path / "compare.json").write_text(json.dumps(comparison(planned, row()) | changes))
    with pytest.raises(InputError, match=re.escape(said)) as raised:
        cemq.report(planned, tmp_path / "a.html", compare=tmp_path / "compare.json", device="cpu")
    assert len(str(raised.value).splitlines()) == 1
    assert not (tmp_path / "a.html").exists()


# --- charts


def test_places_in_a_chart_by_hand():
    x, y = Axis(label="x", low=0, high=10), Axis(label="y", low=0.01, high=1, logarithmic=True)
    chart = Chart(title="", x=x, y=y)
    assert chart.place((5, 0.1)) == (50, 50)
    assert chart.path([(0, 0.01), (10, 1)]) == "0,100 100,0"
    assert [text for _, text in x.ticks] == ["0", "2", "4", "6", "8", "10"]
    assert {"0.01", "0.1", "1"} <= {text for _, text in y.ticks}
    assert Axis.over("", 3.0, 3.0).place(3.0) == 50
    assert math.isfinite(Axis.over("", 0.0, logarithmic=True).place(0.0))


def test_errors_of_all_views_have_one_scale_of_colours():
    tables = [np.array([[np.nan, 0.01], [0.0, 0.1]]), np.array([[1.0]])]
    (first, second), low, high = as_colours(tables)
    assert (low, high) == (0.01, 1.0)
    assert first[0, 0].tolist() == [0, 0, 0, 0]
    assert first[1, 0].tolist() == first[0, 1].tolist()
    assert second[0, 0].tolist() != first[1, 1].tolist()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.htm", "report '.*a.htm': the name must end in .html"),
        ("no/a.html", "the folder '.*no' does not exist"),
        ("folder.html", "is a folder: name a file in it"),
    ],
)
def test_a_page_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path, name, said):
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(InputError, match=said):
        cemq.report(tmp_path / "no such bundle", tmp_path / name)


def test_what_cannot_be_shown_is_one_line_and_leaves_no_file(instant, tmp_path):
    with pytest.raises(BundleError, match="no such folder"):
        cemq.report(tmp_path / "nothing", tmp_path / "a.html")
    with pytest.raises(InputError, match="samples=0"):
        cemq.report(instant, tmp_path / "a.html", samples=0, device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_where_the_page_is(instant, tmp_path):
    asked = ["report", str(instant), "-o", str(tmp_path / "a.html"), "--samples", "1", "--device", "cpu", "--quiet"]
    shown = CliRunner().invoke(app, asked)
    assert shown.exit_code == 0, shown.output
    assert f"{tmp_path / 'a.html'}: 1 sample, PSNR" in " ".join(shown.stdout.split())
    found = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
    assert found["report"] == str(tmp_path / "a.html")
    assert found["samples"] == 1
    refused = CliRunner().invoke(app, [*asked[:3], str(tmp_path / "a.pdf")])
    assert refused.exit_code == 1
    assert "must end in .html" in refused.output
