"""The picture of a bundle's card: what it shows of which samples, how large it is, and that no bundle lacks it."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from support.pipelines import CALL, save_dit

import cemq
from cemq.bundle.manifest import CARD, MANIFEST, PICTURE, read_bundle
from cemq.errors import BundleError
from cemq.evaluation.pictures import few_of, light_webp, sheet

RNG = np.random.default_rng(0)


def batches(*shapes):
    return [RNG.random(shape).astype(np.float32) for shape in shapes]


def levels(picture):
    return (picture * 255).round().astype(np.uint8)


def test_the_first_few_samples_are_shown_tiny_ones_as_they_are():
    references, images = batches((3, 8, 6, 3), (3, 8, 6, 3)), batches((3, 8, 6, 3), (3, 8, 6, 3))
    for found, drawn in zip(few_of(references, images, total=6), (references, images), strict=True):
        assert np.array_equal(found, levels(np.concatenate(drawn)[:4]))


def test_large_samples_are_fewer_and_made_smaller():
    (large,) = batches((3, 1024, 512, 3))
    left, right = few_of([large], [large], total=3)
    assert left.shape == right.shape == (2, 400, 200, 3)


def test_what_has_no_three_channels_is_grey():
    (depth,) = batches((1, 8, 8, 1))
    assert np.array_equal(few_of([depth], [depth], total=1)[0], levels(depth.repeat(3, -1)))


def test_of_a_video_it_is_the_frame_in_the_middle_and_of_audio_nothing():
    (video,), (audio,) = batches((2, 5, 8, 8, 3)), batches((1, 2, 400))
    assert np.array_equal(few_of([video], [video], total=2)[0], levels(video[:, 2]))
    assert few_of([audio], [audio], total=1) is None


def dark_boxes(page, steps):
    """Which boxes of a sheet's lowest line are dark."""
    row = np.asarray(page.convert("L"))[-20, 16:-16]
    return [bool(row[int((step + 0.4) * len(row) / steps)] < 128) for step in range(steps)]


def colours_of(pixels):
    return np.unique(pixels.reshape(-1, 3).astype(int) @ [1 << 16, 1 << 8, 1])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_sheet_shows_both_rows_and_the_schedule(count):
    (pictures,) = (levels(each) for each in batches((2 * count, 8, 8, 3)))
    marks = "█··█" * 5
    page = sheet([("full precision", pictures[:count]), ("this bundle", pictures[count:])], marks)
    assert dark_boxes(page, 20) == [mark == "█" for mark in marks]
    plain = sheet([("full precision", pictures[:count]), ("this bundle", pictures[count:])])
    assert plain.height < page.height
    assert np.isin(colours_of(pictures), colours_of(np.asarray(page))).all()  # none is smoothed
    assert sheet([("a" * 200, pictures[:count])]).width > plain.width  # text is not cut


def test_a_sheet_of_a_thousand_steps_is_drawn():
    (pictures,) = (levels(each) for each in batches((1, 8, 8, 3)))
    assert sheet([("", pictures), ("", pictures)], "█▌·" * 334).width < 1000


def test_a_picture_is_light_and_without_loss_where_that_is_light():
    for size, mode in ((100, "lossless"), (900, "lossy")):
        noise = Image.fromarray(RNG.integers(0, 256, (size, size, 3), dtype=np.uint8))
        file = light_webp(noise)
        assert len(file) <= 200_000
        found = np.asarray(Image.open(io.BytesIO(file)))
        assert np.array_equal(found, np.asarray(noise)) == (mode == "lossless")


# --- in a bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_dit(tmp_path_factory.mktemp("pictures"), labels=8)


def built(folder, output, **settings):
    cemq.quantize_and_schedule(
        str(folder / "pipeline"), output, scheme="w8a8", calib=str(folder / "labels.txt"), steps=6, call=CALL,
        device="cpu", rounding="nearest", samples=1, **settings,
    )  # fmt: skip
    return output


def listed(bundle):
    return json.loads((bundle / MANIFEST).read_text())["files"]


def test_a_bundle_that_was_checked_shows_its_samples_in_its_card(folder, tmp_path):
    bundle = built(
        folder, tmp_path / "bundle", budget=3, effort="quick", solver="uniform", rectify="none", check_samples=3
    )
    page = Image.open(bundle / PICTURE)
    assert dark_boxes(page, 6) == [step in read_bundle(bundle).schedule.full_steps for step in range(6)]
    assert PICTURE in listed(bundle)
    assert f"]({PICTURE})\n" in (bundle / CARD).read_text()
    cemq.from_pretrained(bundle, device="cpu").save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / PICTURE).read_bytes() == (bundle / PICTURE).read_bytes()
    assert f"]({PICTURE})\n" in (tmp_path / "again" / CARD).read_text()
    (bundle / PICTURE).write_bytes(b"x" * (bundle / PICTURE).stat().st_size)
    with pytest.raises(BundleError, match=f"'{PICTURE}' was edited or damaged"):
        read_bundle(bundle, verify="always")


def test_where_nothing_was_run_to_see_there_is_no_picture(folder, tmp_path):
    bundle = built(folder, tmp_path / "bundle", budget=3, effort="instant")
    assert not (bundle / PICTURE).exists()
    assert "![" not in (bundle / CARD).read_text()


def test_with_a_policy_there_is_no_strip(folder, tmp_path):
    bundle = built(folder, tmp_path / "bundle", policy="teacache:threshold=1.0", check_samples=1)
    assert "strip" not in (bundle / CARD).read_text().partition("](")[0]
    assert not any(dark_boxes(Image.open(bundle / PICTURE).crop((0, 0, 800, 34)), 6))
