"""Bytes: integers inside, units where a person reads or writes. MB is 10^6, MiB is 2^20, and they are never mixed."""

import re
from fractions import Fraction

KIB = 2**10
MIB = 2**20
GIB = 2**30

_FACTORS = {"B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _FACTORS |= {f"{_letter}B": 1000**_power, f"{_letter}IB": 1024**_power}
_SIZE = re.compile(r"\s*([0-9]{1,40}(?:\.[0-9]{1,40})?)\s*([A-Za-z]*)\s*")
_MOST = 2**60  # bytes: no card and no machine has as much


def parse_bytes(text: str | int) -> int:
    """`"6 GB"`, `"5.5 GiB"`, `"512MiB"` or a plain count of bytes as an integer number of bytes.

    Units are read without regard to case, so `gb` means GB (10^9 bytes), never bits.

    Raises:
        ValueError: not a size, an unknown unit, a fraction of a byte, or more than 2^60 bytes.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        if text < 0:
            raise ValueError(f"{text} is not a size: it is negative")
        return text
    match = _SIZE.fullmatch(str(text))
    if match is None:
        raise ValueError(f"{text!r} is not a size; write 6 GB, 5.5 GiB or a number of bytes")
    number, unit = match.groups()
    factor = _FACTORS.get(unit.upper() or "B")
    if factor is None:
        raise ValueError(f"{text!r} has the unknown unit {unit!r}; use B, KB, MB, GB (10^3) or KiB, MiB, GiB (2^10)")
    if "." in number and factor == 1:
        raise ValueError(f"{text!r} is a fraction of a byte; add a unit, as in {number} GiB")
    count = int(Fraction(number) * factor)  # 5.1 GiB must not depend on how 5.1 rounds in binary
    if count > _MOST:
        raise ValueError(f"{text!r} is more than any card has")
    return count


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


def format_bytes(count: int, like: str = "") -> str:
    """A count of bytes as a person reads it: `"1.482 GiB"`, `"8.1 MiB"`, `"512 B"`.

    Beside a size that somebody wrote (`like`) it is in that one's unit, unless it would round to nothing there.
    """
    written = _SIZE.fullmatch(like)
    factor = _FACTORS.get(written[2].upper(), 1) if written else 1
    if written and factor > 1:
        text = f"{count / factor:.{3 if factor >= 1000**3 else 1}f}"
        if float(text) or not count:
            return f"{text} {written[2]}"
    for unit, size, digits in (("GiB", GIB, 3), ("MiB", MIB, 1), ("KiB", KIB, 1)):
        if abs(count) >= size:
            return f"{count / size:.{digits}f} {unit}"
    return f"{count} B"


def format_signed(count: int, like: str = "") -> str:
    """A difference in bytes: `"+3.0 MiB"`, `"-512 B"`, `"0 B"`; `like` as of `format_bytes`."""
    return f"+{format_bytes(count, like)}" if count > 0 else format_bytes(count, like)
