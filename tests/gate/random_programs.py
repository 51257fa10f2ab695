"""Random programs of several processes whose peak is known by construction, to the byte.

A program is a list of steps, one after the other: which process does what. Processes wait for their next step on a
socket, so that what is held at once is known, whoever holds it. Sizes are such that PyTorch's allocator hands out what
it is asked for: multiples of 512 bytes up to 1 MiB, above that of 2 MiB. Imports torch only where it is used: some of
the processes have none.
"""

import contextlib
import ctypes
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

MIB = 2**20
CARD = "rtx-4090-24gb"
# Ways of starting a process. Those of `HEAVY` import torch anew, which takes seconds; `plain` has none and takes its
# memory from the CUDA runtime itself.
FORKS = ("fork", "fork, orphaned", "multiprocessing fork")
LIGHT = ("plain, subprocess", "plain, exec", "plain, through sh", "plain, new session")
HEAVY = ("subprocess", "exec", "multiprocessing spawn", "multiprocessing forkserver", "new session")
ENDS = ("return", "_exit", "kill", "exec")
_PLACES = ("here", "stream", "thread")

Step = list[Any]  # process, action, its arguments


@dataclass
class Program:
    """Steps, the highest sum of what all processes held, and what kinds of steps there are."""

    steps: list[Step] = field(default_factory=list)
    peak: int = 0
    kinds: set[str] = field(default_factory=set)


@dataclass
class _Process:
    torch: bool
    used: bool = False  # CUDA: it cannot fork any more
    held: dict[str, int] = field(default_factory=dict)


def program(seed: int, *, heavy: bool = False, compiled: bool = False) -> Program:
    """The same program for the same seed; `heavy` starts processes that import torch, `compiled` uses Inductor."""
    chance = random.Random(seed)
    found, processes, names = Program(), {0: _Process(torch=True)}, iter(range(10**6))

    def note(process: int, action: str, *arguments: Any) -> None:
        found.steps.append([process, action, *arguments])
        found.peak = max(found.peak, sum(sum(each.held.values()) for each in processes.values()))

    def take(number: int, place: str) -> Step:
        process, name = processes[number], f"t{next(names)}"
        small = process.torch and chance.random() < 0.3
        process.held[name] = 512 * chance.randint(1, 2048) if small else 2 * MIB * chance.randint(1, 40)
        process.used = True
        found.kinds.add(place if process.torch else "without torch")
        return [number, "take", name, process.held[name], place]

    def start(number: int) -> None:
        parent = processes[number]
        forks = FORKS if parent.torch and not parent.used else ()
        how = chance.choice([*forks, *forks, *LIGHT, *(HEAVY if heavy and chance.random() < 0.3 else ())])
        child = max(processes) + 1
        processes[child] = _Process(torch=not how.startswith("plain"))
        found.kinds |= {how, *(("nested",) if number else ())}
        note(number, "start", child, how)

    for _ in range(chance.choice((0, 1, 1, 2, 3))):  # before anyone has used CUDA, so that forks are possible
        start(chance.choice(list(processes)))
    for _ in range(chance.randint(5, 16)):
        number = chance.choice(list(processes))
        process = processes[number]
        action = chance.choice(["take"] * 5 + ["drop"] * 4 + ["start", "end", "empty", "pin", "threads", "at once"])
        if action == "take":
            note(*take(number, chance.choice((*_PLACES, "compiled, eager") if heavy else _PLACES)))
        elif action == "drop" and process.held:
            name = chance.choice(list(process.held))
            del process.held[name]
            found.kinds.add("freed")
            note(number, "drop", name)
        elif action == "start" and len(processes) < 6:
            start(number)
        elif action == "end" and number:
            how = chance.choice(ENDS)
            del processes[number]
            found.kinds.add(f"ends by {how}")
            note(number, "end", how)
        elif action in ("empty", "pin") and process.torch:
            process.used = True
            found.kinds.add({"empty": "cache emptied", "pin": "pinned memory"}[action])
            note(number, action)
        elif action == "threads" and process.torch:
            count, size = chance.randint(2, 5), 2 * MIB * chance.randint(1, 20)
            process.used, process.held["threads"] = True, count * size
            note(number, "threads", count, size)
            del process.held["threads"]
            found.kinds.add("threads at once")
        elif action == "at once":
            note(0, "at once", *(take(each, "here") for each in list(processes)))
            found.kinds.add("processes at once")
    if not found.peak:
        note(*take(0, "here"))
    if compiled:
        from qlora_lowmem.virtual_gpu import get_card

        size = 2 * MIB * chance.randint(10, 40)
        processes[0].held |= {"x": size, "y": size, "to empty the cache": get_card(CARD).l2_bytes}
        note(0, "compile", size)
        del processes[0].held["to empty the cache"]  # Inductor times kernels in an L2 cache that a tensor has filled
        found.kinds.add("compiled, Inductor")
    if any(process.held for number, process in processes.items() if number):
        found.kinds.add("outlives the test")
    return found


def limit_of(found: Program, seed: int) -> int:
    """A budget that is the peak itself, a byte less, or some bytes more or less."""
    chance = random.Random(seed)
    return max(1, found.peak + chance.choice((0, 0, -1, -1, -chance.randint(1, 8 * MIB), chance.randint(1, 8 * MIB))))


def run(found: Program) -> None:
    """Be the program; its process 0 is this one. What it started may live on when it returns."""
    me = _Actor(0, os.getpid(), torch=True)
    ask = _Asker(os.getpid())
    for process, action, *arguments in found.steps:
        if action == "at once":
            ask.at_once([step for step in arguments if step[0]])
            for step in arguments:
                if not step[0]:
                    me.do(*step[1:])
        elif process:
            ask(process, action, *arguments)
        else:
            me.do(action, *arguments)
        if action == "start":
            ask.meet(arguments[0])


def _address(root: int, number: int) -> str:
    return f"\0random-program-{root}-{number}"


class _Asker:
    """In process 0: tells the others what to do, and waits until they have."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._known: dict[int, tuple[socket.socket, int]] = {}

    def meet(self, number: int) -> None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(120)
        deadline = time.monotonic() + 120
        while True:
            try:
                connection.connect(_address(self._root, number))
                break
            except OSError:
                assert time.monotonic() < deadline, f"process {number} did not start"
                time.sleep(0.005)
        self._known[number] = connection, int(connection.recv(100))

    def __call__(self, number: int, action: str, *arguments: Any) -> None:
        self.at_once([[number, action, *arguments]])
        if action == "end":
            self._wait_for_the_end(self._known.pop(number)[1])

    def at_once(self, steps: list[Step]) -> None:
        for number, *order in steps:
            self._known[number][0].send(json.dumps(order).encode())
        for number, *order in steps:
            answer = self._known[number][0].recv(4000).decode()
            assert answer == "done", f"process {number}, {order}: {answer}"

    def _wait_for_the_end(self, pid: int) -> None:
        while Path(f"/proc/{pid}").exists():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                if fields[0] == "Z":
                    return
                another = Path(f"/proc/{pid}/exe").readlink() != Path("/proc/self/exe").readlink()
                if another and int(fields[25]):  # its stack is there: exec is through
                    return
            time.sleep(0.001)


class _Actor:
    """What a process can do."""

    def __init__(self, number: int, root: int, torch: bool) -> None:
        self._number, self._root, self._torch = number, root, torch
        self._held: dict[str, Any] = {}
        self._children: list[Any] = []

    def do(self, action: str, *arguments: Any) -> None:
        getattr(self, f"_{action}")(*arguments)

    def _take(self, name: str, size: int, place: str) -> None:
        if not self._torch:
            address = ctypes.c_void_p()
            assert _runtime().cudaMalloc(ctypes.byref(address), ctypes.c_size_t(size)) == 0
            self._held[name] = address
            return
        import torch

        def take() -> None:
            self._held[name] = torch.empty(size, dtype=torch.uint8, device="cuda")

        if place == "stream":
            with torch.cuda.stream(torch.cuda.Stream()):
                take()
        elif place == "thread":
            thread = threading.Thread(target=take)
            thread.start()
            thread.join()
        elif place == "compiled, eager":
            torch.compile(take, backend="eager")()
        else:
            take()

    def _drop(self, name: str) -> None:
        held = self._held.pop(name)
        if not self._torch:
            assert _runtime().cudaFree(held) == 0

    def _empty(self) -> None:
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # which hides nothing

    def _pin(self) -> None:
        import torch

        torch.empty(64 * MIB, dtype=torch.uint8, pin_memory=True)

    def _threads(self, count: int, size: int) -> None:
        import torch

        together = threading.Barrier(count)

        def take() -> None:
            taken = torch.empty(size, dtype=torch.uint8, device="cuda")
            together.wait()
            del taken

        threads = [threading.Thread(target=take) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _compile(self, size: int) -> None:
        import torch

        x = torch.empty(size // 4, device="cuda")
        self._held |= {"x": x, "y": torch.compile(lambda t: (t * 2 + 1).sin())(x)}

    def _start(self, child: int, how: str) -> None:
        target = (child, self._root)
        command = [sys.executable, __file__, *map(str, target), str(int(not how.startswith("plain")))]
        if how in ("fork", "fork, orphaned"):
            pid = os.fork()
            if pid == 0:
                if how == "fork, orphaned" and os.fork():
                    os._exit(0)
                _serve_and_exit(*target)
            if how == "fork, orphaned":
                os.waitpid(pid, 0)
        elif how.startswith("multiprocessing"):
            made = multiprocessing.get_context(how.split()[1]).Process(target=serve, args=(*target, True))
            made.start()
            self._children.append(made)
        elif how.endswith("exec"):
            if os.fork() == 0:
                os.execv(command[0], command)
        elif how.endswith("sh"):
            self._children.append(subprocess.Popen(["sh", "-c", '"$@"; exit', "sh", *command]))
        else:
            self._children.append(subprocess.Popen(command, start_new_session=how.endswith("new session")))


def _serve_and_exit(number: int, root: int) -> NoReturn:
    """In a forked child, which has its parent's stack below it."""
    with contextlib.suppress(SystemExit):
        serve(number, root, True)
    os._exit(0)


def serve(number: int, root: int, torch: bool) -> NoReturn:
    """Do what process 0 says, until it says that it is enough or is gone."""
    actor = _Actor(number, root, torch)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(_address(root, number))
    listener.listen()
    connection, _ = listener.accept()
    connection.send(str(os.getpid()).encode())
    connection.settimeout(1)
    while True:
        try:
            order = connection.recv(4000)
        except TimeoutError:
            order = b""
            if Path(f"/proc/{root}").exists():
                continue
        action, *arguments = json.loads(order or b'["end", "_exit"]')
        if action == "end":
            with contextlib.suppress(OSError):
                connection.send(b"done")
            _end(*arguments)
        try:
            actor.do(action, *arguments)
            connection.send(b"done")
        except Exception as error:
            connection.send(f"{type(error).__name__}: {error}"[:3000].encode())


def _end(how: str) -> NoReturn:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exec":
        os.execv("/bin/sleep", ["sleep", "20"])
    if how == "_exit":
        os._exit(0)
    sys.exit(0)


def _runtime() -> Any:
    """The CUDA runtime of this machine, which is preloaded: `libcudart.so.13`."""
    (path,) = [entry for entry in os.environ["LD_PRELOAD"].split() if "libcudart" in entry]
    return ctypes.CDLL(path)


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1")
