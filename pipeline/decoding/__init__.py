"""The speculative decoding engine (see engine.py): requests, pages, proposers, scheduling, verification."""

from pipeline.decoding.batch import QueueFull
from pipeline.decoding.emission import RoundTrace
from pipeline.decoding.engine import Engine
from pipeline.decoding.proposers import make_proposer
from pipeline.decoding.proposers.several import SeveralDrafts
from pipeline.decoding.request import Completion, Request, RequestMetrics, StepEvent
from pipeline.decoding.scheduler import make_scheduler
from pipeline.decoding.step_cost import StepCost

__all__ = [
    "Completion",
    "Engine",
    "QueueFull",
    "Request",
    "RequestMetrics",
    "RoundTrace",
    "SeveralDrafts",
    "StepCost",
    "StepEvent",
    "make_proposer",
    "make_scheduler",
]
