"""One ragged step of the target: tokens of many requests in, hidden states, taps and logits out."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path

import torch

from pipeline.config import EngineConfig
from pipeline.decoding.attention import NAME, StepLayout
from pipeline.decoding.cache import PagedKV, on_device, page_bytes, pool_pages
from pipeline.decoding.geometry import attention_geometry
from pipeline.decoding.pages import PagePool
from pipeline.decoding.plan import Ahead
from pipeline.decoding.prepack import PackedLinear, available, prepack
from pipeline.decoding.recorded import (
    SIZES,
    AheadInput,
    CudaGraphs,
    Recorder,
    RecordingTerms,
    Replays,
    StepInput,
    size_for,
)
from pipeline.decoding.step_cost import StepCost, StepTimer, device_name, kept, measure
from pipeline.decoding.table_layout import Segment, TableLayout
from pipeline.errors import DraftlineError
from pipeline.target import TapCapture, Target

log = logging.getLogger(__name__)

Done = tuple[torch.Tensor | None, torch.Tensor]
"""Taps [T, L*D] or None, and logits [T, V]."""


class TargetRunner:
    """Runs the frozen target over flattened steps, its keys and values in pages.

    The target's module is taken over: its attention is switched to the engine's and, on CPU in fp32, its linear
    layers are replaced by prepacked ones.

    Args:
        config: sizes, and whether linears are prepacked (CPU, fp32).
        layer_ids: tapped decoder layers (empty: no taps).
        recorder: makes what steps that read no prompts are recorded with. None: CUDA graphs where the target is on a
            GPU, and else nothing.
        draft_page_bytes, block_size: what a page takes in the drafts beside the target, and how many tokens of theirs
            stand behind a text, to size the pool.
    Attributes:
        pool: of the pages, for the drafts' keys and values too.
        terms: how steps are recorded, the drafts' too; None: they are launched operation by operation.
        layer_ids: tapped decoder layers.
        buckets: sizes in tokens that recorded steps are padded to; none without recording.
        unsound: which segments of the last step have hidden states that are not finite; looked at on CPU only.
    Raises:
        DraftlineError: a target that the engine can't run, with the reason, or a context beyond its positions.
    """

    def __init__(
        self,
        target: Target,
        config: EngineConfig,
        layer_ids: list[int] | None = None,
        draft_page_bytes: int = 0,
        block_size: int = 0,
        recorder: Callable[[], Recorder] | None = None,
    ) -> None:
        limit = getattr(target.config, "max_position_embeddings", None)
        if limit is not None and config.max_context > limit:
            raise DraftlineError(
                f"engine.max_context={config.max_context} is beyond the target's {limit} positions; set it to {limit} "
                "or less."
            )
        self.target, self.config = target, config
        self._layer_ids = list(layer_ids or [])
        self.family = target.family
        self.geometry = attention_geometry(target, NAME)
        shapes = [
            (g.kv_heads, g.key_dim, g.value_dim) if g.source == layer else None for layer, g in enumerate(self.geometry)
        ]
        each = page_bytes(shapes, config.page_size, target.dtype) + draft_page_bytes
        devices = {p.device for p in target.model.parameters()} | {target.device}
        if recorder is None and config.cuda_graphs and target.device.type == "cuda":
            if len(devices) == 1:
                recorder = functools.partial(CudaGraphs, target.device)
            else:
                log.info("The target lies on several devices: its steps are not recorded in CUDA graphs.")
        pages = pool_pages(config, each, target.device, block_size)
        self.pool = PagePool(pages, config.page_size, scratch=recorder is not None)
        self.cache = PagedKV(shapes, self.pool.total, self.pool.size, target.dtype, target.device)
        self.terms: RecordingTerms | None = None
        self.buckets: tuple[int, ...] = ()
        self._replays: Replays[Done] | None = None
        self._ahead_replays: Replays[Done] | None = None
        self._inputs: dict[int, StepInput] = {}
        self._ahead: dict[tuple[int, int], AheadInput] = {}
        if recorder is not None:
            behind = max(block_size, 7) + 1
            widest = min(self.pool.needed(config.max_context + behind), self.pool.pages)
            self.terms = RecordingTerms(recorder, self.pool.pages, widest, config.max_requests)
            most = min(config.max_requests * behind, SIZES[-1])
            self.buckets = tuple(sorted({most, *(t for t in SIZES if t <= most)}))
            self._replays = Replays(self.terms, f"the target ({self.family.name})")
            ahead = f"the target ({self.family.name}) that run ahead"
            self._ahead_replays = Replays(self.terms, ahead, "they wait for the host to read what was drafted")
        self._timer = StepTimer(devices)
        self.unsound: set[int] = set()
        self.packed = 0
        if config.prepack and target.device.type == "cpu" and target.dtype == torch.float32 and available():
            self.packed = prepack(self.family.backbone)
            head = target.model.get_output_embeddings()
            if type(head) is torch.nn.Linear:
                target.model.set_output_embeddings(PackedLinear(head.weight, head.bias))
                self.packed += 1

    @property
    def layer_ids(self) -> list[int]:
        return self._layer_ids

    @layer_ids.setter
    def layer_ids(self, layer_ids: Iterable[int]) -> None:
        """Taps other layers from now on; steps are recorded anew."""
        if list(layer_ids) != self._layer_ids:
            for replays in (self._replays, self._ahead_replays):
                if replays is not None:
                    replays.clear()
        self._layer_ids = list(layer_ids)

    @property
    def recordings(self) -> int:
        """How many were made so far, of the drafts' steps too; a step in which one is made takes longer than others."""
        return 0 if self.terms is None else self.terms.made

    def run_as(self, tokens: int) -> int:
        """Tokens of the step that one of so many is run as."""
        return size_for(tokens, self.buckets) or tokens

    @torch.inference_mode()
    def step(self, segments: list[Segment], token_ids: list[int], logit_rows: list[int]) -> Done:
        """Runs T tokens. What one request's tokens become never depends on another's, even on one whose are NaN.

        Args:
            segments: whose tokens they are, in order. token_ids: T ids.
            logit_rows: rows (0..T-1) that need logits.
        Returns:
            taps [T, L*D] or None, and logits [len(logit_rows), V] (softcapped where the family does so).
        """
        self._timer.start()
        done = self._replayed(segments, token_ids) if len(logit_rows) == len(token_ids) else None
        if done is None:
            done = self._launched(segments, token_ids, logit_rows)
        self._timer.stop()
        return done

    def _replayed(self, segments: list[Segment], token_ids: list[int]) -> Done | None:
        """A step that reads no prompts, from its recording; None where there is none of its size."""
        size = size_for(len(token_ids), self.buckets)
        if self.terms is None or self._replays is None or size is None:
            return None
        if size not in self._inputs:
            self._inputs[size] = StepInput(size, min(size, self.terms.requests), self.terms, self.target.device)
        given = self._inputs[size]
        if not given.load(segments, token_ids):
            return None
        done = self._replay(self._replays, size, given, given, len(token_ids))
        if done is None:
            # Larger ones would find no memory either.
            self.buckets = tuple(b for b in self.buckets if b < size) if self._replays.possible else ()
            if self._ahead_replays is not None:  # larger ones hold memory for nothing; the others are made again
                self._ahead_replays.clear()
                self._ahead.clear()
        return done

    def _replay(
        self, replays: Replays[Done], key: Hashable, given: StepInput | AheadInput, step: StepInput, tokens: int
    ) -> Done | None:
        """The first `tokens` rows of taps and logits of a step that is filled in."""

        def body() -> Done:
            layout = given.layout(self.cache, self.geometry, causal=True)
            hidden, taps = self._forward(step.ids.long()[None], layout)
            return taps, self._logits(hidden)

        done = replays.run(key, body)
        if done is None:
            return None
        self.unsound = set()
        taps, logits = done
        # Taps may be held for a draft beyond the next replay, logits are not.
        return None if taps is None else taps[:tokens].clone(), logits[:tokens]

    @torch.inference_mode()
    def step_ahead(
        self, segments: list[Segment], anchors: list[int], drafts: torch.Tensor, ahead: Ahead
    ) -> Done | None:
        """A step over blocks that only the device knows yet, from a recording.

        Args:
            segments: of B requests, with no tokens yet. anchors: their last tokens. drafts: int64[<= B, K], of the
                first ones.
        Returns:
            as `step` for all rows; None, and nothing done, where there is no recording of its size.
        """
        size, block = size_for(ahead.tokens, self.buckets), drafts.shape[1]
        if self.terms is None or self._ahead_replays is None or size is None:
            return None
        if (size, block) not in self._ahead:
            requests = min(size, self.terms.requests)
            self._ahead[size, block] = AheadInput(size, requests, block, self.terms, self.target.device)
        given = self._ahead[size, block]
        self._timer.start()
        if not given.load(segments, anchors, drafts, ahead.lengths):
            return None
        done = self._replay(self._ahead_replays, (size, block), given, given.step, ahead.tokens)
        self._timer.stop()
        return done

    def may_run_ahead(self, tokens: int, drafts: torch.Tensor) -> bool:
        """Whether `step_ahead` could run a step of so many tokens over such drafts, as far as is known."""
        size = size_for(tokens, self.buckets)
        if self._ahead_replays is None or size is None or drafts.device != self.target.device:
            return False
        return self._ahead_replays.may((size, drafts.shape[1]))

    def record_ahead(self, blocks: Sequence[int]) -> None:
        """Records steps that run ahead with blocks of so many tokens, before any request comes. For while no request
        runs, as `time_step`."""
        if not (self.buckets and blocks):
            return
        self.pool.forget()
        pages = self.pool.take(1)
        self.pool.give_back(pages)
        # The largest first, whose memory serves the others.
        for size, block in itertools.product(reversed(self.buckets), reversed(blocks)):
            requests = min(-(-size // (block + 1)), self.config.max_requests)
            lengths = [max(0, min(block, size - requests - b * block)) for b in range(requests)]
            drafts = torch.zeros(requests, block, dtype=torch.int64, device=self.target.device)
            if self.may_run_ahead(size, drafts):
                ahead = Ahead(on_device(lengths, self.target.device), sum(lengths) + requests, lengths)
                self.step_ahead([Segment(pages, 0, 0)] * requests, [0] * requests, drafts, ahead)

    def _launched(self, segments: list[Segment], token_ids: list[int], logit_rows: list[int]) -> Done:
        layout = StepLayout(segments, self.cache, self.geometry)
        ids = on_device(token_ids, self.target.device)[None]
        hidden, taps = self._forward(ids, layout)
        self.unsound = self._not_finite(hidden, segments)
        if self.unsound and layout.paired:
            # Whose NaN it is: apart, a segment reads no cells but its own. All that was written is written again.
            hidden, taps = self._forward(ids, StepLayout(segments, self.cache, self.geometry, pairs=False))
            self.unsound = self._not_finite(hidden, segments)
        if len(logit_rows) != hidden.shape[0]:
            hidden = hidden[on_device(logit_rows, hidden.device)]
        return taps, self._logits(hidden)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.target.model.get_output_embeddings()(hidden)
        cap = self.family.logit_softcap
        return torch.tanh(logits / cap) * cap if cap else logits

    def _forward(self, ids: torch.Tensor, layout: StepLayout | TableLayout) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Last hidden states [T, D] of ids int64[1, T], and taps [T, L*D] or None."""
        if not self.layer_ids:
            return self.family.hidden(ids, position_ids=layout.positions[None], draftline_layout=layout)[0], None
        with TapCapture(self.family, self.layer_ids) as capture:
            hidden = self.family.hidden(ids, position_ids=layout.positions[None], draftline_layout=layout)[0]
        taps = capture.taps()
        return hidden, taps[0] if taps.dim() == 3 else taps

    def _not_finite(self, hidden: torch.Tensor, segments: list[Segment]) -> set[int]:
        """Segments with hidden states [T, D] that are not finite; whatever was NaN on the way there makes them so. On
        CUDA none: its kernel reads no cell of another's, and looking would wait for it."""
        if hidden.device.type != "cpu" or bool(hidden.isfinite().all()):
            return set()
        rows = hidden.isfinite().all(-1).split([s.count for s in segments])
        return {i for i, mine in enumerate(rows) if not bool(mine.all())}

    def step_cost(self, per_request: int, config: EngineConfig) -> StepCost:
        """Seconds of steps of up to `per_request` tokens of each of config.max_requests: those kept in the file
        config.step_cost where they fit, else measured now. For while no request runs."""
        most = config.max_requests * per_request
        grid = sorted({*(t for t in SIZES if t <= most), *self.buckets})
        room = max(config.max_context - per_request, 1)
        contexts = sorted({min(64, room), min(512, room)})
        # Beyond its last context a table stays as it is there, and long texts would seem as cheap as short ones.
        far = [c for c in sorted({2048, room}) if contexts[-1] < c <= room]

        def measured() -> StepCost:
            cost = measure(lambda t, c: self.time_step(t, c, per_request), grid, contexts, far=far)
            cost.hardware = device_name(self.target.device)
            return cost

        for size in reversed(self.buckets):  # the largest first, whose memory serves the others
            self.time_step(size, 1, per_request)
        if not config.step_cost:
            return measured()
        identity = self.target.identity
        made_for = {
            "hardware": device_name(self.target.device),
            "threads": torch.get_num_threads() if self.target.device.type == "cpu" else 0,
            "dtype": str(self.target.dtype).removeprefix("torch."),
            # Another engine may have packed them.
            "packed_linears": sum(isinstance(m, PackedLinear) for m in self.target.model.modules()),
            "target": identity.id,
            "target_config": identity.config_digest,
            "recorded": bool(self.buckets),
        }
        cost = kept(Path(config.step_cost), made_for, (grid[-1], [*contexts, *far][-1]), measured)
        cost.hardware = str(made_for["hardware"])
        return cost

    def time_step(self, tokens: int, context: int, per_request: int) -> float:
        """Seconds of a step over `tokens` tokens of ceil(tokens / per_request) requests at `context` tokens each.

        For profiling while no request runs: scribbles over the pool's pages, and what was kept in them is forgotten.
        Where they are too few, requests share them, which costs the same.
        """
        requests, each = -(-tokens // per_request), self.pool.needed(context + per_request)
        self.pool.forget()
        pages = self.pool.take(min(requests * each, self.pool.pages))
        self.pool.give_back(pages)
        pages *= -(-requests * each // len(pages))
        segments = [
            Segment(pages[i * each : (i + 1) * each], context, min(per_request, tokens - i * per_request))
            for i in range(requests)
        ]
        ids = [7 % self.target.vocab_size] * tokens
        self.step(segments, ids, list(range(tokens)))
        return self.seconds()

    def seconds(self) -> float:
        """What the last step took. On CUDA this waits for its end, and is for after its results were read."""
        return self._timer.seconds()
