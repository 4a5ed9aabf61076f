"""The frozen target: obtaining it, its identity, its family, its taps."""

from pipeline.identity import TargetIdentity
from pipeline.target.families import Family, check_family, family_of
from pipeline.target.loading import (
    Target,
    load_borrowed,
    load_config,
    load_identity,
    load_target,
    load_tokenizer,
    target_id,
)
from pipeline.target.obtain import obtain
from pipeline.target.taps import TapCapture, features_of, validate_layer_ids

__all__ = [
    "Family",
    "TapCapture",
    "Target",
    "TargetIdentity",
    "check_family",
    "family_of",
    "features_of",
    "load_borrowed",
    "load_config",
    "load_identity",
    "load_target",
    "load_tokenizer",
    "obtain",
    "target_id",
    "validate_layer_ids",
]
