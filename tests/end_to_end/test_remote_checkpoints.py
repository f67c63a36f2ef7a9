"""A chain with checkpoints in an object store: killed during an upload, and continued to the same result."""

import json
import uuid
from pathlib import Path

import pytest

from pipeline.checkpoints.checkpoint import open_checkpoint
from tests.servers.fault_proxy import Fault, FaultProxy
from tests.servers.s3 import S3Server
from tests.support.command import coatnet, kill, start, wait_until
from tests.support.recipes import checkpoint_bytes, write_recipe

pytestmark = pytest.mark.slow
SETTINGS = [
    "pretrain.steps=12", "pretrain.checkpoint.every_steps=4", "finetune.steps=2", "finetune.resources.ranks=1",
    "evaluate.resources.ranks=1",
]  # fmt: skip


def test_a_chain_that_is_killed_during_an_upload_equals_the_one_on_disk(
    s3: S3Server, shards: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "local", shards)
    on_disk = coatnet("run", recipe, *SETTINGS)
    assert on_disk.returncode == 0, on_disk.stderr

    recipe = write_recipe(tmp_path / "remote", shards)
    run = tmp_path / "remote/runs/test/pretrain"
    log = run / "logs/rank-00000.log"
    bucket = f"s3://test/{uuid.uuid4().hex}"
    remote = [f"{stage}.checkpoint.folder={bucket}" for stage in ("pretrain", "finetune")]
    with FaultProxy(s3.port) as proxy:
        fault = Fault("hang", path="step-00000008/rank-00001.safetensors", method="PUT", after=10_000)
        proxy.faults.append(fault)
        process = start("train", recipe, "pretrain", *SETTINGS, *remote, f"data.storage.endpoint={proxy.url}")
        # Step 8 is being saved behind these, and the save of step 12 would wait for it.
        wait_until(lambda: fault.fired == 1 and "step 11/12" in log.read_text(), process)
        kill(process, "everyone")
    files = s3.files()
    left = {path.partition("/pretrain/")[2] for path in files.find(f"{bucket[5:]}/test/pretrain")}
    assert "step-00000004/manifest.json" in left
    assert "step-00000008/manifest.json" not in left
    assert "step-00000008/buffers.safetensors" in left

    again = coatnet("run", recipe, *SETTINGS, *remote)
    assert again.returncode == 0, again.stderr
    assert "continues from checkpoint step-00000004" in again.stdout
    for stage, step in (("pretrain", 12), ("finetune", 2)):
        result = json.loads((tmp_path / f"remote/runs/test/{stage}/result.json").read_text())
        assert result["checkpoint"] == f"{bucket}/test/{stage}/step-{step:08d}"
        there = tmp_path / stage
        files.get(f"{result['checkpoint'][5:]}/", f"{there}/", recursive=True)
        assert checkpoint_bytes(there) == checkpoint_bytes(
            tmp_path / f"local/runs/test/{stage}/checkpoints/step-{step:08d}"
        )
        assert open_checkpoint(result["checkpoint"]).damage() is None
        kept = [p for p in (tmp_path / f"remote/runs/test/{stage}/checkpoints").rglob("*") if p.is_file()]
        assert kept == []
    evaluated = [
        json.loads((tmp_path / f"{where}/runs/test/evaluate/result.json").read_text()) for where in ("local", "remote")
    ]
    assert evaluated[0]["validation"] == evaluated[1]["validation"]
    assert evaluated[1]["checkpoint"] == f"{bucket}/test/finetune/step-00000002"

    verified = coatnet("checkpoints", "verify", recipe.parent / "runs/test")
    assert verified.returncode == 0, verified.stderr
    assert f"{bucket}/test/pretrain/step-00000012: intact" in verified.stdout
    done = coatnet("run", recipe, *SETTINGS, *remote)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done before") == 3
