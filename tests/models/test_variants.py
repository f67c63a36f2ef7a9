"""The table of variants and its options."""

from dataclasses import replace
from typing import Any

import pytest

from models.variants import VARIANTS, find_variant


def layout(name: str) -> str:
    return "-".join({"mbconv": "C", "transformer": "T"}[stage.kind] for stage in VARIANTS[name].stages)


def test_the_family_is_complete() -> None:
    published = {f"coatnet_{number}" for number in range(8)} | {"coatnet_6_table12"}
    assert published | {f"{name}_dw" for name in published} <= VARIANTS.keys()
    assert [layout(f"coatnet_2_{name}") for name in ("cccc", "ccct", "cctt", "cttt", "vit_rel")] == [
        "C-C-C-C", "C-C-C-T", "C-C-T-T", "C-T-T-T", "T",
    ]  # fmt: skip
    assert VARIANTS["coatnet_2_vit_rel"].stem_stride == VARIANTS["coatnet_2_vit_rel"].stride == 16
    assert VARIANTS["coatnet_3_dw"] == replace(VARIANTS["coatnet_3"], stride_in="depthwise")


def test_options_override_those_of_the_variant() -> None:
    variant = find_variant("coatnet_2", head_size=64, depths=(2, 2, 18, 2), pool="average")
    assert (variant.head_size, variant.pool) == (64, "average")
    assert [stage.depth for stage in variant.stages] == [2, 2, 18, 2]
    assert [stage.width for stage in variant.stages] == [128, 256, 512, 1024]
    small = find_variant("coatnet_0", widths=(8, 8, 16, 32, 64))
    assert (small.stem_width, small.stages[-1].width) == (8, 64)


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("coatnet_8", {}, "unknown model coatnet_8; did you mean coatnet_7 or coatnet_6 or coatnet_5?"),
    ("resnet50", {}, "unknown model resnet50; known: coatnet_0, coatnet_0_dw"),
    ("coatnet_0", {"heads_size": 32}, "unknown option heads_size of coatnet_0; did you mean head_size"),
    ("coatnet_0", {"stages": ()}, "unknown option stages"),
    (
        "coatnet_0",
        {"head_size": 40},
        "head_size 40 does not divide the width 384 of a Transformer stage; sizes that do: 8, 12, 16",
    ),
    ("coatnet_0", {"head_size": 0}, "must be positive"),
    ("coatnet_0", {"gelu": "sigmoid"}, "gelu 'sigmoid': must be tanh or exact"),
    ("coatnet_0", {"layer_norm_epsilon": 0.0}, "layer_norm_epsilon must be positive"),
    ("coatnet_0", {"pool": "median"}, "pool 'median': must be max or average"),
    ("coatnet_0", {"relative_attention": "off"}, "must be pre_normalization or post_normalization or none"),
    ("coatnet_0", {"depths": (2, 3)}, "takes 4 depths and, with the stem's, 5 widths"),
    ("coatnet_0", {"widths": (64, 96, 192, 384)}, "takes 4 depths and, with the stem's, 5 widths"),
    ("coatnet_0", {"depths": (2, 0, 5, 2)}, "must be positive"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD, ids=lambda value: str(value)[:40])
def test_errors_name_what_does_not_fit(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("?", r"\?")):
        find_variant(name, **options)
