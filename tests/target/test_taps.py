"""What the taps hold, and which layer ids are refused."""

from __future__ import annotations

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.target import TapCapture, Target, features_of, validate_layer_ids


def _batch(lengths: list[int], pad: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    ids = torch.full((len(lengths), max(lengths)), pad)
    for row, n in zip(ids, lengths, strict=True):
        row[:n] = torch.randint(3, 380, (n,), generator=generator)
    return ids


def _plain(target: Target, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.inference_mode():
        return target.model(ids[None], output_hidden_states=True).hidden_states


def test_a_tap_is_entry_id_plus_one_of_the_hidden_states_and_last_hidden_is_the_last_entry(tiny: Target) -> None:
    ids = _batch([17])
    (taps,), (last,) = features_of(tiny, [2, 0], ids, [17])
    states = _plain(tiny, ids[0])
    torch.testing.assert_close(taps, torch.cat([states[3], states[1]], dim=-1)[0])
    torch.testing.assert_close(last, states[-1][0])


def test_the_final_layer_s_tap_is_its_raw_output_not_the_normalised_entry(tiny: Target) -> None:
    ids = _batch([9])
    (taps,), (last,) = features_of(tiny, [3], ids, [9])
    assert not torch.allclose(taps, last)
    torch.testing.assert_close(tiny.family.final_norm(taps), last)


def test_lm_head_over_last_hidden_gives_the_model_s_logits(tiny: Target) -> None:
    ids = _batch([12])
    _, (last,) = features_of(tiny, [1], ids, [12])
    with torch.inference_mode():
        torch.testing.assert_close(tiny.family.lm_head(last), tiny.model(ids).logits[0])


@pytest.mark.parametrize("pad", [0, 7])
def test_features_of_a_row_do_not_depend_on_its_neighbours_or_the_padding(tiny: Target, pad: int) -> None:
    lengths = [5, 30, 1, 18]
    ids = _batch(lengths, pad)
    taps, last = features_of(tiny, [0, 2], ids, torch.tensor(lengths))
    for row, n, t, h in zip(ids, lengths, taps, last, strict=True):
        (alone,), (alone_last,) = features_of(tiny, [0, 2], row[None, :n], [n])
        assert t.shape == (n, 2 * tiny.hidden_size)
        torch.testing.assert_close(t, alone, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(h, alone_last, atol=2e-5, rtol=1e-4)


def test_lengths_that_do_not_fit_the_batch_are_refused(tiny: Target) -> None:
    with pytest.raises(ValueError, match="don't fit"):
        features_of(tiny, [0], _batch([4, 6]), [4, 7])


def _hooks(target: Target) -> list[int]:
    return [len(layer._forward_hooks) for layer in target.family.layers]


def test_hooks_are_gone_afterwards_even_when_the_forward_fails(tiny: Target) -> None:
    before = _hooks(tiny)  # transformers keeps some of its own
    with pytest.raises(RuntimeError, match="out of memory, say"), TapCapture(tiny.family, [0, 1]) as capture:
        assert _hooks(tiny) == [before[0] + 1, before[1] + 1, *before[2:]]
        raise RuntimeError("out of memory, say")
    assert _hooks(tiny) == before
    with pytest.raises(RuntimeError, match="no forward ran"):
        capture.taps()


def test_a_capture_keeps_the_tapped_layers_of_the_last_forward_only(tiny: Target) -> None:
    with TapCapture(tiny.family, [1]) as capture:
        for length in (6, 4):
            tiny.family.backbone(input_ids=_batch([length]), use_cache=False)
    assert capture.taps().shape == (1, 4, tiny.hidden_size)
    assert len(capture._outputs) == 1


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([1, 4], r"after the final norm.*use 3"),
        ([9], r"holds 9; the target's layers are 0 to 3"),
        ([-2], r"holds -2"),
        ([-1, 1], r"embedding's output.*Use 0 to 3"),
        ([1, 2, 1], r"names a layer twice"),
        ([], r"empty"),
    ],
)
def test_layer_ids_outside_the_convention_are_refused_with_what_to_use(ids: list[int], says: str, tiny: Target) -> None:
    with pytest.raises(ConfigError, match=says):
        validate_layer_ids(ids, 4)
    with pytest.raises(ConfigError, match=says):
        TapCapture(tiny.family, ids)


def test_the_final_layer_may_be_tapped() -> None:
    validate_layer_ids([0, 3], 4)
