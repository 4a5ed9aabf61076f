"""What every draft is: embedding and lm_head, the target's or its own, a draft vocabulary, and what turns hidden states
into proposals.

Letters: N positions, D hidden, d head dim, V target vocabulary, Vd draft vocabulary, G tokens per block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.drafts.config import DraftConfig
from pipeline.drafts.heads import ConfidenceHead, MarkovHead
from pipeline.drafts.layers import RMSNorm


class Draft(nn.Module):
    """A draft's borrowed and common parts.

    Args:
        config: resolved (no zeros left).
        embed: float[V, D], the target's embedding. lm_head: float[V, D], its output rows (kept are those in the draft
            vocabulary). Borrowed, they are references outside the state dict; a draft's own start as float32 copies,
            and are parameters.
        d2t: int64[Vd], ascending target ids of the draft vocabulary.
        embed_scale, logit_softcap: the target family's.
    Attributes:
        temperatures: float32[G], calibration of the confidence logits (ones until fitted).
        markov_head, confidence_head: None in drafts that have none.
    """

    d2t: torch.Tensor
    temperatures: torch.Tensor
    embed: torch.Tensor
    lm_rows: torch.Tensor
    inv_freq: torch.Tensor
    markov_head: MarkovHead | None
    confidence_head: ConfidenceHead | None
    fc: nn.Linear
    layers: nn.ModuleList
    norm: RMSNorm

    def __init__(
        self,
        config: DraftConfig,
        embed: torch.Tensor,
        lm_head: torch.Tensor,
        d2t: torch.Tensor,
        *,
        embed_scale: float = 1.0,
        logit_softcap: float | None = None,
    ) -> None:
        super().__init__()
        c = self.config = config
        self.embed_scale, self.logit_softcap = embed_scale, logit_softcap
        self.markov_head = None
        self.confidence_head = None
        self.register_buffer("d2t", d2t.clone())
        self.register_buffer("temperatures", torch.ones(c.tokens_per_block))
        full = d2t.shape[0] == lm_head.shape[0]
        self._target_dtype = lm_head.dtype
        self._take("embed", embed.detach(), c.own_embedding)
        self._take("lm_rows", lm_head.detach() if full else lm_head.detach()[d2t], c.own_lm_head)
        steps = torch.arange(0, c.head_dim, 2, dtype=torch.float32) / c.head_dim
        # Dimensions that don't rotate have the frequency 0 (what transformers calls proportional).
        turning = torch.arange(c.head_dim // 2) < int((c.rope_fraction or 0.0) * c.head_dim // 2)
        frequencies = c.rope_theta**-steps
        rotated = frequencies if c.rope_fraction is None else frequencies * turning
        self.register_buffer("inv_freq", rotated, persistent=False)

    def _take(self, name: str, matrix: torch.Tensor, own: bool) -> None:
        if own:
            self.register_parameter(name, nn.Parameter(matrix.to(torch.float32, copy=True)))
        else:
            self.register_buffer(name, matrix, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """What the target computes in: a draft decodes in it, whatever its weights are trained in."""
        return self._target_dtype if self.config.own_lm_head else self.lm_rows.dtype

    def borrowed(self) -> dict[int, torch.Tensor]:
        """What a copy of the draft shares with it, by id, as `copy.deepcopy` takes it."""
        return {id(t): t for t in (self.embed, self.lm_rows) if not isinstance(t, nn.Parameter)}

    def rope(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin [N, 1, d] of int64 positions [N]."""
        angles = positions[:, None].float() * self.inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return angles.cos(), angles.sin()

    def embedding(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings [.., D] of tokens [..], scaled as the target's family does."""
        x = self.embed[tokens]
        return x * self.embed_scale if self.embed_scale != 1.0 else x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Backbone logits [.., Vd] of hidden [.., D], without the Markov bias."""
        return self.cap(F.linear(hidden, self.lm_rows))

    def cap(self, logits: torch.Tensor) -> torch.Tensor:
        """Applies the target family's softcap, if it has one."""
        return logits if not self.logit_softcap else torch.tanh(logits / self.logit_softcap) * self.logit_softcap

    def markov_step(
        self, hidden: torch.Tensor, previous: torch.Tensor, state: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | float, torch.Tensor | None]:
        """Bias [.., Vd] of slots with hidden [.., D] after target tokens previous [..] (0.0 without a Markov head), and
        the head's state for the next slot."""
        if self.markov_head is None:
            return 0.0, None
        code, state = self.markov_head.step(hidden, previous, state)
        return self.markov_head.markov_w2(code), state

    def confidence(self, hidden: torch.Tensor, previous: torch.Tensor) -> torch.Tensor | None:
        """Confidence logits [..] of slots with hidden [.., D] after tokens previous [..]; None without the head."""
        if self.confidence_head is None:
            return None
        x = hidden
        if self.config.has_markov and self.config.confidence_head_with_markov and self.markov_head is not None:
            x = torch.cat((hidden, self.markov_head.markov_w1(previous).to(hidden.dtype)), dim=-1)
        return self.confidence_head.proj(x).squeeze(-1)

    def trainable_state(self) -> dict[str, torch.Tensor]:
        """The tensors of a checkpoint: everything but what is borrowed."""
        return {name: t.detach() for name, t in self.state_dict().items()}
