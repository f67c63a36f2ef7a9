"""The readers that are fuzzed, by name."""

from tests.fuzzing.campaign import Target
from tests.fuzzing.targets import datasets, exports, runs, services, texts, weights

TARGETS: dict[str, Target] = {
    target.name: target for part in (datasets, texts, runs, exports, services, weights) for target in part.TARGETS
}
