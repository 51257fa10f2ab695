"""One HTML page of what the project's commands wrote: charts, tables, and where each figure comes from.

    qlora-lowmem report results/rtx-4050-laptop-6gb results/reality.json --output report.html
    qlora-lowmem report before.json after.json --output compared.html --charts charts

Give folders, whose JSON files are read, or files: what `pytest bench/`, `pytest bench/test_lean_families.py`,
`pytest bench/test_phases.py`, `pytest bench/test_reality.py`, `pytest --vram-report`, `explain --json`,
`phases --json`, `train --json`, `lengths --table` and `longest --table` write. What is not there is left out. The page
needs no network and no JavaScript; two attributions are shown side by side.
"""

import argparse
from pathlib import Path

from tqdm.auto import tqdm

from qlora_lowmem.errors import EXIT_OK
from qlora_lowmem.results.page import render, save_charts, sections_of, title_of
from qlora_lowmem.targets import check_file, check_folder, write, writing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", nargs="+", metavar="PATH", type=Path, help="a folder of results, or JSON files")
    parser.add_argument("--output", default="report.html", metavar="FILE", help="the page (default: report.html)")
    parser.add_argument("--title", metavar="TEXT", help="its title (default: names the cards)")
    parser.add_argument("--charts", metavar="DIR", help="write every chart there as SVG and PNG as well")


def run(options: argparse.Namespace) -> int:
    output = Path(options.output)
    check_file("--output", options.output)
    check_folder("--charts", options.charts)
    made = sections_of(options.results)
    count = sum(len(section.charts) for section in made.sections)
    with tqdm(total=count * (2 if options.charts else 1), desc="charts", unit="chart") as bar:
        page = render(options.title or title_of(made.sections), made.sections, bar.update)
        charts: list[Path] = []
        if options.charts:
            with writing("--charts", options.charts, "folder"):
                charts = save_charts(Path(options.charts), made.sections, bar.update)
        write("--output", options.output, page)
    print(f"{output}: {', '.join(section.title for section in made.sections)}")
    if charts:
        print(f"{options.charts}: {len(charts)} files, one SVG and one PNG for each of {count} charts")
    for path in made.left_out:
        print(f"not shown, for no section shows its kind: {path}")
    return EXIT_OK
