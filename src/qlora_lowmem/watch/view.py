"""What a person sees: one frame of the terminal view, and the same as a line or as plain data."""

import time
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qlora_lowmem.units import format_bytes
from qlora_lowmem.watch.judgement import CARD, Frame, Room, rooms

_LEVELS = "▁▂▃▄▅▆▇█"
_SPARKS = 60
WIDTH = 100
_TITLES = {"wall": "near the wall", "spill": "spilling", "stale": "old figures"}
_SPILLING = {
    "none": "nothing lies in system memory, as far as it shows",
    "impossible": "cannot happen: on Linux an allocation beyond the card fails",
    "unknown": "unknown: only a job of this project tells what it has reserved",
    "estimate": "about {} in system memory",
}
_STYLES = {"wall": "bold yellow", "spill": "bold red", "stale": "yellow"}


def sparkline(values: Sequence[int], limit: int) -> str:
    """The last values as blocks of eight heights, 0 at the bottom and `limit` at the top."""
    top = max(limit, 1)
    return "".join(_LEVELS[min(8 * value // top, 7)] for value in values[-_SPARKS:])


def line(frame: Frame) -> str:
    """The frame on one line, for a log or a terminal that cannot draw."""
    reading = frame.reading
    clock = time.strftime("%H:%M:%S", time.localtime(reading.time))
    parts = [clock, *(f"{room.name} {_used(room)}" for room in rooms(reading))]
    if reading.job is not None:
        parts.append(_progress(frame))
        if reading.job.total:
            parts.append(f"allocated {format_bytes(reading.job.allocated)}")
    if reading.process_bytes is not None:
        parts.append(f"process {format_bytes(reading.process_bytes)}")
    parts += [f"WARNING ({_TITLES[notice.kind]}): {notice.text}" for notice in frame.notices]
    return "; ".join(parts)


def render(frame: Frame) -> RenderableType:
    """The frame as rich draws it. Text is drawn as it is: a recipe's name may look like rich's markup."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for room in rooms(frame.reading):
        table.add_row(Text(room.name), Text(f"{_used(room)}, {format_bytes(room.headroom)} left"))
        table.add_row("", ProgressBar(total=room.limit, completed=room.used))
        if room.name == CARD and len(frame.history) > 1:
            table.add_row("", Text(sparkline(frame.history, room.limit)))
    for name, text in _facts(frame):
        table.add_row(Text(name), Text(text))
    said = [Text(f"WARNING, {_TITLES[each.kind]}: {each.text}.", style=_STYLES[each.kind]) for each in frame.notices]
    return Panel(Group(table, *said), title=Text(_title(frame)), title_align="left", width=WIDTH)


def _title(frame: Frame) -> str:
    card, job = frame.reading.card, frame.reading.job
    name = card.name if card else job.card if job else ""
    if job is None:
        return name
    where = {"virtual": f"{name} (virtual)" if name else "virtual GPU", "cpu": "CPU"}.get(job.device, name)
    return f"{job.recipe} on {where}" if where else job.recipe


def _facts(frame: Frame) -> list[tuple[str, str]]:
    reading, job = frame.reading, frame.reading.job
    facts = [("job", _progress(frame))] if job is not None else []
    if job is not None and job.total:
        cached = format_bytes(job.reserved - job.allocated)
        held = f"{format_bytes(job.allocated)} allocated, {format_bytes(job.reserved)} reserved ({cached} cached)"
        facts.append(("allocator", held))
    if reading.process_bytes is not None:
        facts.append(("process", f"{format_bytes(reading.process_bytes)} on the card"))
    elif reading.card is not None:
        told = (
            f"pid {pid}: {'not told by the driver' if size is None else format_bytes(size)}"
            for pid, size in reading.card.processes.items()
        )
        facts.append(("processes", ", ".join(told) or "none"))
    if reading.resident_bytes is not None:
        facts.append(("host memory", format_bytes(reading.resident_bytes)))
    if frame.peak:
        facts.append(("peak", f"{format_bytes(frame.peak)} on the card"))
    if job is not None and job.total:
        most = f"{format_bytes(job.peak_allocated)} allocated, {format_bytes(job.peak_reserved)} reserved"
        facts.append(("" if frame.peak else "peak", most))
    if reading.card is not None:
        facts.append(("spilling", _SPILLING[frame.spill.state].format(format_bytes(frame.spill.bytes))))
    return facts


def _progress(frame: Frame) -> str:
    job = frame.reading.job
    assert job is not None
    steps = f"step {job.step} of {job.steps}, " if job.steps else ""
    if job.phase == "ended":
        return f"{steps}ended: {job.outcome}"
    return steps + (f"{job.phase}, pid {job.pid}" if frame.reading.running else f"gone while {job.phase} (killed?)")


def _used(room: Room) -> str:
    return f"{format_bytes(room.used)} of {format_bytes(room.limit)} ({100 * room.used / room.limit:.0f} %)"
