"""`coatnet shards index`, `verify` and `show` on the command line."""

import json
from pathlib import Path

import pytest
from PIL import Image

from data.images.contact_sheet import sheet_size
from data.index import read_index
from tests.servers.s3 import S3Server
from tests.support.command import coatnet
from tests.support.paths import ROOT
from tests.support.third_party import picture, samples, write_members, write_shards

pytestmark = pytest.mark.slow
NAMES = ("ant", "bee", "cat")


def test_a_foreign_dataset_is_indexed_verified_and_shown(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", samples(24, lambda n: {"json": {"label": NAMES[n % 3]}}), per_shard=10)
    write_members(tmp_path / "in/in-0003.tar", [("odd.jpg", picture(0))])
    indexed = coatnet("shards", "index", "in/in-{0000..0003}.tar", folder=tmp_path)
    assert indexed.returncode == 0, indexed.stderr
    assert indexed.stdout.splitlines() == [
        "inferred: images are the jpg members (--image-field), labels are in the json members (--label-field), under the key "
        "'label' (--label-key), and are class names (--label-by)",
        "no label: 1 of 25 samples",
        "  in-0003.tar: odd",
        "warning: 4.00% of the samples cannot be used; a run stops above 0.1% unless data.skipped_share allows more",
        "images: JPEG in jpg 25",
        "4 files found, all of them taken: 4 shards",
        "49 members found",
        "24 taken: images",
        "24 taken: labels",
        " 1 left out: of samples with no label (in-0003.tar: odd (image))",
        f"{tmp_path}/in: 25 samples of 3 classes in 4 shards, 0.1 MB",
    ]
    verified = coatnet("shards", "verify", "in", folder=tmp_path)
    assert verified.returncode == 0, verified.stderr
    assert verified.stdout.splitlines() == [
        *indexed.stdout.splitlines()[6:10],
        "in: 25 samples in 4 shards, 0.1 MB: all as in the index",
    ]

    again = coatnet("shards", "index", "in/*.tar", "--overwrite", "--decode", "--json", folder=tmp_path)
    assert read_index(tmp_path / "in").images_decode
    report = json.loads(again.stdout)
    assert report == json.loads((tmp_path / "in/report.json").read_text())
    assert (report["found"], report["datasets"][0]["images"], report["files"]["found"]) == (49, 25, 7)
    document = (ROOT / "docs" / "indexing.md").read_text()
    assert all(f"`{key}`" in document for key in [*report, *report["datasets"][0]])

    shown = coatnet("shards", "show", "in", "--samples", "20", folder=tmp_path)
    assert shown.returncode == 0, shown.stderr
    lines = [line.strip() for line in shown.stdout.splitlines()]
    assert any(line.split("  ")[0] == "samples of a shard" and "least 1, median 7, most 10" in line for line in lines)
    assert "ant         8 ██████████████████████████████" in lines
    assert lines[-2:] == ["samples without a label: 1", "contact.png: 20 samples"]
    with Image.open(tmp_path / "contact.png") as sheet:
        assert (sheet.format, sheet.size) == ("PNG", sheet_size(8, 3))

    facts = json.loads(coatnet("shards", "show", "in", "--json", "--output", "x.png", folder=tmp_path).stdout)
    assert facts["histogram"]["classes"] == dict.fromkeys(NAMES, 8)
    assert facts["contact_sheet"] == "x.png"
    assert all(f"`{key}`" in document for key in facts)


def test_indexing_warns_of_shards_that_are_sorted_by_class(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", samples(1024, lambda n: {"cls": n // 64}), per_shard=128)
    indexed = coatnet("shards", "index", "in", folder=tmp_path)
    assert indexed.returncode == 0, indexed.stderr
    assert indexed.stdout.splitlines()[-1] == (
        "warning: the samples are sorted: with 64 lanes and windows of 8,192, a batch of 128 has on average "
        "16 classes (16 if all samples were shuffled), and a micro-batch of 32 has 4.0 (14); no data.lanes and no "
        f"data.shuffle_window mixes enough: shuffle them once with: coatnet shards build {tmp_path}/in NEW_FOLDER"
    )


def test_verify_ends_with_78_and_a_line_for_each_problem(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", samples(8, lambda n: {"cls": n % 3}))
    assert coatnet("shards", "index", "in", folder=tmp_path).returncode == 0
    (tmp_path / "in/in-0000.tar").unlink()
    shard = tmp_path / "in/in-0001.tar"
    data = shard.read_bytes()
    shard.write_bytes(data.replace(picture(5), picture(5)[:-30] + bytes(30)))
    verified = coatnet("shards", "verify", "in", "--decode", folder=tmp_path)
    assert verified.returncode == 78
    lines = verified.stdout.splitlines()
    assert lines[0] == "shard in-0000.tar is missing"
    assert lines[1].startswith("shard in-0001.tar has the sha256 ")
    assert lines[2].startswith("shard in-0001.tar: picture_0005 has an image that does not decode (damaged: ")
    assert lines[3:] == [
        "8 members found",
        "3 taken: images",
        "3 taken: labels",
        "2 left out: of samples with an image that does not decode (in-0001.tar: picture_0005 (image), in-0001.tar: "
        "picture_0005 (label))",
        "in: 8 samples in 2 shards, 0.0 MB: 3 problems",
    ]


def test_shards_on_s3_are_indexed_verified_and_shown(s3: S3Server, tmp_path: Path) -> None:
    url = s3.put(write_shards(tmp_path / "in", samples(8, lambda n: {"cls": n % 3})), "command")
    storage = ("--endpoint", s3.url)
    for command in (("index", f"{url}/in-{{0000..0001}}.tar"), ("verify", url), ("show", url)):
        done = coatnet("shards", *command, *storage, folder=tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "contact.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("index", "nowhere"), "nowhere: no such folder"),
        (("index", "pipe:cat x.tar"), "not a supported location"),
        (
            ("index", "s3://b/x.tar", "--endpoint", "host:80"),
            "host:80: not the URL of an S3 server; write https://host:80",
        ),
        (("index", "in", "--classes", "none.txt"), "none.txt: no such file"),
        (("verify", "in"), "no index.json there; build shards with"),
        (("show", "in"), "no index.json there; build shards with"),
        (("show", "in", "--output", "sheet.jpg"), "the contact sheet is a PNG"),
        (("show", "in", "--output", "none/sheet.png"), "no folder none; create it first"),
    ],
)
def test_mistakes_are_reported_in_one_line(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    write_shards(tmp_path / "in", samples(2, lambda n: {"cls": n % 3}))
    done = coatnet("shards", *arguments, folder=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (78, 1)
    assert message in done.stderr
