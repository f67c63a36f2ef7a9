"""Shards on web servers: what can be indexed can be verified and read, and a refusal says what to do."""

import base64
import itertools
import json
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.dataset import Dataset, open_dataset
from data.errors import DataError, StorageDown, StorageRefused
from data.images.augment import EvaluationTransform, TrainTransform
from data.index import ShardIndex, check_shards, read_index
from data.indexing.index_shards import index_shards
from data.indexing.pattern import find_shards
from data.indexing.scan import ScanOptions
from data.indexing.verify import verify_shards
from data.order import SampleOrder
from data.remote.cache import Cache
from data.remote.storage import (
    Storage,
    checked,
    file_size,
    list_files,
    named_sizes,
    read_bytes,
)
from data.remote.storage_errors import is_missing, refusal_fix
from data.stream import RankShare, evaluation_stream, training_stream
from tests.servers.web import WebServer

HASTY = Storage(give_up_after=0.2, greatest_delay=0.02)
NAMES = "train-{000000..000006}.tar"


@pytest.fixture(scope="module")
def files(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `in` with the seven training shards, without their index."""
    folder = tmp_path_factory.mktemp("www")
    (folder / "in").mkdir()
    for path in (shards / "train").glob("*.tar"):
        shutil.copy(path, folder / "in")
    return folder


@pytest.fixture
def web(files: Path) -> Iterator[WebServer]:
    with WebServer(files) as server:
        yield server


def indexed(pattern: str, home: Path) -> ShardIndex:
    return index_shards([pattern], output=str(home), scanning=ScanOptions(HASTY)).index


def few_images(dataset: Dataset, cache: Cache | None) -> np.ndarray:
    order = SampleOrder(dataset.shard_samples, seed=5, batch=8, lanes=2, window=10)
    stream = training_stream(
        dataset, order, TrainTransform(16), RankShare(0, 1, 8), first_step=0, workers=2, cache=cache
    )
    images = np.concatenate([batch.images for batch in itertools.islice(stream, 4)])
    stream.close()
    return images


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        pytest.param({}, id="as usual"),
        pytest.param({"listings": True}, id="with lists of files"),
        pytest.param({"head": 405}, id="without HEAD"),
        pytest.param({"head": 403}, id="HEAD is not covered by the signature"),
        pytest.param({"status": 503, "failures": 3}, id="overloaded at first"),
        pytest.param({"status": 429, "failures": 3}, id="too many requests at first"),
    ],
)
def test_shards_that_can_be_indexed_can_be_verified_and_read(
    change: dict[str, int], web: WebServer, shards: Path, tmp_path: Path
) -> None:
    for name, value in change.items():
        setattr(web, name, value)
    storage = Storage(greatest_delay=0.02)
    index_shards([f"{web.url}/in/{NAMES}"], output=str(tmp_path / "index"), scanning=ScanOptions(storage))
    dataset = open_dataset(str(tmp_path / "index"), storage)
    assert [entry.sha256 for entry in dataset.index.shards] == [
        entry.sha256 for entry in read_index(shards / "train").shards
    ]
    check_shards(dataset.index, storage)
    assert list(verify_shards(dataset.index, scanning=ScanOptions(storage))) == []
    if not change or "head" in change:  # a downloader starts in half a second
        local = Dataset(read_index(shards / "train"))
        assert np.array_equal(few_images(dataset, Cache(tmp_path / "cache", 10**9)), few_images(local, None))


@pytest.mark.slow
def test_shards_without_samples_may_come_first(web: WebServer, files: Path, tmp_path: Path) -> None:
    """An empty tar, which the index leaves out, and shards all of whose samples a label map drops."""
    shutil.copytree(files / "in", tmp_path / "in")
    tarfile.open(tmp_path / "in/train-000000.tar", "w").close()
    web.folder = tmp_path
    pattern, home = f"{web.url}/in/{NAMES}", tmp_path / "index"
    report = index_shards([pattern], output=str(home), scanning=ScanOptions(HASTY))
    assert report.files.left_out["tars without members"].first == ["train-000000.tar"]
    kept = np.arange(report.index.samples) >= 15  # the first two of the others are empty, too
    remote = Dataset(report.index, HASTY, kept=kept)
    local = Dataset(replace(report.index, folder=str(tmp_path / "in")), kept=kept)
    web.requests.clear()
    assert np.array_equal(few_images(remote, Cache(tmp_path / "cache", 10**9)), few_images(local, None))
    transform, share = EvaluationTransform(16), RankShare(0, 1, 4)
    passes = [
        evaluation_stream(dataset, transform, share, workers=1, cache=cache)
        for dataset, cache in ((remote, Cache(tmp_path / "cache", 10**9)), (local, None))
    ]
    for there, here in zip(*passes, strict=True):
        assert np.array_equal(there.images, here.images)
    assert not [path for _, path in web.requests if path.endswith(("01.tar", "02.tar"))]


def test_a_folder_whose_server_lists_it_has_the_sizes_of_its_files(web: WebServer, files: Path) -> None:
    web.listings = True
    sizes = {path.name: path.stat().st_size for path in sorted((files / "in").iterdir())}
    assert list_files(f"{web.url}/in", HASTY) == sizes
    assert find_shards([f"{web.url}/in"], HASTY).sizes == sizes
    assert find_shards([f"{web.url}/in/train-*[35].tar"], HASTY).sizes.keys() == {
        "train-000003.tar", "train-000005.tar",
    }  # fmt: skip


def test_shards_that_are_gone_or_changed_are_named(web: WebServer, files: Path, tmp_path: Path) -> None:
    index = indexed(f"{web.url}/in/{NAMES}", tmp_path)
    (tmp_path / "in").mkdir()
    for path in (files / "in").iterdir():
        shutil.copy(path, tmp_path / "in")
    web.folder = tmp_path
    (tmp_path / "in/train-000004.tar").write_bytes(b"another")
    with pytest.raises(DataError, match=r"shard train-000004.tar has 7 bytes and [\d,]+ in the index"):
        check_shards(index, HASTY)
    (tmp_path / "in/train-000002.tar").unlink()
    with pytest.raises(DataError, match=r"shard train-000002.tar is missing"):
        check_shards(index, HASTY)
    with pytest.raises(DataError, match=r"1 of 7 shards are missing: train-000002.tar;"):
        find_shards([f"{web.url}/in/{NAMES}"], HASTY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": 401}, r"access refused \(PermissionError: HTTP 401 Unauthorized\); give a login in ~/.netrc"),
        ({"status": 403}, r"access refused \(PermissionError: HTTP 403 Forbidden\); give a login in ~/.netrc"),
        ({"status": 405}, r"the server refuses to read it \(HTTP 405 Method Not Allowed\); check the address"),
        ({"status": 400}, r"the server refuses to read it \(HTTP 400 Bad Request\); check the address"),
        ({"status": 501}, r"the server refuses to read it \(HTTP 501 Not Implemented\); check the address"),
        ({"length": False}, "the server does not tell its size, neither for HEAD nor for a range; copy"),
    ],
)
def test_a_refusal_is_reported_at_once_with_its_status_and_a_fix(
    change: dict[str, int], message: str, web: WebServer
) -> None:
    for name, value in change.items():
        setattr(web, name, value)
    with pytest.raises(StorageRefused, match=f"in/train-000000.tar: {message}"):
        find_shards([f"{web.url}/in/train-000000.tar"], Storage(give_up_after=600))
    assert len(web.requests) == 2


def test_a_server_that_takes_no_files_is_refused_as_the_place_of_an_index(web: WebServer) -> None:
    with pytest.raises(StorageRefused, match=r"access refused .*501.*; or write the index elsewhere with --output"):
        index_shards([f"{web.url}/in/{NAMES}"], scanning=ScanOptions(Storage(give_up_after=600)))


@pytest.mark.parametrize("status", [404, 410])
def test_only_a_missing_file_counts_as_missing(status: int, web: WebServer) -> None:
    web.status = status
    assert named_sizes(f"{web.url}/in", ["train-000000.tar"], HASTY) == {}
    with pytest.raises(FileNotFoundError):
        read_bytes(f"{web.url}/in/train-000000.tar", HASTY)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_stays_overloaded_is_down(status: int, web: WebServer) -> None:
    web.status = status
    with pytest.raises(StorageDown, match=rf"no answer in 0 s \(last: ConnectionError: HTTP {status}"):
        file_size(f"{web.url}/in/train-000000.tar", HASTY)


def test_a_server_without_ranges_is_refused(web: WebServer) -> None:
    web.ranges = False
    place = f"{web.url}/in/train-000000.tar"
    whole = read_bytes(place, HASTY)
    assert read_bytes(place, HASTY, 0, len(whole)) == whole
    for start, stop in ((0, 100), (100, 200)):
        with pytest.raises(StorageRefused, match=r"ignores byte ranges \(HTTP 200 instead of 206\).*copy the files"):
            read_bytes(place, Storage(give_up_after=600), start, stop)


@pytest.mark.slow
@pytest.mark.parametrize("status", [401, 403])
def test_access_that_ends_during_a_run_ends_it_at_once(status: int, web: WebServer, tmp_path: Path) -> None:
    indexed(f"{web.url}/in/{NAMES}", tmp_path / "index")
    web.status = status
    dataset = open_dataset(str(tmp_path / "index"), Storage(give_up_after=600))
    with pytest.raises(DataError, match=rf"train-00000\d.tar: access refused \(PermissionError: HTTP {status}"):
        few_images(dataset, Cache(tmp_path / "cache", 10**9))


def test_a_folder_without_a_list_of_files_is_reported_with_the_notation_for_its_shards(web: WebServer) -> None:
    with pytest.raises(DataError, match=r"in: no such folder; a web server need not list .*in/shard-{0000..0099}.tar"):
        find_shards([f"{web.url}/in"], HASTY)
    web.status = 403
    with pytest.raises(StorageRefused, match=r"HTTP 403.*a web server need not list a folder: name the shards"):
        find_shards([f"{web.url}/in"], HASTY)


@pytest.mark.parametrize("pattern", ["in/train-00000[1].tar", "in/train-*.tar"])
def test_a_name_that_looks_like_a_glob_is_tried_first(pattern: str, web: WebServer, tmp_path: Path) -> None:
    (tmp_path / pattern).parent.mkdir()
    (tmp_path / pattern).write_bytes(b"12")
    web.folder = tmp_path
    assert find_shards([f"{web.url}/{pattern}"], HASTY).sizes == {Path(pattern).name: 2}


@pytest.mark.slow
def test_a_signature_for_all_shards_is_part_of_their_location(web: WebServer, files: Path, tmp_path: Path) -> None:
    web.query = "sv=2026&sig=a%2Fb%3D"
    index = indexed(f"{web.url}/in/{NAMES}?{web.query}", tmp_path / "index")
    assert index.folder == f"{web.url}/in?{web.query}"
    assert [entry.name for entry in index.shards] == [f"train-{number:06}.tar" for number in range(7)]
    dataset = open_dataset(str(tmp_path / "index"), HASTY)
    check_shards(dataset.index, HASTY)
    assert len(few_images(dataset, Cache(tmp_path / "cache", 10**9))) == 32

    renewed = json.loads((tmp_path / "index/index.json").read_text())
    web.query = "sv=2027&sig=new"
    with pytest.raises(StorageRefused, match=r"train-00000\d.tar\?...: access refused .*403.*may have expired"):
        check_shards(dataset.index, HASTY)
    (tmp_path / "index/index.json").write_text(json.dumps(renewed | {"folder": f"{web.url}/in?{web.query}"}))
    check_shards(read_index(tmp_path / "index"), HASTY)


@pytest.mark.slow
def test_a_folder_with_its_index_may_need_a_signature(web: WebServer, shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards / "train", tmp_path / "in")
    web.folder, web.query = tmp_path, "sig=a/b"
    dataset = open_dataset(f"{web.url}/in?{web.query}", HASTY)
    check_shards(dataset.index, HASTY)
    assert dataset.digest == read_index(shards / "train").digest
    assert len(few_images(dataset, Cache(tmp_path / "cache", 10**9))) == 32


def test_signatures_of_single_shards_are_kept_and_do_not_change_the_digest(web: WebServer, tmp_path: Path) -> None:
    def signed(signature: str, home: str) -> ShardIndex:
        patterns = [f"{web.url}/in/train-00000{number}.tar?X-Amz-Signature={signature}{number}/" for number in (0, 1)]
        return index_shards(patterns, output=str(tmp_path / home), scanning=ScanOptions(HASTY)).index

    one, other = signed("a", "one"), signed("b", "other")
    assert [entry.name for entry in one.shards] == [f"train-00000{n}.tar?X-Amz-Signature=a{n}/" for n in (0, 1)]
    assert one.folder == f"{web.url}/in"
    assert one.digest == other.digest
    web.requests.clear()
    check_shards(read_index(tmp_path / "one"), HASTY)
    assert sorted(web.requests) == [("HEAD", f"/in/train-00000{n}.tar?X-Amz-Signature=a{n}/") for n in (0, 1)]


def test_a_login_comes_from_netrc(web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    web.authorization = f"Basic {base64.b64encode(b'me:secret').decode()}"
    assert file_size(f"{web.url}/in/train-000000.tar", HASTY) > 0


@pytest.mark.parametrize("scheme", ["http", "https", "s3", "sftp"])
def test_an_address_with_a_password_is_refused_and_the_password_not_repeated(scheme: str) -> None:
    with pytest.raises(DataError) as caught:
        read_index(f"{scheme}://me:secret@host/in")
    assert "the address contains a login; give it without" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("variable", [None, "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_so_is_a_server_of_s3_with_a_password(variable: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = "http://me:secret@127.0.0.1:1"
    if variable:
        monkeypatch.setenv(variable, endpoint)
    with pytest.raises(DataError) as caught:
        file_size("s3://bucket/x.tar", replace(HASTY, endpoint=None if variable else endpoint))
    assert "http://...@127.0.0.1:1: the address contains a login" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_revision_an_account_and_a_user_are_no_passwords() -> None:
    for location in ("hf://datasets/a/b@c:d/x", "abfs://files@account.dfs.core.windows.net/x", "sftp://me@host/x"):
        assert checked(location) == location


def test_an_address_that_is_none_is_refused_at_once() -> None:
    with pytest.raises(StorageRefused, match=r"x.tar: not a web address \(.*\); correct it"):
        read_bytes("http://[::1/x.tar", Storage(give_up_after=600))


def test_a_bucket_whose_requesters_pay_needs_a_setting_or_a_variable(
    web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server knows the header of S3, and nothing else of S3."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    web.payer = "requester"
    place, refused = "s3://in/train-000000.tar", Storage(endpoint=web.url)
    with pytest.raises(StorageRefused, match=r"set data.storage.requester_pays or AWS_REQUEST_PAYER=requester$"):
        read_bytes(place, refused)
    content = read_bytes(place, Storage(endpoint=web.url, requester_pays=True))
    monkeypatch.setenv("AWS_REQUEST_PAYER", "requester")
    other_client = Storage(endpoint=web.url, give_up_after=599)
    assert read_bytes(place, other_client) == content == (web.folder / "in/train-000000.tar").read_bytes()


class RepositoryNotFoundError(OSError):
    """As in huggingface_hub, which is not installed here; found by its name."""


class GatedRepoError(RepositoryNotFoundError):
    """As in huggingface_hub."""


def test_a_gated_or_private_dataset_of_hugging_face_is_a_refusal_and_not_missing() -> None:
    for kind in (GatedRepoError, RepositoryNotFoundError):
        translated = FileNotFoundError("datasets/x (repository not found)")
        translated.__cause__ = kind("401 Client Error")
        for error in (translated, kind("403")):
            assert not is_missing(error)
            assert "set HF_TOKEN to a token that may read it" in str(refusal_fix(error, "no"))
    missing = FileNotFoundError("datasets/x/y.tar")
    assert is_missing(missing)
    assert refusal_fix(missing, "no") is None


@pytest.mark.parametrize(
    ("folder", "trusted"),
    [("{url}/in/more", True), ("{url}/inside", False), ("{url}/in/../other", False), ("/home/someone", False)],
)
def test_a_remote_index_may_name_shards_below_its_own_folder_only(
    tmp_path: Path, shards: Path, folder: str, trusted: bool
) -> None:
    with WebServer(tmp_path) as web:
        index = replace(read_index(shards / "train"), folder=folder.format(url=web.url), home=str(tmp_path / "in"))
        (tmp_path / "in").mkdir()
        index.write()
        assert read_index(tmp_path / "in").folder == index.folder  # the reader's own
        if not trusted:
            with pytest.raises(DataError, match=r"names shards outside of its own folder, .+shards_elsewhere"):
                read_index(f"{web.url}/in")
        assert read_index(f"{web.url}/in", Storage(shards_elsewhere=not trusted)).folder == index.folder
