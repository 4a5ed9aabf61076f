"""The sequential heads of a block drafter: the Markov head in its three forms, and the confidence head.

A Markov head turns the token before a slot (and, in the richer forms, the slot's hidden state and what came earlier in
the block) into a code of rank r; W2 of the code is added to the slot's logits (DSpark, arXiv 2607.05147, eqs. 5-6).
In training the whole block is known (`codes`); in decoding it grows token by token (`step`).

Letters: A blocks, K slots, B requests, D hidden, r rank, V target vocabulary rows, Vd draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_OPEN = 4.0  # bias of a gate that starts open: sigmoid(4) = 0.98


class MarkovHead(nn.Module):
    """vanilla: the code is W1[x]. W1 [V, r] is indexed by target ids, W2 [Vd, r] gives draft ids."""

    def __init__(self, vocab_rows: int, draft_vocab: int, rank: int, hidden_size: int) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(vocab_rows, rank)
        self.markov_w2 = nn.Linear(rank, draft_vocab, bias=False)
        nn.init.normal_(self.markov_w1.weight, std=0.02)
        nn.init.zeros_(self.markov_w2.weight)

    def step(self, hidden: Tensor, previous: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Codes [.., r] of one slot, and the state for the next.

        Args:
            hidden: [.., D], the slot's. previous: int64[..], target ids of the tokens before it.
            state: what the slot before returned; None at the start of a block.
        """
        return self.markov_w1(previous), None

    def codes(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """Codes [A, K, r] of whole blocks, from hidden [A, K, D] and the true previous tokens [A, K]."""
        return self.step(hidden, previous)[0]

    @torch.no_grad()
    def set_bigrams(self, w1: Tensor, w2: Tensor) -> None:
        """Starts the head as the bigram model W1 W2^T: w1 [V, r'], w2 [Vd, r'], r' <= r; the other ranks as 0."""
        rank = w1.shape[1]
        for weight, given in ((self.markov_w1.weight, w1), (self.markov_w2.weight, w2)):
            weight.zero_()
            weight[:, :rank] = given


class GatedMarkovHead(MarkovHead):
    """gated: the code is W1[x] * sigmoid(gate([h ; W1[x]]))."""

    def __init__(self, vocab_rows: int, draft_vocab: int, rank: int, hidden_size: int) -> None:
        super().__init__(vocab_rows, draft_vocab, rank, hidden_size)
        self.gate_proj = nn.Linear(hidden_size + rank, rank)

    def step(self, hidden: Tensor, previous: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        embedded = self.markov_w1(previous)
        gate = self.gate_proj(torch.cat((hidden, embedded.to(hidden.dtype)), dim=-1))
        return embedded * torch.sigmoid(gate), None

    @torch.no_grad()
    def set_bigrams(self, w1: Tensor, w2: Tensor) -> None:
        super().set_bigrams(w1, w2)
        self.gate_proj.weight.zero_()
        self.gate_proj.bias.fill_(_OPEN)


class RecurrentMarkovHead(MarkovHead):
    """rnn (eq. 6): z = [s ; W1[x] ; h], one linear to (g, c, o); s' = sigmoid(g) s + (1 - sigmoid(g)) tanh(c), the code
    is tanh(o); s is 0 at the start of a block."""

    def __init__(self, vocab_rows: int, draft_vocab: int, rank: int, hidden_size: int) -> None:
        super().__init__(vocab_rows, draft_vocab, rank, hidden_size)
        self.joint_proj = nn.Linear(2 * rank + hidden_size, 3 * rank)

    def step(self, hidden: Tensor, previous: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        embedded = self.markov_w1(previous).to(hidden.dtype)
        state = torch.zeros_like(embedded) if state is None else state
        gate, candidate, output = self.joint_proj(torch.cat((state, embedded, hidden), dim=-1)).chunk(3, dim=-1)
        kept = torch.sigmoid(gate)
        return torch.tanh(output), kept * state + (1 - kept) * torch.tanh(candidate)

    def codes(self, hidden: Tensor, previous: Tensor) -> Tensor:
        state, out = None, []
        for k in range(hidden.shape[1]):
            code, state = self.step(hidden[:, k], previous[:, k], state)
            out.append(code)
        return torch.stack(out, dim=1)

    @torch.no_grad()
    def set_bigrams(self, w1: Tensor, w2: Tensor) -> None:
        # tanh(x) is x within 1 % up to 0.17; what W1 loses in scale W2 gains.
        shrink = 0.17 / float(w1.abs().max().clamp(min=1e-6))
        super().set_bigrams(w1 * shrink, w2 / shrink)
        rank = self.markov_w1.embedding_dim
        output = self.joint_proj.weight[2 * rank :]
        output.zero_()
        output[:, rank : 2 * rank] = torch.eye(rank)
        self.joint_proj.bias[2 * rank :].zero_()


MARKOV_HEADS: dict[str, type[MarkovHead]] = {
    "vanilla": MarkovHead,
    "gated": GatedMarkovHead,
    "rnn": RecurrentMarkovHead,
}


class ConfidenceHead(nn.Module):
    """A linear on [h ; W1[x]] or on h alone (eq. 7); its sigmoid is P(accepted | all before accepted)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(size, 1)
