"""Where a peak's bytes are, for people: a table by kind, the lines of code that own most, and a picture."""

from pathlib import Path
from typing import Any

import msgspec

from qlora_lowmem.memory.attribution import Attribution
from qlora_lowmem.memory.kinds import KINDS, OUTSIDE_ALLOCATED
from qlora_lowmem.results.kinds.attribution import picture
from qlora_lowmem.results.style import save
from qlora_lowmem.results.tables import gib, markdown_table, provenance_lines, times_floor, write_result
from qlora_lowmem.units import MIB, format_bytes


def kinds_table(attribution: Attribution) -> str:
    """Bytes by kind as a Markdown table, with the allocated peak as a subtotal and the device's as the total."""
    total = attribution.device_bytes
    rows: list[list[str]] = []
    for kind, text in KINDS.items():
        if kind == OUTSIDE_ALLOCATED[0]:
            rows.append(_row("**allocated**", attribution.allocated_bytes, total))
        if kind in attribution.kinds:
            rows.append(_row(text, attribution.kinds[kind], total))
    rows.append(_row("**on the card**", total, total))
    return markdown_table(("kind", "bytes", "GiB", "share"), rows)


def _row(text: str, count: int, total: int) -> list[str]:
    return [text, f"{count:,}", gib(count), f"{100 * count / total:.1f} %"]


def owners_table(attribution: Attribution, limit: int = 15) -> str:
    """The lines of code that own most of the peak, as a Markdown table; what is unexplained is always among them."""
    unexplained = [owner for owner in attribution.owners[limit:] if owner.kind == "unexplained"]
    rows = [
        [owner.line, KINDS[owner.kind], f"{owner.module} {owner.layout}".strip(), str(owner.blocks), mib(owner.bytes)]
        for owner in (*attribution.owners[:limit], *unexplained)
    ]
    headers = ("line", "kind", "largest for", "blocks", "MiB")
    return markdown_table(headers, rows, text_columns=3)


def mib(count: int) -> str:
    """Bytes as MiB with two decimals, for a table whose heading names the unit."""
    return f"{count / MIB:.2f}"


def headline(attribution: Attribution) -> str:
    """One sentence: how much, where, when."""
    return (
        f"{attribution.device} ({attribution.provenance}): {format_bytes(attribution.allocated_bytes)} allocated, "
        f"{format_bytes(attribution.device_bytes)} on the card; "
        f"the {attribution.phase} peak comes in {attribution.moment}"
    )


def markdown(attribution: Attribution, title: str, floor_bytes: int) -> str:
    """A page: title, the peak in a sentence and its floor in another, both tables."""
    beside = (
        f"The floor, which no method avoids, is {format_bytes(floor_bytes)}; allocated is "
        f"{times_floor(attribution.allocated_bytes, floor_bytes)} times that."
    )
    return (
        f"# {title}\n\n{headline(attribution)}. {beside}\n\n{kinds_table(attribution)}\n\n"
        f"The lines of code that own most of it:\n\n{owners_table(attribution)}\n"
    )


def write_attribution(
    folder: Path, name: str, attribution: Attribution, floor_bytes: int, record: dict[str, Any]
) -> None:
    """Write `attribution-NAME` under `folder`: JSON (the source), CSV, the page with its provenance, the picture."""
    rows = [{"kind": kind, "bytes": count} for kind, count in attribution.kinds.items() if count]
    page = (
        f"{markdown(attribution, name, floor_bytes)}\n![{name}](attribution-{name}.svg)\n\n{provenance_lines(record)}\n"
    )
    content = {"environment": record, "recipe": name, "floor_bytes": floor_bytes}
    content["attribution"] = msgspec.to_builtins(attribution)
    write_result(folder, f"attribution-{name}", content, page, rows)
    write_picture(attribution, name, folder / f"attribution-{name}.svg", folder / f"attribution-{name}.png")


def write_picture(attribution: Attribution, title: str, *paths: Path) -> None:
    """Draw the peak by kind and the step's memory over time; the paths' suffixes (.svg, .png) say the formats."""
    save(lambda style: picture(style, attribution, title, headline(attribution)), title, *paths)
