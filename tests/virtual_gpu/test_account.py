import re
from pathlib import Path

import pytest

from qlora_lowmem.virtual_gpu import account, get_card

HEADER = Path(account.__file__).with_name("csrc") / "account.h"


def test_a_new_account_reads_as_an_idle_machine(tmp_path):
    account.create(tmp_path / "account", get_card("rtx-4050-laptop-6gb"), 3)
    reading = account.read(tmp_path / "account")
    assert reading.device_peak_bytes == (0, 0, 0)
    assert (reading.pinned_peak_bytes, reading.managed_peak_bytes) == (0, 0)
    assert reading.missing_functions == ()
    assert reading.notices == ()


@pytest.mark.parametrize("count", [0, 17])
def test_a_machine_has_1_to_16_cards(tmp_path, count):
    with pytest.raises(ValueError, match="1 to 16"):
        account.create(tmp_path / "account", get_card("t4-16gb"), count)


def test_another_file_is_not_an_account(tmp_path):
    (tmp_path / "account").write_bytes(b"something else")
    with pytest.raises(ValueError, match="not the account"):
        account.read(tmp_path / "account")


def test_both_languages_agree_on_the_limits():
    constants = dict(re.findall(r"constexpr \w+ (k\w+) = (\d+);", HEADER.read_text()))
    assert int(constants["kMaxDevices"]) == account.MAX_DEVICES
    assert int(constants["kMaxProcesses"]) == account._MAX_PROCESSES
    assert int(constants["kMaxMissing"]) == account._MAX_MISSING
    assert int(constants["kNameBytes"]) == account._NAME_BYTES
    assert int(constants["kLayoutVersion"]) == account._LAYOUT_VERSION
