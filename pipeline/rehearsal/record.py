"""The result of a rehearsal, as JSON and people read it."""

from dataclasses import dataclass

from pipeline.preflight.finding import Finding
from pipeline.recipe.schema import Precision
from pipeline.rehearsal.checkpoint_layout import PlannedFile
from pipeline.rehearsal.partitions import PartitionSizes
from pipeline.rehearsal.reshape import Reshape
from pipeline.rehearsal.sample_shares import CacheNeed, DataFacts, StepShare


@dataclass(frozen=True, slots=True)
class RehearsedRank:
    """One rank's part of the job."""

    rank: int
    node: int
    """From 0."""
    partitions: tuple[PartitionSizes, ...]
    """What it holds with each ZeRO stage that the precision allows."""
    files: tuple[PlannedFile, ...]
    """What it writes of each checkpoint, the leader's among them."""
    steps: tuple[StepShare, ...]
    """Its samples of the first step with the present batch and of the last one; empty without data."""
    build_seconds: float
    """That its engine took."""
    build_peak_bytes: int
    """Main memory of the process in which its engine was built."""


@dataclass(frozen=True, slots=True)
class Consistency:
    """What was checked over all ranks; anything else than what it says would have been an error."""

    elements_owned_once: dict[int, int]
    """By ZeRO stage: elements of parameters, each saved by exactly one rank."""
    samples_seen_once: dict[int, int]
    """By step: samples of its batch, each read by exactly one rank."""
    files_named_once: int
    """Files of a checkpoint, each with a name of its own."""
    engines_as_computed: int
    """Engines of DeepSpeed that hold and save what the arithmetic says."""


@dataclass(frozen=True, slots=True)
class CheckpointTotals:
    """A whole checkpoint."""

    files: int
    bytes: int
    fragments: int
    smallest_rank_file: int
    largest_rank_file: int
    manifest_bytes: int
    """By stand-ins for what only a run knows, such as the name of the GPU: some hundred bytes more or less."""


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What a stage would do on so many ranks, as far as one machine can tell."""

    recipe: str
    stage: str
    model: str
    precision: Precision
    zero_stage: int
    ranks: int
    nodes: int
    ranks_per_node: int
    parameters: int
    micro_batches_per_rank: int
    """Of a step."""
    data: DataFacts | None
    """None without shards and without any assumed."""
    rehearsed: tuple[RehearsedRank, ...]
    checkpoint: CheckpointTotals
    cache: CacheNeed | None
    consistency: Consistency
    reshapes: tuple[Reshape, ...]
    """Of the run's newest checkpoint if there is one, otherwise of one that these ranks would save."""
    findings: tuple[Finding, ...]
    """What would stop the job on the cluster, or make it slow."""
    answered: tuple[str, ...]
    """What other ranks or machines would have said, and was answered for them or left out."""
    assumed: tuple[str, ...]
    """What was made up."""
    seconds: float
    peak_bytes: int
    """Main memory of the largest process."""

    @property
    def fails(self) -> bool:
        """Whether the job would not run."""
        refused = any(reshape.refused for reshape in self.reshapes)
        return refused or any(finding.level == "error" for finding in self.findings)
