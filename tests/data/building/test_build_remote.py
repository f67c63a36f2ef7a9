"""Building from S3 gives the same shards as building from local files."""

from pathlib import Path
from typing import Any

import pytest

from data.building.build import build_shards, merge_parts
from data.errors import DataError, StorageRefused
from data.files.json_records import to_json
from data.remote.storage import Storage
from tests.conftest import write_tar_of_tars
from tests.servers.fault_proxy import Fault, FaultProxy
from tests.servers.s3 import S3Server
from tests.support.trees import ODD, PLAIN, write

pytestmark = pytest.mark.slow


def digest(source: str | Path, destination: Path, storage: Storage = Storage(), **options: Any) -> str:  # noqa: B008
    report = build_shards(source, destination, samples_per_shard=25, storage=storage, **options)
    return report.indexes[destination].digest


@pytest.fixture(scope="module")
def whole_tar(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tar of class tars."""
    return write_tar_of_tars(pictures, tmp_path_factory.mktemp("whole") / "whole.tar").parent


def test_a_folder_of_class_folders(s3: S3Server, pictures: Path, tmp_path: Path) -> None:
    url = s3.put(pictures, "pictures")
    assert digest(url, tmp_path / "remote") == digest(pictures, tmp_path / "local")


def test_a_tar_of_class_tars_through_a_bad_connection(s3: S3Server, whole_tar: Path, tmp_path: Path) -> None:
    url = s3.put(whole_tar, "whole") + "/whole.tar"
    with FaultProxy(s3.port) as proxy:
        proxy.faults = [Fault("truncate", share=0.5), Fault("status", share=0.3)]
        storage = Storage(endpoint=proxy.url, greatest_delay=0.1)
        assert digest(url, tmp_path / "remote", storage) == digest(whole_tar / "whole.tar", tmp_path / "local")
        assert sum(fault.fired for fault in proxy.faults) > 0


def test_parts_of_a_remote_tar_are_merged(s3: S3Server, whole_tar: Path, tmp_path: Path) -> None:
    url = s3.put(whole_tar, "parts") + "/whole.tar"
    for part in (1, 2):
        build_shards(url, tmp_path / "remote", samples_per_shard=25, part=(part, 2))
    merged = merge_parts(tmp_path / "remote").indexes[tmp_path / "remote"].digest
    assert merged == digest(whole_tar / "whole.tar", tmp_path / "local")


def test_odd_entries_of_a_folder_are_accounted_for_as_locally(s3: S3Server, tmp_path: Path) -> None:
    folder = write(tmp_path / "tree", PLAIN | ODD)
    url = s3.put(folder, "odd")
    local, remote = build_shards(folder, tmp_path / "local"), build_shards(url, tmp_path / "remote")
    assert to_json(remote.accounting) == to_json(local.accounting)
    assert remote.indexes[tmp_path / "remote"].digest == local.indexes[tmp_path / "local"].digest


def test_missing_and_forbidden_files_are_reported(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="s3://test/nowhere"):
        build_shards("s3://test/nowhere", tmp_path / "out")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageRefused, match="access refused"):
        build_shards("s3://test/nowhere", tmp_path / "out", storage=Storage(give_up_after=599))
