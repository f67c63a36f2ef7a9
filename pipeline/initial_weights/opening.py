"""Opens what a stage starts from, whatever it is.

Without ranks nothing but headers is read, so that a recipe can be checked before it runs; tensors are then on the meta
device. With the ranks of a stage every checksum that there is is verified.
"""

from pathlib import Path

from pipeline.initial_weights.checkpoint_source import open_checkpoint_source
from pipeline.initial_weights.content import weight_file_at
from pipeline.initial_weights.file_source import open_file_source
from pipeline.initial_weights.source import Request, WeightSource
from pipeline.ranks.distributed import Ranks


def open_source(request: Request, ranks: Ranks | None = None, scratch: Path | None = None) -> WeightSource:
    """The weights that are requested.

    Args:
        request: what is wanted.
        ranks: of the stage; all of them call this together.
        scratch: folder for the downloads of a remote checkpoint.

    Raises:
        ConfigError: there are none, they are damaged, another model's, or not the requested ones.
        StorageDown, StorageRefused: a remote store that cannot be read.
    """
    file = None if request.earlier else weight_file_at(request.location, request.storage)
    if file:
        return open_file_source(request, file, values=ranks is not None)
    return open_checkpoint_source(request, ranks, scratch)
