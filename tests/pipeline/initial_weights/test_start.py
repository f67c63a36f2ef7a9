"""What a stage takes from another run, a checkpoint or a file of weights, and what it refuses, from headers and in full."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from data.files.digest import json_sha256
from data.remote.storage import Storage
from models.coatnet import CoAtNet
from models.model_facts import ModelFacts, ModelSource
from models.pretrained import CONFIG_KEY, config_of
from models.registry import create_model
from pipeline.errors import ConfigError
from pipeline.initial_weights.content import content_digest
from pipeline.initial_weights.fitting import Fitted
from pipeline.initial_weights.start import checked_start, fitted_start
from pipeline.plan import Plan, plan_stage
from pipeline.recipe.loader import load_recipe
from pipeline.runs.announcements import StartingWeights
from pipeline.runs.run_folder import RunFolder
from pipeline.weights import build_model
from tests.pipeline.checkpoints.small import ALONE
from tests.servers.web import WebServer
from tests.support.recipes import write_recipe
from tests.support.trained import MODEL, PREPROCESSING, assert_same_model, save_trained, trained_model

CLASSES = ("bright", "dark", "striped")
HEAD = {"head.classifier.weight", "head.classifier.bias"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a stage that has trained for 7 steps, with a moving average."""
    folder = tmp_path_factory.mktemp("other") / "runs/big/pretrain"
    save_trained(folder, 7, averaged=True, classes=CLASSES)
    return folder


@pytest.fixture
def planned(shards: Path, tmp_path: Path) -> Callable[..., Plan]:
    """Plans a stage of a recipe of the same model that starts from what it is given."""

    def plan(start: str | Path, *overrides: str, stage: str = "pretrain") -> Plan:
        path = write_recipe(tmp_path / "mine", shards, model={"name": "coatnet_debug", "depths": [1, 1, 2, 1]})
        return plan_stage(load_recipe(path, [f"{stage}.start_from={start}", *overrides]), stage)

    return plan


def started(plan: Plan) -> tuple[StartingWeights, Fitted, CoAtNet]:
    """What headers say, the same with values, and the model that begins with them."""
    assert plan.stage.start_source is not None
    folder, model = run_folder_of(plan), build_model(plan)
    said = checked_start(plan, folder)
    assert said is not None
    fitted = fitted_start(plan, plan.stage.start_source, folder, model, ALONE, folder.path / "scratch")
    assert fitted.beginning == said
    model.load_state_dict({**fitted.parameters, **fitted.buffers}, strict=False)
    return said, fitted, model.eval()


def run_folder_of(plan: Plan) -> RunFolder:
    """Of the recipe; nothing is written."""
    return RunFolder(Path("/nowhere/test") / plan.name)


def rows(said: StartingWeights) -> dict[str, int]:
    return {row.what: row.tensors for row in said.table}


def plain(model: CoAtNet) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("part", ["", "..", "checkpoints/step-00000007"])
@pytest.mark.parametrize(("weights", "seed"), [("raw", 7), ("ema", 8), ("auto", 8)])
def test_a_run_its_stage_and_its_checkpoint_give_all_their_weights_and_statistics(
    run: Path, planned: Callable[..., Plan], part: str, weights: str, seed: int
) -> None:
    said, _, model = started(planned(run / part, f"pretrain.start_weights={weights}"))
    assert_same_model(model, trained_model(seed))
    assert said.checkpoint == str(run / "checkpoints/step-00000007")
    assert (said.step, said.weights) == (7, "raw" if weights == "raw" else "ema")
    assert (said.origin, said.keeps_classifier, said.precision) == ("stage pretrain of another run", True, "fp32")
    count = len(list(model.state_dict()))
    assert rows(said) == {"taken": count}


def test_another_image_size_and_other_classes_are_resized_and_begun_anew(
    run: Path, planned: Callable[..., Plan], tmp_path: Path
) -> None:
    (tmp_path / "map.yaml").write_text("rename: {bright: Bright}\n")
    maps = [f"data.{key}={tmp_path}/map.yaml" for key in ("label_map", "validation_label_map")]
    plan = planned(run, *maps, "pretrain.resolution=48")
    said, fitted, _ = started(plan)
    model = create_model(**MODEL | {"image_size": 48})
    assert fitted.parameters.keys() == dict(model.named_parameters()).keys() - HEAD
    assert rows(said) == {"taken": len(model.state_dict()) - 5, "resized": 3, "begun anew": 2, "left out": 2}
    assert "class 0 was bright and is Bright" in said.classifier
    lines = said.announcements(plan)
    assert (
        "weights resized         3  relative position tables are resized for 48 pixels: 3 from 3 x 3 to 5 x 5" in lines
    )
    assert "weights begun anew      2  head.classifier.weight, head.classifier.bias" in lines
    # An evaluation of this model on other classes is refused.
    with pytest.raises(ConfigError, match=r"trained for other classes than the 3 of the data"):
        checked_start(planned(run, *maps, stage="evaluate"), run_folder_of(plan))


def test_another_architecture_is_refused_with_the_settings_that_match(run: Path, planned: Callable[..., Plan]) -> None:
    plan = planned(run, "model={name: coatnet_nano, pool: average}")
    with pytest.raises(ConfigError) as refused:
        checked_start(plan, run_folder_of(plan))
    assert str(refused.value).splitlines() == [
        f"{run}/checkpoints/step-00000007: these weights are of another architecture than coatnet_nano of the recipe:",
        "  blocks: 8 C1x8 C1x16 T2x32 T1x32 (stride 1) there, 32 C2x32 C2x64 T1x96 T1x128 (stride 1) here, without an option",
        "  head_size: 16 there, 32 here",
        "  pool: max there, average here",
        "no setting matches all of it; start from other weights",
    ]
    plan = planned(run, "model={name: coatnet_debug, depths: [1, 1, 2, 1], pool: average, head_hidden_layer: false}")
    with pytest.raises(ConfigError, match=r"\nset model\.pool: max, model\.head_hidden_layer: true$"):
        checked_start(plan, run_folder_of(plan))


def test_a_file_with_our_names_says_what_it_leaves_open(planned: Callable[..., Plan], tmp_path: Path) -> None:
    state = plain(trained_model(3))
    save_file(state, tmp_path / "weights.safetensors")
    torch.save(state, tmp_path / "weights.pt")
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    averaged = plain(trained_model(4))
    torch.save({"state_dict": wrapped, "model_ema": averaged, "epoch": 3, "optimizer": {}}, tmp_path / "run.pth")
    for name, which, seed in (
        ("weights.safetensors", "auto", 3), ("weights.pt", "raw", 3), ("run.pth", "raw", 3), ("run.pth", "auto", 4),
    ):  # fmt: skip
        said, _, model = started(planned(tmp_path / name, f"pretrain.start_weights={which}"))
        assert_same_model(model, trained_model(seed))
        assert "3 classes as here, without their names" in said.classifier
        assert any("(pool, stride_in, gelu, epsilons) are taken for those of the recipe" in r for r in said.remarks)
        assert rows(said).get("left out", 0) == (2 if name == "run.pth" else 0)
    plan = planned(tmp_path / "weights.pt", "pretrain.start_weights=ema")
    with pytest.raises(ConfigError, match="holds no moving average; use the raw weights, or auto"):
        checked_start(plan, run_folder_of(plan))


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_file_that_holds_more_than_tensors_is_refused_and_runs_nothing(
    planned: Callable[..., Plan], tmp_path: Path
) -> None:
    path, made = tmp_path / "weights.pth", tmp_path / "made"
    content = {"state_dict": plain(trained_model(3)), "extra": _Evil(made)}
    torch.save(content, path)
    plan = planned(path)
    with pytest.raises(ConfigError, match=r"holds more than tensors and plain values \(posix\.mkdir\), and is not"):
        checked_start(plan, run_folder_of(plan))
    torch.save(content, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ConfigError, match=r"no torch file, or of a version before 1\.6"):
        checked_start(plan, run_folder_of(plan))
    assert not made.exists()


BROKEN: list[tuple[str, Callable[[Path], object], str]] = [
    ("a.safetensors", lambda path: path.write_bytes(b"\x08" + bytes(7) + b"nonsense"), "cannot be read"),
    ("a.pt", lambda path: path.write_bytes(b"nonsense"), "no torch file"),
    ("a.pt", lambda path: path.write_bytes(b""), "no torch file"),
    ("a.pt", lambda path: path.write_bytes(pickle.dumps([1])), "no torch file"),
    ("a.pt", lambda path: torch.save([torch.zeros(2)], path), "holds a list; a dictionary of tensors is needed"),
    ("a.pt", lambda path: torch.save({"a": 1}, path), "has no tensors under names"),
    ("a.npz", lambda path: path.write_bytes(b"PK"), r"not a file of weights that can be read \(\.safetensors, \.pth, "),
    ("a.pt", lambda path: torch.save({"fc.weight": torch.zeros(2)}, path), r"neither our names nor those of timm's CoAtNet \(the first is fc\.weight\)"),
    ("a.pt", lambda path: torch.save({"blocks.0.x": torch.zeros(2)}, path), r"lacks stem\.norm\.running_mean and \d+ more of BatchNorm's"),
    ("a.safetensors", lambda path: None, "there is no such file; correct the path"),
    ("a", lambda path: path.mkdir(), "not a trained model: no run folder, checkpoint or exported model"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "make", "message"), BROKEN)
def test_what_cannot_be_started_from_is_named_with_the_reason(
    planned: Callable[..., Plan], tmp_path: Path, name: str, make: Callable[[Path], object], message: str
) -> None:
    make(tmp_path / name)
    plan = planned(tmp_path / name)
    with pytest.raises(ConfigError, match=f"^{tmp_path}/{name}: .*({message})"):
        checked_start(plan, run_folder_of(plan))


def test_weights_at_a_url_are_read_by_their_header_first(planned: Callable[..., Plan], tmp_path: Path) -> None:
    save_file(plain(trained_model(3)), tmp_path / "weights.safetensors")
    size = (tmp_path / "weights.safetensors").stat().st_size
    with WebServer(tmp_path) as server:
        plan = planned(f"{server.url}/weights.safetensors")
        assert checked_start(plan, run_folder_of(plan)) is not None
        _, _, model = started(plan)
        assert_same_model(model, trained_model(3))
        local = content_digest(str(tmp_path / "weights.safetensors"), plan_storage(plan))
        assert content_digest(f"{server.url}/weights.safetensors", plan_storage(plan)) == local
        with pytest.raises(ConfigError, match=r"/missing\.safetensors: there is no such file"):
            checked_start(planned(f"{server.url}/missing.safetensors"), run_folder_of(plan))
    assert size > 100_000


def plan_storage(plan: Plan) -> Storage:
    return Storage(**plan.stage.data.storage.model_dump())


def test_a_damaged_checkpoint_of_another_run_is_refused(planned: Callable[..., Plan], tmp_path: Path) -> None:
    checkpoint = save_trained(tmp_path / "runs/big/pretrain", 5, classes=CLASSES)
    plan = planned(checkpoint)
    file = checkpoint / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert checked_start(plan, run_folder_of(plan)) is not None  # headers are right
    with pytest.raises(ConfigError, match=r"rank-00000\.safetensors has another checksum|sha256|checksum"):
        started(plan)
    file.write_bytes(content[:-1])
    with pytest.raises(ConfigError, match=r"rank-00000\.safetensors has [\d,]+ bytes instead of"):
        checked_start(plan, run_folder_of(plan))


@pytest.mark.parametrize("place", ["metadata", "folder"])
def test_an_exported_file_and_an_exported_folder_are_read_with_the_names_of_their_classes(
    planned: Callable[..., Plan], tmp_path: Path, place: str
) -> None:
    out, remote = tmp_path / "out", ""
    out.mkdir()
    export(out, trained_model(3), CLASSES, in_file=place == "metadata")
    location = out / "model.safetensors" if place == "metadata" else out
    with WebServer(tmp_path) as server:
        remote = f"{server.url}/out" + ("/model.safetensors" if place == "metadata" else "")
        for start in (str(location), remote):
            said, _, model = started(planned(start))
            assert_same_model(model, trained_model(3))
            assert (said.origin, said.step, said.weights) == ("the exported model", 7, "ema")
            assert said.classifier.startswith("starts with the classifier of the exported model: the same classes")
    export(out, trained_model(3), ("bright", "Dark", "striped"), in_file=place == "metadata")
    said, _, _ = started(planned(location))
    assert "class 1 was Dark and is dark" in said.classifier
    plan = planned(location, "pretrain.start_weights=raw")
    with pytest.raises(ConfigError, match="holds their moving average alone; use auto, or export the others"):
        checked_start(plan, run_folder_of(plan))
    plan = planned(location, "model={name: coatnet_debug}")
    with pytest.raises(ConfigError, match=r"set model\.depths: \[1, 1, 2, 1\]|blocks: 8 C1x8"):
        checked_start(plan, run_folder_of(plan))


def export(folder: Path, model: CoAtNet, classes: tuple[str, ...], *, in_file: bool) -> None:
    """What `coatnet export` writes."""
    facts = ModelFacts(
        arguments=MODEL, classes=classes, display_names=None, preprocessing=PREPROCESSING, loss="softmax", weights="ema",
        step=7, samples=70, run_id=None, stage="pretrain", recipe_digest=None, classes_digest=json_sha256(classes),
        source=ModelSource("a", "b"),
    )  # fmt: skip
    config = json.dumps(config_of(facts))
    save_file(plain(model), folder / "model.safetensors", {CONFIG_KEY: config} if in_file else None)
    if not in_file:
        (folder / "config.json").write_text(config)
