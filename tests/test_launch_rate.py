"""How fast a rank launches work: measured without a trace in what the run computes."""

import pytest

pytestmark = pytest.mark.cpu


def test_measuring_draws_no_random_numbers_and_leaves_no_gradient():
    import torch

    from harness.entry import launch_rate

    before = torch.get_rng_state()
    with torch.no_grad():
        rate = launch_rate.measure("cpu")
    assert torch.get_rng_state().equal(before)
    assert 0 < rate.add_us < rate.operation_us, (
        "an operation that autograd records costs more than one that it does not"
    )


def test_a_host_that_launches_more_slowly_shows(monkeypatch):
    from harness.entry import launch_rate

    times_s = iter(x for batch in range(100) for x in (batch, batch + 0.004))
    monkeypatch.setattr(launch_rate.time, "perf_counter", lambda: next(times_s))
    rate = launch_rate.measure("cpu")
    assert rate.add_us == pytest.approx(4000 / launch_rate.ADDS)
    assert rate.operation_us == pytest.approx(4000 / (launch_rate.TURNS * 6))
