"""Every reader of a format from outside ends in a value or in an error of its own, whatever the bytes.

This is the short form; `python -m tests.fuzzing` tries inputs for as long as it is told.
"""

import contextlib
import io
import json
import os
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests.fuzzing import campaign as campaigns
from tests.fuzzing.campaign import Fuzz, SilentAcceptance, Target, campaign
from tests.fuzzing.targets import TARGETS

_INPUTS = 60
_FEWER = {"verification": 25, "recipe": 15, "frozen-recipe": 20, "override": 25, "label-map": 30}
"""Of targets whose inputs take long."""
_NESTED = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
_TIME = "2026-01-02T03:04:05+0000"


@pytest.fixture(autouse=True)
def own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target puts stand-ins for Slurm's commands on PATH, which must not be those of other tests."""
    monkeypatch.setenv("PATH", os.environ["PATH"])


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_input_is_read_or_refused(name: str, tmp_path: Path) -> None:
    figures = campaign(TARGETS[name], tmp_path, seed=1, inputs=_FEWER.get(name, _INPUTS))
    assert not figures.failures
    assert figures.inputs == figures.values + figures.refusals == _FEWER.get(name, _INPUTS)


def _header(text: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def _tar(*members: tuple[str, bytes, bytes]) -> bytes:
    """A tar of members by name, kind and content, which of a link is its target."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type = kind
            if kind == tarfile.SYMTYPE:
                member.linkname = content.decode()
            member.size = 0 if kind == tarfile.SYMTYPE else len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


_PAX = tarfile.XHDTYPE
_FOUND: dict[str, tuple[str, bytes]] = {
    "nested objects in an event": ("event-log", _NESTED),
    "an event before the first century": ("event-log", b'{"time": "0001-01-01T00:00:00", "event": "save"}'),
    "an accuracy without end": ("event-log", json.dumps({"time": _TIME, "event": "evaluation", "step": 1, "top1": 10**400}).encode()),
    "nested objects in a progress": ("progress", _NESTED),
    "a progress of strings": ("progress", b'{"step": "3", "steps": 1, "loss": "", "images_per_second": 0, "seconds_left": 0, "time": 0}'),
    "nested objects in a result": ("stage-result", _NESTED),
    "nested objects in a record of locations": ("checkpoint-locations", _NESTED),
    "nested objects in a submission": ("submissions", _NESTED),
    "a submission without text": ("submissions", b'{"stage": [], "job": 7, "command": null, "time": 1}'),
    "a report of something else": ("preflight-report", b'{"level": "ok", "x": 1}'),
    "nested objects in a report": ("preflight-report", _NESTED),
    "nested objects in a sweep": ("sweep", _NESTED),
    "a sweep of runs elsewhere": ("sweep", b'{"runs": ["../../x"], "settings": {}}'),
    "a sweep with a name that is too long": ("sweep", json.dumps({"runs": ["x" * 5000], "settings": {}}).encode()),
    "a number beyond floats": ("download-failure", json.dumps({"reason": "", "storage_down": True, "urgent": True, "time": 10**400}).encode()),
    "a folder that is no path": ("run-identity", json.dumps({"id": "a", "folder": "a\0b", "inode": 1}).encode()),
    "a batch of 19 digits": ("stage-recipe", b'{"stage": "s", "batch": {"global_size": 9223372036854775807, "micro_size": 8}}'),
    "a date that does not exist": ("stage-recipe", b"stage: 2001-99-99\n"),
    "a control character": ("stage-recipe", b"stage: \x01\n"),
    "nested lists in a submitted recipe": ("frozen-recipe", b"[" * 5000),
    "stages that are no mapping": ("frozen-recipe", b"stages: 7\n"),
    "a source that is no path": ("build-plan", b'{"version": 2, "source": "a\\u0000b"}'),
    "a class with an id and no name": ("class-list", b'list.json\0{"0": ["n01", ""], "1": ["n02", "b"]}'),
    "a header that is no Python": ("labels", _header(b"{'descr': '<i4', 'shape': ((((\n")),
    "a header of no shape": ("labels", _header(b"{'descr': '<i4', 'fortran_order': False, 'shape': (12, -1)}\n")),
    "a header of no type": ("labels", _header(b"{'descr': (), 'fortran_order': False, 'shape': (12, 1)}\n") + bytes(48)),
    "a shape of a truth value": ("labels", _header(b"{'descr': '<i4', 'fortran_order': False, 'shape': (12, True)}\n") + bytes(48)),
    "a line of tabs": ("class-list", b"list.txt\0x" + b"\t" * 20_000 + b"y\tz\n"),
    "a line of spaces": ("class-list", b"list.txt\0x" + b" " * 20_000 + b"y\t" + b" " * 20_000 + b"\tz\n"),
    "a name of thousands of digits": ("class-list", b"list.txt\0" + b"9" * 5000 + b"\n1\n"),
    "a short line of sacct": ("slurm", b"sacct\x0017|COMPLETED\n"),
    "a line of sacct that is not UTF-8": ("slurm", b"sacct\x0017|COMPLETED|\xff|None\n"),
    "a time of squeue in other digits": ("slurm", "squeue\x0017|RUNNING|1|n|N/A|²|None\n".encode()),
    "a log of a day that does not exist": ("job-log", b"2026-99-99 03:04:05 job 17: done\n"),
    "a size of thousands of digits": ("tar-headers", _tar(("x", _PAX, b"5010 size=" + b"9" * 4999 + b"\n"), ("a.jpg", b"0", b""))),
    "a million pax records": ("tar-headers", _tar(("x", _PAX, b"4 a=" * 2**18), ("a.jpg", b"0", b""))),
    "a page of half a link": ("web-server", b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + b"<a " + b" " * 100_000),
}  # fmt: skip
"""What was found: an exception, a hang or a wrong value."""


@pytest.mark.parametrize("what", _FOUND)
def test_what_was_found_is_read_or_refused(what: str, tmp_path: Path) -> None:
    name, content = _FOUND[what]
    fuzz = TARGETS[name].prepare(tmp_path)
    began = time.process_time()
    with contextlib.suppress(*fuzz.refusals):
        fuzz.read(content)
    assert time.process_time() - began < campaigns.SECONDS  # of the processor


def test_chains_and_circles_of_links_take_no_longer_than_their_length(tmp_path: Path) -> None:
    from data.tar import read_tar

    count = 8000  # a quadratic walk takes half a minute
    links = [(f"{n}.jpg", tarfile.SYMTYPE, f"{n + 1}.jpg".encode()) for n in range(count)]
    circle = [(f"c{n}.jpg", tarfile.SYMTYPE, f"c{(n + 1) % count}.jpg".encode()) for n in range(count)]
    path = tmp_path / "s.tar"
    path.write_bytes(_tar(*links, (f"{count}.jpg", b"0", b"x"), *circle))
    began = time.process_time()
    with open(path, "rb") as file:
        contents = read_tar(file.fileno())
    assert time.process_time() - began < 5
    assert (len(contents.members), len({member.offset for member in contents.members})) == (count + 1, 1)
    assert len(contents.others) == count


def _target(read: Any) -> Target:
    return Target("own", lambda folder: Fuzz(lambda rng: rng.randbytes(4), read, (ValueError,)))


def test_a_campaign_reports_exceptions_wrong_values_and_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaigns, "SECONDS", 0.05)
    kinds = iter(("value", "refusal", "defect", "wrong", "hang", "memory"))

    def read(content: bytes) -> None:
        kind = next(kinds)
        if kind == "refusal":
            raise ValueError
        if kind == "defect":
            json.loads("{}")["x"]
        if kind == "wrong":
            raise SilentAcceptance("a wrong value")
        if kind == "memory":
            raise ValueError from MemoryError()
        while kind == "hang":
            time.sleep(0.01)

    figures = campaign(_target(read), tmp_path / "seeds", inputs=6, keep=tmp_path / "kept")
    assert (figures.inputs, figures.values, figures.refusals) == (6, 1, 1)
    kinds_found = sorted(failure.partition(" at ")[0] for failure in figures.failures)
    assert kinds_found == ["Hang", "KeyError", "ValueError", "accepted: a wrong value"]
    assert len(list((tmp_path / "kept").iterdir())) == 4


def test_inputs_follow_from_the_seed(tmp_path: Path) -> None:
    fuzz = TARGETS["images"].prepare(tmp_path)
    first, again, other = (campaigns.input_of(fuzz, "images", seed, 7) for seed in (1, 1, 2))
    assert first == again != other
