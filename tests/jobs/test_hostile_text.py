"""Names and logs that contain what terminals obey or markup, and signatures of addresses, through the real commands."""

import io
import re
import tarfile
from pathlib import Path

import pytest

from tests.conftest import write_pictures
from tests.pipeline.checkpoints.small import save
from tests.servers.web import WebServer
from tests.support.command import coatnet
from tests.support.recipes import events, write_recipe

pytestmark = pytest.mark.slow
HOSTILE = "[red] \x1b]0;title\x07\r\x1b[2J\u202e\x9b1m\nerror: forged"
SHOWN = r"[red] \x1b]0;title\x07\r\x1b[2J\u202e\u009b1m"
SIGNED = "sv=2026&X-Amz-Signature=50ff7a99"
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]|^error: forged", re.MULTILINE)


def printed(*arguments: str | Path, code: int = 0, folder: Path | None = None) -> str:
    """What a command prints to standard output and error, which must have nothing that a terminal obeys."""
    done = coatnet(*arguments, folder=folder)
    assert done.returncode == code, done.stderr
    found = _OBEYED.search(done.stdout + done.stderr)
    assert found is None, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return next(write_pictures(tmp_path_factory.mktemp("pictures"), per_class=1).rglob("*.jpg")).read_bytes()


def test_names_of_classes_and_images(picture: bytes, tmp_path: Path) -> None:
    for name in (HOSTILE, "tea"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        (tmp_path / "classes" / name / "1.jpg").write_bytes(picture)
    (tmp_path / "classes/tea" / f"{HOSTILE}.jpg").write_bytes(b"no picture")
    build = ("shards", "build", tmp_path / "classes", tmp_path / HOSTILE, "--processes", "1")
    assert SHOWN in printed(*build, code=78)
    assert SHOWN in printed(*build, "--skip-broken")
    assert SHOWN in printed("shards", "verify", tmp_path / HOSTILE)
    assert SHOWN in printed("shards", "show", tmp_path / HOSTILE, "--output", tmp_path / "c.png")


def test_names_in_foreign_shards(picture: bytes, tmp_path: Path) -> None:
    def write(content: bytes) -> None:
        with tarfile.open(tmp_path / "a-0000.tar", "w") as tar:
            for key, members in (("good", {"jpg": picture, "cls": b"1"}), (HOSTILE, {"jpg": content})):
                for extension, data in members.items():
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))

    write(picture)
    assert SHOWN in printed("shards", "index", tmp_path)
    write(b"no picture")
    assert SHOWN in printed("shards", "verify", "--decode", tmp_path, code=78)


def test_names_of_folders_and_what_logs_and_jobs_contain(shards: Path, tmp_path: Path) -> None:
    home = tmp_path / "[/red]" / HOSTILE
    recipe = write_recipe(home, shards)
    printed("doctor", recipe, "data.nothing=[/red]", code=78)
    assert SHOWN in printed("checkpoints", recipe)
    run = home / "runs/test/pretrain"
    run.mkdir(parents=True)
    save(run, 10)
    (run / "logs").mkdir()
    (run / "logs/rank-00000.log").write_bytes(HOSTILE.encode("utf-8", "surrogateescape") + b"\tcaf\xe9\n")
    assert coatnet("logs", home / "runs/test").stdout.splitlines()[0] == SHOWN
    assert "\tcaf\\xe9\n" in coatnet("logs", home / "runs/test").stdout
    printed("status", recipe)
    (run / "recipe.yaml").write_text(f"[/red] {HOSTILE!r}: [")
    printed("status", recipe)


def test_an_error_of_a_rank(shards: Path, tmp_path: Path) -> None:
    home = tmp_path / "[/red]" / HOSTILE
    recipe = write_recipe(home, shards, resources={"ranks": 1})
    (home / "runs/test/finetune").mkdir(parents=True)
    (home / "runs/test/finetune/result.json").write_text("{")
    assert SHOWN in printed("train", recipe, "finetune", code=78)
    assert SHOWN in printed("export", home, tmp_path / "x.safetensors", code=78)


def test_signatures_are_kept_where_they_were_given_alone(shards: Path, tmp_path: Path) -> None:
    with WebServer(shards) as web:
        web.query = SIGNED
        train, validation = (f"{web.url}/{part}?{SIGNED}" for part in ("train", "validation"))
        recipe = write_recipe(
            tmp_path,
            shards,
            data={"train": train, "validation": validation, "lanes": 4, "cache": {"folder": str(tmp_path / "cache")},
                  "workers": 1, "storage": {"give_up_after": 1.0, "shards_elsewhere": True}},
            resources={"ranks": 1},
            log={"every_steps": 1, "samples": True},
        )  # fmt: skip
        texts = [
            printed("doctor", recipe, "--stage", "pretrain"),
            printed("train", recipe, "pretrain", "pretrain.steps=5"),
            printed("status", recipe),
            printed("shards", "verify", train),
            printed("shards", "show", train, "--output", tmp_path / "c.png"),
            printed("shards", "show", train, "--json", "--output", tmp_path / "c.png"),
            printed("shards", "index", f"{web.url}/train/*.tar?{SIGNED}", "--json", code=78),
        ]
        web.query = "sv=expired"
        texts.append(printed("train", recipe, "pretrain", "pretrain.steps=5", "name=other", code=78))
    assert all("50ff7a99" not in text for text in texts)
    assert "?..." in texts[-1]
    assert events(tmp_path / "runs/test/pretrain")
    kept = {
        path.relative_to(tmp_path).parts[:3]
        for path in tmp_path.rglob("*")
        if path.is_file() and b"50ff7a99" in path.read_bytes()
    }
    assert kept == {("recipe.yaml",), ("runs", "test", "recipes")}
