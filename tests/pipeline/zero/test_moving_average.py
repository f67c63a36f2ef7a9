"""The moving average by itself."""

import pytest
import torch

from pipeline.zero import moving_average as ema
from pipeline.zero.moving_average import MovingAverage


def test_updates_follow_the_decay_with_its_warm_up() -> None:
    live = torch.zeros(3)
    average = MovingAverage(0.25, [live])
    expected = 0.0
    # The warm-up gives 1/10, 2/11, 3/12 = 0.25, and then the decay is the lesser.
    for number, decay in enumerate((1 / 10, 2 / 11, 3 / 12, 0.25, 0.25)):
        live.fill_(number + 1.0)
        average.update()
        expected = decay * expected + (1 - decay) * (number + 1.0)
        torch.testing.assert_close(average.averages[0], torch.full((3,), expected))
    assert average.updates == 5


def test_it_starts_and_restarts_as_a_copy() -> None:
    live = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])]
    average = MovingAverage(0.9, live)
    assert all(torch.equal(a, b) for a, b in zip(average.averages, live, strict=True))
    live[0] += 1
    average.update()
    assert not torch.equal(average.averages[0], live[0])
    average.restart()
    assert torch.equal(average.averages[0], live[0])
    assert average.updates == 0


def test_exchanging_twice_puts_everything_back_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    live = torch.randn(10, 7)
    average = MovingAverage(0.9, [live])
    live += torch.randn(10, 7)
    average.update()
    before, averaged = live.clone(), average.averages[0].clone()
    monkeypatch.setattr(ema, "_EXCHANGED_AT_ONCE", 16)
    average.exchange()
    assert torch.equal(live, averaged)
    assert torch.equal(average.averages[0], before)
    average.exchange()
    assert torch.equal(live, before)
    assert torch.equal(average.averages[0], averaged)
