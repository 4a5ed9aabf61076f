"""Every kernel compiles for an H100 and an A100 where no GPU is: what the interpreter lets pass (types, shapes, the
language's limits), the compiler doesn't."""

from __future__ import annotations

from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed on this platform")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from draftline_kernels import vocab_loss_triton  # noqa: E402

_LOGITS = ("fp32", "bf16")


def _vocab_loss(dtype: str, softcap: bool, bias: bool, gradient: bool) -> tuple[Any, dict[str, str], dict[str, Any]]:
    pointers = {name: f"*{dtype}" for name in ("base", "bias", "target")}
    pointers |= {name: "*i64" for name in ("target_best", "labels")} | {"agree": "*i8"}
    pointers |= {n: "*fp32" for n in ("normalisers", "ce_weight", "kl_weight", "l1_weight", "ce", "kl", "l1")}
    scalars = {"base_stride": "i64", "bias_stride": "i64", "target_stride": "i64", "width": "i32", "cap": "fp32"}
    constants = {"SOFTCAP": softcap, "BIAS": bias, "GRADIENT": gradient, "TILE": 4096}
    return vocab_loss_triton._row_losses, pointers | scalars, constants


CASES = {
    **{f"vocab_loss {d}": _vocab_loss(d, False, False, True) for d in _LOGITS},
    "vocab_loss softcap and bias": _vocab_loss("bf16", True, True, True),
    "vocab_loss statistics": _vocab_loss("bf16", False, True, False),
}


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("capability", [90, 80])
def test_compiles(name: str, capability: int) -> None:
    kernel, signature, constants = CASES[name]
    signature = {n: signature.get(n, "constexpr") for n in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    assert len(compiled.asm["cubin"]) > 0
    assert compiled.metadata.shared < 100_000, "bytes of shared memory a program takes"
