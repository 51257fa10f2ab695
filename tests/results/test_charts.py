"""Colours that can be told from their ground, paths that stay what they were, and files that come out the same."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_lowmem.memory.kinds import KINDS
from qlora_lowmem.memory.profile import Peak
from qlora_lowmem.results import style, timeline
from qlora_lowmem.results.kinds import attribution, families, lengths, phases, verdicts, waterfall
from qlora_lowmem.results.kinds.attribution import picture_as
from qlora_lowmem.results.page import sections_of
from results.examples import STEPS, named
from results.examples import attribution as example


@pytest.mark.parametrize("found", [style.LIGHT, style.DARK], ids=["light", "dark"])
def test_text_and_lines_stand_out(found: style.Theme) -> None:
    """4.5 for text, 3 for lines and marks, as WCAG 2.2 AA asks for."""
    for ground in (found["paper"], found["ground"]):
        for role in ("ink", "muted", "limit", "good", "bad", "link"):
            assert style.contrast(found[role], ground) >= 4.5, (role, ground)
        assert style.contrast(found["focus"], ground) >= 3
    for role in (*style.SERIES, "bar", "edge"):
        assert style.contrast(found[role], found["paper"]) >= 3, role
    for group in style.GROUPS:
        assert style.contrast(found[f"on-{group.role}"], found[group.role]) >= 4.5, group.role


def test_contrast_is_that_of_wcag() -> None:
    assert style.contrast("#000000", "#ffffff") == pytest.approx(21)
    assert style.contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


def test_every_kind_has_one_colour() -> None:
    kinds = [kind for group in style.GROUPS for kind in group.kinds]
    assert sorted(kinds) == sorted(KINDS)
    assert len(set(style.ROLE_OF)) == len(style.LIGHT.colours) == len(style.DARK.colours)


steps = st.lists(st.tuples(st.integers(-40, 40), st.integers(-40, 40)), min_size=2, max_size=40)


@given(steps, st.booleans())
def test_a_shorter_path_goes_the_same_way(points: list[tuple[int, int]], closed: bool) -> None:
    """Its corners are those of the path, less the points that a straight level or upright line passes."""
    path = "M " + " \nL ".join(f"{x} {y}" for x, y in points) + (" \nz\n" if closed else "")
    short = style.shorter_path(path)
    assert short.endswith("z") == closed
    assert _corners(short.removesuffix("z")) == _without_passed([float(x), float(y)] for x, y in points)


def _corners(short: str) -> list[list[float]]:
    found: list[list[float]] = []
    for command in re.findall("[MLHV][^MLHV]*", short):
        numbers = [float(number) for number in command[1:].split()]
        here = found[-1] if found else [0.0, 0.0]
        found.append({"H": [*numbers, here[1]], "V": [here[0], *numbers]}.get(command[0], numbers))
    return found


def _without_passed(points: Iterable[list[float]]) -> list[list[float]]:
    found: list[list[float]] = []
    for point in points:
        if found and found[-1] == point:
            continue
        if len(found) > 1:
            (ax, ay), (bx, by), (cx, cy) = found[-2], found[-1], point
            level = ay == by == cy and (bx - ax) * (cx - bx) > 0
            upright = ax == bx == cx and (by - ay) * (cy - by) > 0
            if level or upright:
                found.pop()
        found.append(point)
    return found


def test_a_path_with_other_commands_is_refused() -> None:
    with pytest.raises(ValueError, match="other commands"):
        style.shorter_path("M 0 0 A 1 1 0 0 0 2 2")


def test_a_colour_without_a_role_is_refused() -> None:
    text = '<svg xmlns="http://www.w3.org/2000/svg"><path d="M 0 0" style="fill: #123456"/></svg>'
    with pytest.raises(KeyError):
        style.inline(text, "a", "a chart", "b")


def phase(name: str, device: int = 2**32) -> phases.PhaseBytes:
    return phases.PhaseBytes(name, Peak(2**30, 2**31, device), 6 * 2**30, 2**31)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(
    "draw",
    [
        lambda look: waterfall.waterfall(look, STEPS, None),
        lambda look: waterfall.waterfall(look, STEPS[:1], 2**33),
        lambda look: families.families(look, [[families.Pair("$\\frac{", 1, 2**31, 2**32, 2**30)]]),
        lambda look: attribution.breakdown(look, example()),
        lambda look: timeline.timeline(look, example().timeline),
        lambda look: attribution.peaks(look, [("_a", example()), ("b" * 300, example(1))]),
        lambda look: lengths.lengths(look, [lengths.Length("$\\frac{", 1024, False, Peak(), 2**29)], 2**33),
        lambda look: phases.phases(look, {"$\\frac{": [phase("merge", 0)]}),
        lambda look: phases.phases(
            look, {"_a": [phase("load")], "b" * 300: [phase("save", 2**34)], "": [phase("save")]}
        ),
        lambda look: verdicts.verdicts(look, []),
    ],
)
def test_drawings_hold_whatever_they_are_given(draw: style.Drawing, narrow: bool) -> None:
    """One step, one point, odd names, nothing at all: a drawing with colours by role comes out, twice the same."""
    text = style.svg_text(draw, style.Style(style.TOKENS, narrow))
    found = style.inline(text, "p", "a <name>", "d")
    assert 'aria-label="a &lt;name&gt;"' in found
    assert "var(--ink)" in found
    assert "#0a00" not in found
    assert found == style.inline(style.svg_text(draw, style.Style(style.TOKENS, narrow)), "p", "a <name>", "d")


@pytest.mark.parametrize("narrow", [False, True])
def test_a_phase_without_figures_keeps_its_row(narrow: bool) -> None:
    """In each recipe's panel stand the phases that any has, in the order of a run's life, and what the card holds."""
    lives = {"a": [phase("save"), phase("load")], "b": [phase("resume", 7 * 2**30)]}
    look = style.Style(style.LIGHT, narrow)
    text = style.svg_text(lambda found: phases.phases(found, lives), look)
    root = ET.fromstring(text)
    words = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    names = [word for word in words if word in {"load", "resume", "save"}]
    assert names == ["load", "resume", "save"] * (2 if narrow else 1)
    assert words.count("no figures") == 3
    assert words.count("4.000") == 2
    assert {"7.000, over", "striped: over budget", "budget on the card: 6.00"} <= set(words)


@pytest.mark.parametrize("narrow", [False, True])
def test_the_length_of_a_bar_is_its_figure(written: Path, narrow: bool) -> None:
    """Bars and steps begin at 0 on a linear scale, on every chart of a page and on the picture of a peak."""
    look = style.Style(narrow=narrow)
    drawings = [chart.draw for section in sections_of([written]).sections for chart in section.charts]
    with_bars = 0
    for draw in (*drawings, lambda look: attribution.picture(look, example())):
        with style.drawing(look):
            figure = draw(look)
        for axes in figure.axes:
            if axes.containers or axes.patches:
                with_bars += 1
                assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "linear")
                assert 0 in (axes.get_xlim() if axes.containers else axes.get_ylim())
    assert with_bars >= len(drawings) - 3  # without: lengths, prediction, published


def test_a_waterfall_shows_the_card_twice_where_the_baseline_is_far_beyond_it() -> None:
    """Whole, and cut at the card's line, so that what fits can be told apart."""
    look = style.Style()
    with style.drawing(look):
        beyond = waterfall.waterfall(look, STEPS, 2**32).axes
        near = waterfall.waterfall(look, STEPS, 20 * 2**30).axes
    assert [axes.get_xlim()[1] for axes in beyond] == pytest.approx([21 * 1.06, 4 * 1.06])
    assert [axes.get_xlim()[1] for axes in near] == pytest.approx([21 * 1.06])


def test_the_picture_of_a_peak_says_what_it_is_of_and_where_the_card_ends(tmp_path: Path) -> None:
    """Model, length, recipe, card; and of a peak that the card cannot hold, where it ran."""
    path = tmp_path / "a.svg"
    path.write_bytes(picture_as("svg", example(), named("mine")))
    words = _words(path)
    assert "granite-4.0-h-1b, 1,024 tokens, recipe mine, on rtx-4050-laptop-6gb (virtual)" in words
    assert "usable on the card: 5.50" in words
    assert "more than" not in words
    path.write_bytes(picture_as("svg", example(6000 * 2**20), named("large")))
    where = "more than the 5.500 GiB that a job can use there, so it ran on a card of the same kind with room for it"
    assert where in _words(path)


def _words(path: Path) -> str:
    texts = ET.parse(path).getroot().iter("{http://www.w3.org/2000/svg}text")
    return " ".join(element.text or "" for element in texts)


def test_files_are_the_same_each_time_and_say_what_they_are(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        paths = [tmp_path / folder / name for name in ("a.svg", "a.png")]
        style.save(lambda look: waterfall.waterfall(look, STEPS, 2**33), "Peaks & more", *paths)
    for name in ("a.svg", "a.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    root = ET.parse(tmp_path / "one" / "a.svg").getroot()
    assert root[0].text == "Peaks & more"
    words = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"Peaks & more", "baseline", "3.000 (−17.000)", "3.000 (+0.000)", "usable on the card: 8.00"} <= words
    assert (tmp_path / "one" / "a.png").read_bytes().startswith(b"\x89PNG")
