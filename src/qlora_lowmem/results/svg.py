"""matplotlib's SVG made smaller, and made part of a page: names of its own, colours by role, no fonts of its own."""

import re
import xml.etree.ElementTree as ET  # only ever reads what matplotlib wrote

from qlora_lowmem.results.theme import ROLE_OF

# Layers of a group whose id begins so meet without a seam.
CRISP = "crisp"

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_HREF = f"{{{_XLINK}}}href"
ET.register_namespace("", _SVG)
ET.register_namespace("xlink", _XLINK)
_COLOUR = re.compile(r"#[0-9a-f]{6}\b")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_TOKEN = re.compile(r"[MLCQz]|-?[0-9.]+(?:e-?[0-9]+)?")
_PAIRS = {"M": 1, "L": 1, "Q": 2, "C": 3}


def tidy(text: str, title: str) -> str:
    """The document with short paths, without metadata, and with a title."""
    root = _compact(text)
    element = ET.Element(f"{{{_SVG}}}title")
    element.text = title
    root.insert(0, element)
    return ET.tostring(root, encoding="unicode") + "\n"


def inline(text: str, prefix: str, label: str, described_by: str) -> str:
    """The drawing as an `svg` element for an HTML page.

    Args:
        text: an SVG document drawn in `theme.TOKENS`.
        prefix: makes its ids unique in the page.
        label: its accessible name.
        described_by: the id of the element that says in words what it shows.

    Raises:
        KeyError: a colour that no role has.
    """
    root = _compact(text)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        _name(element, prefix)
        _theme(element)
    for sheet in [child for child in root.iter("defs") if child.find("style") is not None]:
        root.remove(sheet)  # its rule is for every element of the page
    for name in ("version", "width", "height"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-label": label, "aria-describedby": described_by}
    return ET.tostring(root, encoding="unicode")


def _compact(text: str) -> ET.Element:
    root = ET.fromstring(text)
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    used = set(_REFERENCE.findall(text)) | set(re.findall(r'xlink:href="#([^"]+)"', text))
    _shorten(root, used, crisp=False)
    return root


def _shorten(element: ET.Element, used: set[str], *, crisp: bool) -> None:
    name = element.get("id", "")
    crisp = crisp or name.startswith(CRISP)
    if name not in used:
        element.attrib.pop("id", None)
    if "d" in element.attrib:
        element.set("d", shorter_path(element.attrib["d"]))
        if crisp:
            element.set("shape-rendering", "crispEdges")
    if element.get("transform", "").startswith("rotate(-0 "):
        del element.attrib["transform"]
    element.text = element.text if element.tag.endswith(("}text", "}style")) else None
    element.tail = None
    for child in element:
        _shorten(child, used, crisp=crisp)


def _name(element: ET.Element, prefix: str) -> None:
    if "id" in element.attrib:
        element.set("id", f"{prefix}-{element.attrib['id']}")
    if _HREF in element.attrib:
        element.set("href", f"#{prefix}-{element.attrib.pop(_HREF)[1:]}")
    for name in ("clip-path", "style"):
        if name in element.attrib:
            element.set(name, _REFERENCE.sub(rf"url(#{prefix}-\1)", element.attrib[name]))


def _theme(element: ET.Element) -> None:
    style = [part for part in element.get("style", "").split("; ") if part and not part.startswith("font-family")]
    if element.get("fill", "").startswith("#"):  # a pattern's ground
        style.append(f"fill: {element.attrib.pop('fill')}")
    if style:
        element.set("style", _COLOUR.sub(lambda found: f"var(--{ROLE_OF[found[0]]})", "; ".join(style)))


def shorter_path(path: str) -> str:
    """The same path to a hundredth of a point: level and upright lines in short, and as one where they go on.

    Raises:
        ValueError: a command other than M, L, Q, C and z in capitals.
    """
    tokens = _TOKEN.findall(path)
    if "".join(tokens) != re.sub(r"[\s,]+", "", path):
        raise ValueError(f"a path of other commands than M, L, Q, C and z: {path[:80]!r}")
    parts: list[tuple[str, tuple[float, ...]]] = []
    here = (0.0, 0.0)
    before = here
    at = 0
    while at < len(tokens):
        command = tokens[at]
        count = 2 * _PAIRS.get(command, 0)
        numbers = tuple(round(float(token), 2) for token in tokens[at + 1 : at + 1 + count])
        at += 1 + count
        if command == "L":
            there = (numbers[0], numbers[1])
            if there == here:
                continue
            short = "V" if there[0] == here[0] else "H" if there[1] == here[1] else "L"
            along = "HV".find(short)
            goes_on = (
                along >= 0 and parts[-1][0] == short and (there[along] > here[along]) == (here[along] > before[along])
            )
            if goes_on:
                parts.pop()
            else:
                before = here
            parts.append((short, (there[along],) if along >= 0 else there))
            here = there
        else:
            parts.append((command, numbers))
            if numbers:
                before, here = here, (numbers[-2], numbers[-1])
    return "".join(command + " ".join(f"{number:g}" for number in numbers) for command, numbers in parts)
