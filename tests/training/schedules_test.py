"""The schedule against transformers' own, step by step, and where it differs on purpose."""

import warnings

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from montessori_jax.config import OptimizerConfig, WarmupConfig
from montessori_jax.errors import UserError
from montessori_jax.training.schedules import Phases, phases, rate_table, wsd
from tests.training import samples


def transformers_rates(settings: OptimizerConfig, steps: int) -> list[float]:
    """The rate that each update would use, and three after the end."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=settings.learning_rate)
    schedule = samples.torch_schedule(optimizer, settings, steps)
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the optimizer itself is never stepped
        for _ in range(steps + 3):
            rates.append(schedule.get_last_lr()[0])
            schedule.step()
    return rates


@pytest.mark.parametrize("decay", ["linear", "cosine"])
@pytest.mark.parametrize(
    ("steps", "warmup_ratio", "decay_ratio", "final"),
    [
        (50, 0.1, 0.4, 5e-9),
        (313, 0.1, 0.4, 5e-9),
        (7, 0.3, 0.5, 0.0),
        (10, 0.0, 1.0, 1e-6),
        (12, 0.5, 0.5, 5e-6),
        (1, 0.0, 0.4, 5e-9),
    ],
)
def test_every_rate_is_that_of_transformers(
    steps: int, warmup_ratio: float, decay_ratio: float, final: float, decay: str
) -> None:
    settings = OptimizerConfig(
        warmup_ratio=warmup_ratio,
        decay_ratio=decay_ratio,
        final_learning_rate=final,
        decay=decay,
    )
    ours = [float(wsd(settings, steps)(step)) for step in range(steps + 3)]
    np.testing.assert_allclose(
        ours, transformers_rates(settings, steps), rtol=2e-6, atol=1e-6 * settings.learning_rate
    )


def test_rates_by_hand() -> None:
    settings = OptimizerConfig(
        learning_rate=1.0,
        final_learning_rate=0.2,
        warmup_ratio=0.2,
        decay_ratio=0.4,
        decay="linear",
    )
    # 2 steps up from 0.2 to 1, 4 at 1, 4 down by 0.2 each, and there it stays.
    expected = [0.2, 0.6, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    np.testing.assert_allclose(rate_table(settings, 10), expected, rtol=1e-6)
    np.testing.assert_allclose(float(wsd(settings, 10)(1000)), 0.2, rtol=1e-6)


def test_a_warm_up_over_all_steps_ends_at_its_peak() -> None:
    table = rate_table(WarmupConfig(learning_rate=8.0, final_learning_rate=0.0), 4)
    np.testing.assert_allclose(table, [0, 2, 4, 6, 8])
    after = wsd(WarmupConfig(learning_rate=8.0, final_learning_rate=0.0), 4)
    assert float(after(5)) == 8.0


@pytest.mark.parametrize(
    ("steps", "warmup_ratio", "decay_ratio", "expected"),
    [
        (10, 0.1, 0.4, Phases(1, 5, 4)),
        (70, 0.1, 0.4, Phases(7, 35, 28)),  # 0.1 * 70 is above 7 in binary
        (3, 0.1, 0.4, Phases(1, 0, 2)),
        (1, 0.1, 0.4, Phases(1, 0, 0)),
        (5, 0.5, 0.5, Phases(3, 0, 2)),
    ],
)
def test_phases_add_up(
    steps: int, warmup_ratio: float, decay_ratio: float, expected: Phases
) -> None:
    settings = OptimizerConfig(warmup_ratio=warmup_ratio, decay_ratio=decay_ratio)
    assert phases(settings, steps) == expected
    assert sum(expected) == steps


def test_impossible_settings_are_named() -> None:
    with pytest.raises(ValidationError, match="warmup_ratio and decay_ratio add up to more"):
        OptimizerConfig(warmup_ratio=0.8, decay_ratio=0.4)
    with pytest.raises(UserError, match=r"final_learning_rate 0\.1 is above"):
        wsd(OptimizerConfig(learning_rate=0.01, final_learning_rate=0.1), 10)
