"""CoAtNet as a PyTorch module: blocks, relative attention and the table of variants; depends on torch alone, and on
safetensors for exported models.

    from models import create_model, load_pretrained
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `models.model_facts` and `models.variants` are read by commands that start without torch
    from models.pretrained import load_pretrained
    from models.registry import create_model

__all__ = ["create_model", "load_pretrained"]


def __getattr__(name: str) -> Any:
    if name == "create_model":
        from models.registry import create_model

        return create_model
    if name == "load_pretrained":
        from models.pretrained import load_pretrained

        return load_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
