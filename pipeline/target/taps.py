"""Taps: raw outputs of chosen decoder layers, by forward hooks.

A hook sees the layer's own output. The `hidden_states` tuple of transformers is another numbering (its entry i + 1 is
layer i) and its last entry is already normalised; nothing here reads it (algorithms.md 2). Where a family has several
residual streams, a tap is their mean: D wide in every family.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch

from pipeline.errors import ConfigError
from pipeline.target.families import Family

if TYPE_CHECKING:
    from pipeline.target.loading import Target


def validate_layer_ids(layer_ids: Sequence[int], num_layers: int) -> None:
    """Raises ConfigError, with what to use instead, unless the ids are distinct 0-based decoder layers."""
    if not layer_ids:
        raise ConfigError("target_layer_ids is empty; name at least one decoder layer.")
    for i in layer_ids:
        if i == num_layers:
            raise ConfigError(
                f"target_layer_ids holds {i}, but the target's {num_layers} layers are 0 to {num_layers - 1}. Ids "
                "count layers from 0: the hidden_states tuple's entry i + 1 is layer i, and its last entry is after "
                f"the final norm, which is no layer's output. To tap the last layer's raw output, use {num_layers - 1}."
            )
        if i == -1:
            raise ConfigError(
                "target_layer_ids holds -1, by convention the embedding's output; this version taps decoder layers "
                f"only. Use 0 to {num_layers - 1}."
            )
        if not 0 <= i < num_layers:
            raise ConfigError(f"target_layer_ids holds {i}; the target's layers are 0 to {num_layers - 1}.")
    if len(set(layer_ids)) != len(layer_ids):
        raise ConfigError(f"target_layer_ids={layer_ids} names a layer twice.")


class TapCapture:
    """Context manager that keeps the outputs of the tapped layers of the last forward in it, and nothing else.

    with TapCapture(family, [1, 8]) as capture:
        family.backbone(...)
    taps = capture.taps()  # [..., L*D], layers in the order of the ids

    Raises:
        ConfigError: ids that `validate_layer_ids` refuses.
    """

    def __init__(self, family: Family, layer_ids: Sequence[int]) -> None:
        validate_layer_ids(layer_ids, len(family.layers))
        self._layers = [family.layers[i] for i in layer_ids]
        self._streams = family.streams
        self._outputs: list[torch.Tensor | None] = [None] * len(layer_ids)
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        for slot, layer in enumerate(self._layers):
            self._hooks.append(layer.register_forward_hook(self._keep(slot)))
        return self

    def __exit__(self, *_: object) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _keep(self, slot: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            raw = output[0] if isinstance(output, tuple) else output
            self._outputs[slot] = raw.mean(dim=-2) if self._streams > 1 else raw

        return hook

    def taps(self) -> torch.Tensor:
        """Concatenated outputs of the last forward: [..., L*D], in the model's dtype, where the last of them is."""
        if any(o is None for o in self._outputs):
            raise RuntimeError("no forward ran while the taps were set")
        outputs = [o for o in self._outputs if o is not None]
        return torch.cat([o.to(outputs[-1].device) for o in outputs], dim=-1)


@torch.inference_mode()
def features_of(
    target: Target, layer_ids: Sequence[int], input_ids: torch.Tensor, lengths: Sequence[int] | torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Taps and last hidden states of a right-padded batch, without logits.

    Args:
        input_ids: int[B, S], row b padded on the right past lengths[b] with any token id.
        lengths: B lengths in tokens, 1 to S.

    Returns:
        taps: B tensors [S_b, L*D]; last_hidden: B tensors [S_b, D], after the final norm. Views, in the model's dtype.
    """
    sizes = [int(n) for n in lengths]
    if len(sizes) != len(input_ids) or not all(1 <= n <= input_ids.shape[1] for n in sizes):
        raise ValueError(f"lengths {sizes} don't fit input_ids of shape {list(input_ids.shape)}")
    with TapCapture(target.family, layer_ids) as capture:
        # No attention mask: attention is causal and padding is on the right, so no real token sees any of it.
        last_hidden = target.family.hidden(input_ids.to(target.device))
    taps = capture.taps()
    return [t[:n] for t, n in zip(taps, sizes, strict=True)], [h[:n] for h, n in zip(last_hidden, sizes, strict=True)]
