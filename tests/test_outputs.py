import wave

import numpy as np
import pytest
import torch
from PIL import Image
from support.checks import draw, quantized
from support.families import FAMILIES
from typer.testing import CliRunner

import cemq
from cemq.cli import app
from cemq.errors import InputError
from cemq.evaluation.compare import measure_fidelity, write_side_by_side
from cemq.pipelines.outputs import Sample, as_array, as_pictures, check_path, kind_of, output_kind, rate_of
from cemq.quantize import record_calls
from cemq.quantize.calibrate import weights_read_elsewhere
from cemq.quantize.pipeline import QuantizationSettings
from cemq.runtime.runner import Outcome

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",  # the audio autoencoder
    "ignore:In CPU autocast",  # Mochi asks for float32
)
FRAMES = np.random.default_rng(0).random((5, 16, 12, 3), dtype=np.float32)
TONE = np.sin(np.linspace(0, 400, 4000, dtype=np.float32))[None].repeat(2, 0)


@pytest.mark.parametrize("name", ["dit", "flux", "wan", "latte", "mochi", "stable_audio"])
def test_what_a_pipeline_makes_is_known_before_it_runs(name):
    family = FAMILIES[name]
    pipe = family.pipeline()
    assert output_kind(pipe) == family.kind
    assert kind_of(draw(pipe, family)) == family.kind


def test_rates_come_from_the_call_the_table_or_the_autoencoder():
    assert rate_of(FAMILIES["dit"].pipeline(), {}) == 0
    assert rate_of(FAMILIES["cogvideox"].pipeline(), {}) == 8
    assert rate_of(FAMILIES["ltx"].pipeline(), {"frame_rate": 12}) == 12
    assert rate_of(FAMILIES["stable_audio"].pipeline(), {}) == 4  # a sample takes little


def test_arrays_of_every_kind():
    assert as_array([np.zeros((8, 8, 3))] * 2).shape == (2, 8, 8, 3)
    assert as_array(torch.zeros(2, 100)).shape == (2, 1, 100)
    assert as_array(torch.zeros(2, 2, 100, dtype=torch.bfloat16)).dtype == np.float32


def test_audio_is_written_as_16_bit_pcm(tmp_path):
    Sample(kind="audio", values=1.5 * TONE, rate=8000).save(tmp_path / "tone.wav")
    with wave.open(str(tmp_path / "tone.wav")) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes(), file.getsampwidth()) == (2, 8000, 4000, 2)
        read = np.frombuffer(file.readframes(4000), "<i2").reshape(-1, 2).T / 32767
    assert np.allclose(read, np.clip(1.5 * TONE, -1, 1), atol=1e-4)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_videos_are_written_frame_by_frame(tmp_path, suffix):
    Sample(kind="video", values=FRAMES, rate=10).save(tmp_path / f"video{suffix}")
    with Image.open(tmp_path / f"video{suffix}") as file:
        assert (file.n_frames, file.size) == (5, (12, 16))
        if suffix == ".png":  # without loss
            file.seek(3)
            assert np.abs(np.asarray(file.convert("RGB")) / 255 - FRAMES[3]).max() < 1 / 255


def test_what_is_no_number_is_black():
    """As in every other picture that is written, and without a warning."""
    image = np.full((2, 2, 3), 0.5, dtype=np.float32)
    image[0, 0], image[0, 1], image[1, 0] = np.nan, np.inf, -1
    assert np.asarray(Sample(kind="image", values=image).to_pil())[..., 0].tolist() == [[0, 255], [0, 128]]


def test_a_video_is_a_list_of_pictures_to_pil():
    assert [frame.size for frame in Sample(kind="video", values=FRAMES, rate=10).to_pil()] == [(12, 16)] * 5
    assert Sample(kind="image", values=FRAMES[0]).to_pil().size == (12, 16)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("out.txt", None, r"a sample is written to a file that ends in \.png, "),
        ("out.wav", "image", r"an image is written to a file that ends in \.png"),
        ("out.png", "audio", r"an audio is written to a file that ends in \.wav"),
        ("out.jpg", "video", r"a video is written to a file that ends in \.mp4"),
        ("nowhere/out.png", "image", "the folder 'nowhere' does not exist"),
    ],
)
def test_a_file_that_cannot_hold_the_sample_is_refused(name, kind, message):
    from pathlib import Path

    with pytest.raises(InputError, match=message):
        check_path(Path(name), kind)


def test_mp4_names_the_package_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install imageio imageio-ffmpeg"):
        check_path(tmp_path / "video.mp4", "video")


def outcome(values):
    return Outcome(images=values, latents=torch.ones(len(values), 1), seconds=1.0)


def test_fidelity_of_a_video_is_that_of_its_frames():
    video, other = FRAMES[None], np.clip(FRAMES[None] + 0.1, 0, 1)
    found = measure_fidelity([outcome(video)], [outcome(other)])
    frames = measure_fidelity([outcome(FRAMES)], [outcome(other[0])])
    assert found.samples == 1
    assert found.ssim == pytest.approx(frames.ssim)
    assert found.psnr_db == pytest.approx(-10 * np.log10(np.mean((other - video) ** 2)), abs=1e-3)
    assert measure_fidelity([outcome(video)], [outcome(video)]).psnr_db == 100


def test_fidelity_of_audio_is_on_the_scale_of_pictures():
    audio = TONE[None]
    found = measure_fidelity([outcome(audio)], [outcome(audio + 0.02)])
    assert found.psnr_db == pytest.approx(40)  # a hundredth of the range from -1 to 1
    assert 0.3 < found.ssim < 1
    assert measure_fidelity([outcome(audio)], [outcome(audio)]).ssim == pytest.approx(1)


def test_a_spectrogram_shows_a_tone_at_its_height():
    picture = as_pictures(TONE[None])[0, 0, :, 5, 0]
    cycles = 400 / (2 * np.pi) / 4000
    assert abs(np.argmax(picture[::-1]) / (len(picture) - 1) / 2 - cycles) < 0.01
    assert picture.max() == pytest.approx(1, abs=0.02)
    assert as_pictures(np.zeros((1, 1, 5), np.float32)).max() == 0


@pytest.mark.parametrize("values", [FRAMES[None].repeat(2, 0), TONE[None], FRAMES], ids=["video", "audio", "images"])
def test_any_kind_can_be_laid_side_by_side(tmp_path, values):
    write_side_by_side(tmp_path / "sheet.png", values, values)
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet)
    half = (pixels.shape[1] - 4) // 2
    assert np.array_equal(pixels[:, :half], pixels[:, half + 4 :])


@pytest.mark.parametrize(("name", "suffix"), [("wan22", ".gif"), ("stable_audio", ".wav")])
def test_the_command_line_makes_videos_and_audio(tmp_path, name, suffix):
    family = FAMILIES[name]
    family.pipeline().save_pretrained(tmp_path / "pipeline")
    cemq.quantize_and_schedule(
        str(tmp_path / "pipeline"), tmp_path / "bundle", steps=4, samples=1, planning_samples=2, budget=2,
        solver="segment", calib="prompts.txt", call=family.call,
    )  # fmt: skip
    arguments = ["generate", str(tmp_path / "bundle"), "--prompt", "a cat", "-o"]
    wrong = CliRunner().invoke(app, [*arguments, str(tmp_path / "out.jpg")])
    assert wrong.exit_code == 1
    assert "is written to a file that ends in" in wrong.output
    found = CliRunner().invoke(app, [*arguments, str(tmp_path / f"out{suffix}")])
    assert found.exit_code == 0, found.output
    assert (tmp_path / f"out{suffix}").stat().st_size > 40
    made = cemq.generate(tmp_path / "bundle", "a cat")
    assert len(made) == 5 if suffix == ".gif" else made.values.ndim == 2


def test_layers_whose_weight_is_read_past_them_are_found():
    family = FAMILIES["hunyuan_dit"]
    pipe = family.pipeline()
    with record_calls(pipe.transformer, every=4) as calls:
        draw(pipe, family)
    config = QuantizationSettings(scheme="w8a8", full_precision=()).config(pipe.transformer)
    read = weights_read_elsewhere(pipe.transformer, config, calls[0])
    assert set(read) == {f"time_extra_emb.pooler.{name}_proj" for name in "kqvc"}
    assert all(type(pipe.transformer.get_submodule(name)) is torch.nn.Linear for name in read)
    assert not weights_read_elsewhere(pipe.transformer, config.with_full_precision(read), calls[0])


def test_both_denoisers_are_quantized():
    pipe = quantized(FAMILIES["wan22"], "w4a8")
    assert pipe.transformer.is_quantized
    assert pipe.transformer_2.is_quantized
