"""Taps: raw outputs of chosen decoder layers, by forward hooks.

A hook sees the layer's own output. The `hidden_states` tuple of transformers is another numbering (its entry i + 1 is
layer i) and its last entry is already normalised; nothing here reads it (algorithms.md 2).
"""

from __future__ import annotations

from typing import Any

import torch

from pipeline.errors import ConfigError
from pipeline.target.families import Family


def validate_layer_ids(layer_ids: list[int], num_layers: int) -> None:
    """Raises ConfigError unless ids are distinct 0-based decoder layers."""
    if not layer_ids:
        raise ConfigError("target_layer_ids is empty; name at least one decoder layer.")
    for i in layer_ids:
        if i == num_layers:
            raise ConfigError(
                f"target_layer_ids holds {i}, but the target's {num_layers} layers are 0 to {num_layers - 1}. Ids count "
                "layers from 0: the hidden_states tuple's entry i + 1 is layer i, and its last entry is after the final "
                f"norm, which is no layer's output. To tap the last layer's raw output, use {num_layers - 1}."
            )
        if not 0 <= i < num_layers:
            raise ConfigError(f"target_layer_ids holds {i}; the target's layers are 0 to {num_layers - 1}.")
    if len(set(layer_ids)) != len(layer_ids):
        raise ConfigError(f"target_layer_ids={layer_ids} names a layer twice.")


class TapCapture:
    """Context manager that keeps the outputs of the tapped layers of the next forward, and nothing else.

    with TapCapture(family, [1, 8]) as capture:
        family.backbone(...)
    capture.taps()  # [..., L*D], layers in the order of the ids
    """

    def __init__(self, family: Family, layer_ids: list[int]) -> None:
        self._layers = [family.layers[i] for i in layer_ids]
        self._outputs: list[torch.Tensor | None] = [None] * len(layer_ids)
        self._hooks: list[Any] = []

    def __enter__(self) -> TapCapture:
        for slot, layer in enumerate(self._layers):
            self._hooks.append(layer.register_forward_hook(self._keep(slot)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, slot: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            self._outputs[slot] = output[0] if isinstance(output, tuple) else output

        return hook

    def taps(self) -> torch.Tensor:
        """Concatenated outputs of the last forward: [..., L*D]."""
        if any(o is None for o in self._outputs):
            raise RuntimeError("no forward ran while the taps were set")
        return torch.cat([o for o in self._outputs if o is not None], dim=-1)
