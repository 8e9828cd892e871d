"""The trainer's commands: ``train``, ``tune``, ``posthoc``, ``table``, ``report``, ``data`` and ``pack``."""

from __future__ import annotations

import difflib
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from ltkernels.trainer import TrainerError
from ltkernels.trainer.datacommand import DataOptions, run_data
from ltkernels.trainer.image_recipes import IMAGE_RECIPES, ImageRecipe, load_recipe
from ltkernels.trainer.image_session import ImageTrainOptions, ResumeOptions, resume_image_training, run_image_training
from ltkernels.trainer.methods import METHODS
from ltkernels.trainer.packcommand import PackOptions, run_pack
from ltkernels.trainer.posthoc import POST_HOC, PostHocOptions, run_posthoc
from ltkernels.trainer.recipes import RECIPES
from ltkernels.trainer.reproduction.command import ReportOptions, run_report
from ltkernels.trainer.session import TrainOptions, run_training
from ltkernels.trainer.table_queue import TableOptions, run_table
from ltkernels.trainer.tables import TABLES
from ltkernels.trainer.tuning import TuneOptions, run_search

_TASKS = tuple(dict.fromkeys(name.removesuffix(f"-{recipe.method}") for name, recipe in IMAGE_RECIPES.items()))
_COMPARISONS = {"train": (TrainOptions, run_training), "tune": (TuneOptions, run_search)}

# Commands with options that help shows without the run or table they are for.
_WITHOUT_SUBJECT = {"posthoc": ("RUN", PostHocOptions()), "table": ("TABLE", TableOptions(name="TABLE"))}

USAGE = f"""usage: ltkernels train RECIPE [options]
       ltkernels tune {"|".join(RECIPES)} [options]
       ltkernels train {{--from RUN/recipe.json,--resume RUN}} [options]
       ltkernels posthoc RUN [options]
       ltkernels table TABLE [options]
       ltkernels report [PAGE ...] [options]
       ltkernels data [options]
       ltkernels pack [TABLE ...] [options]

  train     {", ".join(RECIPES)}: train the methods of the recipe and compare them on the test set
            other recipes: one run of one method; --from repeats the recipe of a run, --resume goes on with a run
  tune      {", ".join(RECIPES)}: search the settings of the methods on a validation split of the training images
  posthoc   {", ".join(POST_HOC)}, on the weights of a run
  table     train the runs of a table that are not done yet, until a time limit, and store their results
  report    write the pages of docs/reproduction from the stored results
  data      list the data sets that are there, draw their long-tailed versions
  pack      pack the images that tables need, one file a data set, for a machine without network

recipes: {", ".join(RECIPES)}; TASK-METHOD with
  TASK      {", ".join(_TASKS)}
  METHOD    {", ".join(METHODS)}
tables: {", ".join(TABLES)}
"ltkernels train {next(iter(IMAGE_RECIPES))} --help" lists every option with its default.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0, 2 for a mistake, 130 after an interrupt, 141 where the reader of a pipe has left, 143 after
        SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _status(arguments)
        sys.stdout.flush()  # now: a failure at exit could not be told any more
        return status
    except BrokenPipeError:  # "| head" has read enough; the flush at exit must not fail as well
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _status(arguments: list[str]) -> int:
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
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    command, rest = arguments[0], arguments[1:]
    if rest[:1] in (["-h"], ["--help"]):
        if command in _COMPARISONS:  # their options depend on the recipe
            print(USAGE, end="")
            return 0
        if command in _WITHOUT_SUBJECT:
            subject, options = _WITHOUT_SUBJECT[command]
            _parse(type(options), f"{command} {subject}", rest, options)
    runners: dict[str, Callable[[list[str], str, Console], int]] = {
        "train": _train,
        "tune": _tune,
        "posthoc": _posthoc,
        "table": _table,
        "report": _report,
        "data": _data,
        "pack": _pack,
    }
    if command not in runners:
        *others, last = [*(name for name in runners if name not in _COMPARISONS), "doctor"]
        raise TrainerError(
            f"unknown command {command!r}: expected train or tune with a recipe, {', '.join(others)} or {last}"
        )
    console = Console()
    if not console.is_terminal:
        console.width = 140  # a file or a pipe: the table's lines stay whole
    return runners[command](rest, shlex.join(["ltkernels", *arguments]), console)


def _train(arguments: list[str], command: str, console: Console) -> int:
    if arguments[:1] == ["--resume"]:
        path, rest = _path_of(arguments, "the folder of a run")
        if path.is_file():
            raise TrainerError(f"--resume: expected the folder of a run, got a file: {path}")
        options = _parse(ResumeOptions, f"train --resume {path}", rest, ResumeOptions())
        return resume_image_training(path, options, command, console)
    if arguments[:1] == ["--from"]:
        path, rest = _path_of(arguments, "the recipe.json of a run")
        if path.is_dir():
            raise TrainerError(f"--from: expected the recipe.json of a run, got a folder: {path}")
        name, recipe = load_recipe(path)
        return _train_images(name, recipe, f"train --from {path}", rest, command, console)
    name = _recipe_of("train", arguments, (*RECIPES, *IMAGE_RECIPES))
    if name in RECIPES:
        return _compare("train", name, arguments[1:], command, console)
    return _train_images(name, IMAGE_RECIPES[name], f"train {name}", arguments[1:], command, console)


def _train_images(
    name: str, recipe: ImageRecipe, program: str, arguments: list[str], command: str, console: Console
) -> int:
    options = _parse(ImageTrainOptions, program, arguments, ImageTrainOptions(recipe=recipe))
    if options.tier is not None and options.recipe.steps != recipe.steps:
        raise TrainerError("tier: it sets the number of steps; give --tier or --steps")
    return run_image_training(options, name, command, console)


def _tune(arguments: list[str], command: str, console: Console) -> int:
    return _compare("tune", _recipe_of("tune", arguments, tuple(RECIPES)), arguments[1:], command, console)


def _compare(command_name: str, name: str, arguments: list[str], command: str, console: Console) -> int:
    options_type, run = _COMPARISONS[command_name]
    options = _parse(options_type, f"{command_name} {name}", arguments, options_type(recipe=RECIPES[name]))
    return run(options, name, command, console)


def _posthoc(arguments: list[str], command: str, console: Console) -> int:
    path, rest = _path_of(["posthoc", *arguments], "the folder of a finished run")
    return run_posthoc(path, _parse(PostHocOptions, f"posthoc {path}", rest, PostHocOptions()), command, console)


def _data(arguments: list[str], command: str, console: Console) -> int:
    return run_data(_parse(DataOptions, "data", arguments, DataOptions()), console)


def _table(arguments: list[str], command: str, console: Console) -> int:
    if not arguments or arguments[0].startswith("-"):
        raise TrainerError(f"table: which table? known: {', '.join(TABLES)}")
    default = TableOptions(name=arguments[0])
    return run_table(_parse(TableOptions, f"table {arguments[0]}", arguments[1:], default), console)


def _report(arguments: list[str], command: str, console: Console) -> int:
    return run_report(_parse(ReportOptions, "report", arguments, ReportOptions()), console)


def _pack(arguments: list[str], command: str, console: Console) -> int:
    return run_pack(_parse(PackOptions, "pack", arguments, PackOptions()), console)


def _parse(options_type: type[Any], program: str, arguments: list[str], default: Any) -> Any:
    return tyro.cli(options_type, prog=f"ltkernels {program}", args=arguments, default=default)


def _path_of(arguments: list[str], what: str) -> tuple[Path, list[str]]:
    if len(arguments) < 2 or arguments[1].startswith("-"):
        raise TrainerError(f"{arguments[0]}: expected {what}")
    return Path(arguments[1]), arguments[2:]


def _recipe_of(command: str, arguments: list[str], known: Sequence[str]) -> str:
    if not arguments or arguments[0].startswith("-"):
        raise TrainerError(f"{command}: which recipe? known: {', '.join(known)}")
    if arguments[0] not in known:
        close = difflib.get_close_matches(arguments[0], known, cutoff=0.9)  # tasks share much of their names
        meant = f"did you mean {' or '.join(close)}? " if close else ""
        raise TrainerError(f"unknown recipe {arguments[0]!r}: {meant}known are {', '.join(known)}")
    return arguments[0]
