"""Warm starts: what a draft can know before its first training step."""

from __future__ import annotations

import torch

from pipeline.drafts.base import Draft
from pipeline.drafts.dspark import DSparkDraft
from pipeline.drafts.eagle3 import Eagle3Draft
from pipeline.errors import ConfigError
from pipeline.target.families import Family

_W2 = "markov_head.markov_w2.weight"


def check_copies(draft: DSparkDraft | Eagle3Draft, family: Family) -> None:
    """Raises ConfigError for a family whose layers compute something else than a draft's, or a draft of more layers;
    asks for none of the target's weights."""
    if family.layer_obstacle is not None:
        raise ConfigError(
            f"trainer.warm_start.layers=target can't copy layers of a {family.name} target: {family.layer_obstacle}. "
            "Use trainer.warm_start.layers=none or features."
        )
    if draft.config.num_layers > (last := len(family.layers)):
        raise ConfigError(
            f"draft.num_layers={draft.config.num_layers}, but the target has {last} layers to start them from. Use "
            f"{last} or fewer, or trainer.warm_start.layers=none."
        )


@torch.no_grad()
def layers_from_target(draft: DSparkDraft | Eagle3Draft, family: Family) -> None:
    """Copies the target's last layers and final norm into the draft, and lets the context pass the last tap.

    Draft layer i takes the weights of target layer n - num_layers + i. `fc` starts as the identity on the last tap,
    and `hidden_norm` with the first copied layer's input norm, so that context keys and values start as what
    those target layers would compute. Tensors of another shape (or absent, as q_norm) keep their initialisation.
    Eagle3's layer takes them for the half of its input that g is; what it makes of the embedding is left to training.

    Raises:
        ConfigError: as `check_copies`.
    """
    check_copies(draft, family)
    last, size = len(family.layers), draft.config.hidden_size
    for i, layer in enumerate(draft.layers):
        source = dict(family.layers[last - draft.config.num_layers + i].named_parameters())
        for name, weight in layer.named_parameters():
            if name not in source:
                continue
            given = source[name]
            if name.endswith(("k_proj.weight", "v_proj.weight")) and weight.shape[0] % given.shape[0] == 0:
                # A draft with more KV heads starts with the target's repeated: the same attention, free to part.
                groups = weight.shape[0] // given.shape[0]
                given = given.unflatten(0, (-1, draft.config.head_dim)).repeat_interleave(groups, 0).flatten(0, 1)
            if given.shape == weight.shape:
                weight.copy_(given)
            elif name.endswith("_proj.weight") and weight.shape == (given.shape[0], 2 * size):
                weight[:, :size] *= 0.1
                weight[:, size:] = given
    draft.norm.weight.copy_(family.final_norm_gain)
    first = family.layers[last - draft.config.num_layers]
    if isinstance(draft, Eagle3Draft):
        draft.layer.input_layernorm.weight.fill_(1.0)
    norm = draft.layer.hidden_norm if isinstance(draft, Eagle3Draft) else draft.hidden_norm
    norm.weight.copy_(first.input_layernorm.weight)  # type: ignore[union-attr, arg-type]
    draft.fc.weight.mul_(0.1)
    draft.fc.weight[:, -size:] += torch.eye(size)


@torch.no_grad()
def from_former(draft: Draft, former: Draft) -> list[str]:
    """Copies a former draft's weights into a draft of the same target; returns the names of those that it lacks.

    A DSpark draft may start from a DFlash one of its slot layout (its heads then start as they are), and either from
    one of another block size: slots share their weights. Heads go over whole or not at all. Rows of the Markov head's
    W2 and of an lm_head of its own go by token, so the vocabularies may differ; a token that the former has not starts
    without a bias, and with the target's row.
    Calibration is not taken over: it belongs to the weights that it was fitted on.

    Raises:
        ConfigError: the layers mean something else in the two (tapped layers, sizes, algorithm), field by field.
    """
    c, f = draft.config, former.config
    same = ["target_layer_ids", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size", "qk_norm"]
    same += ["layer_family", "rope_theta", "rope_fraction", "values_are_keys", "rms_norm_eps", "sliding_windows"]
    same += [] if "eagle3" in (c.algorithm, f.algorithm) else ["sample_from_anchor", "mask_token_id"]
    same += ["norm_before_residual"] if "eagle3" in (c.algorithm, f.algorithm) else []
    differing = [f"{n} is {getattr(f, n)} there, {getattr(c, n)} here" for n in same if getattr(f, n) != getattr(c, n)]
    # Layers trained beside matrices of their own mean nothing beside the target's.
    differing += [
        f"draft.{n} is true there, false here"
        for n in ("own_embedding", "own_lm_head")
        if getattr(f, n) > getattr(c, n)
    ]
    if (c.algorithm == "eagle3") != (f.algorithm == "eagle3"):
        differing.insert(0, f"algorithm is {f.algorithm} there, {c.algorithm} here")
    if differing:
        raise ConfigError(
            f"The draft can't start from trainer.warm_start.draft: {'; '.join(differing)}. Give the new draft these "
            "settings of the former one, or start it without."
        )
    theirs = dict(former.named_parameters())
    buffers = dict(former.named_buffers())
    for name, buffer in draft.named_buffers():
        if name.endswith("layer_scalar"):  # Gemma 4's: not trained, but a part of the layer
            buffer.copy_(buffers[name])
    lacking = []
    heads = _heads_that_fit(draft, former)
    for name, weight in draft.named_parameters():
        given = theirs.get(name)
        head = name.split(".")[0]
        if head in ("markov_head", "confidence_head") and head not in heads:
            lacking.append(name)
        elif name in (_W2, "lm_rows") and given is not None:
            place = torch.full((int(draft.embed.shape[0]),), -1, dtype=torch.int64)
            place[former.d2t.cpu()] = torch.arange(len(former.d2t))
            rows = place[draft.d2t.cpu()]
            if name == _W2:
                weight.zero_()  # what stands there belongs to another W1
            weight[rows >= 0] = given[rows[rows >= 0]].to(weight.dtype)
        elif given is not None and given.shape == weight.shape:
            weight.copy_(given)
        else:
            lacking.append(name)
    return lacking


def _heads_that_fit(draft: Draft, former: Draft) -> set[str]:
    """Heads that mean the same in both: each goes over whole or not at all, and a confidence that reads the Markov
    head's codes not without them."""
    mine, theirs = dict(draft.named_parameters()), dict(former.named_parameters())

    def alike(head: str) -> bool:
        names = [n for n in mine if n.startswith(f"{head}.")]
        first = {n: int(n == _W2) for n in names}  # W2 has a row per token of the vocabulary
        return all(n in theirs and theirs[n].shape[first[n] :] == mine[n].shape[first[n] :] for n in names)

    c, f = draft.config, former.config
    markov = c.markov_head_type == f.markov_head_type and alike("markov_head")
    reads = c.has_markov and c.confidence_head_with_markov
    confidence = c.confidence_head_with_markov == f.confidence_head_with_markov and alike("confidence_head")
    return {
        n for n, fits in (("markov_head", markov), ("confidence_head", confidence and (markov or not reads))) if fits
    }


@torch.no_grad()
def markov_from_bigrams(
    draft: Draft, pairs: tuple[torch.Tensor, ...], *, smoothing: float = 4.0, seed: int = 0
) -> None:
    """Sets the Markov head to a low-rank fit of the corpus' bigram log-ratios, in closed form.

    The matrix M[x, y] = log((c(x, y) + s * p(y)) / ((c(x) + s) * p(y))) over pairs that occur (0 elsewhere) says how
    much more likely y is after x than anywhere. Its truncated SVD of the head's rank gives W1 and W2.

    Args:
        pairs: (previous, next, count) int64[n] each: every pair of target ids once, ascending, and how often it occurs
            (`pipeline.corpus.build.count_bigrams`). A next token outside the draft vocabulary is skipped.
        smoothing: s, pseudo-count of the unigram distribution.
    """
    head = draft.markov_head
    if head is None:
        return
    previous, following, count = pairs
    draft_size = draft.d2t.shape[0]
    t2d = torch.full((int(draft.embed.shape[0]),), -1, dtype=torch.int64)
    t2d[draft.d2t] = torch.arange(draft_size)
    column = t2d[following]
    inside = column >= 0
    rows, r = previous[inside].unique(return_inverse=True)
    c, count = column[inside], count[inside]
    total = torch.zeros(rows.shape[0]).index_add_(0, r, count.float())
    p = torch.zeros(draft_size).index_add_(0, c, count.float()) / count.sum()
    value = ((count + smoothing * p[c]) / ((total[r] + smoothing) * p[c])).log().clamp(min=0)
    # Rare rows are mostly noise; their evidence is weighed down.
    value = value * (total[r] / (total[r] + smoothing)).sqrt()
    shape = (rows.shape[0], draft_size)
    matrix = torch.sparse_coo_tensor(torch.stack((r, c)), value, shape, check_invariants=True).coalesce()
    rank = min(draft.config.markov_rank, *matrix.shape)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(matrix, q=rank, niter=4)
    scale = s.sqrt()
    w1 = torch.zeros(draft.embed.shape[0], rank)
    w1[rows] = u * scale
    head.set_bigrams(w1, v * scale)
