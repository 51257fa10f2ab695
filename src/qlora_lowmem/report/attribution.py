"""Where a peak's bytes are, for people: a table by kind, the lines of code that own most, and a picture."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_lowmem.memory.attribution import Attribution
from qlora_lowmem.memory.kinds import KINDS, OUTSIDE_ALLOCATED
from qlora_lowmem.report.tables import gib, markdown_table, provenance_lines, write_result
from qlora_lowmem.units import GIB, MIB, format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Kinds that are drawn as one, bottom to top, each with a colour that stays apart from its neighbours' in the common
# kinds of colour blindness and in grey (Paul Tol's "muted" and "bright" schemes, reordered).
_GROUPS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("base weights, 4-bit", "#332288", ("weights_4bit", "quantisation")),
    ("embeddings, norms", "#88CCEE", ("weights_other",)),
    ("adapters, gradients, optimizer", "#117733", ("adapters", "gradients", "optimizer", "optimizer_step")),
    ("checkpointed activations", "#DDCC77", ("checkpoints",)),
    ("Mamba scan", "#CC6677", ("activations_mamba", "recomputed_mamba", "backward_mamba")),
    ("attention", "#882255", ("activations_attention", "recomputed_attention", "backward_attention")),
    ("MLP", "#F4A582", ("activations_mlp", "recomputed_mlp", "backward_mlp")),
    ("norm", "#44AA99", ("activations_norm", "recomputed_norm", "backward_norm")),
    ("other activations", "#B2ABD2", ("activations_other", "recomputed_other", "backward_other", "input")),
    ("dequantised weights", "#999933", ("dequantised",)),
    ("loss and logits", "#EE7733", ("loss",)),
    ("libraries, rounding, unexplained", "#777777", ("libraries", "rounding", "unexplained")),
    ("allocator slack", "#CFCFCF", ("slack",)),
    ("CUDA context", "#EAEAEA", ("outside",)),
)
_INK = "#222222"
_PAPER: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}


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


def markdown(attribution: Attribution, title: str) -> str:
    """A page: title, sentence, both tables."""
    return (
        f"# {title}\n\n{headline(attribution)}.\n\n{kinds_table(attribution)}\n\n"
        f"The lines of code that own most of it:\n\n{owners_table(attribution)}\n"
    )


def write_attribution(folder: Path, name: str, attribution: Attribution, record: dict[str, Any]) -> None:
    """Write `attribution-NAME` under `folder`: JSON (the source), CSV, the page with its provenance, the picture."""
    rows = [{"kind": kind, "bytes": count} for kind, count in attribution.kinds.items() if count]
    page = f"{markdown(attribution, name)}\n![{name}](attribution-{name}.svg)\n\n{provenance_lines(record)}\n"
    content = {"environment": record, "recipe": name, "attribution": attribution.to_dict()}
    write_result(folder, f"attribution-{name}", content, page, rows)
    write_picture(attribution, name, folder / f"attribution-{name}.svg", folder / f"attribution-{name}.png")


def write_picture(attribution: Attribution, title: str, *paths: Path) -> None:
    """Draw the peak by kind and the step's memory over time; the paths' suffixes (.svg, .png) say the formats."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "qlora_lowmem", "text.color": _INK}):
        figure = Figure(figsize=(10, 6.4), layout="constrained", facecolor="white")
        peak, time = figure.subplots(2, 1, height_ratios=(1, 2.6))
        figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
        peak.set_title(headline(attribution), fontsize=9, loc="left", pad=10, wrap=True)
        drawn = _draw_peak(peak, attribution)
        _draw_timeline(time, attribution)
        handles = [_patch(colour, text) for text, colour, _ in _GROUPS if text in drawn]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
        for path in paths:
            # Without a date, the same figures give the same file.
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _patch(colour: str, text: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, edgecolor="white", label=text)


def _draw_peak(axes: "Axes", attribution: Attribution) -> set[str]:
    """One bar, stacked by group, sized in its parts where they have room. Returns the groups that are there."""
    left, drawn = 0.0, set()
    for text, colour, kinds in _GROUPS:
        count = sum(attribution.kinds.get(kind, 0) for kind in kinds)
        if not count:
            continue
        drawn.add(text)
        width = count / GIB
        hatch = "///" if text == "allocator slack" else None
        axes.barh(0, width, left=left, color=colour, edgecolor="white", linewidth=0.8, height=0.7, hatch=hatch)
        if count > 0.045 * attribution.device_bytes:
            axes.text(left + width / 2, 0, f"{width:.2f}", ha="center", va="center", color=_on(colour), fontsize=8.5)
        left += width
    marks = ((attribution.allocated_bytes, "allocated", 0.78), (attribution.device_bytes, "on the card", 0.44))
    for count, text, height in marks:  # at two heights, for they may be close
        axes.plot([count / GIB] * 2, [-0.35, height + 0.28], color=_INK, linewidth=1)
        words = f"{text} {count / GIB:.2f}"
        axes.annotate(
            words,
            (count / GIB, height),
            xytext=(-4, 0),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=8.5,
            bbox=_PAPER,
        )
    axes.set_ylim(-0.4, 1.1)
    axes.set_xlim(0, attribution.device_bytes / GIB * 1.005)
    axes.set_yticks([])
    axes.set_xlabel("GiB at the peak")
    _plain(axes)
    return drawn


def _draw_timeline(axes: "Axes", attribution: Attribution) -> None:
    """Allocated bytes by group over the allocator's events of the recorded step."""
    timeline = attribution.timeline
    layers, colours = [], []
    for _, colour, kinds in _GROUPS:
        columns = [index for index, kind in enumerate(timeline.kinds) if kind in kinds]
        if columns:
            layers.append([sum(row[index] for index in columns) / GIB for row in timeline.bytes])
            colours.append(colour)
    axes.stackplot(timeline.events, layers, colors=colours, linewidth=0, step="post")
    totals = [sum(row) / GIB for row in timeline.bytes]
    top = max(range(len(totals)), key=totals.__getitem__)
    axes.plot(timeline.events[top], totals[top], marker="v", color=_INK, markersize=6)
    axes.annotate(
        f"peak {totals[top]:.2f} GiB",
        (timeline.events[top], totals[top]),
        xytext=(6, 4),
        textcoords="offset points",
        fontsize=8.5,
    )
    _draw_phases(axes, attribution)
    axes.set_ylim(0, max(totals) * 1.2)
    axes.set_xlim(timeline.events[0], timeline.events[-1])
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylabel("allocated GiB")
    axes.set_xlabel("allocations and frees of the micro-batch in which the peak comes, in order")
    _plain(axes)


def _draw_phases(axes: "Axes", attribution: Attribution) -> None:
    """A line where forward turns into backward."""
    timeline = attribution.timeline
    in_backward = ("backward", "recompute")
    turn = next((e for e, phase in zip(timeline.events, timeline.phases, strict=True) if phase in in_backward), None)
    if turn is None:
        return
    axes.axvline(turn, color=_INK, linewidth=0.8, linestyle=(0, (3, 3)))
    recomputes = any(phase == "recompute" for phase in timeline.phases)
    behind = "backward, layers recomputed" if recomputes else "backward"
    for text, side in (("forward ", "right"), (f" {behind}", "left")):
        axes.text(turn, 1.0, text, transform=axes.get_xaxis_transform(), ha=side, va="top", fontsize=8.5)


def _on(colour: str) -> str:
    """Ink for text on `colour`: white where its luminance is low (ITU-R BT.709 weights)."""
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return "white" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 140 else _INK


def _plain(axes: "Axes") -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=3, color=_INK)
