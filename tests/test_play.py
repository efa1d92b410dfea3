"""The page to play with: what a turn draws and tells, who may ask for one, and how the page looks in a browser."""

import base64
import http.client
import io
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
import wave
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from support import browser
from support.bundles import resealed
from support.pipelines import CALL, save_dit
from typer.testing import CliRunner

import cemq
from cemq.cli import app
from cemq.errors import BundleError, InfeasibleBudgetError, InputError, ModelError
from cemq.evaluation import play_server
from cemq.evaluation.play import Asked, Begun, Drawn, Measured, Player, Stepped, StoppedError, files_of, open_player
from cemq.evaluation.play_server import Server, page_of
from cemq.metrics import psnr_db
from cemq.pipelines.batches import EVALUATION_SEED_OFFSET, Batch
from cemq.runtime import find_hook, schedule_hook
from cemq.runtime.runner import Runner

STEPS, BUDGET = 8, 4
ASKED = Asked(condition="3", seed=7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_dit(tmp_path_factory.mktemp("play"), labels=8)


def built(folder, name, **settings):
    cemq.quantize_and_schedule(
        str(folder / "pipeline"), folder / name, scheme="w8a8", calib=str(folder / "labels.txt"), steps=STEPS,
        call=CALL, device="cpu", rounding="nearest", **settings,
    )  # fmt: skip
    return folder / name


@pytest.fixture(scope="module")
def bundle(folder):
    return built(folder, "bundle", budget=BUDGET, effort="instant")


@pytest.fixture(scope="module")
def opened(bundle):
    return open_player(bundle, device="cpu")


@pytest.fixture
def player(opened):
    """As if it had just been opened."""
    names = ("name", "manifest", "runner", "followed", "original", "absent")
    return Player(**{name: getattr(opened, name) for name in names})


def turn(player, **asked):
    """What is told in a turn."""
    events = []
    player.turn(Asked(**vars(ASKED) | asked), events.append)
    return events


def of(kind, events, side=None):
    return [each for each in events if isinstance(each, kind) and (side is None or side == each.side)]


def pixels(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def levels(images):
    return (images[0].clip(0, 1) * 255).round().astype(np.uint8)


def drawn_alone(pipe):
    pipe.set_progress_bar_config(disable=True)
    return Runner(pipe=pipe, steps=STEPS, call=CALL).run_one(Batch(conditions=(3,), seeds=(7,))).images


# --- a turn


def test_a_turn_draws_what_the_bundle_and_its_original_draw(player, bundle, folder):
    events = turn(player)
    scheduled, original = cemq.from_pretrained(bundle, device="cpu"), player.original.pipe
    expected = drawn_alone(scheduled), drawn_alone(original)
    made, reference = of(Drawn, events)
    assert (made.side, reference.side) == ("bundle", "reference")
    for found, images in zip((made, reference), expected, strict=True):
        assert np.array_equal(pixels(found.picture), levels(images))
        assert found.seconds > 0
        assert found.sound == ""
    assert (made.num_steps, made.full_steps, reference.full_steps) == (STEPS, BUDGET, STEPS)
    assert made.marks == schedule_hook(scheduled).schedule.strip()
    (measured,) = of(Measured, events)
    assert measured.psnr_db == pytest.approx(psnr_db(*expected)[0])
    assert find_hook(original) is None


def test_every_step_is_told_as_it_runs(player):
    events, calls = [], []
    layer = player.runner.pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(len(events)))
    player.turn(ASKED, events.append)
    layer.remove()
    kinds = [type(each) for each in events]
    assert kinds == [*[Begun, *[Stepped] * STEPS, Drawn] * 2, Measured]
    steps = of(Stepped, events, "bundle")
    assert [each.step for each in steps] == list(range(STEPS))
    assert "".join(each.mark for each in steps) == of(Begun, events)[0].marks == of(Drawn, events)[0].marks
    assert len(set(calls)) == STEPS  # each between two events


def test_a_budget_is_planned_from_the_bundle_and_gives_the_same_whatever_was_before(player, bundle):
    for budget in (2, STEPS, BUDGET, 2):
        expected = schedule_hook(cemq.from_pretrained(bundle, device="cpu", budget=budget)).schedule
        assert player.marks(Asked(**vars(ASKED) | {"budget": budget})) == expected.strip()
        (made,) = of(Drawn, turn(player, budget=budget), "bundle")
        assert (made.marks, made.full_steps) == (expected.strip(), budget)
    assert player.marks(ASKED) == player.manifest.schedule.strip()
    with pytest.raises(InfeasibleBudgetError):
        turn(player, budget=STEPS + 1)


def test_weights_and_cache_are_chosen_apart(player):
    found = {
        (quantized, cached): of(Drawn, turn(player, quantized=quantized, cached=cached), "bundle")[0]
        for quantized in (True, False)
        for cached in (True, False)
    }
    assert {key: made.full_steps for key, made in found.items()} == {
        (True, True): BUDGET, (True, False): STEPS, (False, True): BUDGET, (False, False): STEPS,
    }  # fmt: skip
    assert len({made.picture for made in found.values()}) == 4
    for pipe in (player.runner.pipe, player.original.pipe):
        assert find_hook(pipe) is None


def test_full_precision_is_drawn_once_for_all_budgets(player):
    first, second = turn(player), turn(player, budget=2)
    (made,), (kept,) = of(Drawn, first, "reference"), of(Drawn, second, "reference")
    assert (made.kept, kept.kept, kept.picture) == (False, True, made.picture)
    assert of(Stepped, second, "reference") == []
    again = turn(player, quantized=False, cached=False)
    assert of(Drawn, again, "reference")[0].kept
    assert of(Measured, again)[0].psnr_db == 100
    for seed in range(10):  # only so many are kept
        turn(player, seed=seed, budget=2)
    assert not of(Drawn, turn(player, seed=0), "reference")[0].kept


def test_what_full_precision_drew_by_itself_is_kept_too(player):
    events = turn(player, quantized=False, cached=False)
    assert [each.kept for each in of(Drawn, events)] == [False, True]
    assert of(Measured, events)[0].psnr_db == 100


def test_a_policy_decides_in_a_bundle_that_has_one(folder):
    player = open_player(
        built(folder, "policy", policy="teacache:threshold=1.0", samples=1, check_samples=2),
        device="cpu",
        reference="none",
    )
    assert (player.first.budget, player.marks(player.first)) == (None, "")
    (made,) = of(Drawn, turn(player))
    assert 0 < made.marks.count("·") == STEPS - made.full_steps
    assert "█" not in turn(player)[0].marks
    with pytest.raises(InputError, match="budget=3: a policy decides in this bundle"):
        turn(player, budget=3)
    assert 'name="budget"' not in page_of(player)


def test_whoever_does_not_listen_any_more_ends_a_turn_and_the_next_one_runs(player):
    class Gone(Exception):
        pass

    def tell(event):
        if isinstance(event, Stepped) and event.step == 2:
            raise Gone

    expected = of(Drawn, turn(player))
    with pytest.raises(Gone):
        player.turn(Asked(condition="3", seed=8), tell)
    assert find_hook(player.runner.pipe) is None
    assert of(Drawn, turn(player))[0].picture == expected[0].picture


def test_stopping_ends_a_turn_at_its_next_step(player):
    told, stopping = [], threading.Thread(target=player.stop)

    def tell(event):
        told.append(event)
        if isinstance(event, Stepped) and event.step == 1:
            stopping.start()
            while not player.is_stopped:
                time.sleep(0.001)

    with pytest.raises(StoppedError):
        player.turn(ASKED, tell)
    stopping.join()
    assert of(Drawn, told) == []


@pytest.mark.parametrize(
    ("asked", "said"),
    [({"condition": "1000"}, "label '1000' is not known"), ({"seed": -1}, "seed=-1"), ({"budget": 1}, "budget=1")],
)
def test_what_cannot_be_drawn_is_said(player, asked, said):
    with pytest.raises((InputError, InfeasibleBudgetError), match=said):
        turn(player, **asked)


@pytest.mark.parametrize(
    "fields",
    [
        None, [], "x", {}, {"condition": "3"}, vars(ASKED) | {"more": 1}, vars(ASKED) | {"seed": True},
        vars(ASKED) | {"seed": "7"}, vars(ASKED) | {"seed": 7.0}, vars(ASKED) | {"budget": True},
        vars(ASKED) | {"condition": 3}, vars(ASKED) | {"cached": 1}, vars(ASKED) | {"quantized": None},
    ],
)  # fmt: skip
def test_what_is_no_turn_is_refused(fields):
    assert Asked.from_dict(dict(vars(ASKED))) == ASKED
    with pytest.raises(InputError, match=r"a turn has the keys condition, seed|this is no "):
        Asked.from_dict(fields)


# --- what is shown


def test_of_a_video_every_frame_is_shown_and_audio_can_be_heard():
    rng = np.random.default_rng(0)
    video = rng.random((1, 3, 8, 10, 3)).astype(np.float32)
    picture, sound = files_of(video, 8.0)
    moving = Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2])))
    assert (moving.n_frames, sound) == (3, "")
    assert np.array_equal(np.asarray(moving.convert("RGB")), levels(video[0]))
    audio = np.sin(np.arange(4000) / 5)[None, None].astype(np.float32)
    picture, sound = files_of(audio, 8000.0)
    assert sound.startswith("data:audio/wav;base64,")
    with wave.open(io.BytesIO(base64.b64decode(sound.partition(",")[2]))) as heard:
        assert (heard.getframerate(), heard.getnframes()) == (8000, 4000)
    assert pixels(picture).shape[0] == 64


def test_what_is_no_number_is_told_as_none(player, monkeypatch):
    run_one = Runner.run_one

    def broken(self, *arguments):
        outcome = run_one(self, *arguments)
        outcome.images[:] = np.nan
        return outcome

    monkeypatch.setattr(Runner, "run_one", broken)
    assert of(Measured, turn(player)) == [Measured(psnr_db=None)]


# --- opening


def test_it_begins_with_what_nothing_was_profiled_with(player):
    manifest = player.manifest
    assert player.first.seed == EVALUATION_SEED_OFFSET
    assert player.first.seed not in manifest.profiled_seeds
    assert player.first.condition == str(manifest.held_out_conditions[0])
    assert player.marks(player.first) == manifest.schedule.strip()


def copied(bundle, folder, **changes):
    return resealed(Path(shutil.copytree(bundle, folder)), lambda content: content.update(changes))


@pytest.mark.parametrize(
    ("options", "changes", "said"),
    [
        ({"reference": "none"}, {}, "--reference none left it out"),
        ({"vram": "8GiB"}, {}, "--vram may leave no room for it"),
        ({}, {"model": "nobody/nothing"}, "'nobody/nothing' is not on this machine"),
        ({}, {"model": "/nowhere/at/all"}, "no such model '/nowhere/at/all'"),
    ],
)
def test_without_full_precision_the_bundle_plays_alone_and_says_why(bundle, tmp_path, options, changes, said):
    player = open_player(copied(bundle, tmp_path / "copy", **changes), device="cpu", **options)
    assert player.original is None
    assert said in player.absent
    assert [type(each) for each in turn(player)] == [Begun, *[Stepped] * STEPS, Drawn]
    with pytest.raises(InputError, match="full precision is not at hand: "):
        turn(player, quantized=False)
    assert "Without full precision beside it" in page_of(player)


def test_an_original_that_is_named_must_be_there(bundle, folder, tmp_path):
    moved = copied(bundle, tmp_path / "copy", model="nobody/nothing")
    assert open_player(moved, reference=str(folder / "pipeline"), device="cpu").original is not None
    with pytest.raises(ModelError, match="no such model 'nowhere'"):
        open_player(bundle, reference="nowhere", device="cpu")
    with pytest.raises(BundleError, match="no such folder"):
        open_player(tmp_path / "nothing")


# --- the server


@contextmanager
def served(player):
    with Server(0) as server:
        server.player = player
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server, method, path, content=None, **headers):
    """Status, headers and body."""
    connection = http.client.HTTPConnection(*server.server_address, timeout=60)
    sent = {"Content-Type": "application/json"} if method == "POST" else {}
    body = content if content is None or isinstance(content, bytes) else json.dumps(content)
    connection.request(method, path, body, sent | {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    found = answer.status, answer.headers, answer.read().decode()
    connection.close()
    return found


def lines(body):
    return [json.loads(line) for line in body.splitlines()]


def test_the_page_draws_and_plans_by_lines_of_json(player):
    with served(player) as server:
        assert server.address == f"http://127.0.0.1:{server.server_address[1]}/"
        status, headers, body = ask(server, "POST", "/draw", vars(ASKED))
        assert (status, headers["Content-Type"]) == (200, "application/x-ndjson")
        assert [each["event"] for each in lines(body)] == [
            *["begun", *["stepped"] * STEPS, "drawn"] * 2, "measured", "ended",
        ]  # fmt: skip
        _, _, body = ask(server, "POST", "/plan", vars(ASKED) | {"budget": 2})
        assert lines(body) == [{"event": "planned", "marks": player.marks(Asked(condition="3", seed=7, budget=2))}]
        _, _, body = ask(server, "POST", "/draw", vars(ASKED) | {"condition": "1000"})
        assert [each["event"] for each in lines(body)] == ["failed"]
        for wrong in (b"", b"{", b"[" * 60_000, b"\xff", b"null", b"{}"):
            _, _, body = ask(server, "POST", "/draw", wrong)
            assert "a turn has the keys" in lines(body)[0]["reason"]


@pytest.mark.parametrize(
    ("method", "path", "headers", "expected"),
    [
        ("GET", "/", {}, 200),
        ("GET", "/", {"Host": "evil.example"}, 403),
        ("GET", "/", {"Host": "127.0.0.1"}, 403),
        ("GET", "/etc/passwd", {}, 404),
        ("GET", "/draw", {}, 404),
        ("POST", "/", {}, 404),
        ("POST", "/plan", {}, 200),
        ("POST", "/draw", {"Origin": "http://evil.example"}, 403),
        ("POST", "/draw", {"Origin": "null"}, 403),
        ("POST", "/draw", {"Content_Type": "text/plain"}, 403),
        ("PUT", "/draw", {}, 501),
        ("OPTIONS", "/draw", {}, 501),
    ],
)
def test_only_the_page_itself_may_ask(method, path, headers, expected):
    first = Asked(condition="<script>alert(1)</script>", seed=1, budget=2)
    manifest = SimpleNamespace(
        model="a&b", pipeline_class="P", scheme="w8a8", policy=None, model_bytes=1, reference_bytes=2,
        schedule=SimpleNamespace(num_steps=8),
    )  # fmt: skip
    player = SimpleNamespace(
        manifest=manifest, first=first, marks=lambda _: "", name="<b>", takes_labels=True, labels={'"><i>': 1},
        original=None, absent="<u>",
    )  # fmt: skip
    with served(player) as server:
        status, said, body = ask(server, method, path, {} if method == "POST" else None, **headers)
    assert status == expected
    if (method, status) == ("GET", 200):
        assert not any(tag in body for tag in ("<script>alert", "<b>", "<i>", "<u>"))
        policy = dict(part.split(" ", 1) for part in said["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["connect-src"] == "'self'"
        assert "unsafe" not in policy["script-src"]
        assert not [part for part in policy.values() if "http" in part or "*" in part]


def test_a_port_that_is_taken_is_one_line_before_anything_is_loaded(tmp_path):
    with Server(0) as server:
        port = server.server_address[1]
        shown = CliRunner().invoke(app, ["play", str(tmp_path), "--port", str(port)])
    assert shown.exit_code == 1
    assert shown.stderr.strip() == (
        f"cemq: port {port} cannot be had (Address already in use): name another with --port, 0 for any"
    )


def test_ctrl_c_ends_the_command_in_silence(bundle, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(play_server.Server, "serve_forever", interrupted)
    shown = CliRunner().invoke(app, ["play", str(bundle), "--port", "0", "--device", "cpu", "--reference", "none"])
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert shown.stdout.startswith("http://127.0.0.1:")


@pytest.mark.slow  # a process of its own takes ten seconds to begin
def test_ctrl_c_ends_a_process_that_draws(bundle):
    code = "from cemq.cli import main; main()"
    asked = [sys.executable, "-c", code, "play", str(bundle), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    address = process.stdout.readline().split()[0]
    connection = http.client.HTTPConnection(address.split("/")[2], timeout=60)
    connection.request("POST", "/draw", json.dumps(vars(ASKED)), {"Content-Type": "application/json"})
    connection.getresponse().readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")


# --- in a browser


@pytest.mark.skipif(not browser.IS_THERE, reason=f"needs {' and '.join(browser.PROGRAMS)}")
def test_the_page_works_and_asks_nothing_of_anybody_else(player, tmp_path):
    with served(player) as server, browser.browser(tmp_path) as page:
        page.open(server.address)
        page.wait("return document.querySelectorAll('#bundle .planned').length === arguments[0]", BUDGET)
        page.run(
            "form.budget.value = 2; for (const kind of ['input', 'change']) form.budget.dispatchEvent(new Event(kind))"
        )
        page.wait("return document.querySelectorAll('#bundle .planned').length === 2")
        page.run("document.getElementById('draw').click()")
        page.wait("return document.querySelectorAll('#turns tr').length")
        assert page.run("return document.querySelectorAll('#bundle .full').length") == 2
        assert page.run("return document.querySelectorAll('#bundle .skipped').length") == STEPS - 2
        assert page.run("return document.querySelectorAll('#reference .full').length") == STEPS
        assert page.run("return [...document.querySelectorAll('figure img')].every(each => each.naturalWidth > 0)")
        assert "dB to full precision" in page.run("return document.getElementById('said').textContent")
        shown = "return document.querySelector('#bundle img').src"
        before = page.run(shown)
        page.run("dispatchEvent(new KeyboardEvent('keydown', {key: 'f'}))")
        assert page.run(shown) == page.run("return document.querySelector('#reference img').src") != before
        page.run("dispatchEvent(new KeyboardEvent('keyup', {key: 'f'}))")
        assert page.run(shown) == before
        page.run("form.condition.value = 'nobody'; document.getElementById('draw').click()")
        page.wait("return document.querySelector('#said.failed')?.textContent.includes(\"label 'nobody'\")")
        assert page.errors() == []
        asked = page.requests()
        assert server.address in asked
        assert not [each for each in asked if not each.startswith((server.address, "data:"))]
