"""Every entry of a source is counted once as taken or left out, and the table of it adds up."""

import pytest

from data.accounting import Accounting, lines, table
from data.errors import DataError
from data.files.json_records import to_json, to_record


def an_accounting() -> Accounting:
    accounting = Accounting("files", found=1006)
    accounting.take("images", 1000)
    accounting.leave_out("hidden", "a/.x.jpg")
    accounting.leave_out("not an image", "a/1.xml", "a/2.xml", "a/3.xml", "a/4.xml", "a/5.xml")
    accounting.remark("multi_label", "some images have several labels")
    return accounting


def test_the_table_names_each_reason_with_its_first_names() -> None:
    assert list(table(an_accounting())) == [
        "1,006 files found",
        "1,000 taken: images",
        "    1 left out: hidden (a/.x.jpg)",
        "    5 left out: not an image (a/1.xml, a/2.xml, a/3.xml, ...)",
        "some images have several labels",
    ]


def test_one_line_says_that_all_entries_were_taken() -> None:
    accounting = Accounting("members", found=1200)
    accounting.take("images", 1200)
    accounting.remark("multi_label", "some images have several labels")
    assert list(lines(accounting)) == [
        "1,200 members found, all of them taken: 1,200 images",
        "some images have several labels",
    ]
    assert list(lines(an_accounting())) == list(table(an_accounting()))


def test_parts_add_up_and_keep_the_first_names_and_one_remark_of_a_kind() -> None:
    both = Accounting("files")
    both.add(an_accounting())
    both.add(an_accounting())
    both.check()
    assert (both.found, both.taken, len(both.remarks)) == (2012, {"images": 2000}, 1)
    assert (both.left_out["hidden"].count, both.left_out["hidden"].first) == (2, ["a/.x.jpg", "a/.x.jpg"])
    assert both.left_out["not an image"].first == ["a/1.xml", "a/2.xml", "a/3.xml"]


def test_an_entry_that_is_not_accounted_for_is_an_error() -> None:
    accounting = an_accounting()
    accounting.check()
    accounting.found += 1
    with pytest.raises(DataError, match="1,007 files found, 1,000 taken and 6 left out, which does not add up"):
        accounting.check()


def test_it_becomes_json_and_back() -> None:
    assert to_record(Accounting, to_json(an_accounting())) == an_accounting()
