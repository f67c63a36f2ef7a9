"""Starting from weights of timm: equal logits where the options match, and what differs where they do not."""

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models.differences import differences_text
from models.timm_differences import TimmWeights
from models.variants import find_variant
from pipeline.errors import ConfigError
from pipeline.initial_weights.start import checked_start
from pipeline.plan import Plan, plan_stage
from pipeline.recipe.loader import load_recipe
from tests.pipeline.initial_weights.test_start import plain, rows, run_folder_of, started
from tests.support.recipes import write_recipe
from tests.support.timm_import import timm

SHAPE: dict[str, Any] = {"depths": [1, 1, 2, 1], "widths": [8, 8, 16, 32, 32], "head_size": 16}
AS_TIMM: dict[str, Any] = {
    "stride_in": "depthwise", "pool": "average", "gelu": "exact", "batch_norm_epsilon": 1e-5, "layer_norm_epsilon": 1e-6,
}  # fmt: skip
THEIRS: dict[str, Any] = {
    "stem_width": 8, "embed_dim": [8, 16, 32, 32], "depths": [1, 1, 2, 1], "head_hidden_size": 32,
    "transformer_dim_head": 16,
}  # fmt: skip
"""The same shape for timm's `coatnet_0`; with nothing else its registered choices remain."""


def of_timm(seed: int = 0, classes: int = 3, size: int = 32, **arguments: Any) -> nn.Module:
    """A model of timm with random weights and statistics."""
    model: nn.Module = timm.create_model("coatnet_0_224", num_classes=classes, img_size=size, **{**THEIRS, **arguments})
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.normal_(0.0, 0.3, generator=generator)
            if name.endswith("running_var"):
                tensor.abs_().add_(0.01)
    return model.eval()


@pytest.fixture
def planned(shards: Path, tmp_path: Path) -> Callable[..., Plan]:
    def plan(start: Path, options: dict[str, Any], *overrides: str, stage: str = "pretrain") -> Plan:
        path = write_recipe(tmp_path / "mine", shards, model={"name": "coatnet_0", **SHAPE, **options})
        return plan_stage(load_recipe(path, [f"{stage}.start_from={start}", *overrides]), stage)

    return plan


def assert_equal_logits(ours: nn.Module, theirs: nn.Module, size: int = 32) -> None:
    pictures = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(pictures.permute(0, 2, 3, 1)), theirs(pictures), atol=1e-5, rtol=1e-5)


def test_timms_own_coatnet_is_taken_with_its_logits_and_what_is_assumed_is_said(
    planned: Callable[..., Plan], tmp_path: Path
) -> None:
    theirs = of_timm()
    save_file(plain(theirs), tmp_path / "weights.safetensors")  # type: ignore[arg-type]
    said, fitted, ours = started(planned(tmp_path / "weights.safetensors", AS_TIMM))
    assert_equal_logits(ours, theirs)
    counters = sum(name.endswith("num_batches_tracked") for name in theirs.state_dict())
    assert rows(said) == {"taken": len(ours.state_dict()) - 2, "zero": 2, "left out": counters}
    assert not fitted.parameters["stem.conv2.bias"].any()
    (remark,) = said.remarks
    assert remark.startswith(
        "there is no config.json that would say what tensors do not show; it is taken as timm's coatnet_0"
    )
    assert "stride of MBConv in: depthwise" in remark


def test_its_config_tells_what_tensors_do_not_show(planned: Callable[..., Plan], tmp_path: Path) -> None:
    arguments = {**THEIRS, "stem_bias": True, "conv_stride_mode": "1x1", "transformer_rel_pos_type": "bias_tf"}
    theirs = of_timm(**arguments)
    save_file(plain(theirs), tmp_path / "model.safetensors")  # type: ignore[arg-type]
    as_ours = {**AS_TIMM, "stride_in": "expansion"}
    plan = planned(tmp_path / "model.safetensors", as_ours)
    with pytest.raises(
        ConfigError, match=r"tensors do not show conv_stride_mode, .*; put a config\.json beside the file"
    ):
        checked_start(plan, run_folder_of(plan))
    labels = ["bright", "dark", "Striped"]
    pixels = {"mean": [0.5, 0.5, 0.5], "std": [0.229, 0.224, 0.225], "label_names": labels}
    config = {"architecture": "coatnet_0_224", "model_args": arguments, "pretrained_cfg": pixels}
    (tmp_path / "config.json").write_text(json.dumps(config))
    said, _, _ = started(planned(tmp_path, as_ours))  # the folder
    assert "class 2 was Striped and is striped" in said.classifier
    assert said.remarks == (
        "its images were normalized with the mean [0.5, 0.5, 0.5], and here it is [0.485, 0.456, 0.406]",
    )
    labels[2] = "striped"
    (tmp_path / "config.json").write_text(json.dumps(config))
    said, _, ours = started(planned(tmp_path, as_ours))
    assert said.keeps_classifier
    assert_equal_logits(ours, theirs)
    plan = planned(tmp_path, AS_TIMM)
    with pytest.raises(
        ConfigError, match=r"stride of MBConv in: expansion there, depthwise here\nset model\.stride_in: expansion$"
    ):
        checked_start(plan, run_folder_of(plan))


def test_a_checkpoint_of_timms_training_script_is_read_with_its_options_and_its_moving_average(
    planned: Callable[..., Plan], tmp_path: Path
) -> None:
    raw, averaged = (
        of_timm(1, conv_pool_type="max2", transformer_pool_type="max2"),
        of_timm(2, conv_pool_type="max2", transformer_pool_type="max2"),
    )
    script = Namespace(
        model="coatnet_0_224", lr=0.1, model_kwargs={"conv_pool_type": "max2", "transformer_pool_type": "max2"}
    )
    content = {
        "epoch": 3, "arch": "coatnet_0_224", "state_dict": raw.state_dict(), "optimizer": {"state": {}}, "args": script,
        "state_dict_ema": averaged.state_dict(),
    }  # fmt: skip
    torch.save(content, tmp_path / "model_best.pth.tar")
    for which, theirs in (("raw", raw), ("auto", averaged)):
        options = {**AS_TIMM, "pool": "max"}
        said, _, ours = started(planned(tmp_path / "model_best.pth.tar", options, f"pretrain.start_weights={which}"))
        assert_equal_logits(ours, theirs)
        assert "epoch, arch, optimizer, args" in next(row.which for row in said.table if row.what == "left out")


def test_another_image_size_and_another_number_of_classes(planned: Callable[..., Plan], tmp_path: Path) -> None:
    save_file(plain(of_timm(classes=5, size=64)), tmp_path / "weights.safetensors")  # type: ignore[arg-type]
    said, _, _ = started(planned(tmp_path / "weights.safetensors", AS_TIMM))
    assert said.resized == {"7 x 7 to 3 x 3": 2, "3 x 3 to 1 x 1": 1}
    assert said.classifier == ("starts with a new classifier, because timm's CoAtNet was trained for other classes (5)")
    save_file(plain(of_timm(classes=0)), tmp_path / "weights.safetensors")  # type: ignore[arg-type]
    said, _, _ = started(planned(tmp_path / "weights.safetensors", AS_TIMM))
    assert said.classifier == "starts with a new classifier, because timm's CoAtNet has none"


RW = {
    "coatnet_0_rw_224": [
        "blocks: 64 C2x96 C3x192 T7x384 T2x768 there", "widths of the stem's two convolutions: 32 and 64 there",
        "hidden width of MBConv: 4 times the input width", "squeeze-and-excitation: before the second norm",
        "bias of MBConv's last convolution: no there", "bias of the Transformer's shortcut: no there",
        "queries, keys and values: of the input width", "head: norm, then pooling, and no hidden layer there",
    ],
    "coatnet_rmlp_1_rw_224": ["relative bias: computed by an MLP there"],
    "coatnet_bn_0_rw_224": ["norm of Transformer blocks: batch there"],
    "coatnet_3_rw_224": ["scale of a layer's output: learned there"],
    "coatnext_nano_rw_224": ["blocks: stages of several kinds of blocks, or of others than CoAtNet's there"],
    "maxvit_tiny_tf_224": ["blocks: stages of several kinds of blocks, or of others than CoAtNet's there"],
}  # fmt: skip


@pytest.mark.parametrize("name", RW)
def test_timms_other_architectures_are_refused_with_every_difference(name: str) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(name)
    weights = TimmWeights({key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}, name)
    text = differences_text(weights.differences(find_variant("coatnet_0")), "coatnet_0")
    assert all(f"\n  {part}" in text for part in RW[name]), text
    assert text.endswith("\nno setting matches all of it; start from other weights")
    assert "stride" not in text.replace("(stride 1)", "")  # nothing is claimed about what tensors do not show


@pytest.mark.parametrize("number", range(6))
def test_timms_coatnet_0_to_5_name_the_settings_by_which_they_match(number: int) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(f"coatnet_{number}_224")
    shapes = {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    weights = TimmWeights(shapes, f"coatnet_{number}_224")
    own = {"head_size": 32} if number == 5 else {}
    assert weights.differences(find_variant(f"coatnet_{number}", **AS_TIMM, **own)) == []
    text = differences_text(weights.differences(find_variant("coatnet_0")), "coatnet_0")
    name = "" if number == 0 else f"model.name: coatnet_{number}, "
    assert text.splitlines()[-1] == (
        f"set {name}model.stride_in: depthwise, model.pool: average, model.gelu: exact, "
        "model.batch_norm_epsilon: 1e-05, model.layer_norm_epsilon: 1e-06"
    )


def test_an_evaluation_takes_such_weights_for_as_many_classes(planned: Callable[..., Plan], tmp_path: Path) -> None:
    save_file(plain(of_timm()), tmp_path / "weights.safetensors")  # type: ignore[arg-type]
    plan = planned(tmp_path / "weights.safetensors", AS_TIMM, "evaluate.resolution=32", stage="evaluate")
    said = checked_start(plan, run_folder_of(plan))
    assert said is not None
    assert said.announcements(plan)[0] == f"evaluates the raw weights in {tmp_path}/weights.safetensors"
    save_file(plain(of_timm(classes=4)), tmp_path / "weights.safetensors")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="trained for other classes than the 3 of the data"):
        checked_start(plan, run_folder_of(plan))
