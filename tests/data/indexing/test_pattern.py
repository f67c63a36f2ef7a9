"""Which shards a pattern matches."""

from pathlib import Path

import pytest

from data.errors import DataError
from data.indexing.pattern import find_shards
from data.remote.storage import Storage
from tests.servers.s3 import S3Server

NAMES = ("a/x-0000.tar", "a/x-0001.tar", "b/x-0000.tar", "b/deep/x-0002.tar", "b/.x-0003.tar", "b/notes.txt")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tree")
    for number, name in enumerate(NAMES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * number)
    return folder


PATTERNS = [
    ("a", "a", ["x-0000.tar", "x-0001.tar"]),
    ("a/", "a", ["x-0000.tar", "x-0001.tar"]),
    ("a/x-0001.tar", "a", ["x-0001.tar"]),
    ("a/x-{0000..0001}.tar", "a", ["x-0000.tar", "x-0001.tar"]),
    ("{a,b}/x-0000.tar", "", ["a/x-0000.tar", "b/x-0000.tar"]),
    ("{a,b}", "", ["a/x-0000.tar", "a/x-0001.tar", "b/x-0000.tar"]),
    ("*/x-*.tar", "", ["a/x-0000.tar", "a/x-0001.tar", "b/x-0000.tar"]),
    ("b/*", "b", ["x-0000.tar"]),
    ("a/x-000[1-9].tar", "a", ["x-0001.tar"]),
    ("b/**/*.tar", "b", ["deep/x-0002.tar", "x-0000.tar"]),
    ("**/x-0002.tar", "b/deep", ["x-0002.tar"]),
]


@pytest.mark.parametrize(("pattern", "folder", "names"), PATTERNS)
def test_a_pattern_matches_local_shards_below_their_common_folder(
    tree: Path, pattern: str, folder: str, names: list[str]
) -> None:
    found = find_shards([f"{tree}/{pattern}"], Storage())
    assert (found.folder, list(found.sizes)) == (str(tree / folder), names)


def test_a_pattern_matches_the_same_shards_on_s3(tree: Path, s3: S3Server) -> None:
    url = s3.put(tree, "patterns")
    for pattern, folder, _ in PATTERNS:
        there, here = find_shards([f"{url}/{pattern}"], Storage()), find_shards([f"{tree}/{pattern}"], Storage())
        assert there == (f"{url}/{folder}".rstrip("/"), here.sizes)


def test_a_folder_whose_name_looks_like_a_glob_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "set[1]").mkdir()
    (tmp_path / "set[1]/x.tar").write_bytes(b"x")
    assert find_shards([f"{tmp_path}/set[1]"], Storage()).sizes == {"x.tar": 1}


def test_a_remote_name_that_looks_like_a_glob_is_meant_literally_if_it_exists(
    tree: Path, s3: S3Server, tmp_path: Path
) -> None:
    for name in ("a[1]/x[0].tar", "a[1]/x0.tar", "what?/x-0.tar", "stars*/x-0.tar", "stars-and/x-0.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    url = s3.put(tmp_path, "literal")
    for pattern, names in {
        "a[1]": ["x0.tar", "x[0].tar"],
        "a[1]/x[0].tar": ["x[0].tar"],
        "a[1]/x[01].tar": ["x0.tar"],
        "a[1]/*.tar": ["x0.tar", "x[0].tar"],
        "what?/x-{0..0}.tar": ["x-0.tar"],
        "stars*": ["x-0.tar"],
        "stars*/x-?.tar": ["x-0.tar"],
        "star*/x-0.tar": ["stars*/x-0.tar", "stars-and/x-0.tar"],
    }.items():
        assert list(find_shards([f"{url}/{pattern}"], Storage()).sizes) == names


def test_overlapping_patterns_match_each_shard_once(tree: Path) -> None:
    assert find_shards([f"{tree}/a", f"{tree}/a/*0.tar"], Storage()).sizes == {"x-0000.tar": 0, "x-0001.tar": 1}


def test_a_relative_pattern_is_relative_to_the_working_directory(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    assert find_shards(["a"], Storage()).folder == str(tree / "a")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nowhere", "nowhere: no such folder"),
        ("packed", "no .*tar in it, but 2 files such as X-0.TAR; .*decompress or rename them"),
        ("nowhere/x-{0..3}.tar", "nowhere: no such folder"),
        ("", r"no \*.tar in it; for those in subfolders use .*/\*\*/\*.tar"),
        ("a/y-*.tar", "matches no"),
        ("a/x-{0000..0003}.tar", "2 of 4 shards are missing: x-0002.tar, x-0003.tar"),
        ("a/x-{0000..0001.tar", "a brace is not closed"),
        ("a/x-{0..999999999}.tar", "expands to more than 1,000,000 shards"),
        ("a/x-{0..999}-{0..9999}.tar", "expands to more than 1,000,000 shards"),
        ("b/notes.txt", "not a .tar"),
        ("a/x.tar.gz", "decompress them first"),
    ],
)
def test_a_pattern_that_matches_no_shards_is_refused(tree: Path, pattern: str, message: str) -> None:
    (tree / "packed").mkdir(exist_ok=True)
    for name in ("X-0.TAR", "x-1.tar.gz"):
        (tree / "packed" / name).write_bytes(b"x")
    with pytest.raises(DataError, match=message):
        find_shards([f"{tree}/{pattern}"], Storage())


def test_patterns_without_a_common_folder_are_refused(tree: Path, s3: S3Server) -> None:
    url = s3.put(tree, "apart")
    with pytest.raises(DataError, match="have no common folder"):
        find_shards([f"{url}/a", f"{tree}/a"], Storage())


@pytest.mark.parametrize("pattern", ["pipe:cat {0..3}.tar", "simplecache::s3://bucket/{0..3}.tar"])
def test_urls_that_run_commands_are_refused(pattern: str) -> None:
    with pytest.raises(DataError, match="not a supported location"):
        find_shards([pattern], Storage())
