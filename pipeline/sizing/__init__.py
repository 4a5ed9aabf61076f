"""What an experiment takes before anybody pays for it, and whether it fits its cluster."""

from pipeline.sizing.cluster import GIB
from pipeline.sizing.plan import Memory, Plan, plan
from pipeline.sizing.show import save, show
from pipeline.sizing.target import TargetSize, size_target

__all__ = ["GIB", "Memory", "Plan", "TargetSize", "plan", "save", "show", "size_target"]
