"""A cache in a place where every user of a node can write: what others have put there is not used."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from data.errors import DataError
from data.remote.cache import Cache

STRANGER = 54321
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")


def made_by_another_user(cache: Path) -> None:
    os.chown(cache, STRANGER, STRANGER)


def writable_by_others(cache: Path) -> None:
    cache.chmod(0o1777)


def a_link(cache: Path) -> None:
    target = cache.with_name("the user's own")
    cache.rename(target)
    cache.symlink_to(target)


def a_link_inside(cache: Path) -> None:
    (cache / "failed").rmdir()
    (cache / "failed").symlink_to(cache)


def a_shard_of_another_user(cache: Path) -> None:
    (cache / "shards" / f"{'0' * 64}.tar").write_bytes(b"images")
    os.chown(cache / "shards" / f"{'0' * 64}.tar", STRANGER, STRANGER)


def a_log_that_is_a_link(cache: Path) -> None:
    (cache / "downloader.log").symlink_to("/home/someone/.bashrc")


def a_log_with_another_name(cache: Path) -> None:
    cache.with_name("own file").touch()
    (cache / "downloader.log").hardlink_to(cache.with_name("own file"))


@pytest.mark.parametrize(
    ("attack", "problem"),
    [
        pytest.param(made_by_another_user, f"it belongs to another user (uid {STRANGER})", marks=needs_root),
        (writable_by_others, "it can be changed by other users (mode 1777)"),
        (a_link, "it is a link"),
        (a_link_inside, "failed is a link"),
        pytest.param(a_shard_of_another_user, f".tar belongs to another user (uid {STRANGER})", marks=needs_root),
        (a_log_that_is_a_link, "downloader.log is a link or not a file"),
        (a_log_with_another_name, "downloader.log is a link or not a file"),
    ],
)
def test_a_cache_that_others_could_have_filled_is_refused(
    tmp_path: Path, attack: Callable[[Path], None], problem: str
) -> None:
    cache = Cache(tmp_path / "cache", 10**9)
    cache.make()
    attack(cache.folder)
    with pytest.raises(DataError) as caught:
        cache.make()
    assert problem in str(caught.value)
    assert "set data.cache.folder to a folder that only you can write" in str(caught.value)


def test_only_its_user_can_enter_a_cache(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "above" / "cache", 10**9)
    cache.make()
    for folder in (cache.folder, *cache.folder.iterdir()):
        assert folder.stat().st_mode & 0o777 == 0o700
