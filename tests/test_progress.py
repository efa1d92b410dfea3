"""How far a command is: lines in a log file, whether anything is told or not, and none where none are wanted."""

import io
import itertools
import json
import logging
import re
import sys
import threading
import time
import warnings
from contextlib import redirect_stderr, redirect_stdout

import pytest
from support.pipelines import make_dit
from typer.main import get_command
from typer.testing import CliRunner

import cemq
from cemq import cli
from cemq.pipelines.batches import BUILD_LOG, Batch, iterate
from cemq.pipelines.progress import EVERY, Lines, shown_progress


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Log(io.StringIO):
    """A stream that remembers when each line of it was there to be read."""

    def __init__(self, clock):
        super().__init__()
        self.clock, self.flushed = clock, []

    def flush(self):
        self.flushed += [(self.clock() - 1000, line) for line in self.getvalue().splitlines()[len(self.flushed) :]]


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def log(clock):
    return Log(clock)


@pytest.fixture
def lines(log, clock):
    return Lines(log, clock)


def pass_time(clock, lines, seconds):
    """As the thread does: a look every second."""
    for _ in range(seconds):
        clock.now += 1
        lines.look()


def test_a_stage_says_when_it_begins_how_far_it_is_and_when_it_ends(clock, lines, log):
    lines.report("reference runs", 0.0)
    for step in range(1, 101):
        pass_time(clock, lines, 1)
        lines.report("reference runs", step / 100)
    assert log.flushed == [
        (0, "reference runs: begun"),
        (45, "reference runs: 44 %, 0:00:45 gone, about 0:00:57 left"),
        (90, "reference runs: 89 %, 0:01:30 gone, about 0:00:11 left"),
        (100, "reference runs: done after 0:01:40"),
    ]


def test_a_stage_that_is_told_nothing_still_says_so_every_minute(clock, lines, log):
    lines.report("quantization", 0.0)
    pass_time(clock, lines, 50)
    lines.report("quantization", 0.25)
    pass_time(clock, lines, 150)
    assert log.flushed == [
        (0, "quantization: begun"),
        (45, "quantization: still at 0 %, 0:00:45 gone"),
        (90, "quantization: 25 %, 0:01:30 gone, about 0:04:30 left"),
        (135, "quantization: still at 25 %, 0:02:15 gone, about 0:06:45 left"),
        (180, "quantization: still at 25 %, 0:03:00 gone, about 0:09:00 left"),
    ]


def test_between_stages_there_is_a_line_a_minute_too(clock, lines, log):
    pass_time(clock, lines, 50)
    lines.report("building", 1.0)
    pass_time(clock, lines, 50)
    assert log.flushed == [
        (45, "still at work, 0:00:45 since the start"),
        (50, "building: begun"),
        (50, "building: done after 0:00:00"),
        (95, "still at work, 0:00:45 since building was done"),
    ]


def test_a_stage_is_over_when_another_begins(clock, lines, log):
    lines.report("planning", 0.0)
    clock.now += 10
    lines.report("planning", 0.5)
    lines.report("check", 0.0)
    assert [line for _, line in log.flushed] == [
        "planning: begun", "planning: done after 0:00:10, at 50 %", "check: begun",
    ]  # fmt: skip


def test_a_stage_that_is_done_may_say_so_again(lines, log):
    for share in (0.5, 1.0, 1.0, 1.0):
        lines.report("planning", share)
    assert [line for _, line in log.flushed] == ["planning: begun", "planning: done after 0:00:00"]


def test_what_was_done_before_the_first_report_does_not_hasten_the_end(clock, lines, log):
    lines.report("planning", 0.5)
    pass_time(clock, lines, 44)
    lines.report("planning", 0.6)
    pass_time(clock, lines, 1)
    assert log.flushed[-1] == (45, "planning: 60 %, 0:00:45 gone, about 0:03:00 left")


def test_lines_are_at_least_one_a_minute_and_at_most_one_in_half_of_one(clock, lines, log):
    lines.report("runs", 0.0)
    for step in range(1, 4000):
        lines.report("runs", step / 4000)
        pass_time(clock, lines, 1)
    times = [when for when, _ in log.flushed]
    assert len(times) == 1 + int(3999 // EVERY)
    assert all(30 <= after - before <= 60 for before, after in itertools.pairwise(times))


def test_a_line_holds_nothing_but_what_can_be_printed(lines, log):
    lines.say("a\rb\x1b[31m\nc")
    lines.report("schedules, é\n", 0.0)
    assert log.getvalue() == "a\\rb\\x1b[31m\\nc\nschedules, é\\n: begun\n"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("I/O operation on closed file")])
def test_a_log_that_takes_no_more_does_not_stop_the_work(clock, error):
    class Full(io.StringIO):
        def write(self, text):
            raise error

    lines = Lines(Full(), clock)
    lines.report("runs", 0.0)
    pass_time(clock, lines, 60)
    with lines.kept_coming():
        lines.say("more")


# --- the thread


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "cemq progress"]


HASTY = 0.02  # seconds, for a minute


def wait_for(found):
    deadline = time.monotonic() + 10
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, SystemExit])
def test_the_thread_writes_while_a_stage_is_silent_and_ends_with_it(monkeypatch, error):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    caught = None
    try:
        with shown_progress(every=HASTY) as report:
            report("a long batch", 0.5)
            wait_for(lambda: stream.getvalue().count("a long batch: still at 50 %") > 2)
            assert len(threads()) == 1
            if error:
                raise error
    except BaseException as found:
        caught = type(found)
    assert caught is error
    assert threads() == []
    how = "stopped" if error else "done"
    assert re.fullmatch(rf"a long batch: {how} after 0:00:\d\d, at 50 %", stream.getvalue().splitlines()[-1])


def test_a_process_whose_stderr_leads_nowhere_writes_nothing(capsys):
    """As `launched` has it for all processes but the main one."""
    nowhere = io.StringIO()
    with redirect_stderr(nowhere), shown_progress(every=HASTY) as report:
        report("runs", 0.5)
        wait_for(lambda: "still at" in nowhere.getvalue())
    assert capsys.readouterr() == ("", "")


def test_nothing_is_written_before_anything_is_told(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with pytest.raises(ValueError, match="early"), shown_progress():
        raise ValueError("early")
    assert stream.getvalue() == ""


def test_what_a_build_logs_stands_between_the_lines(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with shown_progress() as report:
        report("runs", 0.0)
        logging.getLogger(BUILD_LOG).info("of %s layers", 3)
    logging.getLogger(BUILD_LOG).info("not any more")
    assert stream.getvalue().splitlines()[1] == "of 3 layers"
    assert "any more" not in stream.getvalue()


def test_quiet_shows_no_progress_no_note_and_no_warning(monkeypatch, capsys):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in range(2):
        with shown_progress(quiet=True) as report:
            report("runs", 0.5)
            logging.getLogger(BUILD_LOG).warning("a note")
            logging.getLogger("another.library").warning("a warning")
            warnings.warn("cemq: a warning", stacklevel=1)
            assert threads() == []
    assert stream.getvalue() == ""
    assert capsys.readouterr().out == ""
    assert logging.root.manager.disable == logging.NOTSET


def test_on_a_terminal_there_are_bars(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stream)
    with shown_progress() as report:
        report("runs", 0.5)
        logging.getLogger(BUILD_LOG).info("a note")
    shown = stream.getvalue()
    assert "runs   " in shown
    assert "━" in shown
    assert "a note\n" in shown
    assert "begun" not in shown


def test_without_a_stderr_nothing_is_shown_anywhere(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    with shown_progress() as report:
        report("runs", 0.5)
    assert capsys.readouterr().out == ""


def test_a_stage_of_batches_begins_before_the_first_step():
    told = []
    batches = iterate([Batch(conditions=(1,), seeds=(1,))], "runs", lambda *said: told.append(said), 2)
    _, on_step = next(batches)
    assert told == [("runs", 0.0)]
    on_step()
    assert told[1:] == [("runs", 0.5)]
    assert list(iterate([], "runs", lambda *said: told.append(said), 2)) == []
    assert len(told) == 2


# --- through the command line


SETTINGS = (
    "--steps", "6", "--budget", "2", "--samples", "1", "--planning-samples", "1", "--effort", "quick", "--solver",
    "uniform", "--rectify", "none", "--device", "cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    root = tmp_path_factory.mktemp("progress")
    make_dit().save_pretrained(root / "pipeline")
    (root / "labels.txt").write_text("1\n2\n3\n")
    return root / "pipeline"


def build(pipeline, output, *more):
    """Exit code, stdout and what stands in the file that stderr goes to."""
    calib, log, out = pipeline.parent / "labels.txt", output.with_suffix(".log"), io.StringIO()
    arguments = ["quantize-and-schedule", pipeline, "-o", output, "--calib", calib, *SETTINGS, *more]
    with log.open("w") as file, redirect_stderr(file), redirect_stdout(out):
        code = get_command(cli.app).main([str(each) for each in arguments], standalone_mode=False)
    return code or 0, out.getvalue(), log.read_text()


def test_a_build_whose_stderr_is_a_file_says_there_what_it_does(pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as many a CI does
    code, out, log = build(pipeline, tmp_path / "bundle", "--json")
    assert code == 0, log
    assert json.loads(out)["scheme"] == "w8a8"  # and nothing else
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", log)
    stages = [line.removesuffix(": begun") for line in log.splitlines() if line.endswith(": begun")]
    for stage in ("reference runs", "full-precision check", "quantization", "forced runs", "scheduled check"):
        assert stages.count(stage) == 1
        assert re.search(rf"^{stage}: done after 0:\d\d:\d\d$", log, flags=re.M), log
    assert any(stage.startswith("planning, ") for stage in stages)
    assert threads() == []


def test_a_quiet_build_leaves_its_log_empty_but_for_errors(pipeline, tmp_path):
    code, out, log = build(pipeline, tmp_path / "bundle", "--quiet")
    assert (code, log) == (0, "")
    assert out.splitlines()[-1].startswith(f"{tmp_path / 'bundle'}: w8a8, ")
    code, out, log = build(pipeline, tmp_path / "bundle", "--quiet")
    assert (code, out) == (1, "")
    assert log == f"cemq: output '{tmp_path / 'bundle'}' exists already: choose another name, or pass --overwrite\n"


@pytest.fixture(scope="module")
def bundle(pipeline):
    settings = {"steps": 6, "budget": 2, "samples": 1, "planning_samples": 1, "solver": "uniform", "device": "cpu"}
    folder, calib = pipeline.with_name("bundle"), str(pipeline.parent / "labels.txt")
    cemq.quantize_and_schedule(str(pipeline), folder, calib=calib, rectify="none", rounding="nearest", **settings)
    return folder


@pytest.mark.parametrize(
    ("command", "stage"),
    [
        ("generate BUNDLE --label 1 -o a.png", "drawing"),
        ("evaluate BUNDLE --samples 1", "reference and bundle"),
        ("bench BUNDLE --rounds 1", "whole run"),
        ("analyze BUNDLE --schedules 5 --samples 1", "schedules, reuse"),
    ],
)
def test_a_command_that_shows_progress_can_be_quiet(bundle, tmp_path, monkeypatch, command, stage):
    monkeypatch.chdir(tmp_path)
    arguments = command.replace("BUNDLE", str(bundle)).split()
    told, silent = (CliRunner().invoke(cli.app, [*arguments, *more]) for more in ([], ["--quiet"]))
    assert told.exit_code == silent.exit_code == 0, (told.output, silent.output)
    assert f"{stage}: begun\n" in told.stderr
    assert f"{stage}: done after " in told.stderr
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", told.stderr)
    assert silent.stderr == ""
    assert silent.stdout != ""
