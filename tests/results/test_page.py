"""The page as a document: whole, alone, well formed for those who do not see it, and true to its files."""

import itertools
import json
import re
import shutil
from functools import partial
from pathlib import Path

import msgspec
import pytest
from bs4 import BeautifulSoup, Tag

from qlora_lowmem.commands.frame import run_command
from qlora_lowmem.memory.attribution import Attribution
from qlora_lowmem.memory.kinds import KINDS
from qlora_lowmem.results.kinds.attribution import write_attribution
from qlora_lowmem.results.page import KINDS as KINDS_OF_FILE
from qlora_lowmem.results.page import named, sections_of
from qlora_lowmem.virtual_gpu import Launches
from results.examples import CARD, ENVIRONMENT, MODEL, attribution, write_all
from results.examples import named as recipe_named
from results.pages import SECTIONS, parsed, table, values

main = partial(run_command, "report")


def test_every_kind_of_file_has_its_section(soup: BeautifulSoup) -> None:
    assert [section.h2["id"] for section in soup.main.find_all("section", recursive=False)] == SECTIONS


def test_every_file_is_of_one_kind(page_folder: Path) -> None:
    for path in page_folder.glob("*.json"):
        content = json.loads(path.read_text())
        assert sum(kind.recognises(content) for kind in KINDS_OF_FILE) == 1, path.name


def test_ids_are_unique_and_references_lead_somewhere(soup: BeautifulSoup) -> None:
    ids = [tag["id"] for tag in soup.find_all(id=True)]
    assert len(ids) == len(set(ids))
    named_by = [name for tag in soup.find_all(True) for name in _references(tag)]
    assert len(named_by) > 100
    assert set(named_by) <= set(ids)


def _references(tag: Tag) -> list[str]:
    found = str(tag.get("aria-labelledby", "")).split() + str(tag.get("aria-describedby", "")).split()
    if str(tag.get("href", "")).startswith("#"):
        found.append(str(tag["href"])[1:])
    for name in ("style", "clip-path", "fill"):
        found += re.findall(r"url\(#([^)]+)\)", str(tag.get(name, "")))
    return found


def test_it_needs_nothing_from_outside(soup: BeautifulSoup) -> None:
    assert not soup.find_all(["script", "iframe", "object", "embed", "img", "base", "form"])
    for tag in soup.find_all(True):
        for name, value in tag.attrs.items():
            assert not name.startswith("on")
            if name in {"src", "href", "xlink:href", "action", "data", "poster", "srcset"}:
                assert value.startswith("#") or value == "data:,", tag
            assert "://" not in value or name == "content", (tag.name, name)
    sheet = soup.style.get_text()
    assert "@import" not in sheet
    assert "url(" not in sheet
    policy = soup.find("meta", attrs={"http-equiv": "Content-Security-Policy"})["content"]
    assert policy.startswith("default-src 'none'")


def test_headings_go_down_one_level_at_a_time(soup: BeautifulSoup) -> None:
    levels = [int(heading.name[1]) for heading in soup.find_all(["h1", "h2", "h3", "h4"])]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_landmarks_and_the_way_past_them(soup: BeautifulSoup) -> None:
    assert soup.html["lang"] == "en"
    assert soup.body.find("a")["href"] == "#main"
    for landmark in ("header", "nav", "main", "footer"):
        assert len(soup.find_all(landmark)) == 1
    links = {link["href"][1:] for link in soup.nav.find_all("a")}
    assert links >= set(SECTIONS)


def test_every_chart_has_a_name_a_summary_and_its_figures(soup: BeautifulSoup) -> None:
    figures = soup.find_all("figure")
    assert len(figures) == 1 + 1 + 1 + 3 * 2 + 1 + 1 + 1 + 1 + 1 + 1
    for figure in figures:
        drawings = figure.find_all("svg")
        assert [svg.find_parent("div")["class"] for svg in drawings] == [["chart", "wide"], ["chart", "narrow"]]
        for svg in drawings:
            assert svg["role"] == "img"
            assert svg["aria-label"] == figure.find_previous("h3").get_text()
            assert len(soup.find(id=svg["aria-describedby"]).get_text()) > 40
            assert svg.find("text") is not None
        assert figure.details.summary is not None
        assert figure.details.find("data") is not None
    for region in soup.find_all(class_="scroll"):
        assert (region["role"], region["tabindex"]) == ("region", "0")
        assert region.find("caption")["id"] == region["aria-labelledby"]


def test_model_and_card_stand_on_top_and_provenance_at_the_end(soup: BeautifulSoup) -> None:
    """The first thing after them is a chart, which says model, length and card; highlights come behind it."""
    assert soup.h1.get_text().startswith(f"GPU memory of {MODEL} on {CARD}")
    assert MODEL in soup.title.get_text()
    blocks = [(tag.name, *tag.get("class", [])) for tag in soup.body.find_all(recursive=False)]
    assert blocks == [("a", "skip"), ("header",), ("div", "layout"), ("section", "made-of"), ("footer",)]
    assert [tag.name for tag in soup.header.find_all(recursive=False)] == ["h1", "p"]
    first, highlights = soup.main.find_all(recursive=False)[:2]
    assert highlights["class"] == ["highlights"]
    assert [tag.name for tag in first.find_all(recursive=False)][:3] == ["h2", "h3", "figure"]
    assert first.h3.get_text() == f"Peak after each idea: {MODEL}, 2,048 then 1,024 tokens, on {CARD} (virtual)"
    assert "usable on the card: 5.50" in [text.get_text() for text in first.svg.find_all("text")]


def test_every_chart_of_this_project_says_on_which_card(soup: BeautifulSoup) -> None:
    """And of which model, where it is of one."""
    for figure in soup.find_all("figure"):
        section, said = figure.find_parent("section").h2["id"], figure.find_previous("h3").get_text()
        assert CARD in said or section in {"published", "prediction"}, said
        assert MODEL in said or section not in {"waterfall", "bytes", "phases", "lengths"}, said


def test_the_end_says_what_it_was_made_of(soup: BeautifulSoup, page_folder: Path) -> None:
    listed = soup.find(class_="made-of").find_all("li")
    assert len(listed) == len(list(page_folder.glob("*.json")))
    for item in listed:
        record = json.loads((page_folder / item.code.get_text()).read_text())["environment"]
        text = item.get_text()
        assert item.find(class_="badge").get_text() == record["provenance"]
        for figure in (record["device"], record["commit"], record["command"], record["date"], record["driver"]):
            assert figure in text
        for name, version in record["versions"].items():
            assert f"{name} {version}" in soup.find(class_="made-of").get_text()


def test_the_waterfall_is_that_of_its_file(soup: BeautifulSoup, page_folder: Path) -> None:
    cases = json.loads((page_folder / "waterfall.json").read_text())["cases"]
    expected = [
        [
            case["peak_allocated_bytes"],
            *([case["saves_bytes"]] if number else []),
            case["peak_device_bytes"],
            case["floor_bytes"],
            float(f"{case['peak_allocated_bytes'] / case['floor_bytes']:.6g}"),
        ]
        for number, case in enumerate(cases)
    ]
    assert values(soup, "chart-waterfall-table-1") == expected
    assert [row[0].get_text() for row in table(soup, "chart-waterfall-table-1")] == [case["idea"] for case in cases]


@pytest.mark.parametrize("recipe", ["baseline", "optimised", "plain"])
def test_the_breakdown_and_the_timeline_are_those_of_their_file(
    soup: BeautifulSoup, page_folder: Path, recipe: str
) -> None:
    content = json.loads((page_folder / f"attribution-{recipe}.json").read_text())["attribution"]
    by_text = {row[0].get_text(): int(row[1].data["value"]) for row in table(soup, f"chart-breakdown-{recipe}-table-1")}
    expected = {KINDS[kind]: count for kind, count in content["kinds"].items()}
    peaks = {"allocated": content["allocated_bytes"], "on the card": content["device_bytes"]}
    assert by_text == expected | peaks
    line = content["timeline"]
    sums = dict(zip(line["events"], map(sum, line["bytes"]), strict=True))
    moments = values(soup, f"chart-timeline-{recipe}-table-1")
    assert max(row[1] for row in moments) == max(sums.values()) == content["allocated_bytes"]
    for event, allocated, *groups in moments:
        assert sums[event] == allocated == sum(groups)


def test_runs_stand_side_by_side_by_kind(soup: BeautifulSoup, page_folder: Path) -> None:
    runs = [json.loads(path.read_text())["attribution"] for path in sorted(page_folder.glob("attribution-*.json"))]
    rows = table(soup, "chart-peaks-table-1")
    found = {row[0].get_text(): [int(cell.data["value"]) for cell in row[1:]] for row in rows}
    for kind, text in KINDS.items():
        expected = [run["kinds"].get(kind, 0) for run in runs]
        assert found.get(text, [0, 0, 0]) == expected


def test_lengths_longest_and_matrix_are_those_of_their_files(soup: BeautifulSoup, page_folder: Path) -> None:
    content = {
        name: json.loads((page_folder / f"{name}.json").read_text()) for name in ("lengths", "longest", "matrix")
    }
    for file in ("lengths", "longest"):
        for case in content[file]["cases"]:
            case["times_floor"] = float(f"{case['peak_allocated_bytes'] / case['floor_bytes']:.6g}")
    names = ["tokens", "peak_allocated_bytes", "floor_bytes", "times_floor", "peak_reserved_bytes", "peak_device_bytes"]
    assert values(soup, "chart-lengths-table-1") == [
        [case[name] for name in names] for case in content["lengths"]["cases"]
    ]
    fits = [row[-1].get_text() for row in table(soup, "chart-lengths-table-1")]
    assert fits == ["fits" if case["fits"] else "does not fit" for case in content["lengths"]["cases"]]
    names = ["tokens", "next_tokens", "peak_allocated_bytes", "floor_bytes", "times_floor"]
    names += ["peak_device_bytes", "host_bytes"]
    assert values(soup, "longest-table-1") == [[case[name] for name in names] for case in content["longest"]["cases"]]
    known, *unknown = values(soup, "matrix-table-1")
    case = content["matrix"]["cases"][0]
    peaks = [case[f"peak_{reading}_bytes"] for reading in ("device", "reserved", "allocated")]
    times = case["peak_allocated_bytes"] / case["floor_bytes"]
    knobs = [case["max_seq_length"], case["lora_r"]]
    assert known == [*peaks, case["floor_bytes"], times, case["phases"][0]["allocated"], *knobs]
    assert unknown == [knobs, knobs]
    verdicts = [row[1].get_text() for row in table(soup, "matrix-table-1")]
    assert verdicts == ["fits", "does not fit", "failed"]


def test_predictions_and_verdicts_are_those_of_their_files(soup: BeautifulSoup, page_folder: Path) -> None:
    figures = json.loads((page_folder / "prediction.json").read_text())["figures"]
    expected = [[row["predicted_bytes"], row["measured_bytes"], float(f"{row['error']:.6g}")] for row in figures]
    assert values(soup, "chart-prediction-table-1") == expected
    whole = [row for row in figures if row["limit_percent"] is not None]
    judged = [row[-2] for row in table(soup, "chart-prediction-table-1") if row[-1].get_text() != "-"]
    assert ["bad" in cell["class"] for cell in judged] == [
        abs(row["error"]) > row["limit_percent"] / 100 for row in whole
    ]
    cases = json.loads((page_folder / "gate.json").read_text())["cases"]
    rows = table(soup, "chart-verdicts-table-1")
    assert [[cell.get_text() for cell in row[:2]] for row in rows] == [
        [case["case"], case["verdict"]] for case in cases
    ]
    assert ["bad" in row[1]["class"] for row in rows] == [case["fails"] for case in cases]
    assert values(soup, "chart-verdicts-table-1")[1] == [5 * 2**20, 4 * 2**20, 2**20, 2048, 4096]
    messages = [row[2].get_text() for row in table(soup, "verdicts-table-1")]
    assert messages == [case["message"] for case in cases if case["message"]]


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style></svg><iframe src=//example.org>",
    "$\\frac{",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt;",
    "_hidden",
    "x" * 300,
    "日本語 🧮 ‮txet‬",
    "a\x00b\ud800c",
]


def test_names_stay_names(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    names = [f"name-{number}-" for number in range(len(HOSTILE))]
    write_all(folder, names)
    for path in folder.glob("*.json"):
        text = path.read_text().replace('"plain"', json.dumps(HOSTILE[0]))
        for name, hostile in zip(names, HOSTILE, strict=True):
            text = text.replace(name, json.dumps(hostile)[1:-1])
        path.write_text(text)
    output = tmp_path / "report.html"
    assert main([str(folder), "--output", str(output)]) == 0
    soup = parsed(output)
    test_it_needs_nothing_from_outside(soup)
    test_ids_are_unique_and_references_lead_somewhere(soup)
    shown = [re.sub("[\x00\ud800\u202a-\u202e]", "\ufffd", hostile) for hostile in HOSTILE]
    changed = " with target_modules all-linear"
    for name, behind in (("longest-table-1", changed), ("prediction-table-1", "")):
        assert [row[0].get_text().removesuffix(behind) for row in table(soup, name)] == shown
    for name in shown:
        assert name in soup.find(id="chart-lengths-summary").get_text()
        assert name in soup.find(id="chart-phases-summary").get_text()
        assert any(row[0].get_text() == name for row in table(soup, "phases-table-1"))
        assert any(row[0].get_text() == name for row in table(soup, "chart-families-table-1"))
    captions = [soup.find(id=f"chart-published-table-{number}") for number, _ in enumerate(shown, start=1)]
    assert [caption.get_text() for caption in captions] == [f"by {name}, GiB." for name in shown]


def test_what_is_absent_is_left_out(results: Path, tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    shutil.copy(results / "matrix.json", tmp_path / "some")
    (tmp_path / "some" / "strange.json").write_text('{"rows": []}')
    output = tmp_path / "report.html"
    assert main([str(tmp_path / "some"), "--output", str(output), "--title", "A & B"]) == 0
    soup = parsed(output)
    assert [section.h2["id"] for section in soup.main.find_all("section", recursive=False)] == ["matrix"]
    assert not soup.find_all("figure")
    assert soup.h1.get_text() == soup.title.get_text() == "A & B"


def test_a_folder_s_other_files_are_named(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(written / "matrix.json", tmp_path)
    for name, text in (("strange.json", '{"rows": []}'), ("trend.json", "[]")):
        (tmp_path / name).write_text(text)
    assert main([str(tmp_path), "--output", str(tmp_path / "report.html")]) == 0
    said = capsys.readouterr().out
    for name in ("strange.json", "trend.json"):
        assert f"not shown, for no section shows its kind: {tmp_path / name}" in said


@pytest.mark.parametrize("apart", [True, False], ids=["by name", "by folder"])
def test_two_files_of_one_recipe_are_compared(apart: bool, tmp_path: Path) -> None:
    files = []
    for folder, loss in (("before", 100), ("after", 40)):
        write_attribution(tmp_path / folder, recipe_named("r"), attribution(loss * 2**20), 2**29, ENVIRONMENT)
        path = tmp_path / folder / "attribution-r.json"
        files.append(path.rename(tmp_path / f"{folder}.json") if apart else path)
    output = tmp_path / "report.html"
    assert main([*map(str, files), "--output", str(output)]) == 0
    soup = parsed(output)
    head = soup.find(id="chart-peaks-table-1").find_parent("table").thead
    names = ["r (before)", "r (after)"] if apart else ["r (before/attribution-r)", "r (after/attribution-r)"]
    assert [cell.get_text() for cell in head.find_all("th")] == ["kind", *names, "difference"]
    differences = {row[0].get_text(): int(row[3].data["value"]) for row in table(soup, "chart-peaks-table-1")}
    assert differences["loss and logits"] == differences["on the card"] == -60 * 2**20
    assert differences["base weights, 4-bit"] == 0


def test_a_file_without_provenance_says_so(tmp_path: Path) -> None:
    """What a failing test of the gate leaves has only the attribution's own."""
    path = tmp_path / "kept.json"
    path.write_text(json.dumps({"case": "t.py::c", "attribution": msgspec.to_builtins(attribution())}))
    output = tmp_path / "report.html"
    assert main([str(path), "--output", str(output)]) == 0
    text = parsed(output).find(class_="made-of").get_text()
    assert "virtual on rtx-4050-laptop-6gb" in " ".join(text.split())
    assert "does not say" in text


def test_the_same_files_give_the_same_page(tmp_path: Path) -> None:
    write_attribution(tmp_path, recipe_named("r"), attribution(), 2**29, ENVIRONMENT)
    pages = [tmp_path / name for name in ("one.html", "two.html")]
    for page in pages:
        assert main([str(tmp_path / "attribution-r.json"), "--output", str(page)]) == 0
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_a_peak_is_told_with_the_launches_of_its_step(tmp_path: Path) -> None:
    """On the page and in Markdown; a file of a GPU, or from before they were counted, has none."""
    said = "An optimizer step takes 16,503 launches: 15,411 kernels, 1,092 copies, 0 memsets."
    for name, launches in (("counted", Launches(15_411, 1_092, 0)), ("measured", None)):
        write_attribution(tmp_path, recipe_named(name), attribution(), 2**29, ENVIRONMENT, launches)
        output = tmp_path / f"{name}.html"
        assert main([str(tmp_path / f"attribution-{name}.json"), "--output", str(output)]) == 0
        found = (said in output.read_text(), said in (tmp_path / f"attribution-{name}.md").read_text())
        assert found == (launches is not None, launches is not None)
    assert "launches" not in json.loads((tmp_path / "attribution-measured.json").read_text())


def test_charts_are_written_as_files(results: Path, tmp_path: Path) -> None:
    charts = tmp_path / "charts"
    arguments = [str(results), "--output", str(tmp_path / "report.html"), "--charts", str(charts)]
    assert main(arguments) == 0
    names = ["breakdown-plain", "families", "lengths", "phases", "prediction", "published", "runs", "timeline-plain"]
    expected = [f"{name}{suffix}" for name in (*names, "verdicts", "waterfall") for suffix in (".png", ".svg")]
    assert sorted(path.name for path in charts.iterdir()) == expected
    for path in charts.glob("*.svg"):
        assert "--ink" not in path.read_text(encoding="utf-8")


def test_an_attribution_of_explain_is_read(tmp_path: Path) -> None:
    """`explain --json` writes the recipe whole; its name is what counts."""
    found = msgspec.json.decode(msgspec.json.encode(attribution()), type=Attribution)
    content = {
        "recipe": {"name": "mine", "base": {}},
        "environment": ENVIRONMENT,
        "attribution": msgspec.to_builtins(found),
    }
    path = tmp_path / "explained.json"
    path.write_text(json.dumps(content))
    (section,) = sections_of([path]).sections
    assert [chart.name for chart in named([section])[0].charts] == ["breakdown-mine", "timeline-mine"]
