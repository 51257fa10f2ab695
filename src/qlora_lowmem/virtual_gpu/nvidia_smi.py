"""`nvidia-smi` of a virtual machine: what programs ask it, answered by NVML as everywhere on the machine.

The table, the list (`-L`), and `--query-gpu` and `--query-compute-apps` as CSV. It is run as a file, by a script that
`launch.py` puts on the program's PATH.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pynvml as nvml

_MIB = 2**20
# Fields by the names that --query-gpu gives them, with their units: of a handle.
_Fields = Mapping[str, tuple[str, Callable[[Any], Any]]]
_OF_A_CARD: _Fields = {
    "index": ("", nvml.nvmlDeviceGetIndex),
    "count": ("", lambda _: nvml.nvmlDeviceGetCount()),
    "name": ("", nvml.nvmlDeviceGetName),
    "gpu_name": ("", nvml.nvmlDeviceGetName),
    "uuid": ("", nvml.nvmlDeviceGetUUID),
    "gpu_uuid": ("", nvml.nvmlDeviceGetUUID),
    "pci.bus_id": ("", lambda gpu: nvml.nvmlDeviceGetPciInfo(gpu).busId),
    "driver_version": ("", lambda _: nvml.nvmlSystemGetDriverVersion()),
    "compute_cap": ("", lambda gpu: "{}.{}".format(*nvml.nvmlDeviceGetCudaComputeCapability(gpu))),
    "memory.total": ("MiB", lambda gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).total // _MIB),
    "memory.used": ("MiB", lambda gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used // _MIB),
    "memory.free": ("MiB", lambda gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).free // _MIB),
    "utilization.gpu": ("%", lambda gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu),
    "utilization.memory": ("%", lambda gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).memory),
}
# By those of --query-compute-apps: of NVML's record of a process.
_OF_A_PROCESS: _Fields = {
    "pid": ("", lambda process: process.pid),
    "used_memory": ("MiB", lambda process: process.usedGpuMemory // _MIB),
    "used_gpu_memory": ("MiB", lambda process: process.usedGpuMemory // _MIB),
}
_NOT_KNOWN = ("", lambda _: "[N/A]")  # as of a card that does not know


def main() -> int:
    """Answers the command line; returns the exit code."""
    parser = argparse.ArgumentParser("nvidia-smi", description=__doc__, allow_abbrev=False)
    parser.add_argument("-L", "--list-gpus", action="store_true", help="list the cards")
    parser.add_argument("-i", "--id", metavar="N,...", help="only these: numbers or UUIDs")
    parser.add_argument("--query-gpu", metavar="FIELD,...", help="fields of the cards, as CSV")
    parser.add_argument("--query-compute-apps", metavar="FIELD,...", help="fields of the processes on them, as CSV")
    parser.add_argument("--format", default="csv", help="csv, noheader, nounits, with commas between")
    asked = parser.parse_args()
    nvml.nvmlInit()
    cards = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    if asked.id is not None:
        wanted = set(asked.id.split(","))
        cards = [gpu for gpu in cards if wanted & {str(_OF_A_CARD[name][1](gpu)) for name in ("index", "uuid")}]
    if not cards:
        print("No devices were found")
        return 6
    if asked.query_gpu:
        _print_csv(asked.query_gpu, asked.format, _OF_A_CARD, cards)
    elif asked.query_compute_apps:
        found = [process for gpu in cards for process in nvml.nvmlDeviceGetComputeRunningProcesses(gpu)]
        _print_csv(asked.query_compute_apps, asked.format, _OF_A_PROCESS, found)
    elif asked.list_gpus:
        for gpu in cards:
            print("GPU {}: {} (UUID: {})".format(*(_OF_A_CARD[name][1](gpu) for name in ("index", "name", "uuid"))))
    else:
        _print_table(cards)
    return 0


def _print_csv(fields: str, options: str, known: _Fields, rows: Sequence[object]) -> None:
    names, chosen = [name.strip() for name in fields.split(",")], options.replace(" ", "").split(",")
    columns = [(name, *known.get(name, _NOT_KNOWN)) for name in names]
    if "noheader" not in chosen:
        print(", ".join(f"{name} [{unit}]" if unit else name for name, unit, _ in columns))
    for row in rows:
        units = ("" if "nounits" in chosen or not unit else f" {unit}" for _, unit, _ in columns)
        print(", ".join(f"{read(row)}{unit}" for (*_, read), unit in zip(columns, units, strict=True)))


def _print_table(cards: Sequence[Any]) -> None:
    driver, cuda = nvml.nvmlSystemGetDriverVersion(), nvml.nvmlSystemGetCudaDriverVersion()
    versions = f"NVIDIA-SMI {driver}   Driver Version: {driver}   CUDA Version: {cuda // 1000}.{cuda % 1000 // 10}"
    rule = f"+{'-' * 89}+"
    print(rule, f"| {versions:<87} |", rule, sep="\n")
    for gpu in cards:
        fields = ("index", "name", "memory.used", "memory.total")
        index, name, used, total = (_OF_A_CARD[field][1](gpu) for field in fields)
        memory = f"{used}MiB / {total}MiB"
        print(f"| {index:>3}  {name:<44} {memory:>26} {'0%':>10} |")
    print(rule)
    for gpu in cards:
        for each in nvml.nvmlDeviceGetComputeRunningProcesses(gpu):
            print(f"| {nvml.nvmlDeviceGetIndex(gpu):>3}  {each.pid:>10}  C {each.usedGpuMemory // _MIB:>65}MiB |")
    print(rule)


if __name__ == "__main__":
    sys.exit(main())
