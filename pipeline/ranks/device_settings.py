"""What decides how devices compute: environment variables that CUDA and NCCL read once, and torch's switches.

Called before anything asks for a GPU, in every process that computes, however it was started. docs/gpus.md explains it.
"""

import os
import sys
from collections.abc import Mapping, MutableMapping

import torch

from pipeline.errors import ConfigError
from pipeline.ranks.rendezvous import LAUNCHER

_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_WORKSPACES = (":4096:8", ":16:8")
"""Sizes of its workspace with which cuBLAS is deterministic (https://docs.nvidia.com/cuda/cublas, reproducibility)."""
_RECORDER = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")  # since torch 2.9, and before, still read
_RECORDED = 2000
"""Collectives that NCCL's flight recorder keeps."""

GPU_PROMISES = {
    True: "equal bits on the same kind and number of machines; other nodes may reorder NCCL's sums",
    False: "the bits of two runs may differ, since GPUs add in any order",
}
"""What holds for the results of GPUs, by the setting `deterministic`."""


def prepare_devices(*, gpus: bool, deterministic: bool) -> None:
    """Set the environment variables and torch's switches for a process that computes.

    Args:
        gpus: whether it may use GPUs; otherwise it sees none, so that ranks without GPUs run beside one that is there.
        deterministic: whether only deterministic algorithms are used. On CPUs all of them are; the switch is set there
            as well, since it makes an operation without such an algorithm an error.
    """
    if gpus:
        os.environ.update(gpu_variables(os.environ, deterministic=deterministic))
    else:
        os.environ.update(dict.fromkeys(_VISIBLE, ""))
    # torch.use_deterministic_algorithms does the same, and imports the compiler, which takes seconds.
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
    _set_compiler(os.environ, deterministic=deterministic)
    # It would fill new memory with NaN: a pass over all of it that no result depends on.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic  # the fastest algorithm of a timing, another one each time
    # By default torch rounds the inputs of convolutions to 11 bits and those of matrix products not. Float32 means
    # float32 for both; bf16_autocast is the setting for speed.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def gpu_variables(environment: Mapping[str, str], *, deterministic: bool) -> dict[str, str]:
    """The variables to set in an environment whose process uses GPUs; what a person has set stays as it is, but for a
    workspace of cuBLAS with which it is not deterministic."""
    wanted = {
        # Without it, the monitoring thread of NCCL's process group aborts a job that was suspended for longer than its
        # heartbeat, eight minutes. The watchdog of this program notices hangs, and knows suspensions.
        "TORCH_NCCL_ENABLE_MONITORING": "0",
    }
    if not any(environment.get(name) for name in _ALLOCATOR):
        # Micro-batches of stochastic depth have ever other sizes, which fragment memory in fixed segments.
        wanted["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if not any(environment.get(name) for name in _RECORDER):
        wanted[_RECORDER[0]] = str(_RECORDED)  # torch warns about the other one
    found = {name: value for name, value in wanted.items() if not environment.get(name)}
    if deterministic and environment.get(_WORKSPACE) not in _WORKSPACES:
        found[_WORKSPACE] = _WORKSPACES[0]
    return found


def gpu_of_rank(local_rank: int, visible: int, environment: Mapping[str, str], node: str) -> int:
    """The number of the GPU of a rank among the `visible` ones of its process: that of the rank on its machine, or 0
    where each task of a job sees a GPU of its own, as with `srun --gpus-per-task=1`.

    Raises:
        ConfigError: there are more ranks than GPUs.
    """
    if local_rank < visible:
        return local_rank
    listed = next((environment[name] for name in _VISIBLE if environment.get(name)), "")
    # Ranks that this program starts itself all have the same list.
    if visible == 1 and listed and "," not in listed and LAUNCHER not in environment:
        return 0
    raise ConfigError(
        f"the rank with number {local_rank} on {node} needs a GPU of its own, and there "
        f"{'is 1' if visible == 1 else f'are {visible}'} for the ranks of this machine; set resources.ranks and "
        "resources.nodes to as many ranks on each machine as it has GPUs, or resources.gpus_per_rank=0 to use CPUs"
    )


def _set_compiler(environment: MutableMapping[str, str], *, deterministic: bool) -> None:
    """Let the code that torch.compile generates follow: its configuration is read when the compiler is imported."""
    environment["TORCHINDUCTOR_DETERMINISTIC"] = "1" if deterministic else "0"
    if (configuration := sys.modules.get("torch._inductor.config")) is not None:
        configuration.deterministic = deterministic  # type: ignore[attr-defined]
