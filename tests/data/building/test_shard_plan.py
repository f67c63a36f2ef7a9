"""From run tables to shards: order, split, bounds and keys, tested on numbers."""

import tarfile
from pathlib import Path

import numpy as np
import pytest

from data.building.build import build_shards, merge_parts
from data.building.keys import sample_key, shuffle_rank
from data.building.shard_plan import (
    Images,
    cuts,
    numbered,
    read_images,
    repetitions,
    sample_bytes,
    shuffled,
    validation_mask,
)


def images(ranks: list[int], names: list[bytes]) -> Images:
    count = len(ranks)
    zeros = np.zeros(count, np.uint8)
    return Images(
        run=np.zeros(count, np.int32),
        rank=np.array(ranks, np.uint64),
        key_hash=np.zeros(count, np.uint64),
        offset=np.zeros(count, np.int64),
        size=np.ones(count, np.int64),
        kind=zeros.astype(np.uint16),
        extension=zeros,
        labels=np.zeros((count, 1), np.int32),
        name_bounds=np.cumsum([0, *map(len, names)]),
        names=np.frombuffer(b"".join(names), np.uint8),
        extensions=("jpg",),
        classes=("a",),
        broken=[],
    )


def test_images_of_equal_rank_are_in_the_order_of_their_names() -> None:
    order, again = shuffled(images([5, 9, 5, 1, 9, 5], [b"c", b"x", b"a", b"q", b"w", b"b"]))
    assert (order.tolist(), again) == ([3, 2, 5, 0, 4, 1], [])


def test_of_images_with_the_same_name_the_first_is_kept() -> None:
    order, again = shuffled(images([7, 3, 7, 7], [b"a", b"b", b"a", b"a"]))
    assert (order.tolist(), again) == ([1, 0], [2, 3])


def test_ranks_follow_from_seed_and_name_and_are_spread_over_64_bits() -> None:
    ranks = [shuffle_rank(f"class/{number}.jpg", 0) for number in range(1000)]
    assert ranks == [shuffle_rank(f"class/{number}.jpg", 0) for number in range(1000)]
    assert not set(ranks) & {shuffle_rank(f"class/{number}.jpg", 1) for number in range(1000)}
    assert all(300 < sum(rank >> bit & 1 for rank in ranks) < 700 for bit in range(64))


@pytest.mark.parametrize(
    ("samples", "bytes_", "expected"),
    [
        (4, None, [(0, 4), (4, 8), (8, 10)]),
        (None, 10240, [(0, 9), (9, 10)]),  # with the end of the tar, 1,024 bytes
        (None, 2 * 10240 - 1, [(0, 9), (9, 10)]),  # its size is a multiple of 10,240
        (2, 10240, [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]),
        (100, 10**9, [(0, 10)]),
        (None, 1, [(n, n + 1) for n in range(10)]),
    ],
)
def test_shards_are_cut_at_whichever_limit_comes_first(
    samples: int | None, bytes_: int | None, expected: list[tuple[int, int]]
) -> None:
    assert list(cuts(np.full(10, 1000), samples, bytes_)) == expected


def members_bytes(path: Path) -> int:
    """Bytes of a tar without its end."""
    with tarfile.open(path) as archive:
        archive.getmembers()
        return int(archive.offset)


@pytest.mark.parametrize("most_labels", [1, 200])
def test_no_shard_exceeds_its_limit_whatever_the_names_and_labels(
    pictures: Path, tmp_path: Path, most_labels: int
) -> None:
    names = ["plain/{}", "grün/{}", "图片/{}", "n\u00adn/{}", "long" * 30 + "/{}", "a.b/c~{}", "ü" * 60 + "{}", "{}"]
    lines = []
    for number, picture in enumerate(sorted(pictures.rglob("*.jpg"))):
        path = tmp_path / "source" / f"{names[number % len(names)].format(number // 8)}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture.read_bytes())
        classes = [str(9 * number + label) for label in range(1 + number % most_labels)]
        lines.append(f"{path.relative_to(tmp_path)}\t{' '.join(classes)}\n")
    (tmp_path / "list.tsv").write_text("".join(lines))
    out, limit = tmp_path / "out", 3 * 10240
    build_shards(tmp_path / "list.tsv", out, samples_per_shard=None, shard_bytes=limit, part=(1, 1))
    runs = tmp_path / ".out.building" / "runs"
    found = read_images([path.with_suffix("") for path in sorted(runs.glob("*.npz"))])
    order, _ = shuffled(found)
    position = {name: number for number, name in enumerate(numbered(found.classes))}
    labels = np.array([position[name] for name in found.classes], np.int32)[found.labels]
    labels = np.where(found.labels >= 0, labels, -1)[order]
    expected = sample_bytes(found, order, labels, as_json=most_labels > 1)
    assert len(set((expected - 512 * -(-found.size[order] // 512)).tolist())) > 1  # several sizes of headers or labels

    (index,) = merge_parts(out).indexes.values()
    assert index.samples == 60
    assert max(shard.bytes for shard in index.shards) == limit
    begin = 0
    for shard in index.shards:
        end = begin + shard.samples
        assert members_bytes(out / shard.name) == expected[begin:end].sum()
        assert end == 60 or expected[begin : end + 1].sum() > limit - 1024  # one more would not have fitted
        begin = end


@pytest.mark.parametrize(
    ("labels", "per_class", "fraction", "chosen"),
    [
        ([[0], [0], [0], [1], [1]], 1, 0.0, [0, 3]),
        ([[1], [0], [1], [0], [0], [1]], 2, 0.0, [0, 1, 2, 3]),
        ([[0], [0], [0], [0], [1], [1], [1], [1], [1], [1]], 0, 0.5, [0, 1, 4, 5, 6]),
        ([[0], [1], [1], [1]], 0, 0.9, [1, 2]),  # of each class one stays for training
        ([[0, 1], [0, -1], [1, -1], [1, 0]], 1, 0.0, [0]),  # counts for both of its labels
        ([[0, -1], [1, 0], [1, -1], [0, -1]], 1, 0.0, [0, 1]),
    ],
)
def test_validation_takes_the_first_images_of_every_class(
    labels: list[list[int]], per_class: int, fraction: float, chosen: list[int]
) -> None:
    mask = validation_mask(np.array(labels, np.int32), ("a", "b"), per_class, fraction)
    assert np.flatnonzero(mask).tolist() == chosen


def test_repeated_keys_are_numbered_in_order() -> None:
    assert repetitions(np.array([4, 7, 4, 9, 7, 4], np.uint64)) == {2: 2, 5: 3, 4: 2}


@pytest.mark.parametrize(
    ("names", "expected"),
    [(("1", "10", "2"), ("1", "2", "10")), (("a", "b"), ("a", "b")), (("1", "10", "2b"), ("1", "10", "2b"))],
)
def test_classes_are_sorted_by_number_if_all_are_numbers(names: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert numbered(names) == expected


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("dog/1.jpg", "dog/1"),
        ("a.b/x.1.jpg", "a_b/x_1"),
        ("val_1.JPEG", "val_1"),
        ("../../etc/passwd.jpg", "______etc/passwd"),
        ("/root/x.png", "_root/x"),
        ("noextension", "noextension"),
        ("c\\d/e\n~.jpg", "c_d/e__"),
    ],
)
def test_keys_are_safe_whatever_the_name(name: str, key: str) -> None:
    assert sample_key(name) == key
    assert len(sample_key("ü" * 60 + "/" + name)) == 32
