"""A warm start in closed form: a draft whose first predicting slot already reads the target's next hidden state off the
features.

The target's last hidden state at an anchor is, to a large part, a linear function of what the draft sees there: the
taps at the position before it and the anchor's own embedding. Ridge regression finds that function in one pass over
the features, and one attention layer can hold it:

* some KV heads ("context heads") attend to the nearest context position. Their keys read a direction in which every
  feature is the same and block slots have next to nothing; turned by RoPE, it makes scores fall with distance.
* the others ("anchor heads") attend to the anchor, and read a subspace of the embedding that context keys and values
  leave empty.
* values carry the two reduced-rank inputs of the regression, `o_proj` maps them to the hidden state.

Queries read what sets the predicting slot apart. Where the anchor's slot predicts, that is that it holds a real token;
the other slots start with even attention, and what they can know beyond the Markov head's bigram is left to training.
In DFlash's own layout it is the mask: all slots that predict start alike.

Letters: n samples, L taps, D hidden, H query heads, Hkv KV heads, d head dim.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.drafts.base import Draft
from pipeline.drafts.config import DraftConfig
from pipeline.drafts.dspark import DSparkDraft
from pipeline.errors import ConfigError
from pipeline.target.families import Family

WIDEST = 16384
"""Most inputs of the regression: its normal equations take the square of this, and its cube in time."""
_CONTEXT_SHARE = 5 / 9
_CONST_ENERGY = 4.0  # of a context vector, the part that does not vary, over the part that does
_NEAREST, _ANCHOR = 60.0, 15.0  # attention score of the wanted key, before the softmax
_OUTPUT_RMS = 3.0  # of what attention adds to the residual stream, where embeddings are far below 1
_PART = 4096


@dataclasses.dataclass(frozen=True)
class Samples:
    """What the regression is fitted on, one sample per anchor.

    Attributes:
        taps: [n, L*D], at the position before the anchor. tokens: int64[n], the anchor's id.
        hidden: [n, D], the target's last hidden state (after its final norm) at the anchor.
    """

    taps: Tensor
    tokens: Tensor
    hidden: Tensor


@dataclasses.dataclass(frozen=True)
class _Fit:
    """The regression's solution in float32: scale [L*D] of the taps, content [L*D, r] and const [L*D] readers of
    scaled taps, and of normalised embeddings: subspace [D, s] (orthonormal columns) and const [D]."""

    scale: Tensor
    content: Tensor
    const: Tensor
    subspace: Tensor
    token_const: Tensor


def closed_form(c: DraftConfig) -> str | None:
    """Why a resolved draft has no start from features, or None if it has."""
    needed = 1 if c.algorithm == "eagle3" else 2  # a block drafter has heads of two kinds
    if c.qk_norm or c.num_kv_heads < needed:
        return (
            f"needs draft.qk_norm=false and {needed} or more KV heads (they are "
            f"{str(c.qk_norm).lower()} and {c.num_kv_heads})"
        )
    frequencies = [c.rope_theta ** (-i / c.head_dim) for i in range(0, c.head_dim, 2)]
    slow = any(f <= 1 / 160 for f in frequencies) or c.algorithm == "eagle3"
    if not (any(1 / 160 < f < 0.75 for f in frequencies) and slow):
        return (
            f"needs fast and slow rotary frequencies; draft.head_dim={c.head_dim} with rope_theta={c.rope_theta:g} has "
            f"{[round(f, 5) for f in frequencies]}"
        )
    if c.layer_family != "llama":
        return f"is for draft.layer_family=llama (it is {c.layer_family})"
    return f"solves for {_inputs(c)} inputs; it takes at most {WIDEST}" if _inputs(c) > WIDEST else None


def check_closed_form(c: DraftConfig) -> None:
    """Raises ConfigError for a resolved draft that has no start from features."""
    if (why := closed_form(c)) is not None:
        raise ConfigError(f"trainer.warm_start.layers=features {why}. Use trainer.warm_start.layers=target.")


def check_samples(c: DraftConfig, samples: int) -> None:
    """Raises ConfigError if there are too few samples."""
    if samples < fewest(c):
        raise ConfigError(
            f"trainer.warm_start.layers=features solves for {_inputs(c)} inputs from {samples} samples; it takes a "
            "quarter as many samples. Use trainer.warm_start.layers=target."
        )


def fewest(c: DraftConfig) -> int:
    """Samples that the regression takes at least."""
    return _inputs(c) // 4


def _inputs(c: DraftConfig) -> int:
    return (len(c.target_layer_ids) + 1) * c.hidden_size


@torch.no_grad()
def layers_from_features(draft: Draft, family: Family, samples: Samples, *, ridge: float = 3e-3) -> None:
    """Sets `fc`, the first layer's attention and the norms from a regression; other layers start as the identity.

    Args:
        ridge: of the mean variance of the inputs.
    Raises:
        ConfigError: a draft that `closed_form` refuses; too few samples.
    """
    c = draft.config
    size, dim = c.hidden_size, c.head_dim
    heads = min(c.num_kv_heads - 1, max(1, round(c.num_kv_heads * _CONTEXT_SHARE)))
    rank = min(heads * dim - 1, round(size * _CONTEXT_SHARE))
    spare = min((c.num_kv_heads - heads) * dim, size - rank - 1)
    near, far = (draft.inv_freq > 1 / 160) & (draft.inv_freq < 0.75), draft.inv_freq <= 1 / 160
    check_closed_form(c)
    assert isinstance(draft, DSparkDraft)
    check_samples(c, len(samples.tokens))
    gain = family.final_norm_gain.float()
    fit = _solve(draft, samples, gain, rank, spare, ridge)

    # One orthonormal basis: the anchor heads' subspace of the embedding, and the rest for what context carries.
    basis = torch.linalg.qr(torch.cat((fit.subspace, torch.eye(size)), 1)).Q
    content_axes, const_axis = basis[:, spare : spare + rank], basis[:, spare + rank]
    amplitude = math.sqrt(_CONST_ENERGY * rank)
    readers = torch.outer(const_axis, fit.const * amplitude) + content_axes @ fit.content.T
    draft.fc.weight.copy_(readers / fit.scale)
    draft.hidden_norm.weight.fill_(1.0)
    first, *others = draft.decoder_layers
    for layer in draft.decoder_layers:
        layer.mlp.down_proj.weight.zero_()
    for layer in others:
        layer.self_attn.o_proj.weight.zero_()
    first.input_layernorm.weight.fill_(1.0)
    draft.norm.weight.copy_(gain)

    attention = first.self_attn
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        projection.weight.zero_()
    k, v = (p.weight.view(c.num_kv_heads, dim, size) for p in (attention.k_proj, attention.v_proj))
    q = attention.q_proj.weight.view(c.num_kv_heads, -1, dim, size)
    # RMSNorm brings a context vector of `rank` unit parts and the constant to length sqrt(D).
    const = const_axis * math.sqrt((rank + amplitude**2) / size) / amplitude
    mask = _seen(draft, torch.tensor(c.mask_token_id))
    answering = fit.subspace @ (fit.subspace.T @ fit.token_const)
    if float(mask @ mask) == 0.0:
        raise ConfigError(
            f"trainer.warm_start.layers=features needs a mask token with an embedding; that of {c.mask_token_id} is "
            "all zeros. Set draft.mask_token_id to another token that no text has, or use "
            "trainer.warm_start.layers=target."
        )
    if c.sample_from_anchor:
        asking = fit.token_const - mask * (mask @ fit.token_const) / (mask @ mask)
    else:
        asking = mask / (mask @ mask)
        own = fit.subspace @ (fit.subspace.T @ mask)
        answering = answering - own * (own @ answering) / (own @ own)
    half = dim // 2
    pattern = _pattern(near, _NEAREST, dim)
    # Scores fall with the distance from the anchor, also where the slot that asks is one behind it.
    turn = draft.inv_freq * (0 if c.sample_from_anchor else 1)
    k[:heads, :half] = pattern[:, None] * const
    q[:heads, :, :half] = (pattern * turn.cos())[:, None] * asking
    q[:heads, :, half:] = -(pattern * turn.sin())[:, None] * asking
    v[:heads].view(-1, size)[: rank + 1] = torch.cat((content_axes, const_axis[:, None]), 1).T
    pattern = _pattern(far, _ANCHOR, dim)
    k[heads:, :half] = pattern[:, None] * answering
    q[heads:, :, :half] = pattern[:, None] * asking
    v[heads:].view(-1, size)[:spare] = fit.subspace.T
    attention.o_proj.weight.copy_(_OUTPUT_RMS * _output(draft, samples, gain, heads))


def _pattern(dims: Tensor, score: float, dim: int) -> Tensor:
    """float32[d/2], rows of q and k alike: q . k / sqrt(d) is `score` at distance 0, evenly over the chosen
    frequencies."""
    chosen = dims.float()
    return (chosen * score * math.sqrt(dim) / chosen.sum()).sqrt()


def _seen(draft: DSparkDraft, tokens: Tensor) -> Tensor:
    """float32[.., D]: embeddings of tokens as the first layer's norm passes them on."""
    embedding = draft.embed[tokens].float()
    return F.rms_norm(embedding, embedding.shape[-1:])


def _parts(samples: Samples) -> list[slice]:
    return [slice(i, i + _PART) for i in range(0, len(samples.tokens), _PART)]


def _solve(draft: DSparkDraft, samples: Samples, gain: Tensor, rank: int, spare: int, ridge: float) -> _Fit:
    """Ridge regression of hidden / gain on (taps, embedding), cut to the ranks that the heads can carry."""
    size = draft.config.hidden_size
    n, width = samples.taps.shape
    energy = sum(samples.taps[p].float().view(-1, width // size, size).square().sum((0, 2)) for p in _parts(samples))
    scale = (torch.as_tensor(energy) / (n * size)).sqrt().clamp(min=1e-6).repeat_interleave(size)
    gram, cross = torch.zeros(width + size, width + size), torch.zeros(width + size, size)
    mean, aim = torch.zeros(width + size), torch.zeros(size)
    for part in _parts(samples):
        x = torch.cat((samples.taps[part].float() / scale, _seen(draft, samples.tokens[part])), 1)
        y = samples.hidden[part].float() / gain
        gram.addmm_(x.T, x, alpha=1 / n)
        cross.addmm_(x.T, y, alpha=1 / n)
        mean, aim = mean + x.sum(0) / n, aim + y.sum(0) / n
    taps, tokens = slice(0, width), slice(width, None)
    penalty = torch.empty(width + size)
    for block in (taps, tokens):
        penalty[block] = ridge * gram.diagonal()[block].mean()
    const = torch.linalg.solve(gram[taps, taps] + penalty[taps].diag(), mean[taps])
    token_const = torch.linalg.solve(gram[tokens, tokens] + penalty[tokens].diag(), mean[tokens])
    covariance = gram - torch.outer(mean, mean)
    weights = torch.linalg.solve(covariance + penalty.diag(), cross - torch.outer(mean, aim))

    # What taps predict varies along few directions: keep the largest, each read with variance 1 and mean 0.
    spread, axes = torch.linalg.eigh(weights[taps].T @ covariance[taps, taps] @ weights[taps])
    spread, axes = spread.flip(0)[:rank].clamp(min=1e-9), axes.flip(1)[:, :rank]
    content = weights[taps] @ axes / spread.sqrt()
    content -= torch.outer(const, mean[taps] @ content)
    # And what tokens predict: the directions of the embedding that it is read from.
    _, axes = torch.linalg.eigh(weights[tokens].T @ covariance[tokens, tokens] @ weights[tokens])
    subspace = torch.linalg.qr(weights[tokens] @ axes.flip(1)[:, :spare]).Q
    return _Fit(scale, content, const, subspace, token_const / (mean[tokens] @ token_const))


def _output(draft: DSparkDraft, samples: Samples, gain: Tensor, heads: int) -> Tensor:
    """o_proj [D, H*d] that maps what the heads will read to hidden / gain, by least squares."""
    c = draft.config
    attention = draft.decoder_layers[0].self_attn
    groups = c.num_heads // c.num_kv_heads
    width = c.num_kv_heads * c.head_dim
    gram, cross = torch.zeros(width, width), torch.zeros(width, c.hidden_size)
    for part in _parts(samples):
        context = attention.v_proj(draft.context(samples.taps[part].float()))
        own = attention.v_proj(_seen(draft, samples.tokens[part]))
        x = torch.cat((context[:, : heads * c.head_dim], own[:, heads * c.head_dim :]), 1)
        gram.addmm_(x.T, x)
        cross.addmm_(x.T, samples.hidden[part].float() / gain)
    penalty = 1e-3 * gram.diagonal().mean()  # also for rows of v that carry nothing
    weight = torch.linalg.solve(gram + penalty * torch.eye(width), cross).T.unflatten(1, (c.num_kv_heads, c.head_dim))
    return (weight / groups).repeat_interleave(groups, 1).flatten(1)
