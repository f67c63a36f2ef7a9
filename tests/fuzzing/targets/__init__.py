"""The readers that are fuzzed, by name."""

from tests.fuzzing.campaign import Target
from tests.fuzzing.targets import datasets, runs, services, texts

TARGETS: dict[str, Target] = {
    target.name: target for part in (datasets, texts, runs, services) for target in part.TARGETS
}
