"""What is verified when a bundle is loaded, what is remembered of it, and who may read its files."""

import json
import os
import shutil
import stat
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.bundles import resealed
from support.pipelines import make_dit
from typer.testing import CliRunner

import cemq
from cemq import cli
from cemq.bundle import checksums
from cemq.bundle.manifest import MANIFEST, PRIOR, read_bundle
from cemq.bundle.staging import staging
from cemq.errors import BundleError, InputError
from cemq.files import cache_folder

SETTINGS = {
    "steps": 4, "budget": 2, "samples": 1, "planning_samples": 1, "effort": "quick", "solver": "uniform",
    "rectify": "none", "rounding": "nearest", "device": "cpu",
}  # fmt: skip
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
DAMAGED = rf"file '{WEIGHTS}' was edited or damaged; copy or write the bundle again"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A bundle that was built under a umask of 022."""
    root, umask = tmp_path_factory.mktemp("loading"), os.umask(0o022)
    make_dit().save_pretrained(root / "pipeline")
    (root / "labels.txt").write_text("1\n2\n3\n")
    cemq.quantize_and_schedule(str(root / "pipeline"), root / "bundle", calib=str(root / "labels.txt"), **SETTINGS)
    os.umask(umask)
    return root / "bundle"


@pytest.fixture
def bundle(built, tmp_path, monkeypatch):
    """A copy that has just been written, and a cache folder of its own; a while has passed since."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 3_000_000_000)
    return shutil.copytree(built, tmp_path / "bundle")


@pytest.fixture
def hashed(monkeypatch):
    """Names of the files whose content is read, as they are."""
    names, sha256 = [], checksums.sha256

    def watched(file):
        names.append(file.name)
        return sha256(file)

    monkeypatch.setattr(checksums, "sha256", watched)
    return names


def listed(bundle):
    """Names of all files that have a checksum."""
    return sorted(Path(name).name for name in json.loads((bundle / MANIFEST).read_text())["files"])


def change(file, *, keep_times=True):
    """Another last byte in a file of the same size, and the same times as far as they can be set."""
    before = file.stat()
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    if keep_times:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert file.stat().st_size == before.st_size


def stamps():
    return list((cache_folder() / "verified").iterdir())


def test_the_second_load_reads_no_file_for_its_checksum(bundle, hashed):
    cemq.from_pretrained(bundle, device="cpu")
    assert sorted(hashed) == listed(bundle)
    hashed.clear()
    cemq.from_pretrained(bundle, device="cpu")
    read_bundle(bundle.parent / "bundle" / ".." / "bundle", verify="once")  # by another name
    assert hashed == []
    assert len(stamps()) == 1


@pytest.mark.parametrize("keep_times", [True, False])
def test_a_changed_file_of_equal_size_is_found_even_with_its_time_put_back(bundle, hashed, keep_times):
    read_bundle(bundle, verify="once")
    hashed.clear()
    change(bundle / WEIGHTS, keep_times=keep_times)
    for _ in range(2):  # and is not remembered as whole
        with pytest.raises(BundleError, match=DAMAGED):
            cemq.from_pretrained(bundle, device="cpu")
    assert hashed == [Path(WEIGHTS).name] * 2


def test_only_what_was_touched_is_read_again(bundle, hashed):
    read_bundle(bundle, verify="once")
    hashed.clear()
    os.utime(bundle / PRIOR)
    for expected in ([PRIOR], []):
        read_bundle(bundle, verify="once")
        assert hashed == expected
        hashed.clear()


def test_a_file_that_another_was_renamed_over_is_read_again(bundle, hashed):
    read_bundle(bundle, verify="once")
    hashed.clear()
    shutil.copy2(bundle / PRIOR, bundle / "copy")
    (bundle / "copy").replace(bundle / PRIOR)
    read_bundle(bundle, verify="once")
    assert hashed == [PRIOR]


def test_always_reads_everything_and_never_nothing(bundle, hashed):
    for verify in ("always", True, "once"):  # the last finds what the first has left
        read_bundle(bundle, verify=verify)
    assert sorted(hashed) == sorted(2 * listed(bundle))
    hashed.clear()
    change(bundle / WEIGHTS)
    cemq.from_pretrained(bundle, device="cpu", verify="never")
    read_bundle(bundle, verify=False)
    assert hashed == []
    with pytest.raises(BundleError, match=DAMAGED):
        read_bundle(bundle, verify="always")


@pytest.mark.parametrize("verify", ["allways", "", None, 2])
def test_another_word_is_refused_with_those_there_are(built, verify):
    with pytest.raises(InputError, match=r"unknown verify .*: choose from always, once, never"):
        cemq.from_pretrained(built, verify=verify)


def test_another_bundle_in_the_same_folder_is_read_as_a_whole(bundle, hashed):
    read_bundle(bundle, verify="once")
    hashed.clear()
    resealed(bundle, lambda content: content.update(model="another"))
    read_bundle(bundle, verify="once")
    assert sorted(hashed) == listed(bundle)
    assert len(stamps()) == 1


@pytest.mark.parametrize(
    "written", [b"", b"{", b"null", b"[1]", b"\xff\xfe", b'{"checksum": 1}', b"[" * 100_000, b'{"files": 7}']
)
def test_a_damaged_stamp_costs_nothing_but_reading_again(bundle, hashed, written):
    read_bundle(bundle, verify="once")
    hashed.clear()
    (stamp,) = stamps()
    whole = stamp.read_bytes()
    stamp.write_bytes(written)
    read_bundle(bundle, verify="once")
    assert sorted(hashed) == listed(bundle)
    assert stamp.read_bytes() == whole


@pytest.mark.parametrize("files", [7, [1], "x", {WEIGHTS: "yes"}, {WEIGHTS: [1]}])
def test_a_stamp_of_another_make_vouches_for_nothing(bundle, hashed, files):
    read_bundle(bundle, verify="once")
    hashed.clear()
    (stamp,) = stamps()
    stamp.write_text(json.dumps(json.loads(stamp.read_text()) | {"files": files}))
    read_bundle(bundle, verify="once")
    assert sorted(hashed) == listed(bundle)


def test_a_cache_that_cannot_be_written_costs_nothing_but_reading_again(bundle, hashed, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    for _ in range(2):
        cemq.from_pretrained(bundle, device="cpu")
    assert sorted(hashed) == sorted(2 * listed(bundle))


def test_without_a_home_folder_files_are_verified_each_time(bundle, hashed, monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nowhere)
    for _ in range(2):
        read_bundle(bundle, verify="once")
    assert sorted(hashed) == sorted(2 * listed(bundle))


def test_what_was_written_a_moment_ago_is_not_remembered_yet(bundle, hashed, monkeypatch):
    """Another change within the same tick of the file system's clock could not be told from it."""
    monkeypatch.setattr(time, "time_ns", lambda: 0)  # the clock of the files is ahead
    for _ in range(2):
        read_bundle(bundle, verify="once")
    assert sorted(hashed) == sorted(2 * listed(bundle))


def test_a_file_that_changes_while_it_is_read_is_read_again(bundle, hashed, monkeypatch):
    watched = checksums.sha256

    def changing(file):
        found = watched(file)
        if file.name == PRIOR:
            os.utime(file)
        return found

    with monkeypatch.context() as once:
        once.setattr(checksums, "sha256", changing)
        read_bundle(bundle, verify="once")
    hashed.clear()
    read_bundle(bundle, verify="once")
    assert hashed == [PRIOR]


def test_sizes_are_compared_before_any_content_is_read(bundle, hashed):
    with (bundle / WEIGHTS).open("ab") as file:
        file.write(b"x")
    with pytest.raises(BundleError, match=rf"'{WEIGHTS}' has \d+ bytes instead of \d+"):
        cemq.from_pretrained(bundle, verify="always")
    assert hashed == []


# --- the commands


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(each) for each in arguments])


def test_verify_says_that_all_is_well_and_reads_everything_every_time(bundle, hashed):
    for _ in range(2):
        done = invoke("verify", bundle)
        assert done.exit_code == 0, done.output
        assert done.stdout.startswith(f"{bundle}: {len(listed(bundle))} files, ")
        assert done.stderr == ""
    assert sorted(hashed) == sorted(2 * listed(bundle))


def test_verify_names_every_file_that_is_not_as_it_was_written(bundle):
    change(bundle / WEIGHTS)
    (bundle / "vae" / "config.json").unlink()
    with (bundle / PRIOR).open("ab") as file:
        file.write(b"x")
    (bundle / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    done = invoke("verify", bundle)
    assert done.exit_code == 1
    assert done.stdout == ""
    *faults, last = done.stderr.splitlines()
    assert sorted(line.partition(":")[0] for line in faults) == sorted(
        [WEIGHTS, "vae/config.json", PRIOR, "transformer/diffusion_pytorch_model.safetensors.index.json"]
    )
    said = f"files damaged, missing or not its own: 4, of {len(listed(bundle))} listed"
    assert last == f"cemq: bundle '{bundle}': {said}"
    told = invoke("verify", bundle, "--json")
    assert told.exit_code == 1
    found = json.loads(told.stdout)
    assert found["faults"]["vae/config.json"] == "is missing; write the bundle again"
    assert len(found["faults"]) == 4
    assert told.stderr.splitlines() == [last]


def test_verify_in_json_says_what_it_read(bundle):
    found = json.loads(invoke("verify", bundle, "--json").stdout)
    total = sum(each["bytes"] for each in json.loads((bundle / MANIFEST).read_text())["files"].values())
    assert found == {"bundle": str(bundle), "files": len(listed(bundle)), "bytes": total, "faults": {}}


@pytest.mark.parametrize(
    "command",
    [["generate", "--label", "1", "-o", "a.png"], ["evaluate", "--samples", "1"], ["analyze"], ["bench"]],
    ids=lambda command: command[0],
)
def test_commands_verify_as_they_are_told(bundle, hashed, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    read_bundle(bundle, verify="once")
    change(bundle / WEIGHTS)
    hashed.clear()
    name, *arguments = command
    for verify in ("once", "always"):
        done = invoke(name, bundle, *arguments, "--verify", verify)
        assert done.exit_code == 1
        assert DAMAGED in done.stderr
    assert len(hashed) > 1


def test_a_picture_is_drawn_from_what_is_not_verified(bundle, hashed, tmp_path):
    done = invoke("generate", bundle, "--label", "1", "-o", tmp_path / "a.png", "--verify", "never")
    assert done.exit_code == 0, done.output
    assert hashed == []


# --- permissions


def modes(folder):
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.rglob("*"))}


@pytest.mark.parametrize(
    ("umask", "file", "inner"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750), (0o077, 0o600, 0o700)]
)
def test_files_of_a_bundle_are_for_whom_the_umask_leaves_them_to(tmp_path, umask, file, inner):
    before = os.umask(umask)
    try:
        with staging(tmp_path / "made" / "bundle") as folder:
            (folder / "vae").mkdir()
            (folder / "private").mkdir(mode=0o700)
            save_file({"a": torch.ones(2)}, folder / "vae" / "a.safetensors")
            (folder / MANIFEST).write_text("{}")
            (folder / MANIFEST).chmod(0o600)
    finally:
        os.umask(before)
    expected = {"bundle": inner, "vae": inner, "private": inner, "a.safetensors": file, MANIFEST: file}
    assert modes(tmp_path / "made" / "bundle") == expected


def test_every_file_of_a_built_bundle_and_of_one_saved_again_can_be_read_by_others(built, tmp_path):
    umask = os.umask(0o022)
    try:
        cemq.from_pretrained(built, device="cpu").save_pretrained(tmp_path / "again")
        assert invoke("export", built, "-o", tmp_path / "schedule.json").exit_code == 0
    finally:
        os.umask(umask)
    for folder in (built, tmp_path / "again"):
        files = {path: path.stat().st_mode & 0o777 for path in folder.rglob("*")}
        assert {path.name for path, mode in files.items() if mode != (0o755 if path.is_dir() else 0o644)} == set()
        assert folder / PRIOR in files
        assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "schedule.json").stat().st_mode) == 0o644
