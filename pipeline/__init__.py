"""draftline: from a corpus and a frozen target to a draft that is trained, measured, promoted and serving.

Data flows one way: corpus -> target -> features -> training -> evaluation -> registry -> serving.
"""

__version__ = "0.1.0"
