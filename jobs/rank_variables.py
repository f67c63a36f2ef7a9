"""The variables that make a process one rank of several, as torchrun, Kubernetes and this program set them."""

from collections.abc import Mapping

_NAMES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
    "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


def rank_variables(environment: Mapping[str, str]) -> list[str]:
    """The names of those that are set; the ones of torchrun's agent decide where torch looks for its store."""
    return sorted(name for name in environment if name in _NAMES or name.startswith("TORCHELASTIC_"))
