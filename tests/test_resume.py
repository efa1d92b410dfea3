"""A build that was ended, however and whenever, is gone on with by the same command, and gives the same bundle."""

import itertools
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from support.counting import counted_rows
from support.pipelines import save_dit
from support.slow import others_slow
from typer.testing import CliRunner

import cemq
from cemq import cli
from cemq.build import stages, stored, work
from cemq.bundle.manifest import MANIFEST
from cemq.bundle.staging import claimed, staging
from cemq.errors import BundleError, CemqError
from cemq.pipelines.batches import BUILD_LOG

CEMQ = Path(sys.executable).with_name("cemq")
STEPS = 6
SETTINGS = {
    "steps": STEPS, "also_steps": [4], "budget": 3, "samples": 2, "planning_samples": 3, "check_samples": 1,
    "effort": "quick", "scheme": "w8a8", "call": {"guidance_scale": 2.0}, "device": "cpu",
}  # fmt: skip
# in this order; what is planned is planned for four steps as well
REFERENCES = [
    "reference-runs-0", "reference-runs-1", "full-precision-planning-samples-0", "full-precision,-4-steps-0",
    "full-precision,-4-steps-1", "full-precision,-4-steps-2", "full-precision-check-0",
]  # fmt: skip


class Ended(BaseException):
    """As sudden as Python knows it."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return save_dit(tmp_path_factory.mktemp("resume"), labels=20)


def build(root, output, **settings):
    asked = SETTINGS | {"calib": str(root / "labels.txt")} | settings
    return cemq.quantize_and_schedule(str(root / "pipeline"), output, **asked)


def content(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def work_of(folder):
    """Where the only build that was ended has kept what it had."""
    (found,) = (path for path in (folder / ".out.building").iterdir() if path.is_dir())
    return found


@pytest.fixture(scope="module")
def whole(root):
    """The bundle of a build that nobody disturbed, and what that ran."""
    with counted_rows() as rows:
        build(root, root / "whole")
    assert names(root) == ["labels.txt", "pipeline", "whole"]
    return content(root / "whole"), rows()


@pytest.fixture
def ends(root, tmp_path, monkeypatch):
    """Whether a build is ended: as soon as ``when`` says so of the stage that was kept last."""

    def is_ended(when, **settings):
        write = stored.write

        def written(folder, name, value):
            write(folder, name, value)
            if when(name):
                raise Ended

        with monkeypatch.context() as patched:
            patched.setattr(stored, "write", written)
            try:
                build(root, tmp_path / "out", **settings)
            except Ended:
                return True
        return False

    return is_ended


@pytest.fixture
def said(caplog):
    """What builds say beside their progress."""
    caplog.set_level("INFO", BUILD_LOG)
    return caplog


# --- ended by an exception


def test_a_build_that_is_ended_after_every_single_stage_runs_none_again(ends, whole, tmp_path):
    kept = []

    def any_stage(name):
        kept.append(name)
        # before a run has ended nothing is worth keeping; and what weights are fitted to is kept after its run
        return name.startswith(("fitted-", "p", "check")) or (name.startswith("run-") and "reference" not in name)

    with counted_rows() as rows:
        for _ in range(len(REFERENCES) + 4):
            assert ends(any_stage)
            assert not (tmp_path / "out").exists()
        assert not ends(any_stage)
    assert rows() == whole[1]
    assert content(tmp_path / "out") == whole[0]
    assert names(tmp_path) == ["out"]
    stages_kept = ["fitted-0", "fitted-0", "opened", "samples", "pipeline", "prior", "plans", "check"]
    assert sorted(kept) == sorted([f"run-{name}" for name in REFERENCES] + stages_kept)  # each once


def test_at_most_one_run_is_repeated(ends, whole, tmp_path, said):
    with counted_rows() as rows:
        assert ends(lambda name: name == "run-reference-runs-1")  # what weights are fitted to is not kept yet
        repeated = rows() // 2  # of two
        assert ends(lambda name: name == "pipeline")
        assert not ends(lambda _: False)
    assert rows() - whole[1] == repeated
    assert content(tmp_path / "out") == whole[0]
    assert [message for message in said.messages if message.startswith("resuming")] == [
        "resuming: 2 of 7 reference runs", "resuming: 7 of 7 reference runs, quantized",
    ]  # fmt: skip


def test_runs_of_schedules_are_not_repeated_either(root, whole, tmp_path, monkeypatch, said):
    note = work.Journal.__setitem__

    def noted(self, name, value):
        note(self, name, value)
        if len(self) == 4:
            raise Ended

    with counted_rows() as rows:
        with monkeypatch.context() as patched, pytest.raises(Ended):
            patched.setattr(work.Journal, "__setitem__", noted)
            build(root, tmp_path / "out")
        build(root, tmp_path / "out")
    assert rows() == whole[1]
    assert content(tmp_path / "out") == whole[0]
    assert said.messages == ["resuming: 7 of 7 reference runs, quantized, profiled, 4 runs of schedules"]


def test_the_original_is_not_opened_once_it_is_quantized(root, ends, tmp_path, monkeypatch):
    opened, open_pipeline = [], stages.open_pipeline
    assert ends(lambda name: name == "pipeline")
    monkeypatch.setattr(
        stages, "open_pipeline", lambda folder, **how: (opened.append(folder), open_pipeline(folder, **how))[1]
    )
    expected = work_of(tmp_path) / "pipeline"
    build(root, tmp_path / "out")
    assert opened == [expected]


def test_what_weights_are_fitted_to_is_kept_until_they_are(ends, tmp_path):
    assert ends(lambda name: name == "fitted-0")
    assert len(list(work_of(tmp_path).glob("fitted-*.safetensors"))) == 1
    assert ends(lambda name: name == "prior")
    assert not list(work_of(tmp_path).glob("fitted-*"))


def test_what_cannot_be_kept_is_said_and_run_again(root, ends, whole, tmp_path, monkeypatch, said):
    write = stored.write

    def refused(folder, name, value):
        if name.startswith("fitted-"):
            raise BundleError(f"stage '{name}' cannot be kept: it holds a Cache, which is no plain data")
        write(folder, name, value)

    monkeypatch.setattr(stored, "write", refused)
    assert ends(lambda name: name == f"run-{REFERENCES[-1]}")
    assert said.messages == [
        "stage 'fitted-0' cannot be kept: it holds a Cache, which is no plain data; it is run again, should this build "
        "be ended"
    ]
    build(root, tmp_path / "out")
    assert content(tmp_path / "out") == whole[0]


def test_an_autoencoder_that_is_cast_when_it_decodes_is_written_as_it_was_opened(root, ends, tmp_path, monkeypatch):
    decode = AutoencoderKL.decode

    def cast(self, latents, *arguments, **keywords):
        return decode(self.to(torch.float32), latents.float(), *arguments, **keywords)

    monkeypatch.setattr(AutoencoderKL, "decode", cast)
    build(root, tmp_path / "at once", dtype="bfloat16")
    assert ends(lambda name: name == f"run-{REFERENCES[-1]}", dtype="bfloat16")
    build(root, tmp_path / "out", dtype="bfloat16")  # where nothing is decoded before it is written
    assert content(tmp_path / "out") == content(tmp_path / "at once")


# --- files that are not what was written


def torn(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flipped(file):
    values = bytearray(file.read_bytes())
    values[-2] ^= 1
    file.write_bytes(values)


@pytest.mark.parametrize(
    ("damage", "pattern", "stage"),
    others_slow(
        [
            (torn, "run-reference-runs-1.json", "run-reference-runs-1"),
            (flipped, "run-full-precision-check-0.safetensors", "run-full-precision-check-0"),
            (flipped, "pipeline/transformer/*.safetensors", "pipeline"),
            (Path.unlink, "pipeline/vae/config.json", "pipeline"),
            (flipped, "pipeline.json", "pipeline"),
            (flipped, "prior.safetensors", "prior"),
            (torn, "samples.json", "samples"),
            (flipped, "opened.json", "opened"),
        ],
        [
            (flipped, "pipeline/transformer/*.safetensors", "pipeline"),
            (Path.unlink, "pipeline/vae/config.json", "pipeline"),
            (torn, "samples.json", "samples"),
        ],
    ),
)
def test_a_damaged_stage_is_run_again_and_said(root, ends, whole, tmp_path, said, damage, pattern, stage):
    assert ends(lambda name: name == "prior")
    (file,) = work_of(tmp_path).glob(pattern)
    damage(file)
    build(root, tmp_path / "out")
    assert content(tmp_path / "out") == whole[0]
    (warned,) = (record.getMessage() for record in said.records if record.levelname == "WARNING")
    assert warned.startswith(f"stage '{stage}' was kept and is damaged, so it is run again: ")


@pytest.mark.parametrize("damage", [torn, flipped])
def test_a_damaged_line_of_a_journal_is_run_again(root, ends, whole, tmp_path, damage):
    assert ends(lambda name: name == "plans")
    (work_of(tmp_path) / "plans.json").unlink()
    for file in work_of(tmp_path).glob("schedules-*"):
        damage(file)
    with counted_rows() as rows:
        build(root, tmp_path / "out")
    assert content(tmp_path / "out") == whole[0]
    assert 0 < rows() < whole[1] / 2


def test_a_journal_is_read_as_far_as_its_lines_are_whole(tmp_path):
    values = {"a": [0.1, 1e-300, float("inf")], "b": [[1.0], 2]}
    journal = work.Journal(tmp_path / "lines")
    for name, value in values.items():
        journal[name] = value
    assert work.Journal(tmp_path / "lines") == values
    with (tmp_path / "lines").open("ab") as file:
        file.write(b"00000000 [1")
    again = work.Journal(tmp_path / "lines")
    again["c"] = 3
    assert work.Journal(tmp_path / "lines") == values | {"c": 3}


# --- whose the output is


def test_a_second_build_of_one_output_is_refused_in_one_line(root, tmp_path):
    refused = "output '.*out' is being written by another process: wait for it, or choose another name"
    with claimed(tmp_path / "out") as place:
        (place.folder / "theirs").mkdir()
        with pytest.raises(BundleError, match=refused):
            build(root, tmp_path / "out", fresh=True)
        with pytest.raises(BundleError, match=refused), staging(tmp_path / "out"):
            pass
        assert names(place.folder) == ["lock", "theirs"]


def test_work_with_other_settings_stays_until_a_bundle_is_written(root, ends, whole, tmp_path, said):
    assert ends(lambda name: name == "pipeline")
    assert ends(lambda name: name == "run-reference-runs-0", seed=9)
    assert len(names(tmp_path / ".out.building")) == 3
    (kept,) = said.messages
    assert "of an unfinished build of 'out' with other settings (seed 0 instead of 9), until a bundle" in kept
    with counted_rows() as rows:
        build(root, tmp_path / "out")
    assert rows() < 0.7 * whole[1]
    assert content(tmp_path / "out") == whole[0]
    assert names(tmp_path) == ["out"]


def test_fresh_begins_anew(root, ends, whole, tmp_path, said):
    assert ends(lambda name: name == "pipeline", seed=9)
    assert ends(lambda name: name == "pipeline")
    said.clear()
    with counted_rows() as rows:
        build(root, tmp_path / "out", fresh=True)
    assert rows() == whole[1]
    assert said.messages == []
    assert names(tmp_path) == ["out"]


def test_a_model_or_a_list_of_prompts_that_was_changed_begins_another_build(root, ends, tmp_path, said):
    (tmp_path / "labels.txt").write_text("1\n2\n3\n4\n5\n")
    asked = {"calib": str(tmp_path / "labels.txt")}
    assert ends(lambda name: name == "run-reference-runs-0", **asked)
    (tmp_path / "labels.txt").write_text("5\n2\n3\n4\n5\n")
    assert ends(lambda name: name == "run-reference-runs-0", **asked)
    weights = next((root / "pipeline" / "transformer").glob("*.safetensors"))
    os.utime(weights)
    assert ends(lambda name: name == "run-reference-runs-0", **asked)
    differ = [message.partition("(")[2].partition(")")[0] for message in said.messages]
    assert sorted(differ) == ["other given files", "other given files, other model files", "other model files"]


def test_a_build_that_has_run_nothing_leaves_nothing(root, ends, tmp_path):
    assert ends(lambda name: name == "samples")
    assert not names(tmp_path)
    with pytest.raises(CemqError):
        build(root, tmp_path / "out", budget=99)
    assert not names(tmp_path)


def test_what_an_earlier_version_has_left_is_cleaned_and_what_lives_is_not(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    left = [f".out.partial-{gone.pid}", ".out.partial-0a1b2c3d", f".out.partial-{os.getpid()}", ".outer.partial-0a1b"]
    for name in (*left, ".out.replaced-0a1b2c3d"):
        (tmp_path / name).mkdir()
    (tmp_path / ".out.replaced-0a1b2c3d" / MANIFEST).write_text("old")
    with staging(tmp_path / "out", overwrite=True) as folder:  # the old bundle is put back before
        assert (tmp_path / "out" / MANIFEST).read_text() == "old"
        (folder / MANIFEST).write_text("new")
    assert names(tmp_path) == sorted([*left[2:], "out"])
    assert (tmp_path / "out" / MANIFEST).read_text() == "new"


# --- ended by the system

KILLED = """
import os, signal, sys
from pathlib import Path
from cemq.bundle import staging

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[2] == "between":
    staging.exchange = lambda *_: False
    rename = Path.rename
    Path.rename = lambda self, to: kill() if self.name == "partial" else rename(self, to)
else:
    staging.Place.clear = kill
with staging.staging(Path(sys.argv[1]), overwrite=True) as folder:
    (folder / "cemq.json").write_text("new")
"""


@pytest.mark.parametrize(("moment", "found"), [("between", "old"), ("after", "new")])
def test_a_bundle_that_was_being_replaced_is_the_old_or_the_new_one(tmp_path, moment, found):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MANIFEST).write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out"), moment], stderr=subprocess.PIPE)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "out").exists() == (moment == "after")
    with pytest.raises(BundleError, match="exists already"), staging(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / MANIFEST).read_text() == found
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("files", [0, 3, 11])
def test_a_disk_that_is_full_is_one_line_and_keeps_what_was_finished(root, whole, tmp_path, monkeypatch, files):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MANIFEST).write_text("old")
    before, written = resource.getrlimit(resource.RLIMIT_FSIZE), itertools.count()
    write = stored.write

    def fills(folder, name, value):
        if next(written) == files:  # from here on
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        write(folder, name, value)

    with monkeypatch.context() as patched:
        patched.setattr(stored, "write", fills)
        try:
            with pytest.raises(BundleError, match=r"output '.*out' cannot be written: ") as raised:
                build(root, tmp_path / "out", overwrite=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(str(raised.value).splitlines()) == 1
    assert (tmp_path / "out" / MANIFEST).read_text() == "old"
    with counted_rows() as rows:
        build(root, tmp_path / "out", overwrite=True)
    assert (rows() < whole[1]) == (files > 3)
    assert content(tmp_path / "out") == whole[0]
    assert names(tmp_path) == ["out"]


def test_ctrl_c_says_how_to_go_on(root, whole, tmp_path, monkeypatch):
    options = [
        "quantize-and-schedule", root / "pipeline", "--calib", root / "labels.txt", "--steps", STEPS, "--also-steps", 4,
        "--budget", 3, "--samples", 2, "--planning-samples", 3, "--check-samples", 1, "--effort", "quick", "--scheme",
        "w8a8", "--call", "guidance_scale=2.0", "--device", "cpu", "-o", tmp_path / "out",
    ]  # fmt: skip
    write = stored.write

    def interrupted(folder, name, value):
        write(folder, name, value)
        if name == "fitted-0" and value[0]["runs"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stored, "write", interrupted)
        stopped = CliRunner().invoke(cli.app, [str(option) for option in options])
    assert stopped.exit_code == 130
    assert stopped.stderr.splitlines()[-1] == (
        "cemq: interrupted; what is finished is kept, and the same command goes on from there"
    )
    done = CliRunner().invoke(cli.app, [str(option) for option in options])
    assert done.exit_code == 0, done.output
    assert done.stderr.splitlines()[0] == "resuming: 2 of 7 reference runs"
    assert content(tmp_path / "out") == whole[0]


@pytest.mark.slow
def test_twenty_builds_killed_at_random_moments_and_continued_give_the_bundle_of_one_left_alone(tmp_path):
    def start(output):
        command = [CEMQ, "quantize-and-schedule", "builtin:dit-digits", "--effort", "quick", "--steps", "8"]
        return subprocess.Popen(
            [*command, "--budget", "4", "-o", output], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )  # fmt: skip

    def kept_files(folder):
        return list(folder.glob(".out.building/*/*"))

    (tmp_path / "whole").mkdir()
    undisturbed, most = start(tmp_path / "whole" / "out"), 0
    while undisturbed.poll() is None:
        most = max(most, len(kept_files(tmp_path / "whole")))
        time.sleep(0.01)
    undisturbed.communicate()
    assert undisturbed.returncode == 0
    moments, kept = random.Random(23), set()
    expected = content(tmp_path / "whole" / "out")
    begun = {"pipeline": "quantization: begun", "prior": "forced runs: begun"}
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        process, files = start(folder / "out"), number * most // 19  # from none to as many as there are in the end
        while len(kept_files(folder)) < files and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moments.uniform(0.0, 0.5))
        process.kill()
        process.communicate()
        finished = {path.name for path in folder.glob(".out.building/*/*.json")}
        kept |= finished
        if not (folder / "out").exists():
            process = start(folder / "out")
            _, errors = process.communicate()
            assert process.returncode == 0, errors
            assert not [stage for stage, line in begun.items() if f"{stage}.json" in finished and line in errors]
            assert ("full-precision check: begun" in errors) != ("run-full-precision-check-0.json" in finished)
        else:  # it may have been about to clear away
            with pytest.raises(BundleError, match="exists already"), staging(folder / "out"):
                pass
        assert content(folder / "out") == expected
        assert names(folder) == ["out"]
    assert {"run-reference-runs-0.json", "pipeline.json", "prior.json"} <= kept  # they were killed at all stages


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_a_build_goes_on_once_there_is_room_on_a_disk_that_was_full(root, whole, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    if subprocess.run([*mount, "size=300k", "tmpfs", disk]).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        with pytest.raises(BundleError, match=r"output '.*out' cannot be written: .*No space left on device"):
            build(root, disk / "out")
        assert names(disk) == [".out.building"]
        subprocess.run([*mount, "remount,size=300m", "tmpfs", disk], check=True)
        build(root, disk / "out")
        assert content(disk / "out") == whole[0]
        assert names(disk) == ["out"]
    finally:
        subprocess.run(["umount", disk], check=True)
