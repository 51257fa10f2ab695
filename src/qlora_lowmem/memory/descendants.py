"""Processes of a program that use a real GPU beside the one that is measured: found, not measured.

NVML says which processes are on a GPU now, not what one that has ended held. Looked at again and again it shows that
there was one, since a process keeps its CUDA context for longer than it takes to look; what it held at its most is not
to be had so. In a container NVML often lists no processes: there nothing is found.
"""

import threading
from typing import Any

import psutil
import pynvml

_SECONDS = 0.05  # between two looks; a process that only imports torch takes ten times that


class DescendantsOnTheCard:
    """Watches from its making to `stop` for descendants of this process on the GPU of an NVML handle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._this = psutil.Process()
        self._before = self._on_the_card()
        self._found: dict[int, str] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> tuple[str, ...]:
        """End; those that were seen, as `python (process 123)`."""
        self._ended.set()
        self._thread.join()
        self._look()
        return tuple(self._found.values())

    def _watch(self) -> None:
        while not self._ended.wait(_SECONDS):
            self._look()

    def _look(self) -> None:
        new = self._on_the_card() - self._before - self._found.keys()
        if not new:
            return
        for process in self._this.children(recursive=True):
            if process.pid in new:
                try:
                    name = process.name()
                except psutil.Error:  # it has ended
                    name = "a process"
                self._found[process.pid] = f"{name} (process {process.pid})"

    def _on_the_card(self) -> set[int]:
        try:
            return {process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle)}
        except pynvml.NVMLError:
            return set()
