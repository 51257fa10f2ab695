"""`max_memory={0: "100%"}` and `device_map="cuda:0"`: what transformers and accelerate make of them on one card."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from typing import Any

from claims.rows import Row, Side, judged
from claims.runs import HYBRID, TITLES
from claims.verdicts import Differs, Exactly
from qlora_lowmem import virtual_gpu
from qlora_lowmem.gate.plugin import DEFAULT_CARD
from qlora_lowmem.units import GIB, format_bytes

_ASKED = 3 * GIB // 2
_MORE = 3 * GIB
# Room for the 4-bit model and not for the 16-bit one.
_SMALL_BYTES = 5 * GIB // 2
_FORMS: tuple[str | float, ...] = ("100%", "90%", "0.9", 1.0, "6gb", "6GB", "6GiB")
_LOADS: dict[str, dict[str, Any]] = {
    "cuda:0": {"device_map": "cuda:0"},
    "{'': 0}": {"device_map": {"": 0}},
    "auto": {"device_map": "auto"},
    "auto, 100%": {"device_map": "auto", "max_memory": {"0": "100%"}},
    "cuda:0, 100%": {"device_map": "cuda:0", "max_memory": {"0": "100%"}},
    "auto, 1.5 GiB": {"device_map": "auto", "max_memory": {"0": f"{_ASKED // 2**20}MiB"}, "then_bytes": _MORE},
    "small card, auto": {"device_map": "auto", "four_bit": False},
    "small card, cuda:0": {"device_map": "cuda:0", "four_bit": False},
}


def submit(server: virtual_gpu.Server) -> "dict[str, Future[virtual_gpu.JobResult]]":
    """Queue the loadings of the 16-bit checkpoint, and what accelerate takes each form of a limit for."""
    card = virtual_gpu.get_card(DEFAULT_CARD)
    small = card.with_memory(card.context_bytes + _SMALL_BYTES)
    jobs = {}
    for name, arguments in _LOADS.items():
        where = small if name.startswith("small card") else card
        jobs[name] = server.submit("claims.loading:load", {"name": HYBRID, **arguments}, where, timeout=120)
    for form in _FORMS:
        jobs[f"form {form!r}"] = server.submit("claims.loading:bytes_taken", {"limit": form}, card, timeout=120)
    return jobs


def rows(found: Mapping[str, Mapping[str, Any]]) -> Iterator[Row]:
    """The statements on placement; `found` has a result for every job of `submit`."""
    yield _percentage(found)
    yield _ignored(found)
    yield _no_cap(found)
    yield _same_place(found)
    yield _all_on_the_card(found)
    yield _auto_spills(found)


def _percentage(found: Mapping[str, Mapping[str, Any]]) -> Row:
    refused = found["auto, 100%"]
    taken = {form: found[f"form {form!r}"] for form in _FORMS}
    others = ", ".join(
        f"{form!r} is refused" if each["error"] else f"{form!r} is {each['bytes']:,} B" for form, each in taken.items()
    )
    whole = found["auto"]["loaded"]
    return judged(
        "max_memory",
        'max_memory={0: "100%"} with device_map="auto" lets the model use the whole GPU',
        TITLES[HYBRID],
        Exactly(whole),
        f"the model loads: {whole:,} B",
        refused["loaded"],
        f"{refused['loaded']:,} B" + (f" ({refused['error'].partition(':')[0]})" if refused["error"] else ""),
        (Side("loaded without max_memory", whole), Side("with it", refused["loaded"])),
        {"false": f"accelerate takes sizes and no percentages, and some forms for what nobody means: {others}."},
    )


def _ignored(found: Mapping[str, Mapping[str, Any]]) -> Row:
    plain, limited = found["cuda:0"]["loaded"], found["cuda:0, 100%"]["loaded"]
    return judged(
        "max_memory",
        'max_memory={0: "100%"} beside device_map="cuda:0" does something',
        TITLES[HYBRID],
        Differs(),
        "a difference",
        limited - plain,
        f"{limited - plain:+,} B",
        (Side("loaded without max_memory", plain), Side("with it", limited)),
        {
            "false": "max_memory is read only where accelerate computes a placement (device_map 'auto' and its like), "
            "so beside an explicit map even the invalid value passes unnoticed."
        },
    )


def _no_cap(found: Mapping[str, Mapping[str, Any]]) -> Row:
    after = found["auto, 1.5 GiB"]["after"]
    return judged(
        "max_memory",
        f"max_memory caps what the job may use ({format_bytes(_ASKED)} asked for, then a tensor of "
        f"{format_bytes(_MORE)} made)",
        TITLES[HYBRID],
        Exactly(0),
        f"no byte beyond {_ASKED:,} B",
        max(after - _ASKED, 0),
        f"{max(after - _ASKED, 0):,} B beyond",
        (Side("asked for", _ASKED), Side("allocated", after)),
        {
            "false": "it steers the placement of modules at loading and is forgotten; a cap is "
            "torch.cuda.set_per_process_memory_fraction, which a recipe's own max_memory sets."
        },
    )


def _same_place(found: Mapping[str, Mapping[str, Any]]) -> Row:
    named, mapped = found["cuda:0"], found["{'': 0}"]
    auto = found["auto"]["peak"] - named["peak"]
    return judged(
        "device_map",
        "device_map=\"cuda:0\" is the same as {'': 0}",
        TITLES[HYBRID],
        Exactly(mapped["peak"]),
        "the same peak of loading",
        named["peak"],
        "the same" if named["peak"] == mapped["peak"] else f"{named['peak'] - mapped['peak']:+,} B",
        (Side("peak of loading with {'': 0}", mapped["peak"]), Side("with cuda:0", named["peak"])),
        {"true": f'both put every module on the one card; "auto" comes to the same place with {auto:+,} B.'},
    )


def _all_on_the_card(found: Mapping[str, Mapping[str, Any]]) -> Row:
    places = found["cuda:0"]["places"]
    total, there = sum(places.values()), places.get("cuda", 0)
    stopped = found["small card, cuda:0"]
    return judged(
        "device_map",
        'device_map="cuda:0" keeps every parameter on the GPU',
        TITLES[HYBRID],
        Exactly(total),
        f"{total} of {total} tensors",
        there,
        f"{there} of {total}",
        (Side("parameters of the model", total, "count"), Side("on the GPU", there, "count")),
        {
            "true": f"nothing may go elsewhere: on a card of {format_bytes(_SMALL_BYTES)} the 16-bit model ends with "
            f"{(stopped['error'] or 'no error').partition(':')[0]} instead of spilling."
        },
    )


def _auto_spills(found: Mapping[str, Mapping[str, Any]]) -> Row:
    spilled = found["small card, auto"]
    places = spilled["places"]
    total, there = sum(places.values()), places.get("cuda", 0)
    elsewhere = ", ".join(f"{count} on {device}" for device, count in spilled["placement"].items())
    return judged(
        "device_map",
        f'device_map="auto" keeps every parameter on the GPU (16-bit model, card of {format_bytes(_SMALL_BYTES)})',
        TITLES[HYBRID],
        Exactly(total),
        f"{total} of {total} tensors",
        there,
        f"{there} of {total}",
        (Side("parameters of the model", total, "count"), Side("on the GPU", there, "count")),
        {"false": f"what does not fit goes to the host without an error (modules: {elsewhere})."},
    )
