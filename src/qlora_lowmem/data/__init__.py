"""Training data: JSON Lines, Parquet or a hub data set, checked sample by sample before any model loads.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], "tools": [...]}
    {"prompt": "...", "completion": "..."}          (or two lists of messages)
    {"text": "..."}

A file streams: memory does not grow with it.
"""

from .check import CheckedData, check_data
from .faults import FaultLog, FaultySampleError
from .formats import DataFormat
from .report import DataReport
from .sources import DataSource

__all__ = [
    "CheckedData",
    "DataFormat",
    "DataReport",
    "DataSource",
    "FaultLog",
    "FaultySampleError",
    "check_data",
]
