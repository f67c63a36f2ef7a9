"""What torch.compile is given."""

import pytest
import torch

from pipeline.compiler import compiler_options


@pytest.mark.slow(seconds=4)
def test_deterministic_stages_leave_no_configuration_to_a_timing() -> None:
    import torch._inductor.config as configuration

    assert configuration.triton.autotune_pointwise
    wrapper = torch._TorchCompileInductorWrapper  # refuses options that Inductor does not have
    compiled = wrapper(None, compiler_options(deterministic=True), False)  # type: ignore[no-untyped-call]
    assert compiled.config["triton.autotune_pointwise"] is False
    assert compiler_options(deterministic=False) is None
