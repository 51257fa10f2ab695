"""Bytes in and out: integers, exact, and no unit mistaken for another."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_lowmem.units import GIB, KIB, MIB, format_bytes, parse_bytes

FACTORS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": 2**40}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("512", 512),
        ("512 B", 512),
        (6_000_000_000, 6_000_000_000),
        ("6 GB", 6 * 10**9),
        ("6GB", 6 * 10**9),
        ("6gb", 6 * 10**9),
        ("  6  GiB ", 6 * GIB),
        ("5.5 GiB", 11 * GIB // 2),
        ("5.5gb", 5_500_000_000),
        ("512MiB", 512 * MIB),
    ],
)
def test_sizes_are_read(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text", ["", "GB", "six GB", "-1 GB", "1.5", "1.5 B", "5 Gb/s", "9 XB", "1e9", "100%", "1 2 GB", -1, True]
)
def test_what_is_no_size_is_refused(text: str | int) -> None:
    with pytest.raises(ValueError, match=r"not a size|unknown unit|fraction of a byte"):
        parse_bytes(text)


def test_a_size_beside_one_that_somebody_wrote_is_in_its_unit() -> None:
    assert format_bytes(6_200_000_000, "6 GB") == "6.200 GB"
    assert format_bytes(6_200_000_000, "6GiB") == "5.774 GiB"
    assert format_bytes(64, "6 GB") == "64 B"
    assert format_bytes(2**30, "1000") == format_bytes(2**30) == "1.000 GiB"


@given(number=st.integers(0, 10**6), unit=st.sampled_from(sorted(FACTORS)), space=st.sampled_from(["", " "]))
def test_a_whole_number_of_units_is_exact_in_any_case(number: int, unit: str, space: str) -> None:
    for written in (unit, unit.lower(), unit.upper()):
        assert parse_bytes(f"{number}{space}{written}") == number * FACTORS[unit]


@given(whole=st.integers(0, 10**6), tenths=st.integers(0, 9), unit=st.sampled_from(sorted(FACTORS)))
def test_a_decimal_fraction_is_rounded_down_and_never_by_binary_floats(whole: int, tenths: int, unit: str) -> None:
    assert parse_bytes(f"{whole}.{tenths} {unit}") == (10 * whole + tenths) * FACTORS[unit] // 10


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (MIB - 1, "1024.0 KiB"),
        (MIB, "1.0 MiB"),
        (GIB, "1.000 GiB"),
        (3 * GIB // 2, "1.500 GiB"),
        (-GIB, "-1.000 GiB"),
    ],
)
def test_sizes_are_written(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize("text", ["9" * 30, "9" * 5000, "2000000 TB", "²GB", "1e9GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a size|is more than any card has"):
        parse_bytes(text)


@given(st.integers(0, 2**45))
def test_what_is_written_reads_back_within_its_last_digit(count: int) -> None:
    step = GIB // 1000 if count >= GIB else MIB // 10 if count >= MIB else KIB // 10 if count >= KIB else 0
    assert abs(parse_bytes(format_bytes(count)) - count) <= step
