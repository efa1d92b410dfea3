import numpy as np
import pytest
import torch

from cemq.evaluation.compare import measure_fidelity, write_side_by_side
from cemq.metrics import middle_error, middle_mean, psnr_db, relative_l2, ssim
from cemq.runtime.outcome import Outcome


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


def test_fidelity_is_the_mean_over_all_samples_of_all_batches():
    black, grey = np.zeros((1, 16, 16, 3)), np.full((2, 16, 16, 3), 0.1)

    def outcome(images):
        return Outcome(images=images, latents=torch.ones(len(images), 1), seconds=1.0)

    found = measure_fidelity([outcome(black), outcome(np.zeros_like(grey))], [outcome(black), outcome(grey)])
    assert found.psnr_db == pytest.approx((100 + 20 + 20) / 3)
    assert (found.samples, found.relative_l2) == (3, 0.0)


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
