"""Training samples that a recipe leaves out: whether the shards that it names are there."""

import difflib

from data.dataset import Dataset
from pipeline.errors import ConfigError
from pipeline.recipe.schema import TrainStage


def check_excluded_samples(stage: TrainStage, train: Dataset, where: str) -> None:
    """Check `data.excluded_samples` as far as the index goes, which has the names of shards and no keys.

    Raises:
        ConfigError: an entry begins with the name of no shard, so that it would leave out nothing.
    """
    if not stage.data.excluded_samples:
        return
    shards = [shard.name for shard in train.index.shards]
    known = set(shards)
    for entry in stage.data.excluded_samples:
        parts = entry.split("/")
        if any("/".join(parts[:count]) in known for count in range(1, len(parts))):
            continue
        near = difflib.get_close_matches(parts[0], shards, 1)
        hint = f"; did you mean {near[0]}/{entry.partition('/')[2] or entry}?" if near else ""
        raise ConfigError(
            f"{where}data.excluded_samples: {entry}: no shard of {train.index.folder} has the name it begins with; "
            f"write shard/key, such as {shards[0]}/KEY{hint}"
        )
