"""Eagle3's warm start in closed form: a layer whose first output already is the target's next hidden state, and whose
own output serves it as input for the one after.

`regression.py` tells why: what the target will say next is to a large part a linear function of the taps before the
anchor and the anchor's embedding. Eagle3 meets its inputs twice, though. Its g comes from the taps (`fc`) where the
target has been and is its own last output where it has not, and one set of weights has to read both. So:

* Two regressions of the target's hidden state: on (taps, embedding), and on (what the first one gave for the position
  before, embedding). Of what they make of taps and of outputs, the directions with most of the energy are kept.
* `fc` gives the g for which the second regression says what the first one says of the taps. Both kinds of g are then
  read alike.
* every head attends to its own position: keys and queries hold a constant, which RoPE makes fall with distance.
* values carry the parts of g and of the embedding that are read, `o_proj` maps them to the hidden state, by least
  squares over both kinds of inputs as the layer really gives them.

Letters: n samples, L taps, D hidden, H query heads, Hkv KV heads, d head dim.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.drafts.eagle3 import Eagle3Draft
from pipeline.drafts.regression import check_samples

_CONTENT_SHARE = 5 / 9
_CONST_ENERGY = 4.0  # of a g from taps, the part that does not vary, over the part that does
_OWN = 100.0  # attention score of a position's own key, before the softmax
_OUTPUT_RMS = 3.0  # of what attention adds to the residual stream, where a normalised g is 1
_LATER = 0.5  # weight of samples whose g is the draft's own output
_PART = 4096


@dataclasses.dataclass(frozen=True)
class PairSamples:
    """What the start is fitted on, one sample per anchor.

    Attributes:
        taps, earlier_taps: [n, L*D], one and two positions before the anchor.
        tokens, earlier_tokens: int64[n], the anchor's id and that of the token before it.
        hidden: [n, D], the target's last hidden state (after its final norm) at the anchor.
    """

    taps: Tensor
    tokens: Tensor
    hidden: Tensor
    earlier_taps: Tensor
    earlier_tokens: Tensor

    def parts(self) -> Iterator[PairSamples]:
        """The same, a few thousand at a time and in float32."""
        for i in range(0, len(self.tokens), _PART):
            at = slice(i, i + _PART)
            yield PairSamples(
                self.taps[at].float(),
                self.tokens[at],
                self.hidden[at].float(),
                self.earlier_taps[at].float(),
                self.earlier_tokens[at],
            )


class _Moments:
    """Second moments of inputs and of inputs with targets, for ridge regression."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.gram, self.cross = torch.zeros(inputs, inputs), torch.zeros(inputs, outputs)

    def add(self, x: Tensor, y: Tensor, weight: float = 1.0) -> None:
        self.gram.addmm_(x.T, x, alpha=weight)
        self.cross.addmm_(x.T, y, alpha=weight)

    def solve(self, ridge: float, blocks: list[int]) -> Tensor:
        """[inputs, outputs]; ridge: of the mean variance of the inputs of each block."""
        penalty = torch.cat([d.mean().expand(len(d)) for d in self.gram.diagonal().split(blocks)])
        return torch.linalg.solve(self.gram + (ridge * penalty).diag(), self.cross)


@torch.no_grad()
def layer_from_pairs(draft: Eagle3Draft, gain: Tensor, samples: PairSamples, *, ridge: float = 3e-3) -> None:
    """Sets all weights of the draft; its MLP adds nothing at first.

    Args:
        draft: one that `regression.closed_form` has nothing against.
        gain: [D], of the target's final norm. ridge: of the mean variance of the inputs.
    Raises:
        ConfigError: too few samples.
    """
    c = draft.config
    size, dim, width = c.hidden_size, c.head_dim, c.num_kv_heads * c.head_dim
    rank = min(width - 2, size - 1, round(width * _CONTENT_SHARE))
    spare = min(width - rank - 1, size)
    n, inputs = samples.taps.shape
    check_samples(c, n)
    layer = draft.layer
    for norm in (layer.input_layernorm, layer.hidden_norm, layer.post_attention_layernorm):
        norm.weight.fill_(1.0)
    draft.norm.weight.copy_(gain)

    energy = sum(p.taps.view(-1, inputs // size, size).square().sum((0, 2)) for p in samples.parts())
    scale = (torch.as_tensor(energy) / (n * size)).sqrt().clamp(min=1e-6).repeat_interleave(size)
    first, one = _Moments(inputs + size, size), torch.zeros(inputs)
    for p in samples.parts():
        taps = p.taps / scale
        first.add(torch.cat((taps, _seen(draft, p.tokens)), 1), p.hidden / gain)
        one += taps.sum(0)
    weights = first.solve(ridge, [inputs, size])
    tap_gram = first.gram[:inputs, :inputs]
    const = torch.linalg.solve(tap_gram + ridge * tap_gram.diagonal().mean() * torch.eye(inputs), one)
    second = _Moments(2 * size, size)
    for p in samples.parts():
        given = torch.cat((p.earlier_taps / scale, _seen(draft, p.earlier_tokens)), 1) @ weights
        second.add(torch.cat((_normed(given), _seen(draft, p.tokens)), 1), p.hidden / gain)
    later = second.solve(ridge, [size, size])

    from_taps, from_own = weights[:inputs], later[:size]
    kept = _largest(from_taps.T @ tap_gram @ from_taps + from_own.T @ second.gram[:size, :size] @ from_own, rank)
    read = from_own @ kept  # [D, rank]: what is read of a g
    tokens = weights[inputs:] + later[size:]
    token_gram = first.gram[inputs:, inputs:]
    subspace = torch.linalg.qr(tokens @ _largest(tokens.T @ token_gram @ tokens, spare)).Q
    axes = torch.linalg.qr(torch.cat((read, torch.eye(size)), 1)).Q[:, : rank + 1]

    gram = read.T @ read
    pull = read @ torch.linalg.inv(gram + 1e-2 * gram.diagonal().mean() * torch.eye(rank))
    content = pull @ (from_taps @ kept).T  # [D, L*D]
    spread = ((content @ tap_gram) * content).sum() / n
    draft.fc.weight.copy_((content + torch.outer(axes[:, rank], const) * (_CONST_ENERGY * spread).sqrt()) / scale)

    attention = layer.self_attn
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj, layer.mlp.down_proj):
        projection.weight.zero_()
    v = attention.v_proj.weight
    v[: rank + 1, size:] = axes.T
    v[rank + 1 : rank + 1 + spare, :size] = subspace.T
    attention.o_proj.weight.zero_()
    constant = None
    for _ in range(3):  # the second kind of input is what the layer gives, so it is fitted anew with each fit
        output, steady = _Moments(width, size), _Moments(2 * size, 1)
        for p in samples.parts():
            g = draft.context(p.taps)
            if constant is None:
                own = _normed(torch.cat((p.earlier_taps / scale, _seen(draft, p.earlier_tokens)), 1) @ weights)
                own = own * _OUTPUT_RMS
            else:
                x, residual = _given(draft, draft.context(p.earlier_taps), p.earlier_tokens)
                own = residual + _mixed(draft, x)
            for state, weight in ((g, 1.0), (own, _LATER)):
                x, residual = _given(draft, state, p.tokens)
                output.add(x @ v.T, _OUTPUT_RMS * p.hidden / gain - residual, weight)
                steady.add(x, torch.ones(len(x), 1), weight)
        groups = c.num_heads // c.num_kv_heads
        weight = output.solve(1e-3, [width]).T.unflatten(1, (c.num_kv_heads, dim)) / groups
        attention.o_proj.weight.copy_(weight.repeat_interleave(groups, 1).flatten(1))
        constant = steady.solve(1e-3, [size, size])[:, 0]

    assert constant is not None
    fast = draft.inv_freq * (draft.inv_freq > 1 / 160)
    pattern = (fast / fast.sum() * _OWN * math.sqrt(dim)).sqrt()
    half = dim // 2
    for projection, heads in ((attention.q_proj, c.num_heads), (attention.k_proj, c.num_kv_heads)):
        projection.weight.view(heads, dim, 2 * size)[:, :half] = pattern[:, None] * constant


def _normed(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


def _seen(draft: Eagle3Draft, tokens: Tensor) -> Tensor:
    """float32[n, D]: embeddings as the layer's norm passes them on."""
    return _normed(draft.embedding(tokens).float())


def _largest(gram: Tensor, count: int) -> Tensor:
    """The `count` eigenvectors of largest eigenvalue, as columns."""
    return torch.linalg.eigh(gram)[1].flip(1)[:, :count]


def _mixed(draft: Eagle3Draft, x: Tensor) -> Tensor:
    """What attention adds where every position sees itself alone."""
    attention = draft.layer.self_attn
    groups = draft.config.num_heads // draft.config.num_kv_heads
    v = attention.v_proj(x).unflatten(-1, attention.shape_kv).repeat_interleave(groups, 1)
    return attention.o_proj(v.flatten(1))


def _given(draft: Eagle3Draft, g: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(what attention reads [n, 2D], where the residual stream starts [n, D]) of pairs."""
    x, normed = draft.joined(g, tokens)
    return x, normed if draft.config.norm_before_residual else g
