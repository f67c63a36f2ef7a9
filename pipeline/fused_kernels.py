"""What the fused depthwise convolution needs: GPUs, Triton, and a model that has such convolutions."""

from importlib.util import find_spec

from pipeline.compiler import check_compiler
from pipeline.errors import ConfigError
from pipeline.recipe.schema import TrainStage

_SETTING = "fused_depthwise"


def check_fused_depthwise(stage: TrainStage, where: str, *, elsewhere: bool = False) -> None:
    """Check that a stage with `fused_depthwise` can have it; with `elsewhere`, it runs on other machines.

    Raises:
        ConfigError: its ranks have no GPUs, its model has no such block, or Triton or a compiler is missing here.
    """
    if not stage.fused_depthwise:
        return
    if not stage.resources.gpus_per_rank:
        raise ConfigError(
            f"{where}{_SETTING}: its kernels run on GPUs, and the ranks of this stage have none "
            f"(resources.gpus_per_rank: 0); leave {_SETTING} out, or give them GPUs"
        )
    variant = stage.model.variant
    if variant.convolution_norm != "batch" or all(part.kind != "mbconv" for part in variant.stages):
        raise ConfigError(
            f"{where}{_SETTING}: it is for MBConv blocks with BatchNorm, and {stage.model.name} as it is set here has "
            f"none; leave {_SETTING} out"
        )
    if elsewhere:
        return
    if find_spec("triton") is None:
        raise ConfigError(
            f"{where}{_SETTING}: its kernels are compiled by Triton, which is not installed here; install a build of "
            f"torch for GPUs, which brings it, or leave {_SETTING} out"
        )
    check_compiler(where, _SETTING, "Triton")


def check_kernel_device(stage: TrainStage, *, on_gpu: bool, where: str) -> None:
    """Check that a rank of a stage with `fused_depthwise` has found a GPU.

    Raises:
        ConfigError: it computes on a CPU, where the same in plain torch would be slower than without the setting.
    """
    if stage.fused_depthwise and not on_gpu:
        raise ConfigError(
            f"{where}{_SETTING}: its kernels run on GPUs, and torch finds none on this machine, so this rank computes "
            f"on CPUs; leave {_SETTING} out, or see why torch.cuda.is_available() is false"
        )
