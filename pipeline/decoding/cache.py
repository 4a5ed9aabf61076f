"""Keys and values in pages, and how many pages there are room for.

Shapes: KV heads H, cells C = pages * page size, tokens of a step T, head dim d. Keys and values of a layer are
[H, C, d]; position p of a request is the cell `pages[p // size] * size + p % size`. Who holds which page: pages.py.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.config import EngineConfig
from pipeline.errors import ConfigError, DraftlineError

log = logging.getLogger(__name__)

Shape = tuple[int, int, int]
"""(KV heads, key dim, value dim) of a layer."""
SHARE = 0.5
"""Of the free memory, taken at most where engine.kv_gib leaves it open."""


class PagedKV:
    """Keys and values of layers that may differ in shape, and of which some keep none.

    Args:
        shapes: per layer, None for one that reads another's. pages, size: of the pool.
    Attributes:
        k, v: per layer that keeps its own: [H, C, key dim] and [H, C, value dim].
    Raises:
        DraftlineError: not enough memory.
    """

    def __init__(
        self, shapes: Sequence[Shape | None], pages: int, size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.size, self.cells, self.dtype, self.device = size, pages * size, dtype, device
        own = [(i, *shape) for i, shape in enumerate(shapes) if shape is not None]
        try:
            self.k = {i: torch.zeros(h, pages * size, d, dtype=dtype, device=device) for i, h, d, _ in own}
            self.v = {i: torch.zeros(h, pages * size, d, dtype=dtype, device=device) for i, h, _, d in own}
        except RuntimeError as e:
            gib = pages * page_bytes(shapes, size, dtype) / 2**30
            raise DraftlineError(
                f"{pages} pages of {size} tokens need {gib:.1f} GiB of keys and values, which are not there ({e}). "
                "Lower engine.kv_gib, or engine.max_requests or engine.max_context where that is 0."
            ) from None

    def write(self, layer: int, cells: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Stores k, v [H, T, d] of one layer in cells int64[T]."""
        self.k[layer].index_copy_(1, cells, k)
        self.v[layer].index_copy_(1, cells, v)

    def wipe(self, pages: Sequence[int]) -> None:
        """Zeroes pages that may hold values that are not finite: a mask doesn't keep a NaN out of a softmax."""
        at = torch.tensor(pages, dtype=torch.int64, device=self.device)[:, None] * self.size
        cells = (at + torch.arange(self.size, device=self.device)).flatten()
        for tensor in (*self.k.values(), *self.v.values()):
            tensor.index_fill_(1, cells, 0)


def on_device(values: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Integers in a tensor there. Nobody waits for the copy: `torch.tensor(values, device=...)` would wait for all that
    the GPU still has to do."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def page_bytes(shapes: Sequence[Shape | None], size: int, dtype: torch.dtype) -> int:
    """Bytes of one page of `size` cells, all layers together."""
    return size * dtype.itemsize * sum(s[0] * (s[1] + s[2]) for s in shapes if s is not None)


def pool_pages(config: EngineConfig, bytes_per_page: int, device: torch.device, block: int = 0) -> int:
    """How many pages the pool has: what engine.kv_gib holds; where that is 0, room for engine.max_requests requests of
    engine.max_context tokens with `block` behind them, as far as half of the free memory goes.

    Raises ConfigError where that is none.
    """
    if config.kv_gib:
        pages = int(config.kv_gib * 2**30) // bytes_per_page
    else:
        # The tokens of a block stand behind the text; an engine made without a draft may be given one later.
        most = config.max_context + max(block, config.page_size)
        wanted = config.max_requests * -(-most // config.page_size)
        free = free_memory(device)
        pages = min(wanted, int(SHARE * free) // bytes_per_page)
        if pages < wanted:
            log.warning(
                "The KV pool has %d pages of %d tokens, not the %d that engine.max_requests x engine.max_context may "
                "need: half of the %.1f GiB of free memory holds no more. Requests wait, or are computed again, when "
                "it is full; set engine.kv_gib to decide otherwise.",
                pages,
                config.page_size,
                wanted,
                free / 2**30,
            )
    if pages < 1:
        there = f"engine.kv_gib={config.kv_gib}" if config.kv_gib else "half of the free memory"
        raise ConfigError(
            f"{there} holds not a single page of {config.page_size} tokens, which takes {bytes_per_page / 2**20:.1f} "
            "MiB of keys and values."
        )
    return pages


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated now; on CPU within the limit of the container, if it has one.

    Raises ConfigError where the system doesn't tell.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    told = Path("/proc/meminfo")
    if not told.exists():
        raise ConfigError("How much memory is free can't be told on this system: set engine.kv_gib.")
    lines = told.read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, max(int(most) - int(used.read_text()), 0))
    return free
