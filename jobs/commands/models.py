"""`coatnet models`: what each variant is and costs, beside the paper's figures."""

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from jobs.commands.arguments import AsJson
from jobs.console import make_console, print_json
from jobs.exit_codes import exit_on_error
from models.complexity import PUBLISHED, count_costs, count_parameters, count_parameters_without_dense_head
from models.variants import VARIANTS, Variant, find_variant
from pipeline.errors import ConfigError

SIZES = (224, 384, 512)


def models(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Variants to show.", show_default="all")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the model variants with layers, parameters, multiply-adds and memory, and the paper's figures."""
    with exit_on_error():
        try:
            variants = {name: find_variant(name) for name in names or VARIANTS}
        except ValueError as error:
            raise ConfigError(str(error)) from None
        console = make_console()
        with console.status("counting"):
            facts = {name: describe(name, variant) for name, variant in variants.items()}
        if as_json:
            print_json(facts)
        else:
            console.print(table(facts, narrow=console.width < 130))
            console.print(
                "\nIn brackets: the paper's figures. Stages: width of the stem, then depth x width, C for MBConv and T "
                "for Transformer. Parameters: with 1000 classes and position tables for 224 pixels. G: billions of "
                "multiply-adds for one image of that many pixels. MiB: bf16 activations that one image of 224 pixels "
                "keeps for the backward pass."
            )


def describe(name: str, variant: Variant) -> dict[str, Any]:
    """The facts about one variant that `--json` prints; docs/models.md has the keys."""
    published = PUBLISHED.get(name)
    costs = {str(size): count_costs(variant, size) for size in SIZES}
    return {
        "stem_width": variant.stem_width,
        "stages": [asdict(stage) for stage in variant.stages],
        "head_size": variant.head_size,
        "stride": variant.stride,
        "parameters": count_parameters(variant),
        "parameters_without_dense_head": count_parameters_without_dense_head(variant),
        "multiply_adds": {size: sum(cost.multiply_adds for cost in parts) for size, parts in costs.items()},
        "activation_bytes": {size: sum(cost.activation_bytes for cost in parts) for size, parts in costs.items()},
        "published": {
            "parameters": published.parameters if published else None,
            "multiply_adds": {str(k): round(v * 1e9) for k, v in published.multiply_adds.items()} if published else {},
        },
    }


def table(facts: dict[str, dict[str, Any]], *, narrow: bool) -> Table:
    """The facts as a table, for 80 columns if `narrow`; published figures in brackets."""
    result = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    result.add_column("variant", no_wrap=True)
    result.add_column("stages", width=8 if narrow else None)
    result.add_column("parameters", justify="right", width=13 if narrow else None)
    for size in SIZES:
        result.add_column(f"G at {size}", justify="right", width=8 if narrow else None)
    result.add_column("MiB", justify="right")
    for name, fact in facts.items():
        printed = {size: f" ({value / 1e9:g})" for size, value in fact["published"]["multiply_adds"].items()}
        parameters = fact["published"]["parameters"]
        result.add_row(
            name,
            _stages(fact),
            f"{fact['parameters']:,}" + (f" ({parameters})" if parameters else ""),
            *(f"{value / 1e9:,.2f}{printed.get(size, '')}" for size, value in fact["multiply_adds"].items()),
            f"{fact['activation_bytes']['224'] / 2**20:,.0f}",
        )
    return result


def _stages(fact: dict[str, Any]) -> str:
    letters = {"mbconv": "C", "transformer": "T"}
    stages = (f"{letters[stage['kind']]}{stage['depth']}x{stage['width']}" for stage in fact["stages"])
    return " ".join([str(fact["stem_width"]), *stages])
