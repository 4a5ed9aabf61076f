"""Proposers: what drafts a block of tokens for the target to verify."""

from __future__ import annotations

from typing import Any

from pipeline.decoding.proposers.base import Commit, Proposal, Proposer
from pipeline.decoding.proposers.ngram import NgramProposer
from pipeline.decoding.proposers.none import NoneProposer
from pipeline.errors import ConfigError, nearest

NAMES = ("none", "ngram", "dspark")


def make_proposer(name: str, draft: Any = None, **options: Any) -> Proposer:
    """Builds a proposer by name.

    Args:
        name: none, ngram (options: block_size, longest) or dspark.
        draft: the DSparkDraft that `dspark` decodes with; its options are slots and capacity (the engine's
            max_requests and max_context), rule and pack.
    Raises:
        ConfigError: unknown name, or `dspark` without a draft.
    """
    if name == "none":
        return NoneProposer()
    if name == "ngram":
        return NgramProposer(**options)
    if name == "dspark":
        if draft is None:
            raise ConfigError("The dspark proposer needs a draft: pass the one that load_draft returned.")
        from pipeline.decoding.proposers.dspark import DSparkProposer

        return DSparkProposer(draft, **options)
    raise ConfigError(f"Proposer {name!r} is not one of {', '.join(NAMES)}.{nearest(name, NAMES)}")


__all__ = ["Commit", "NgramProposer", "NoneProposer", "Proposal", "Proposer", "make_proposer"]
