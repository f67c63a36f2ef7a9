"""Loading exported models as documented."""

import json
from pathlib import Path
from textwrap import dedent

from safetensors import safe_open
from safetensors.torch import load_file

from models.coatnet import CoAtNet
from models.registry import create_model
from tests.support.paths import ROOT


def load_exported(path: Path) -> CoAtNet:
    """The model in `path`, loaded by the code in docs/formats.md."""
    text = (ROOT / "docs/formats.md").read_text()
    lines = text[text.index("    with safe_open(") :].partition("\n\n")[0]
    names = {"safe_open": safe_open, "load_file": load_file, "create_model": create_model, "json": json}
    exec(dedent(lines).replace('"model.safetensors"', repr(str(path))), names)  # noqa: S102 (our own documentation)
    model = names["model"]
    assert isinstance(model, CoAtNet)
    return model
