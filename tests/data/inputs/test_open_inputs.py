"""Which images the words of a command line mean, and which files are left out."""

import io
import os
from pathlib import Path

import pytest

from data.errors import DataError
from data.inputs import image_files
from data.inputs.image_files import FileSource
from data.inputs.image_source import UnreadableImage
from data.inputs.open_inputs import Inputs, open_inputs
from data.remote.storage import Storage
from tests.servers.s3 import S3Server
from tests.servers.web import WebServer
from tests.support.third_party import picture

QUICK = Storage(give_up_after=0)


def names(inputs: Inputs) -> list[str]:
    places = (inputs.sources.place(number) for number in range(len(inputs.sources)))
    return [source.name(number) for source, number in places]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images at several depths, and files that are none."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.jpg", "b.PNG", "sub/c.webp", "sub/deep/d.jpeg", "odd[1].jpg", "without"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(0))
    for name in ("notes.txt", ".hidden.jpg", "__MACOSX/e.jpg", "data.bin", "sub/part.tar"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"text")
    os.symlink("nowhere", tmp_path / "in" / "lost.jpg")
    return tmp_path


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        (
            ["in"],
            [
                "in/a.jpg",
                "in/b.PNG",
                "in/lost.jpg",
                "in/odd[1].jpg",
                "in/without",
                "in/sub/c.webp",
                "in/sub/deep/d.jpeg",
            ],
        ),
        (["in/sub/", "in/a.jpg"], ["in/sub/c.webp", "in/sub/deep/d.jpeg", "in/a.jpg"]),
        (["in/*.jpg"], ["in/a.jpg", "in/lost.jpg", "in/odd[1].jpg"]),
        (["in/**/*.jpeg", "in/s*"], ["in/sub/deep/d.jpeg", "in/sub/c.webp", "in/sub/deep/d.jpeg"]),
        (["i?/sub"], ["in/sub/c.webp", "in/sub/deep/d.jpeg"]),
        (["in/odd[1].jpg"], ["in/odd[1].jpg"]),
        (["in/nowhere.jpg", "in/notes.txt"], ["in/nowhere.jpg", "in/notes.txt"]),
    ],
    ids=["folder", "folder and file", "glob", "globs", "glob of folders", "name like a glob", "named files"],
)
def test_files_folders_and_globs_mean_images(tree: Path, places: list[str], expected: list[str]) -> None:
    assert names(open_inputs(places, QUICK)) == expected
    absolute = [str(tree / place) for place in places]
    assert names(open_inputs(absolute, QUICK)) == [str(tree / name) for name in expected]


def test_what_a_folder_holds_beside_images_is_counted_by_reason(tree: Path) -> None:
    left_out = open_inputs(["in"], QUICK).left_out
    assert {reason: (entries.count, entries.first) for reason, entries in left_out.left_out.items()} == {
        "hidden": (2, ["in/.hidden.jpg", "in/__MACOSX/e.jpg"]),
        "not an image by its first bytes": (1, ["in/data.bin"]),
        "not an image (.txt)": (1, ["in/notes.txt"]),
        "tars; of shards, give the folder with their index.json": (1, ["in/sub/part.tar"]),
    }


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (["nowhere"], "nowhere: no such file or folder; check the path"),
        (["x.jpg", "y.jpg"], r"x.jpg: no such file or folder \(2 are named, and none exists\)"),
        (["in/*.gif", "in/a.jpg"], r"in/\*.gif: matches no image; check the path"),
        (["none/*.jpg"], "none: no such folder"),
        (["in/__MACOSX"], "in/__MACOSX: no images in it"),
        (["in/sub/*.tar"], r"matches no image; there are tars; of shards, give the folder .* \(in/sub/part.tar\)"),
        (
            ["in/sub/part.tar"],
            "part.tar: no index.json beside it, .* index it with: coatnet shards index in/sub/part.tar",
        ),
        (["-", "-"], "standard input is one image"),
        (["pipe:cat x"], "not a supported location"),
        (["https://user:secret@host/x.jpg"], "contains a login"),
    ],
)
def test_places_without_images_are_refused_before_a_model_is_read(tree: Path, places: list[str], message: str) -> None:
    if places == ["in/__MACOSX"]:
        (tree / "in/__MACOSX/e.jpg").unlink()
    with pytest.raises(DataError, match=message):
        open_inputs(places, QUICK)


def test_files_that_cannot_be_read_have_the_reason(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tree / "pipe.jpg")
    (tree / "large.jpg").write_bytes(bytes(101))
    monkeypatch.setattr(image_files, "IMAGE_BYTES", 100)
    source = FileSource(["in/lost.jpg", "gone.jpg", "pipe.jpg", "large.jpg", "in", "-"], QUICK, io.BytesIO(bytes(200)))
    reasons = []
    for number in range(len(source)):
        with pytest.raises(UnreadableImage) as error:
            source.read(number)
        assert not error.value.may_pass
        reasons.append(str(error.value))
    assert reasons == [
        "no such file", "no such file", "not a regular file", "more than 100 bytes", "a folder",
        "more than 100 bytes; no more are read",
    ]  # fmt: skip


@pytest.mark.parametrize(("kind", "reason"), [("none", "is closed"), ("terminal", "is a terminal")])
def test_standard_input_without_an_image_is_not_waited_for(
    kind: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    master, inside = os.openpty()
    with open(master, "rb"), open(inside) as terminal:
        monkeypatch.setattr("sys.stdin", terminal if kind == "terminal" else None)
        with pytest.raises(UnreadableImage, match=f"standard input {reason}; pipe an image to it"):
            FileSource(["-"], QUICK).read(0)


def test_an_image_at_a_web_address_is_not_downloaded_beyond_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(1))
    monkeypatch.setattr(image_files, "IMAGE_BYTES", 100)
    with WebServer(tmp_path) as server, pytest.raises(UnreadableImage, match="bytes; at most 100 are read"):
        FileSource([f"{server.url}/a.jpg"], QUICK).read(0)
    assert [method for method, _ in server.requests] == ["HEAD"]


def test_images_at_web_addresses_are_read_and_a_silent_server_is_asked_once(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(1))
    with WebServer(tmp_path) as server:
        places = [f"{server.url}/a.jpg?token=secret", f"{server.url}/gone.jpg", f"{server.url}/a.jpg"]
        sources = open_inputs(places, QUICK).sources
        source, _ = sources.place(0)
        assert source.read(0).content == picture(1)
        assert source.name(0) == f"{server.url}/a.jpg?..."
        with pytest.raises(UnreadableImage, match="^no such file$"):
            source.read(1)
        server.status = 503
        with pytest.raises(UnreadableImage, match="^no answer in 0 s .*HTTP 503") as error:
            source.read(2)
        assert error.value.may_pass
        asked = len(server.requests)
        with pytest.raises(UnreadableImage, match="^not tried, since its server did not answer: no answer in 0 s"):
            source.read(0)
        assert len(server.requests) == asked


def test_folders_globs_and_shards_on_s3_are_found(s3: S3Server, shards: Path, tmp_path: Path) -> None:
    for name in ("one/a.jpg", "one/b.png", "two/c.jpg", "two/d[1].png", "two/notes.txt"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(2))
    url = s3.put(tmp_path / "in", "inputs")
    assert names(open_inputs([f"{url}/one"], QUICK)) == [f"{url}/one/a.jpg", f"{url}/one/b.png"]
    found = open_inputs([f"{url}/*/*.jpg"], QUICK)
    assert names(found) == [f"{url}/one/a.jpg", f"{url}/two/c.jpg"]
    assert found.sources.place(1)[0].read(1).content == picture(2)
    assert open_inputs([f"{url}/two/d[1].png"], QUICK).sources.place(0)[0].read(0).content == picture(2)


def test_shards_are_named_by_their_folder_their_index_or_their_tars(shards: Path, pictures: Path) -> None:
    folder = shards / "validation"
    whole = names(open_inputs([str(folder)], QUICK))
    assert len(whole) == 15
    assert names(open_inputs([str(folder / "index.json")], QUICK)) == whole
    tars = sorted(str(path) for path in folder.glob("*.tar"))
    assert whole[0].startswith(f"{tars[0]}: ")
    assert names(open_inputs(tars, QUICK)) == whole
    assert names(open_inputs([tars[1]], QUICK)) == whole[7:14]
    inputs = open_inputs([str(pictures / "dark"), tars[0]], QUICK)
    source, number = inputs.sources.place(20)
    assert (len(inputs.sources), number, source.classes) == (27, 0, ("bright", "dark", "striped"))
    key = source.name(0).rpartition(": ")[2]
    stored = source.read(0)
    assert (stored.content, [source.classes[label] for label in stored.labels]) == (
        (pictures / f"{key}.jpg").read_bytes(),
        [key.split("/")[0]],
    )
