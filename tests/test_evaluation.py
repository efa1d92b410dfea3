from importlib.util import find_spec

import numpy as np
import pytest
import torch

import cemq
from cemq.bundle.manifest import quality_text
from cemq.errors import InputError
from cemq.evaluation.compare import measure_fidelity, write_side_by_side
from cemq.evaluation.scores import METRICS, score
from cemq.metrics import middle_error, middle_mean, psnr_db, relative_l2, ssim
from cemq.pipelines.batches import Batch
from cemq.runtime.runner import Outcome


def test_psnr_of_a_known_error():
    black = np.zeros((2, 8, 8, 3))
    assert psnr_db(black, black + 0.1) == pytest.approx([20.0, 20.0])
    assert psnr_db(black, black).tolist() == [100.0, 100.0]


def test_psnr_is_per_sample_and_not_of_the_mean_error():
    reference = np.zeros((2, 4, 4, 3))
    images = reference.copy()
    images[1] += 0.01
    assert psnr_db(reference, images) == pytest.approx([100.0, 40.0])


def test_ssim_is_one_for_identical_images_and_agrees_with_scikit_image():
    from skimage.metrics import structural_similarity

    rng = np.random.default_rng(0)
    reference = rng.random((2, 24, 24, 3))
    images = np.clip(reference + 0.1 * rng.standard_normal(reference.shape), 0, 1)
    assert ssim(reference, reference) == pytest.approx([1.0, 1.0])
    for a, b, value in zip(reference, images, ssim(reference, images), strict=True):
        independent = structural_similarity(
            a, b, data_range=1.0, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert value == pytest.approx(independent, abs=0.02)  # they treat the border differently
        assert value < 0.99


def test_ssim_works_on_images_smaller_than_its_window():
    tiny = np.random.default_rng(0).random((1, 8, 8, 3))
    assert ssim(tiny, tiny) == pytest.approx([1.0])


def test_relative_l2_does_not_let_opposite_errors_cancel():
    reference = torch.ones(1, 2)
    assert relative_l2(reference, reference + torch.tensor([[0.5, -0.5]])) == pytest.approx([0.5])


def outcome_of(images):
    return Outcome(images=images, latents=torch.ones(len(images), 1), seconds=1.0)


def test_fidelity_is_the_mean_over_all_samples_of_all_batches():
    black, grey = np.zeros((1, 16, 16, 3)), np.full((2, 16, 16, 3), 0.1)

    found = measure_fidelity(
        [outcome_of(black), outcome_of(np.zeros_like(grey))], [outcome_of(black), outcome_of(grey)]
    )
    assert found.psnr_db == pytest.approx((100 + 20 + 20) / 3)
    assert (found.samples, found.relative_l2) == (3, 0.0)


def graded(count, size=16):
    """Black pictures, and the same with more and more grey: errors of 0.01, 0.02, ..."""
    grey = 0.01 * np.arange(1, count + 1)[:, None, None, None] * np.ones((1, size, size, 3))
    return np.zeros_like(grey), grey


def test_every_metric_tells_its_fifth_percentile_and_whose_the_worst_sample_is():
    black, grey = graded(21)
    batches = [Batch(conditions=tuple(f"picture {i}" for i in range(21)), seeds=tuple(range(100, 121)))]
    found = measure_fidelity([outcome_of(black)], [outcome_of(grey)], batches=batches).scores
    psnr = -20 * np.log10(0.01 * np.arange(1, 22))
    assert found["psnr_db"] == {
        "mean": pytest.approx(psnr.mean()), "p5": pytest.approx(psnr[19]), "worst": pytest.approx(psnr[20]),
        "seed": 120, "condition": "picture 20",
    }  # fmt: skip
    assert found["ssim"]["worst"] < found["ssim"]["p5"] < found["ssim"]["mean"] < 1
    if find_spec("flip_evaluator"):  # where more is worse
        assert 0 < found["flip"]["mean"] < found["flip"]["p5"] < found["flip"]["worst"]
        assert found["flip"]["seed"] == 120


def test_a_metric_is_one_registered_function():
    cemq.register_metric("largest", lambda a, b: abs(a - b).max((1, 2, 3)), higher_is_better=False, kinds=["image"])
    try:
        black, grey = graded(3)
        found = measure_fidelity([outcome_of(black)], [outcome_of(grey)]).scores["largest"]
        assert (found["mean"], found["worst"]) == (pytest.approx(0.02), pytest.approx(0.03))
        assert "largest" not in score(black[None], grey[None])  # no metric of videos
        with pytest.raises(InputError, match="metric 'largest': there is one of that name"):
            cemq.register_metric("largest", lambda a, b: a)
    finally:
        del METRICS["largest"]


def test_a_video_that_flickers_is_told_from_one_that_is_as_far_away_and_does_not():
    video = np.full((1, 6, 8, 8, 3), 0.5)
    flicker = 0.1 * (-1.0) ** np.arange(6)[:, None, None, None]
    still, flickering = score(video, video + 0.1), score(video, video + flicker)
    assert still["psnr_db"] == pytest.approx(flickering["psnr_db"])
    assert still["change_psnr_db"] == 100
    assert flickering["change_psnr_db"] == pytest.approx(-20 * np.log10(0.2))


def test_audio_is_told_by_noise_and_by_spectrum():
    tone = np.sin(np.arange(4096) / 5)[None, None].astype(np.float32)
    found = score(tone, 1.1 * tone)
    assert found["snr_db"] == pytest.approx([20.0], abs=1e-3)
    assert 0 < found["spectral_db"][0] < 20 * np.log10(1.1) + 1e-3
    assert set(found) == {"psnr_db", "ssim", "snr_db", "spectral_db"}


def test_people_read_of_the_worst_sample():
    told = {"psnr_db": {"mean": 50.0, "p5": 40.0, "worst": 30.0, "seed": 7, "condition": "a cat"}}
    assert quality_text({"psnr_db": 50.0, "samples": 16, "scores": told}) == (
        "50.0 dB (5th percentile 40.0, worst 30.0 with seed 7, 'a cat')"
    )
    assert quality_text({"psnr_db": 50.0, "samples": 2, "scores": told}) == "50.0 dB (worst 30.0 with seed 7, 'a cat')"
    assert quality_text({"psnr_db": 50.0, "samples": 1, "scores": told}) == "50.0 dB"
    assert quality_text({"psnr_db": 50.0, "samples": 2}) == "50.0 dB"  # of a bundle of before


def test_the_picture_has_the_reference_on_the_left(tmp_path):
    from PIL import Image

    write_side_by_side(tmp_path / "a.png", np.zeros((1, 32, 32, 3)), np.ones((1, 32, 32, 3)))
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    assert pixels.shape == (128, 260, 3)
    assert pixels[:, :128].max() == 0
    assert pixels[:, -128:].min() == 255


def test_the_middle_of_samples_and_its_standard_error_by_hand():
    values = np.array([100.0, 1, 2, 3, 4, -50])  # the outer sixths are cut off, or moved to 1 and 4
    assert middle_mean(values) == 2.5
    held = [4, 1, 2, 3, 4, 1]
    expected = np.std(held, ddof=1) / np.sqrt(6) / (4 / 6)
    assert middle_error(np.stack([values, 2 * values])) == pytest.approx([expected, 2 * expected])
    assert (middle_mean(values[:1]), middle_error(values[:1])) == (100.0, 0.0)
