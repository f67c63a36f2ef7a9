"""Pictures as PNG files and in TensorBoard."""

import io
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

from pipeline.errors import ConfigError
from pipeline.monitoring.charts import scalars
from pipeline.monitoring.event_file import EventFile
from pipeline.monitoring.event_reader import read_events
from pipeline.planner.pictures.scaling_curve import ScalingPoint, scaling_picture
from pipeline.planner.pictures.write import show_in_tensorboard, write_pictures
from pipeline.runs.run_folder import RunFolder
from tests.pipeline.planner.pictures.readable import SUBJECT


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return scaling_picture(SUBJECT, [ScalingPoint(8, 1000, 0.1)])


def plain(colour: str) -> Image.Image:
    return Image.new("RGB", (4, 3), colour)


def test_pictures_are_whole_png_files_and_replace_earlier_ones(tmp_path: Path, picture: Image.Image) -> None:
    folder = tmp_path / "new" / "pictures"
    write_pictures(folder, {"memory": plain("red"), "scaling": plain("red")})
    paths = write_pictures(folder, {"memory": plain("blue"), "scaling": picture})
    assert paths == [folder / "memory.png", folder / "scaling.png"]
    assert sorted(folder.iterdir()) == paths
    with Image.open(paths[1]) as found:
        assert found.format == "PNG"
        assert found.tobytes() == picture.tobytes()
    with Image.open(paths[0]) as found:
        assert found.getpixel((0, 0)) == (0, 0, 255)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/pictures: cannot be written \(Not a directory\); name another folder"):
        write_pictures(tmp_path / "file" / "pictures", {"memory": plain("red")})


def shown(server: EventAccumulator, tag: str) -> list[Image.Image]:
    assert server.SummaryMetadata(tag).plugin_data.plugin_name == "images"
    found: list[Image.Image] = []
    for event in server.Tensors(tag):
        width, height, content = event.tensor_proto.string_val
        found.append(Image.open(io.BytesIO(content)))
        assert found[-1].size == (int(width), int(height))
    return found


def test_tensorboard_shows_the_pictures_of_the_last_call(tmp_path: Path, picture: Image.Image) -> None:
    run = RunFolder(tmp_path)
    running = EventAccumulator(str(run.plan))
    for memory, scaling in ((plain("red"), plain("red")), (plain("green"), picture), (plain("blue"), picture)):
        show_in_tensorboard(run, {"memory": memory, "scaling": scaling})
        running.Reload()
        fresh = EventAccumulator(str(run.plan))
        fresh.Reload()
        for server in (running, fresh):
            assert sorted(server.Tags()["tensors"]) == ["plan/memory", "plan/scaling"]
            assert [found.tobytes() for found in shown(server, "plan/memory")] == [memory.tobytes()]
            assert [found.tobytes() for found in shown(server, "plan/scaling")] == [scaling.tobytes()]
    recorded = read_events(run.plan)
    assert recorded.problems == []
    assert {tag: [step for step, _ in images] for tag, images in recorded.images.items()} == {
        "plan/memory": [0],
        "plan/scaling": [0],
    }


def test_event_files_do_not_accumulate(tmp_path: Path) -> None:
    for _ in range(5):
        show_in_tensorboard(RunFolder(tmp_path), {"memory": plain("red")})
    assert len(list((tmp_path / "plan").iterdir())) == 2


def test_what_a_run_records_is_left_as_it_is(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    trainer = EventFile(run.tensorboard, 1, pytest.fail)
    trainer.add(scalars({"train/loss": 1.0}), 1)
    trainer.flush()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    show_in_tensorboard(run, {"memory": plain("red")})
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    trainer.add(scalars({"train/loss": 0.5}), 2)
    trainer.close()
    assert [point.value for point in read_events(run.tensorboard).scalars["train/loss"]] == [1.0, 0.5]


def test_pictures_that_cannot_be_shown_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "plan").write_text("")
    with pytest.raises(ConfigError, match="plan cannot be written"):
        show_in_tensorboard(RunFolder(tmp_path), {"memory": plain("red")})
