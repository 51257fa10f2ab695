"""A job's peaks: one value type, and a profile that is the highest of its phases and survives JSON."""

import json
from dataclasses import replace

from qlora_lowmem.memory.profile import MemoryProfile, Peak
from qlora_lowmem.virtual_gpu import Launches

PROFILE = MemoryProfile("card", "virtual", 100, 7, {"load": Peak(1, 9, 16), "steady": Peak(5, 6, 13)})


def test_the_highest_of_peaks_is_that_of_each_figure() -> None:
    assert Peak.highest([Peak(1, 9, 16), Peak(5, 6, 13)]) == Peak(5, 9, 16)
    assert Peak.highest([]) == Peak(0, 0, 0)


def test_a_profile_is_the_same_after_json() -> None:
    content = json.loads(json.dumps(PROFILE.to_dict()))
    assert MemoryProfile.from_dict(content) == PROFILE
    assert content["phases"][1] == {"name": "steady", "allocated": 5, "reserved": 6, "device": 13}
    assert not {"launches", "micro_batch_launches"} & content.keys(), "nobody counted"
    assert [content[f"peak_{figure}_bytes"] for figure in ("allocated", "reserved", "device")] == [5, 9, 16]


def test_launches_are_the_same_after_json_and_stand_beside_each_phase() -> None:
    counted = replace(PROFILE, launches={"steady": Launches(7, 2, 1)}, micro_batch_launches=Launches(3, 1, 0))
    content = json.loads(json.dumps(counted.to_dict()))
    assert MemoryProfile.from_dict(content) == counted
    assert content["launches"] == {"steady": {"kernels": 7, "copies": 2, "memsets": 1}}
    assert [phase.get("launches") for phase in content["phases"]] == [None, 10]
    assert counted.step_launches == Launches(7, 2, 1)
    assert PROFILE.step_launches is None
