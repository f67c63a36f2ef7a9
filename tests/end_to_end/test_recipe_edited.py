"""A recipe that is edited for the next experiment while a run of it trains."""

import threading
from pathlib import Path

import pytest
import yaml

from tests.support.command import coatnet, start, wait_until
from tests.support.ports import free_ports
from tests.support.recipes import write_recipe

pytestmark = pytest.mark.slow(seconds=8)
ONE = {"resources": {"ranks": 1, "gpus_per_rank": 0}}


def test_later_stages_run_with_the_recipe_of_the_start(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, **ONE)
    at_start = recipe.read_text()
    process = start("run", recipe)
    run = tmp_path / "runs" / "test"
    wait_until((run / "pretrain" / "events.jsonl").exists, process)
    edited = yaml.safe_load(at_start) | {"name": "next"}
    edited["stages"]["finetune"] |= {"steps": 9, "resolution": 64}
    recipe.write_text(yaml.safe_dump(edited))
    assert process.wait(120) == 0
    finetune = yaml.safe_load((run / "finetune" / "recipe.yaml").read_text())
    assert (finetune["steps"], finetune["resolution"]) == (6, 48)
    assert not (tmp_path / "runs" / "next").exists()
    recipe.write_text(at_start)
    again = coatnet("run", recipe)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before") == 3


def test_ranks_that_are_started_by_hand_with_different_recipes_refuse_to_train(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, resources={"ranks": 2, "gpus_per_rank": 0})
    (port,) = free_ports(1)
    codes: dict[int, int] = {}

    def rank(number: int) -> None:
        name = str(number)
        done = coatnet(
            "train", recipe, "pretrain", f"pretrain.steps={40 + number}",
            RANK=name, LOCAL_RANK=name, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        codes[number] = done.returncode

    threads = [threading.Thread(target=rank, args=[number]) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == {0: 78, 1: 78}
    log = (tmp_path / "runs" / "test" / "pretrain" / "logs" / "rank-00000.log").read_text()
    assert "stage pretrain: rank 1 has read another recipe, or other data, than rank 0 (digest " in log
