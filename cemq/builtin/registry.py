"""The built-in models: each is a folder beside this file, with a card that says what it is and what it was found to
do. A folder without weights is a model that can be trained."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

FOLDER = Path(__file__).parent
CARD = "card.json"


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a built-in model's ``card.json`` says.

    Shares are of samples on which a thing is what was asked for.
    """

    summary: str
    example: str  # a prompt or a label
    data: str
    licence: str
    training: str  # the command
    trained: str  # what it took, and where
    required: dict[str, float]
    found: dict[str, float]


def cards() -> dict[str, Card]:
    """Every built-in model's card, by its name.

    Raises:
        TypeError: A card lacks a field, or has one more.
    """
    return {path.parent.name: Card(**json.loads(path.read_text("utf-8"))) for path in sorted(FOLDER.glob(f"*/{CARD}"))}


def record(name: str, found: dict[str, float]) -> None:
    """Write what was found into a card."""
    card = cards()[name]
    known = {field.name: getattr(card, field.name) for field in fields(card)}
    text = json.dumps(known | {"found": {what: round(share, 4) for what, share in found.items()}}, indent=2)
    (FOLDER / name / CARD).write_text(text + "\n", "utf-8")
