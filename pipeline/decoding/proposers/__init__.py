"""Proposers: what drafts a block of tokens for the target to verify."""

from __future__ import annotations

from typing import Any

from pipeline.decoding.proposers.base import Commit, Proposal, Proposer
from pipeline.decoding.proposers.ngram import NgramProposer
from pipeline.decoding.proposers.none import NoneProposer
from pipeline.errors import ConfigError, nearest

NAMES = ("none", "ngram", "dspark", "dflash", "eagle3")


def make_proposer(name: str, draft: Any = None, **options: Any) -> Proposer:
    """Builds a proposer by name.

    Args:
        name: none, ngram (options: block_size, longest), or a draft's algorithm: dspark, dflash, eagle3.
        draft: what such a proposer decodes with; its options are rule and pack.
    Raises:
        ConfigError: unknown name, or an algorithm without a draft or with another's.
    """
    if name == "none":
        return NoneProposer()
    if name == "ngram":
        return NgramProposer(**options)
    if name in NAMES:
        if draft is None or draft.config.algorithm != name:
            given = "none was given" if draft is None else f"this one's is {draft.config.algorithm}"
            raise ConfigError(
                f"The {name} proposer needs a draft of that algorithm; {given}. Pass what load_draft returns."
            )
        if name == "eagle3":
            from pipeline.decoding.proposers.eagle3 import Eagle3Proposer

            return Eagle3Proposer(draft, **options)
        from pipeline.decoding.proposers.dspark import DSparkProposer

        return DSparkProposer(draft, **options)
    raise ConfigError(f"Proposer {name!r} is not one of {', '.join(NAMES)}.{nearest(name, NAMES)}")


__all__ = ["Commit", "NgramProposer", "NoneProposer", "Proposal", "Proposer", "make_proposer"]
