"""Which folders are trusted with what is loaded from a cache."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_lowmem.errors import UsageError
from qlora_lowmem.files import cache_folder
from qlora_lowmem.owned import NotOwnError, own_folder


def test_what_is_made_is_this_users_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = own_folder(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert [folder.stat().st_mode & 0o777 for folder in (made.parent, made)] == [0o700, 0o700]
    assert own_folder(tmp_path / "a" / "b") == made


def open_to_all(cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o1777)


def open_to_the_group(cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o770)


def a_link(cache: Path) -> None:
    cache.parent.mkdir()
    (cache.parent / "elsewhere").mkdir()
    cache.symlink_to("elsewhere")


def a_file(cache: Path) -> None:
    cache.parent.mkdir()
    cache.touch()


def below_what_is_open_to_all(cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.parent.chmod(0o777)


def behind_a_link_to_what_is_open_to_all(cache: Path) -> None:
    place = cache.parents[1] / "open"
    (place / "elsewhere").mkdir(parents=True)
    place.chmod(0o777)
    cache.parent.symlink_to(place / "elsewhere")


FOREIGN = [
    open_to_all, open_to_the_group, a_link, a_file, below_what_is_open_to_all, behind_a_link_to_what_is_open_to_all
]  # fmt: skip


@pytest.mark.parametrize("make", FOREIGN, ids=lambda make: make.__name__)
def test_what_others_could_have_written_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "cache" / "kind")
    with pytest.raises(NotOwnError, match="cannot be trusted"):
        own_folder(tmp_path / "cache" / "kind")


def test_another_users_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_folder(tmp_path / "cache")
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    with pytest.raises(NotOwnError, match="belongs to user"):
        own_folder(tmp_path / "cache")


def test_ones_own_links_and_sticky_folders_on_the_way_are_trusted(tmp_path: Path) -> None:
    (tmp_path / "sticky").mkdir()
    (tmp_path / "sticky").chmod(0o1777)
    (tmp_path / "link").symlink_to("sticky")
    assert own_folder(tmp_path / "link" / "mine") == tmp_path / "link" / "mine"


def test_every_cache_is_checked_and_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_LOWMEM_CACHE", str(tmp_path / "cache"))
    assert cache_folder("plan") == tmp_path / "cache" / "plan"
    (tmp_path / "cache" / "plan").chmod(0o777)
    with pytest.raises(UsageError, match=r"chmod go-w .*set QLORA_LOWMEM_CACHE to a folder of your own"):
        cache_folder("plan")
