"""Files with the labels of images, and class lists."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.classes.class_lists import read_class_list, read_classes
from data.classes.label_files import label_lines, read_label_file
from data.errors import DataError
from data.indexing.index_shards import index_shards
from data.remote.storage import Storage
from tests.support.third_party import picture, write_members

Labels = dict[str, tuple[str, ...]]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("l.csv", "a.jpg,golden retriever\nb.jpg, great white shark \n", {"a.jpg": ("golden retriever",), "b.jpg": ("great white shark",)}),
        ("l.tsv", "a.jpg\ttench, Tinca tinca\n", {"a.jpg": ("tench, Tinca tinca",)}),
        ("l.csv", 'a.jpg,"tench, Tinca tinca"\r\n"b, c.jpg","say ""no"""\r\n', {"a.jpg": ("tench, Tinca tinca",), "b, c.jpg": ('say "no"',)}),
        ("l.csv", "a.jpg,cat,dog,cat,\n\n", {"a.jpg": ("cat", "dog")}),
        ("l.csv", "\ufefffilepath,label\na.jpg,cat\n", {"a.jpg": ("cat",)}),
        ("l.csv", "ImageId,Class\na.jpg,cat\n", {"a.jpg": ("cat",)}),
        ("l.csv", "image_1.jpg,cat\n", {"image_1.jpg": ("cat",)}),
        ("l.txt", "a.jpg cat dog\nb.jpg\tcat, dog\nc.jpg,cat\n", {"a.jpg": ("cat", "dog"), "b.jpg": ("cat", "dog"), "c.jpg": ("cat",)}),
    ],
)  # fmt: skip
def test_a_cell_is_one_label_and_a_word_of_a_text_line_is_one(
    tmp_path: Path, name: str, text: str, expected: Labels
) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode())
    assert read_label_file(str(path), Storage()).by_name == expected
    path.write_bytes(text.encode("utf-16"))
    assert read_label_file(str(path), Storage()).by_name == expected


def test_lines_that_name_no_image_are_given_with_the_reason() -> None:
    lines = ["file,label\n", "\n", "a.jpg,cat\n"]
    found = [(line.number, line.name, line.length, line.left_out) for line in label_lines(lines, "x.csv")]
    assert found == [(1, "", 11, "headings"), (2, "", 1, "empty"), (3, "a.jpg", 10, "")]
    assert [line.left_out for line in label_lines(["\n", "a.jpg cat\n"], "x.txt")] == ["empty", ""]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("filename,width,label\n", "has 3 columns, filename, width, label, and every one behind the name would be a label"),
        ('a.jpg,"cat\n', "line 1: unexpected end of data; correct its quotes"),
    ],
)  # fmt: skip
def test_cells_that_are_unclear_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "l.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_label_file(str(path), Storage())


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.csv", "a.jpg;cat\nb.jpg;dog\n", "separated by semicolons .* by commas"),
        ("l.csv", "id;label\n1;cat\n", "separated by semicolons"),
        ("l.csv", "a.jpg\tcat\n", "separated by tabs"),
        ("l.tsv", "a.jpg,cat\n", "separated by commas .* by tabs"),
        ("l.txt", "a.jpg|cat\n", "separated by bars"),
        ("l.txt", "a.jpg\nb.JPG\n", "a.jpg is the name of an image without a label"),
        ("l.txt", "label\ncat\ndog\n", "its first line, label, seems to be a heading"),
        ("l.csv", "a.jpg,0,1,0\n", "line 1: 0, 1, 0 seems to be a one-hot list"),
        ("l.csv", "cat,a.jpg\ncat,b.jpg\n", "line 2: a second line for the image cat; .* swap the columns"),
        ("l.json", '{"a.jpg": "cat"}\n', "labels are read from text, CSV and TSV"),
    ],
)  # fmt: skip
def test_columns_that_would_be_read_as_labels_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_label_file(str(path), Storage())


@pytest.mark.parametrize("line", ["001", "train/001.jpg", "C:\\data\\001.jpg", "001.JPG"])
def test_a_name_that_is_written_differently_is_shown_beside_that_of_the_image(tmp_path: Path, line: str) -> None:
    path = tmp_path / "l.csv"
    path.write_text(f"{line},cat\n")
    with pytest.raises(DataError, match="no label for the image 001.jpg; the line of .*001.* may be meant"):
        read_label_file(str(path), Storage()).of("001.jpg")


def test_a_list_of_labels_with_commas_and_without_names_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "l.tsv"
    path.write_text("tench, Tinca tinca\nshark; white\n")
    assert read_label_file(str(path), Storage()).in_order == [("tench, Tinca tinca",), ("shark; white",)]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (["img1.jpg", "img2.jpg", "img10.jpg"], "as text img10.jpg is image 2, by number img2.jpg is; write lines of NAME"),
        (["img01.jpg", "img02.jpg", "img10.jpg"], None),
    ],
)  # fmt: skip
def test_labels_by_order_need_names_that_have_one_order(tmp_path: Path, images: list[str], message: str | None) -> None:
    path = tmp_path / "l.txt"
    path.write_text("one\ntwo\nten\n")
    labels = read_label_file(str(path), Storage())
    if message is None:
        assert labels.assign(images) == dict(zip(images, [("one",), ("two",), ("ten",)], strict=True))
    else:
        with pytest.raises(DataError, match=message):
            labels.assign(images)


@pytest.mark.parametrize(
    ("name", "content", "names", "ids"),
    [
        ("c.txt", "\ufefftench\r\ncrane\r\ncrane\r\n\r\n", ("tench", "crane", "crane"), None),
        ("c.json", {"0": ["n01", "tench"], "1": ["n02", "crane"]}, ("tench", "crane"), ("n01", "n02")),
        ("imagenet_class_index.json", {"1": ["n02", "crane"], "0": ["n01", "tench"]}, ("tench", "crane"), ("n01", "n02")),
        ("c.json", {"0": "tench", "1": "crane"}, ("tench", "crane"), None),
        ("c.json", {"tench": 1, "crane": 0}, ("crane", "tench"), None),
        ("c.json", ["tench", "crane"], ("tench", "crane"), None),
        ("c.txt", ["tench", "crane"], ("tench", "crane"), None),
        ("c.txt", "a\x0cb\nc\u2028d\n", ("a\x0cb", "c\u2028d"), None),
        ("c.txt", "n01\ttench, Tinca\nn02\tcrane\n", ("tench, Tinca", "crane"), ("n01", "n02")),
        ("c.txt", "n01440764 tench, Tinca\nn02012849 crane\n", ("tench, Tinca", "crane"), ("n01440764", "n02012849")),
        ("c.txt", "1 tench\n0 crane\n", ("crane", "tench"), None),
        ("c.txt", "0: tench\n1: crane\n", ("tench", "crane"), None),
        ("c.txt", "0 - tench\n1 - crane\n", ("tench", "crane"), None),
        ("c.txt", f"{'9' * 5000} tench\ncrane\n", (f"{'9' * 5000} tench", "crane"), None),
        ("c.txt", "boeing 747\nairbus 380\n", ("boeing 747", "airbus 380"), None),
        ("c.txt", "/t/tench 1\n/c/crane bird 0\n", ("/c/crane bird", "/t/tench"), None),
        ("c.txt", "class 1\nclass 0\n", ("class 1", "class 0"), None),
    ],
)  # fmt: skip
def test_class_lists_are_text_or_json(
    tmp_path: Path, name: str, content: Any, names: tuple[str, ...], ids: tuple[str, ...] | None
) -> None:
    path = tmp_path / name
    path.write_bytes((content if isinstance(content, str) else json.dumps(content)).encode())
    found = read_class_list(str(path), Storage())
    assert (found.names, found.ids) == (names, ids)
    if ids is not None and found.names == ("tench", "crane"):
        assert (read_classes(str(path), Storage()), found.by_name({"crane"})) == (ids, names)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.txt", "a\n\nb\n", "line 2 is empty; it needs one class per line"),
        ("c.txt", "# names\na\n", "line 1 is a comment; it needs one class per line"),
        ("c.txt", "", "no class in it"),
        ("c.txt", "a\nb\na\n", "class a is repeated"),
        ("c.json", "{", "not JSON"),
        ("c.json", '{"1": "a", "2": "b"}', "not a class list; it may be a list of names"),
        ("c.json", '{"a": 0, "b": 0}', "not a class list"),
        ("c.json", '{"0": "a", "1": "b", "1": "c"}', "the key '1' is there twice"),
        ("c.txt", "name\na\nb\n", "line 1, 'name', is a heading; it needs one class per line"),
        ("c.txt", "id\tname\n0\ta\n", "is a heading"),
        ("c.txt", "1 a\n2 b\n", "the lines are numbered from 1 to 2; write the names only.*--first-label 1"),
        ("c.txt", "{0: 'a',\n 1: 'b'}\n", "looks like a list or dictionary and is not JSON"),
        ("c.txt", "a\nb\t1\tx\n", "line 2 has columns"),
        ("c.yaml", "names:\n  0: a\n", "is YAML; it needs one class per line"),
        ("c.csv", "n01,a\nn02,b\n", "has columns"),
        ("c.txt", b"caf\xe9\n", "not UTF-8; save it as UTF-8"),
        ("c.txt", None, "c.txt: no such file"),
    ],
)
def test_class_lists_that_are_unclear_are_refused(
    tmp_path: Path, name: str, text: str | bytes | None, message: str
) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(DataError, match=message):
        read_classes(str(path), Storage())


def test_numbers_in_another_order_are_no_names_for_labels_that_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("2\n0\n1\n")
    classes = read_class_list(str(tmp_path / "c.txt"), Storage())
    assert classes.by_name({"0"}) == ("2", "0", "1")
    with pytest.raises(DataError, match="numbers in another order than the labels"):
        classes.by_number()


def test_the_classes_of_an_index_are_those_of_its_folder_or_file(tmp_path: Path) -> None:
    write_members(tmp_path / "a.tar", [("s.jpg", picture(0)), ("s.cls", b"ant")])
    index_shards([str(tmp_path)])
    for location in (tmp_path, tmp_path / "index.json"):
        assert read_classes(str(location), Storage()) == ("ant",)
