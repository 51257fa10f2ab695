"""A job's peaks: one value type, and a profile that is the highest of its phases and survives JSON."""

import json

from qlora_lowmem.memory.profile import MemoryProfile, Peak

PROFILE = MemoryProfile("card", "virtual", 100, 7, {"load": Peak(1, 9, 16), "steady": Peak(5, 6, 13)})


def test_the_highest_of_peaks_is_that_of_each_figure() -> None:
    assert Peak.highest([Peak(1, 9, 16), Peak(5, 6, 13)]) == Peak(5, 9, 16)
    assert Peak.highest([]) == Peak(0, 0, 0)


def test_a_profile_is_the_same_after_json() -> None:
    content = json.loads(json.dumps(PROFILE.to_dict()))
    assert MemoryProfile.from_dict(content) == PROFILE
    assert content["phases"][1] == {"name": "steady", "allocated": 5, "reserved": 6, "device": 13}
    assert [content[f"peak_{figure}_bytes"] for figure in ("allocated", "reserved", "device")] == [5, 9, 16]
