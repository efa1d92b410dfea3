"""Writes cli.md, the help of every command: ``python docs/cli.py``; with ``--check`` it only says whether it has to."""

from __future__ import annotations

import sys
from pathlib import Path

from typer.main import get_command
from typer.testing import CliRunner

from cemq.cli import app

PAGE = Path(__file__).with_suffix(".md")
WIDTH = 100
INTRODUCTION = """# Command line

What `--help` prints, written by `python docs/cli.py`; what the options of a build do stands in
[options and recipes](options.md). Results go to stdout, progress and complaints to stderr. A command ends with 0 when
it is done, 1 with one line that says what is wrong, 2 when it was called wrongly, 130 when it was interrupted.
"""


def help_of(*command: str) -> str:
    """What ``cemq COMMAND --help`` prints on a terminal of 100 columns."""
    shown = CliRunner().invoke(app, [*command, "--help"], prog_name="cemq", terminal_width=WIDTH)
    return "\n".join(line.rstrip() for line in shown.output.strip().splitlines())


def page() -> str:
    """cli.md: the program first, then each command."""
    parts = [INTRODUCTION, f"```text\n{help_of()}\n```\n"]
    parts += [f"## cemq {name}\n\n```text\n{help_of(name)}\n```\n" for name in get_command(app).commands]
    return "\n".join(parts)


def main(arguments: list[str]) -> None:
    """Write the page, or check it."""
    if arguments not in ([], ["--check"]):
        raise SystemExit(f"{' '.join(arguments)}: leave it out, or say --check")
    if not arguments:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
        raise SystemExit("docs/cli.md is not what --help prints: run python docs/cli.py")


if __name__ == "__main__":
    main(sys.argv[1:])
