"""Turns the JSON of a benchmark run into a Markdown report, a bar chart and a small JSON, all fit to be committed.

    python -m benchmarks.report [JSON ...] [--out FOLDER] [--name NAME]

Each family of benchmarks gets files of its own: NAME.* for margin_cross_entropy, FAMILY-NAME.* for the others. Several
files are merged if they are of one machine; a file that this program has written may be given again. NAME is that of
the first file, without "-raw" and without a family.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import report_auxiliary, report_contrastive, report_linear, report_margin, report_trainer
from benchmarks.results import Results, ResultsError, load
from benchmarks.tables import number
from benchmarks.targets import Target, targets

RESULTS = Path(__file__).parent / "results"
REPORTS = {
    "margin": report_margin,
    "auxiliary": report_auxiliary,
    "linear": report_linear,
    "contrastive": report_contrastive,
    "trainer": report_trainer,
}


def markdown(results: Results) -> str:
    sections = [*REPORTS[results.family].sections(results), _tests(results)]
    return "\n\n".join(section for section in sections if section) + "\n"


def main_table(results: Results) -> str:
    return REPORTS[results.family].main_table(results)


def _targets(results: Results) -> list[Target]:
    return report_trainer.targets(results) if results.family == "trainer" else targets(results)


def _tests(results: Results) -> str:
    if not results.tests:
        return ""
    counts = {what: count for what, count in results.tests.items() if what != "stopped"}
    stopped = "; then the time was over, and the others have not run" if "stopped" in results.tests else ""
    return "## Tests on this machine\n\n" + ", ".join(f"{n} {what}" for what, n in counts.items()) + stopped


def file_name(family: str, name: str) -> str:
    return name if family == "margin" else f"{family}-{name}"


def write(results: Results, name: str, out: Path) -> list[Path]:
    """Writes the family's .json, .md and, where matplotlib is installed, .png and its plots, NAME-PLOT.png."""
    out.mkdir(parents=True, exist_ok=True)
    name = file_name(results.family, name)
    files = [out / f"{name}.{suffix}" for suffix in ("json", "md")]
    results.save(files[0])
    pictures = ""
    try:
        from benchmarks import chart_trainer
        from benchmarks.chart import PLOTS, draw
    except ImportError as error:
        print(f"No bar chart: {error}. Install matplotlib for it.", file=sys.stderr)
    else:
        bars = chart_trainer.draw if results.family == "trainer" else draw
        drawn = {f"{name}.png": (bars, "The main results as bars")}
        drawn |= {f"{name}-{plot}.png": one for plot, one in PLOTS.get(results.family, {}).items()}
        for file, (picture, text) in drawn.items():
            picture(results, out / file)
            files.append(out / file)
            pictures += f"\n![{text}]({file})\n"
    head, _, rest = markdown(results).partition("\n## ")
    files[1].write_text(f"{head}{pictures}\n## {rest}")
    return files


def _name(path: Path) -> str:
    name = path.stem.removesuffix("-raw")
    for family in REPORTS:
        name = name.removeprefix(f"{family}-")
    return name


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("json", nargs="*", type=Path, default=[RESULTS / "cpu-raw.json"], metavar="JSON")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the report; default: benchmarks/results")
    parser.add_argument("--name", help="of the report; default: that of the first file")
    options = parser.parse_args(arguments)
    try:
        families = load(options.json)
    except ResultsError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    name = options.name or _name(options.json[0])
    for results in families.values():
        for path in write(results, name, options.out):
            print(path)
        for target in _targets(results):
            measured = number(target.measured) or "-"
            print(f"{target.verdict.strip('*'):>12}  {target.text}: {measured} ({target.wanted_text})")


if __name__ == "__main__":
    main()
