"""A budget on a test's GPU memory and its launches, and what is said when it is exceeded."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from qlora_lowmem.gate.records import changes
from qlora_lowmem.gate.verdicts import Verdict
from qlora_lowmem.memory.attribution import Attribution
from qlora_lowmem.memory.kinds import KINDS
from qlora_lowmem.results.kinds.verdicts import FIGURES, Budget, Record
from qlora_lowmem.units import format_bytes, format_signed, parse_bytes

if TYPE_CHECKING:
    from qlora_lowmem.virtual_gpu import Card

_LARGEST = 5


def budget_of(
    arguments: tuple[Any, ...], options: Mapping[str, Any], default_limit: str | None, default_card: str
) -> Budget:
    """The budget that `@pytest.mark.vram_budget(*arguments, **options)` states.

    Raises:
        ValueError: no limit, one that is not a size, an unknown figure, card or argument.
    """
    unknown = options.keys() - {"limit", "of", "card", "launches"}
    if unknown or len(arguments) > 1 or (arguments and "limit" in options):
        what = f"unknown: {', '.join(sorted(unknown))}" if unknown else "the limit is given more than once"
        raise ValueError(
            f'vram_budget takes a limit, card=, of= and launches=; {what}. Write vram_budget("6 GB", card="NAME")'
        )
    limit = arguments[0] if arguments else options.get("limit", default_limit)
    if limit is None:
        raise ValueError(
            'vram_budget has no limit: write vram_budget("6 GB"), or set vram_budget = 6 GB in the ini file, or '
            "--vram-budget 6GB"
        )
    if not isinstance(limit, str | int):
        raise ValueError(f"vram_budget: limit={limit!r} is not a size; write 6 GB, 5.5 GiB or a number of bytes")  # noqa: TRY004
    try:
        size = parse_bytes(limit)
    except ValueError as error:
        raise ValueError(f"vram_budget: limit={limit!r}: {error}") from None
    of = options.get("of", "allocated")
    if of not in FIGURES:
        raise ValueError(f"vram_budget: of={of!r} is not one of {', '.join(FIGURES)}")
    try:
        card = card_named(options.get("card", default_card)).name
    except ValueError as error:
        raise ValueError(f"vram_budget: card={options.get('card', default_card)!r}: {error}") from None
    launches = options.get("launches")
    if launches is not None and (type(launches) is not int or launches < 0):
        raise ValueError(f"vram_budget: launches={launches!r} is not a number of launches; write launches=5000")
    return Budget(size, of, card, limit.strip() if isinstance(limit, str) else "", launches)


def card_named(name: object) -> "Card":
    """The virtual card of that name. Raises ValueError: there is none, or it is no text."""
    from qlora_lowmem import virtual_gpu

    if not isinstance(name, str):
        raise ValueError(f"{name!r} is not a card's name; write one of virtual_gpu --list-cards, as in t4-16gb")  # noqa: TRY004
    try:
        return virtual_gpu.get_card(name)
    except virtual_gpu.VirtualGPUError as error:
        raise ValueError(str(error)) from None


def over_budget(
    case: str,
    budget: Budget,
    record: Record,
    attribution: Attribution | None = None,
    reference: Record | None = None,
    reference_name: str = "",
) -> Verdict:
    """The verdict on a test that used more than its budget: sizes, what grew, the largest owners.

    Args:
        reference: what it used when it was within its budget, if that is known.
        reference_name: `its baseline` or `it last passed`.
    """
    key, used, limit, given = record.key, budget.used(record), budget.limit, budget.given
    where = f"; the peak comes in {attribution.moment}" if attribution is not None else ""
    parts = [
        f"GPU memory over budget: {case}\n"
        f"  {budget.of} {format_bytes(used, given)}, limit {budget.shown()}: "
        f"{format_bytes(used - limit, given)} over ({used:,} - {limit:,} = {used - limit:,} bytes)\n"
        f"  on {key.device} ({key.provenance}){where}"
    ]
    if reference is not None:
        total = format_signed(record.allocated - reference.allocated)
        head = f"{total} since {reference_name} ({format_bytes(reference.allocated)} allocated):"
        rows = [
            [format_signed(change.bytes), change.name or "(outside of the model)", change.remark]
            for change in changes(reference.modules, record.modules)[:_LARGEST]
        ]
        parts.append(_table(head, rows, "", "module", ""))
    elif record.modules:
        blocks = sorted(record.modules.items(), key=lambda item: (-item[1], item[0]))[:_LARGEST]
        rows = [[format_bytes(count), name or "(outside of the model)"] for name, count in blocks]
        parts.append(_table("largest modules:", rows, "", "module"))
    if attribution is not None and attribution.owners:
        owners = attribution.owners[:_LARGEST]
        rows = [[format_bytes(each.bytes), KINDS[each.kind], each.module, each.line] for each in owners]
        parts.append(_table("largest owners:", rows, "", "kind", "largest for", "line"))
    return Verdict("OVER BUDGET", "\n\n".join(parts), kept="kept")


def too_many_launches(case: str, record: Record, limit: int, reference: Record | None, reference_name: str) -> Verdict:
    """The verdict on a test that launched more than it may; `reference` and its name as in `over_budget`."""
    key, used = record.key, record.launches or 0
    found = (
        f"Launches over budget: {case}\n"
        f"  {used:,} kernels, copies and memsets, limit {limit:,}: {used - limit:,} over\n"
        f"  on {key.device} ({key.provenance})"
    )
    if reference is not None and reference.launches is not None:
        found += f"; {used - reference.launches:+,} since {reference_name} ({reference.launches:,})"
    return Verdict("OVER BUDGET", found, kept="kept")


def _table(title: str, rows: list[list[str]], *headers: str) -> str:
    align = ("right", *["left"] * (len(headers) - 1))
    text = tabulate(rows, headers=headers, tablefmt="plain", disable_numparse=True, colalign=align)
    return "\n".join([title, *(f"  {line}".rstrip() for line in text.splitlines() if line.strip())])
