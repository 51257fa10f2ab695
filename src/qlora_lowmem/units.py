"""Bytes: integers inside, units where a person reads or writes. MB is 10^6, MiB is 2^20, and they are never mixed."""

import re
from fractions import Fraction

KIB = 2**10
MIB = 2**20
GIB = 2**30

_FACTORS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": KIB,
    "MIB": MIB,
    "GIB": GIB,
    "TIB": 2**40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """`"6 GB"`, `"5.5 GiB"`, `"512MiB"` or a plain count of bytes as an integer number of bytes.

    Units are read without regard to case, so `gb` means GB (10^9 bytes), never bits.

    Raises:
        ValueError: not a size, an unknown unit, or a fraction of a byte.
    """
    if isinstance(text, bool):
        raise ValueError(f"{text!r} is not a size; write 6 GB, 5.5 GiB or a number of bytes")  # noqa: TRY004
    if isinstance(text, int):
        if text < 0:
            raise ValueError(f"{text} is not a size: it is negative")
        return text
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write 6 GB, 5.5 GiB or a number of bytes")
    number, unit = match.groups()
    factor = _FACTORS.get(unit.upper() or "B")
    if factor is None:
        raise ValueError(f"{text!r} has the unknown unit {unit!r}; use B, KB, MB, GB (10^3) or KiB, MiB, GiB (2^10)")
    if "." in number and factor == 1:
        raise ValueError(f"{text!r} is a fraction of a byte; add a unit, as in {number} GiB")
    whole, _, fraction = number.partition(".")
    # Integer arithmetic: 5.1 GiB must not depend on how 5.1 rounds in binary.
    return int(whole) * factor + (int(fraction) * factor // 10 ** len(fraction) if fraction else 0)


def parse_memory_limit(limit: str | int, total_bytes: int) -> int:
    """`"90%"` of `total_bytes`, rounded down; or a size, whatever the total.

    Raises:
        ValueError: not a percentage above 0 and up to 100, nor a size (`parse_bytes`).
    """
    if not isinstance(limit, str) or not limit.rstrip().endswith("%"):
        return parse_bytes(limit)
    digits = limit.strip()[:-1].strip()
    if not (digits.isascii() and digits.replace(".", "", 1).isdigit() and 0 < Fraction(digits) <= 100):
        raise ValueError(f"{limit!r} is not a percentage above 0 % and up to 100 %")
    return int(total_bytes * Fraction(digits) / 100)


def format_bytes(count: int) -> str:
    """A count of bytes as a person reads it: `"1.473 GiB"`, `"8.1 MiB"`, `"512 B"`."""
    sign, size = ("-" if count < 0 else ""), abs(count)
    if size >= GIB:
        return f"{sign}{size / GIB:.3f} GiB"
    if size >= MIB:
        return f"{sign}{size / MIB:.1f} MiB"
    if size >= KIB:
        return f"{sign}{size / KIB:.1f} KiB"
    return f"{sign}{size} B"


def format_signed(count: int) -> str:
    """A difference in bytes: `"+3.0 MiB"`, `"-512 B"`, `"0 B"`."""
    return f"+{format_bytes(count)}" if count > 0 else format_bytes(count)
