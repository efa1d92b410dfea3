"""Writes what a build takes with each recipe at each effort, wherever that is said: ``python docs/costs.py``; with
``--check`` it only says whether it has to."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from cemq.build.estimate import generations_of, planned_stages
from cemq.build.settings import BuildSettings
from cemq.pipelines.opening import ModelSource
from cemq.recipe import load_recipe, recipe_names
from cemq.search.settings import EFFORTS

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "getting-started.md")
BEGIN, END = "<!-- costs: written by python docs/costs.py -->", "<!-- end of costs -->"
SAID = "# A build takes at most "  # of a recipe


def generations(name: str, effort: str) -> float:
    """Of one sample, in full, at the steps of the recipe: the most that a build takes."""
    recipe = load_recipe(name)
    nothing = ModelSource(name=str(recipe.model), folder=Path())
    settled = recipe.model_copy(update={"effort": effort})
    asked = BuildSettings(recipe=settled, source=nothing, device="cpu", dtype="float32")
    return round(generations_of(planned_stages(asked, recipe.steps))["total"], 1)


def table() -> str:
    lines = [f"| recipe | steps | {' | '.join(f'`{effort}`' for effort in EFFORTS)} |", f"|---|{'---|' * 5}"]
    for name in recipe_names():
        cells = [f"{generations(name, effort):g}" for effort in EFFORTS]
        lines.append(f"| {name} | {load_recipe(name).steps} | {' | '.join(cells)} |")
    return "\n".join(lines)


def line(name: str) -> str:
    """What a recipe says of itself."""
    counts = [f"{generations(name, effort):g} ({effort})" for effort in EFFORTS]
    return f"{SAID}{', '.join(counts[:-1])} or {counts[-1]} generations of {load_recipe(name).steps} steps."


def written() -> Iterator[tuple[Path, str]]:
    """Every file that says it, as it has to be."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        yield page, re.sub(rf"(?<={BEGIN}\n).*?(?={END})", f"\n{table()}\n\n", text, flags=re.DOTALL)
    for name in recipe_names():
        path = ROOT / "recipes" / f"{name}.yaml"
        lines = [each for each in path.read_text(encoding="utf-8").splitlines() if not each.startswith(SAID)]
        place = next(number for number, each in enumerate(lines) if not each.startswith("#"))
        yield path, "\n".join([*lines[:place], line(name), *lines[place:]]) + "\n"


def main(arguments: list[str]) -> None:
    """Write the files, or check them."""
    if arguments not in ([], ["--check"]):
        raise SystemExit(f"{' '.join(arguments)}: leave it out, or say --check")
    for path, text in written():
        if not arguments:
            path.write_text(text, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != text:
            raise SystemExit(f"{path.relative_to(ROOT)} does not say what builds take: run python docs/costs.py")


if __name__ == "__main__":
    main(sys.argv[1:])
