"""`coatnet models`: the table and its JSON."""

import io
import json
from typing import Any

import pytest
from rich.console import Console

from jobs.commands.models import table
from models.variants import VARIANTS
from tests.support.command import coatnet
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def facts() -> dict[str, dict[str, Any]]:
    """What `--json` prints."""
    loaded: dict[str, dict[str, Any]] = json.loads(coatnet("models", "--json").stdout)
    return loaded


def test_json_has_the_documented_keys_for_every_variant(facts: dict[str, dict[str, Any]]) -> None:
    assert list(facts) == list(VARIANTS)
    assert facts["coatnet_7"]["parameters"] == 2_441_973_112
    assert facts["coatnet_7"]["parameters_without_dense_head"] == 2_432_532_856
    assert facts["coatnet_0"]["multiply_adds"] == {"224": 4_141_888_512, "384": 13_051_471_872, "512": 25_051_047_936}
    assert facts["coatnet_5"]["published"] == {"parameters": "688M", "multiply_adds": {"512": 812_000_000_000}}
    for fact in facts.values():
        assert fact.keys() == {
            "stem_width", "stages", "head_size", "stride", "parameters", "parameters_without_dense_head", "multiply_adds",
            "activation_bytes", "published",
        }  # fmt: skip
        assert list(fact["activation_bytes"]) == ["224", "384", "512"]


def test_the_document_has_the_table_and_the_keys(facts: dict[str, dict[str, Any]]) -> None:
    document = (ROOT / "docs" / "models.md").read_text()
    console = Console(width=170, file=io.StringIO())
    console.print(table(facts, narrow=False))
    printed = "".join(f"    {line.rstrip()}\n" for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]
    assert printed in document
    keys = {key for fact in facts.values() for key in fact}
    assert all(f"`{key}`" in document for key in keys)


def test_the_table_has_our_figures_beside_the_papers() -> None:
    output = coatnet("models", "coatnet_3", "coatnet_2_vit_rel").stdout
    (row,) = [line for line in output.splitlines() if line.startswith("coatnet_3 ")]
    assert row.split() == [
        "coatnet_3", "192", "C2x192", "C6x384", "T14x768", "T2x1536", "166,966,648", "(168M)", "34.37", "(34.7)",
        "105.79", "(107.4)", "198.11", "(203.1)", "253",
    ]  # fmt: skip
    assert "coatnet_2_vit_rel" in output


def test_an_unknown_variant_is_answered_with_the_closest() -> None:
    outcome = coatnet("models", "coatnet_9")
    assert outcome.returncode == 78
    assert "unknown model coatnet_9; did you mean coatnet_" in outcome.stderr
