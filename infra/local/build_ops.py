"""Compiles DeepSpeed's CPU collective (shared memory all-reduce) into its cache, once per machine.

python -m infra.local.build_ops
"""

from __future__ import annotations

import shutil
import sys


def main() -> int:
    import torch

    if torch.cuda.is_available():
        return 0
    if shutil.which("g++") is None and shutil.which("c++") is None:
        print(
            "No C++ compiler: DeepSpeed compiles its CPU collective with one. Install g++ and make again.",
            file=sys.stderr,
        )
        return 2
    from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder

    ShareMemCommBuilder().load(verbose=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
