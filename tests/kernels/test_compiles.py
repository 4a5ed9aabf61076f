"""Every kernel compiles for an H100 and an A100 where no GPU is: what the interpreter lets pass (types, shapes, the
language's limits), the compiler doesn't."""

from __future__ import annotations

from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed on this platform")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from draftline_kernels import (  # noqa: E402
    markov_block_triton,
    ragged_paged_attention_triton,
    residual_triton,
    sampling_triton,
    truncation_triton,
    verify_triton,
    vocab_loss_triton,
)
from draftline_kernels.sampling import BLOCK  # noqa: E402

_LOGITS = ("fp32", "bf16")
VOCABULARY = 151_936
"""Qwen3's: constants that go by the vocabulary are those of its launches."""
_BLOCKS = triton.cdiv(VOCABULARY, BLOCK)
_WIDTHS = {"SPAN": BLOCK, "PADDED": triton.next_power_of_2(_BLOCKS)}
Case = tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]
"""A kernel, its arguments' types, its constants and the options it is launched with."""


def _vocab_loss(dtype: str, softcap: bool, bias: bool, gradient: bool, more: bool = False) -> Case:
    pointers = {name: f"*{dtype}" for name in ("base", "bias", "target")}
    pointers |= {name: "*i64" for name in ("target_best", "labels")} | {"agree": "*i8"}
    weights = tuple(f"{n}_weight" for n in ("ce", "kl", "l1", "rkl", "lk", "hybrid"))
    pointers |= {n: "*fp32" for n in ("normalisers", *weights, "ce", "kl", "l1", "rkl", "overlap")}
    scalars = {n: "i64" for n in ("base_stride", "bias_stride", "target_stride")} | {"width": "i32"}
    scalars |= {n: "fp32" for n in ("cap", "eta", "floor")}
    constants = {"SOFTCAP": softcap, "BIAS": bias, "GRADIENT": gradient, "TILE": vocab_loss_triton.TILE}
    constants |= dict.fromkeys(("NORMALISER", "BEST"), not softcap) | dict.fromkeys(("RKL", "LK", "HYBRID"), more)
    options = {"num_warps": vocab_loss_triton.warps(vocab_loss_triton.TILE)}
    return vocab_loss_triton._row_losses, pointers | scalars, constants, options


_INT64 = ("tokens", "lengths", "cu_lengths", "positions", "seeds", "top_k", "accepted_in", "accepted_out")
_INT64 += ("owners", "lines", "starts")
_INT32 = ("places", "last_ties", "t2d", "bounds")
_INT8 = ("finite_in", "finite_out")
_SIZES = ("slots", "width", "blocks", "draft_width", "draft_blocks")


def _verify(kernel: Any, dtype: str, **constants: Any) -> Case:
    """A kernel of verification; every argument's type goes by its name."""
    types = dict.fromkeys(("logits", "draft"), f"*{dtype}") | dict.fromkeys((*_INT64, "next_out"), "*i64")
    types |= dict.fromkeys(_INT32, "*i32") | dict.fromkeys(_INT8, "*i8") | dict.fromkeys(_SIZES, "i32")
    types |= {"stride": "i64", "entries": "*i16"}
    return _case(kernel, types, {**_WIDTHS, "DRAFT_PADDED": 8, "OVERRIDES": False, **constants})


def _case(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> Case:
    """types: of arguments by name, "*fp32" where it is not there."""
    names = kernel.arg_names
    return (
        kernel,
        {n: types.get(n, "*fp32") for n in names if n not in constants},
        {n: v for n, v in constants.items() if n in names},
        {"num_warps": _WARPS[kernel.__module__][kernel.__name__]},
    )


_WARPS = {m.__name__: m.WARPS for m in (markov_block_triton, sampling_triton, truncation_triton, verify_triton)}
_WARPS[residual_triton.__name__] = verify_triton.WARPS  # which launches them


_COUNTS = ("slot", "batch", "rank", "tiles", "stream", "width", "blocks", "column_blocks")
_TABLES = ("starts", "ends", "places", "winners", "blocks_of", "bounds", "last_ties")
_ROWS = ("d2t", "seeds", "positions", "out", "top_k", "top_p")


def _markov(kernel: Any, dtype: str, **constants: Any) -> Case:
    """A kernel of the sequential head, likewise."""
    types = dict.fromkeys(("base", "codes", "w2"), f"*{dtype}") | dict.fromkeys(_ROWS, "*i64")
    types |= dict.fromkeys(_COUNTS, "i32") | dict.fromkeys(_TABLES, "*i32") | {"top_p": "*fp32", "stride": "i64"}
    types |= dict.fromkeys(("base_request", "base_slot", "w2_stride", "kept_request", "kept_slot"), "i64")
    return _case(kernel, types, {"TILE": 64, "GROUP": 16, "DEPTH": 64, **_WIDTHS, **constants})


_TILES = triton.next_power_of_2(markov_block_triton.tile_count(VOCABULARY, _BLOCKS))


_STRIDES = ("q_token", "q_head", "k_head", "k_cell", "v_head", "v_cell", "table_row")
_COUNTED = ("tokens", "batch", "pages", "cells", "heads", "splits")


def _attend(dtype: str, dim: int, groups: int, queries: int, flags: dict[str, Any], value_dim: int = 0) -> Case:
    """Attention over pages with the sizes that its launch would have, dims of tensors dense."""
    itemsize = 4 if dtype == "fp32" else 2
    sizes = ragged_paged_attention_triton.shapes(groups, dim, value_dim or dim, itemsize, queries)
    options = {n: sizes.pop(n) for n in ("num_warps", "num_stages")}
    types = dict.fromkeys(("q", "keys", "values"), f"*{dtype}") | {"sums": "*fp32", "scale": "fp32"}
    types |= dict.fromkeys(("page_table", "cu_q", "context"), "*i32") | dict.fromkeys(_STRIDES, "i64")
    types |= dict.fromkeys(_COUNTED, "i32") | {"out": "*fp32" if flags["SPLIT"] else f"*{dtype}"}
    dense = dict.fromkeys(("q_dim", "k_dim", "v_dim", "table_page"), 1)
    constants = {"GROUPS": groups, "PAGE": 16, "SPAN": 256, **dense, **flags, **sizes}
    return ragged_paged_attention_triton._attend, types, constants, options


_TARGET = {"WINDOW": 0, "SOFTCAP": 0.0, "CAUSAL": True, "SPLIT": False}
_DRAFT = {**_TARGET, "CAUSAL": False, "SPLIT": True}
_GEMMA = {"WINDOW": 1024, "SOFTCAP": 50.0, "CAUSAL": True, "SPLIT": True}
_COMBINED = {"partials": "*fp32", "sums": "*fp32", "cu_q": "*i32", "out": "*bf16"}
_COMBINED |= dict.fromkeys(("batch", "heads", "splits"), "i32")
_RATIO = {"GREEDY": False, "RATIO": True, "DRAFT": True, "D2T": True}
_ONE_HOT = {"GREEDY": False, "RATIO": True, "DRAFT": False, "D2T": False}
_OVERRIDDEN = {"OVERRIDES": True}
_COUPLED = {"RATIO": False, "DRAFT": False, "D2T": False}
CASES: dict[str, Case] = {
    **{f"attend {d}": _attend(d, 128, 4, 8, _TARGET) for d in _LOGITS},
    "attend prefill": _attend("bf16", 128, 4, 512, _TARGET),
    "attend prefill fp32": _attend("fp32", 64, 7, 512, _TARGET),
    "attend block": _attend("bf16", 80, 5, 7, _DRAFT),
    "attend block fp32": _attend("fp32", 256, 1, 7, {**_DRAFT, "WINDOW": 128}),
    "attend gemma": _attend("bf16", 256, 2, 8, _GEMMA),
    "attend two dims": _attend("bf16", 192, 8, 64, _GEMMA, value_dim=128),
    "attend 512": _attend("bf16", 512, 8, 8, _TARGET),
    "combine splits": (
        ragged_paged_attention_triton._combine,
        _COMBINED,
        {"VALUE_DIM": 256, "VALUE_PADDED": 256, "SPLITS": 64},
        {"num_warps": ragged_paged_attention_triton.COMBINE_WARPS},
    ),
    **{f"stats {d}": _verify(sampling_triton.stats, d, GREEDY=False) for d in _LOGITS},
    "stats greedy": _verify(sampling_triton.stats, "bf16", GREEDY=True),
    "select": _verify(truncation_triton.select, "bf16"),
    "accept greedy": _verify(verify_triton._accept, "bf16", GREEDY=True, **_COUPLED),
    "accept coupled": _verify(verify_triton._accept, "bf16", GREEDY=False, **_COUPLED),
    "accept ratio": _verify(verify_triton._accept, "fp32", **_RATIO),
    "accept one-hot": _verify(verify_triton._accept, "fp32", **_ONE_HOT),
    "residual": _verify(residual_triton.residual, "fp32", **_RATIO),
    "residual one-hot": _verify(residual_triton.residual, "fp32", **_ONE_HOT),
    "pick": _verify(residual_triton.pick, "fp32", **_RATIO),
    "stats overridden": _verify(sampling_triton.stats, "bf16", GREEDY=False, **_OVERRIDDEN),
    "stats greedy overridden": _verify(sampling_triton.stats, "fp32", GREEDY=True, **_OVERRIDDEN),
    "select overridden": _verify(truncation_triton.select, "bf16", **_OVERRIDDEN),
    "accept greedy overridden": _verify(verify_triton._accept, "bf16", GREEDY=True, **_COUPLED, **_OVERRIDDEN),
    "accept coupled overridden": _verify(verify_triton._accept, "bf16", GREEDY=False, **_COUPLED, **_OVERRIDDEN),
    "accept ratio overridden": _verify(verify_triton._accept, "fp32", **_RATIO, **_OVERRIDDEN),
    "residual overridden": _verify(residual_triton.residual, "bf16", **_RATIO, **_OVERRIDDEN),
    "pick overridden": _verify(residual_triton.pick, "bf16", **_RATIO, **_OVERRIDDEN),
    "bias bf16": _markov(markov_block_triton._bias, "bf16", MARKOV=True, D2T=True, GREEDY=False, WRITE=True),
    "bias fp32": _markov(markov_block_triton._bias, "fp32", MARKOV=True, D2T=False, GREEDY=False, WRITE=False),
    "bias 64": _markov(markov_block_triton._bias, "bf16", MARKOV=True, D2T=False, GREEDY=True, WRITE=False, GROUP=64),
    "no bias": _markov(markov_block_triton._bias, "bf16", MARKOV=False, D2T=True, GREEDY=False, WRITE=True),
    "combine": _markov(markov_block_triton._combine, "bf16", D2T=True, GREEDY=False, PADDED=_TILES),
    "combine greedy": _markov(markov_block_triton._combine, "bf16", D2T=False, GREEDY=True, PADDED=_TILES),
    "truncated": _markov(markov_block_triton._truncated, "bf16", D2T=True),
    **{f"vocab_loss {d}": _vocab_loss(d, False, False, True) for d in _LOGITS},
    "vocab_loss softcap and bias": _vocab_loss("bf16", True, True, True),
    "vocab_loss every term": _vocab_loss("bf16", False, True, True, True),
    "vocab_loss statistics": _vocab_loss("bf16", False, True, False),
}


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("capability", [90, 80])
def test_compiles(name: str, capability: int) -> None:
    kernel, signature, constants, options = CASES[name]
    signature = {n: signature.get(n, "constexpr") for n in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert len(compiled.asm["cubin"]) > 0
    assert compiled.metadata.shared < 100_000, "bytes of shared memory a program takes"
