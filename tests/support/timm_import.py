"""timm as an oracle: the CPU build of torch needs two schemas before torchvision, which timm imports, can be."""

from typing import Any

from benchmarks.timm_models import import_timm

timm: Any = import_timm()
