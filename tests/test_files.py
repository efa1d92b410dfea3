"""Outputs that are whole or not there at all, wherever they lead, and paths in a working folder that changes."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import SafetensorError
from support.pipelines import make_dit

import cemq
from cemq.bundle.manifest import MANIFEST
from cemq.bundle.staging import staging
from cemq.errors import BundleError, InputError, PlacementError
from cemq.files import check_writable, link_or_copy, written_whole
from cemq.memory.offload import whole_folder
from cemq.pipelines.outputs import Sample

SETTINGS = {
    "steps": 4, "budget": 2, "samples": 1, "planning_samples": 1, "effort": "quick", "solver": "uniform",
    "rectify": "none", "rounding": "nearest", "device": "cpu",
}  # fmt: skip


def written(folder, text):
    (folder / MANIFEST).write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("files")
    make_dit().save_pretrained(root / "pipeline")
    (root / "labels.txt").write_text("1\n2\n3\n")
    cemq.quantize_and_schedule(
        str(root / "pipeline"), root / "bundle", calib=str(root / "labels.txt"), **SETTINGS
    )  # fmt: skip
    return root / "bundle"


def test_a_link_to_a_bundle_stays_and_the_bundle_behind_it_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "digits").mkdir()
    written(tmp_path / "disk" / "digits", "old")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "digits")
    with pytest.raises(BundleError, match=r"link' exists already"), staging(link):
        pass
    with staging(link, overwrite=True) as folder:
        written(folder, "new")
    assert link.is_symlink()
    assert (link / MANIFEST).read_text() == "new"
    assert names(tmp_path) == ["disk", "link"]
    assert names(tmp_path / "disk") == ["digits"]


def test_a_link_to_nothing_leads_to_where_the_bundle_is_written(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "digits")
    with staging(link) as folder:
        written(folder, "new")
    assert link.is_symlink()
    assert (tmp_path / "disk" / "digits" / MANIFEST).read_text() == "new"


def test_a_link_to_itself_is_one_line(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(BundleError, match=r"output '.*loop'"), staging(tmp_path / "loop"):
        pass


def test_an_empty_folder_is_taken_and_still_there_after_a_failure(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    with pytest.raises(ZeroDivisionError), staging(output):
        raise ZeroDivisionError
    assert names(tmp_path) == ["out"]
    with staging(output) as folder:
        written(folder, "new")
    assert names(output) == [MANIFEST]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("output", [".", "..", "../../{name}"])
def test_the_folder_that_one_is_in_is_not_taken_away(tmp_path, monkeypatch, output):
    here = tmp_path / "above" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    for overwrite in (False, True):
        with (
            pytest.raises(BundleError, match="output '"),
            staging(Path(output.format(name="above")), overwrite=overwrite),
        ):
            pass
    written(here, "old")
    with pytest.raises(BundleError, match="cannot be replaced as a whole"), staging(Path("."), overwrite=True):
        pass
    assert names(here) == [MANIFEST]


def test_folders_made_for_a_bundle_go_with_it(tmp_path):
    with pytest.raises(ZeroDivisionError), staging(tmp_path / "a" / "b" / "out"):
        raise ZeroDivisionError
    assert not names(tmp_path)
    with staging(tmp_path / "a" / "b" / "out") as folder:
        written(folder, "new")
    assert names(tmp_path / "a" / "b") == ["out"]


def test_a_home_folder_that_nobody_has_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with staging(Path("~nobody-of-that-name")) as folder:  # as every other tool does: a name like any other
        written(folder, "new")
    assert names(tmp_path) == ["~nobody-of-that-name"]


def limited(code, *arguments, limit=2_000_000):
    """Python code in a process that can write no file beyond ``limit`` bytes, as if the disk were full."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip


FILL = """
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from cemq.bundle.staging import staging
from cemq.errors import BundleError
try:
    with staging(Path(sys.argv[1])) as folder:
        (folder / "config.json").write_text("{}")
        save_file({"weight": np.zeros(2_000_000)}, folder / "model.safetensors")
except BundleError as error:
    print(error)
"""


def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(tmp_path):
    done = limited(FILL, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "output '" in done.stdout
    assert "cannot be written: " in done.stdout
    assert len(done.stdout.strip().splitlines()) == 1
    assert not names(tmp_path)


@pytest.mark.parametrize("error", [SafetensorError("I/O error: No space left on device"), OSError(28, "No space left")])
def test_a_disk_that_is_full_is_one_line_where_weights_are_offloaded(tmp_path, error):
    said = r"offload folder '.*' cannot be written: .*No space left"
    with pytest.raises(PlacementError, match=said), whole_folder(tmp_path / "offload" / "key"):
        raise error


def test_a_relative_path_holds_after_a_change_of_the_working_folder(bundle, tmp_path, monkeypatch):
    shutil.copytree(bundle, tmp_path / "first" / "digits")
    (tmp_path / "second").mkdir()
    monkeypatch.chdir(tmp_path / "first")
    pipe = cemq.from_pretrained("digits", device="cpu")
    monkeypatch.chdir(tmp_path / "second")
    pipe.save_pretrained("again")
    assert cemq.from_pretrained("again", device="cpu").transformer is not None
    assert names(tmp_path / "second") == ["again"]
    assert names(tmp_path / "first") == ["digits"]


def test_saving_takes_an_empty_folder_and_leaves_it_where_it_fails(bundle, tmp_path, monkeypatch):
    pipe = cemq.from_pretrained(bundle, device="cpu")
    (tmp_path / "again").mkdir()

    def fail(*_, **__):
        raise SafetensorError("I/O error: No space left on device")

    with monkeypatch.context() as full:
        full.setattr(type(pipe), "save_pretrained", fail)
        with pytest.raises(BundleError, match="again' cannot be written: I/O error: No space left on device"):
            pipe.save_pretrained(tmp_path / "again")
    assert names(tmp_path) == ["again"]
    assert not names(tmp_path / "again")
    pipe.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / MANIFEST).is_file()


# Single files.


def picture():
    return Sample(kind="image", values=np.zeros((8, 8, 3), np.float32))


def test_a_picture_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    picture().save(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def half(self, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(InputError, match=r"a.png' cannot be written: No space left on device"):
        picture().save(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before
    assert names(tmp_path) == ["a.png"]


def test_ctrl_c_in_the_middle_of_a_file_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / "a.json") as partial:
        partial.write_text("{")
        raise KeyboardInterrupt
    assert not names(tmp_path)


def test_a_linked_file_is_written_behind_its_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "a.png").symlink_to(tmp_path / "real" / "b.png")
    check_writable(tmp_path / "a.png")
    picture().save(tmp_path / "a.png")
    assert (tmp_path / "a.png").is_symlink()
    assert names(tmp_path / "real") == ["b.png"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_device_is_written_as_it_is():
    check_writable("/dev/full")
    said = "'/dev/full' cannot be written: No space left on device"
    with pytest.raises(InputError, match=said), written_whole("/dev/full") as partial:
        partial.write_text("text")
    assert Path("/dev/full").is_char_device()


def test_whether_a_file_can_be_written_is_known_beforehand(tmp_path):
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "new.png")
    check_writable(tmp_path / "file")
    assert names(tmp_path) == ["file"]
    for path, message in (
        (tmp_path, "is a folder: name a file in it"),
        (tmp_path / "none" / "a.png", "the folder '.*none' does not exist"),
        (tmp_path / "file" / "a.png", "the folder '.*file' does not exist"),
        (tmp_path / ("a" * 300), "cannot be written: File name too long"),
    ):
        with pytest.raises(InputError, match=message):
            check_writable(path)


def unable(*_):
    raise OSError(18, "Invalid cross-device link")


@pytest.mark.parametrize("without", [(), ("link",), ("link", "copy_file_range")], ids=len)
def test_content_gets_another_name_or_is_copied_where_it_cannot(tmp_path, monkeypatch, without):
    for name in without:
        monkeypatch.setattr(os, name, unable)
    (tmp_path / "blob").write_bytes(b"weights" * 1000)
    (tmp_path / "link").symlink_to("blob")  # as in the cache of the Hub
    link_or_copy(tmp_path / "link", tmp_path / "new")
    assert not (tmp_path / "new").is_symlink()
    assert (tmp_path / "new").samefile(tmp_path / "blob") == (not without)
    (tmp_path / "blob").unlink()
    assert (tmp_path / "new").read_bytes() == b"weights" * 1000


def test_what_can_neither_be_linked_nor_copied_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        link_or_copy(tmp_path / "nothing", tmp_path / "new")
