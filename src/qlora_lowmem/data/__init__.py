"""Training data: JSON Lines, Parquet or a hub data set, checked sample by sample before any model loads.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], "tools": [...]}
    {"prompt": "...", "completion": "..."}          (or two lists of messages)
    {"text": "..."}

A file streams: memory does not grow with it.
"""

from qlora_lowmem.data.check import CheckedData, check_data
from qlora_lowmem.data.report import DataReport
from qlora_lowmem.data.values import FaultLog, FaultySampleError

__all__ = ["CheckedData", "DataReport", "FaultLog", "FaultySampleError", "check_data"]
