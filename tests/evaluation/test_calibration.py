"""Sequential temperature scaling finds what distorted the confidences, and says where it could not."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.evaluation.calibration import FEWEST, fit


def rounds(count: int, distortion: list[float], seed: int = 0, mean: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """(raw [N, K], accepted [N]): true acceptance logits, reported multiplied by a factor per position."""
    generator = np.random.default_rng(seed)
    true = generator.normal(mean, 1.5, (count, len(distortion)))
    held = generator.random(true.shape) < 1 / (1 + np.exp(-true))
    return true * np.array(distortion), held.cumprod(1).sum(1)


def test_known_temperatures_are_recovered() -> None:
    distortion = [3.0, 0.5, 2.0, 1.0]
    fitted = fit(*rounds(20_000, distortion))
    assert fitted.temperatures == pytest.approx(distortion, rel=0.2)


def test_the_calibration_error_of_new_rounds_falls() -> None:
    distortion = [3.0, 3.0, 0.4]
    fitted = fit(*rounds(6000, distortion))
    measured = fit(*rounds(6000, distortion, seed=1), temperatures=np.array(fitted.temperatures))
    assert measured.temperatures == fitted.temperatures
    for position in measured.positions:
        assert position["ece_after"] < 0.5 * position["ece_before"]


def test_the_order_within_a_position_stays() -> None:
    raw, accepted = rounds(2000, [3.0, 3.0])
    before = fit(raw, accepted, temperatures=np.ones(2))
    after = fit(raw, accepted)
    assert [p["auc"] for p in before.positions] == [p["auc"] for p in after.positions]


def test_a_position_with_few_survivors_keeps_the_temperature_before_it_and_says_so() -> None:
    raw, accepted = rounds(400, [2.0, 2.0, 2.0, 2.0, 2.0, 2.0], mean=-1.5)
    fitted = fit(raw, accepted)
    few = [p for p in fitted.positions if p["too_few"]]
    assert few
    assert not fitted.positions[0]["too_few"]
    for position in few:
        k = int(position["position"]) - 1
        assert position["rounds"] == (accepted >= k).sum() < FEWEST
        assert fitted.temperatures[k] == fitted.temperatures[k - 1]


def test_without_rounds_nothing_is_scaled() -> None:
    fitted = fit(np.zeros((0, 3)), np.zeros(0, dtype=np.int64))
    assert fitted.temperatures == [1.0, 1.0, 1.0]
    assert all(p["too_few"] for p in fitted.positions)
