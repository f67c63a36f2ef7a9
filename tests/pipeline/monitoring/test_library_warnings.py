"""Which warnings of libraries are left out."""

import warnings

import pytest

from pipeline.monitoring.library_warnings import quiet_library_warnings


def test_only_the_listed_warnings_are_quiet() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        quiet_library_warnings()
        warnings.warn("`torch.distributed.all_gather_into_tensor` is deprecated. Please use another", FutureWarning, 2)
        warnings.warn("`torch.load` will change", FutureWarning, 2)
        warnings.warn("`torch.distributed.reduce` is deprecated", UserWarning, 2)
    assert [str(one.message) for one in shown] == [
        "`torch.load` will change",
        "`torch.distributed.reduce` is deprecated",
    ]


@pytest.mark.parametrize("name", ["all_gather_into_tensor", "reduce_scatter_tensor"])
def test_a_call_that_torch_deprecates_is_quiet(name: str) -> None:
    import torch.distributed as dist

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        quiet_library_warnings()
        with pytest.raises(Exception):  # noqa: B017, PT011 (there is no process group)
            getattr(dist, name)(None, None)
    assert [one for one in shown if one.category is FutureWarning] == []
