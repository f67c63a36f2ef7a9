"""`recipe.yaml` of a run folder: the settings of a stage, and what they were before they were changed on purpose."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.runs.settings_history import SettingsHistory


@dataclass(frozen=True, slots=True)
class FrozenStage:
    """What a stage was at its first start, or since its settings were last changed by `--extend`."""

    stage: str
    seed: int
    task: Literal["train", "evaluate"]
    index_digests: Mapping[str, str]
    """Of the indexes of `train` and `validation` shards."""
    start_digest: str | None
    """See `run_folder.start_digest`."""
    content: Mapping[str, Any]
    """The whole file, with all settings of the stage."""
    changes: SettingsHistory | None = None
    """Of the settings; None if there was none."""

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the stage, as `TrainStage` and `EvaluateStage` have them."""
        own = {"stage", "seed", "index_digests", "start_digest", "changes"}
        return {key: value for key, value in self.content.items() if key not in own}
