"""``ltkernels train RECIPE`` and ``ltkernels tune RECIPE``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro
from rich.console import Console

from ltkernels.trainer import TrainerError
from ltkernels.trainer.recipes import RECIPES
from ltkernels.trainer.session import TrainOptions, run_training
from ltkernels.trainer.tuning import TuneOptions, run_search

COMMANDS: dict[str, tuple[type[Any], Callable[..., int]]] = {
    "train": (TrainOptions, run_training),
    "tune": (TuneOptions, run_search),
}

USAGE = f"""usage: ltkernels {{{",".join(COMMANDS)}}} RECIPE [options]

  train   train the methods of a recipe and compare them on the test set
  tune    search their settings on a validation split of the training images

recipes: {", ".join(RECIPES)}
"ltkernels train {next(iter(RECIPES))} --help" lists every option with its default.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for a user's mistake, 130 after an interrupt."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as done:  # tyro's way out of --help and of options it cannot read, which it has explained
        return done.code if isinstance(done.code, int) else 2


def _run(arguments: list[str]) -> int:
    if any(word in ("-h", "--help") for word in arguments[:2] or ["--help"]):
        print(USAGE, end="")
        return 0
    command, recipe_name, options = arguments[0], arguments[1] if len(arguments) > 1 else None, arguments[2:]
    if command not in COMMANDS:
        raise TrainerError(f"unknown command {command!r}: expected {' or '.join(COMMANDS)}")
    if recipe_name is None or recipe_name.startswith("-"):
        raise TrainerError(f"{command}: which recipe? known: {', '.join(RECIPES)}")
    if recipe_name not in RECIPES:
        raise TrainerError(f"unknown recipe {recipe_name!r}: known are {', '.join(RECIPES)}")
    options_type, run = COMMANDS[command]
    parsed = tyro.cli(
        options_type,
        prog=f"ltkernels {command} {recipe_name}",
        args=options,
        default=options_type(recipe=RECIPES[recipe_name]),
    )
    console = Console()
    if not console.is_terminal:
        console.width = 140  # a file or a pipe: the table's lines stay whole
    return run(parsed, recipe_name, shlex.join(["ltkernels", *arguments]), console)
