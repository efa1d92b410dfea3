"""The loop that trains the built-in models, and what it keeps."""

import pytest
import torch
from torch import nn

from cemq.builtin.registry import cards
from cemq.builtin.training.fit import Stage, Workshop, fit
from cemq.builtin.training.models import t5_tokenizer, tokenizer

STAGE = Stage(name="line", steps=60, learning_rate=0.1, seed=3)


class Ended(Exception):
    pass


def trained(folder, stage=STAGE, *, end_after=None):
    """The weights of a line fitted to noisy points, and how many steps this took; ``end_after`` as many it is ended."""
    torch.manual_seed(0)
    model, taken = nn.Linear(3, 1), []

    def loss(generator):
        if len(taken) == end_after:
            raise Ended
        taken.append(1)
        points = torch.randn(8, 3, generator=generator)
        return (model(points) - points.sum(1, keepdim=True)).square().mean()

    workshop = Workshop(folder=folder, device=torch.device("cpu"), seconds_between_checkpoints=0)
    try:
        fit(workshop, stage, [model], loss)
    except Ended:
        return None, len(taken)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), len(taken)


def test_training_that_was_ended_goes_on_and_gives_the_same_weights(tmp_path):
    whole, steps = trained(tmp_path / "whole")
    assert steps == STAGE.steps
    assert (whole - torch.tensor([1.0, 1.0, 1.0, 0.0])).abs().max() < 0.3
    assert trained(tmp_path / "ended", end_after=25) == (None, 25)
    again, steps = trained(tmp_path / "ended")
    assert steps == STAGE.steps - 25
    assert torch.equal(again, whole)


def test_what_is_trained_is_not_trained_again(tmp_path):
    first, _ = trained(tmp_path)
    again, steps = trained(tmp_path)
    assert steps == 0
    assert torch.equal(again, first)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_a_checkpoint_of_other_settings_is_not_gone_on_with(tmp_path, capsys):
    trained(tmp_path, end_after=10)
    other = Stage(name="line", steps=20, learning_rate=0.1, seed=3)
    assert trained(tmp_path, other)[1] == other.steps
    assert "made with other settings: line begins anew" in capsys.readouterr().out


def test_every_model_has_a_card_whose_figures_are_what_it_requires():
    for name, card in cards().items():
        assert card.training.endswith(f"training.train {name}")
        assert card.found.keys() == card.required.keys()
        assert all(card.found[what] >= least for what, least in card.required.items()), name


@pytest.mark.parametrize(
    "words", [["lion", "light", "smiling", "right", "heart-eyes", "a"], ["seven", "eleven", "even"]]
)
def test_every_known_word_is_one_token_and_others_are_spelled(words):
    clip, t5 = tokenizer(words), t5_tokenizer(words)
    for word in words:
        assert clip.tokenize(word) == [f"{part}</w>" for part in word.replace("-", " - ").split()]  # it splits there
        assert t5.tokenize(word) == [f"▁{word}"]
        assert t5.tokenize(word.capitalize()) == [f"▁{word.capitalize()}"]
    assert len(clip.tokenize("zebra")) > 1 < len(t5.tokenize("zebra"))
