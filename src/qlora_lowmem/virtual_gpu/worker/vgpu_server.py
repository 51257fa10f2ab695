"""The process that jobs are forked from: imports modules once, without initialising CUDA, then forks a child a job.

`python vgpu_server.py FD MODULES`: FD is a socket to the parent, MODULES a JSON list. Every message of the parent is a
job's folder, with a socket of the job's own; that gets the child's pid, and when it has ended its exit code, or minus a
signal's number. Modules that cannot be imported are told to the parent, and end the process.

A job's folder has `job.json` (`function`, `kwargs`, `variables`), and gets `result.json` and `output`.
"""

import contextlib
import ctypes
import gc
import importlib
import importlib.util
import json
import os
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

_PR_SET_PDEATHSIG = 1


@contextlib.contextmanager
def _answering_without_cuda(torch: Any) -> Iterator[None]:
    """While modules are imported, answers what they ask about the card without making a context.

    A child cannot use CUDA once its parent has. bitsandbytes, for one, asks for the compute capability at import.
    """
    capability = tuple(json.loads(os.environ["VGPU_SERVER_CAPABILITY"]))
    name = os.environ["VGPU_SERVER_TITLE"]
    properties = SimpleNamespace(name=name, major=capability[0], minor=capability[1])
    answers: dict[str, Any] = {
        "get_device_capability": capability,
        "get_device_name": name,
        "get_device_properties": properties,
    }
    originals = {attribute: getattr(torch.cuda, attribute) for attribute in answers}
    importing = True

    def answering(attribute: str) -> Callable[..., Any]:
        def answer(*arguments: Any, **options: Any) -> Any:
            # A module that keeps the function asks the card with it later, as Inductor does.
            return answers[attribute] if importing else originals[attribute](*arguments, **options)

        return answer

    vars(torch.cuda).update({attribute: answering(attribute) for attribute in answers})
    try:
        yield
    finally:
        importing = False
        vars(torch.cuda).update(originals)


def _preload(modules: list[str]) -> None:
    torch: Any = importlib.import_module("torch")
    # A thread pool does not survive a fork; one thread makes none.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with _answering_without_cuda(torch):
        for name in modules:
            module, _, function = name.partition(":")
            imported = importlib.import_module(module)
            if function:
                getattr(imported, function)()
            if torch.cuda.is_initialized():
                raise RuntimeError(
                    f"importing {name} initialises CUDA, and a forked job could not use it any more; "
                    "leave that module out of preload"
                )
    _after_fork.append(lambda: torch.set_num_threads(threads))
    gc.collect()
    gc.freeze()  # the collector of a child would copy every page of what is shared


_after_fork: list[Any] = []


def _run_job(folder: Path) -> NoReturn:
    """In the child: runs the function, leaves its result, and ends the process."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setpgid(0, 0)
    with (folder / "output").open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    os.environ.update(job["variables"])
    ctypes.CDLL(None).vgpu_say_in_force()  # to the account of the job's own
    tempfile.tempdir = None  # where that is may have been asked before the fork
    for action in _after_fork:
        action()
    code, result = 0, {}
    try:
        module, _, function = job["function"].partition(":")
        call = getattr(importlib.import_module(module), function)
        # Cycles that hold tensors live until the next collection: count towards it from zero in every job, so that the
        # same job has the same peak whatever the server did before.
        gc.collect()
        value = call(**job["kwargs"])
        json.dumps(value)
        result = {"value": value}
    except SystemExit as request:
        code = request.code if isinstance(request.code, int) else int(request.code is not None)
        if isinstance(request.code, str):
            print(request.code, file=sys.stderr)
    except BaseException as error:
        code, result = 1, {"error": f"{type(error).__name__}: {error}"}
        traceback.print_exc()
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


class _Server:
    def __init__(self, connection: socket.socket, processes: Any) -> None:
        self.connection = connection
        self.processes = processes
        processes.adopt_orphans()
        self.selector = selectors.DefaultSelector()
        self.selector.register(connection, selectors.EVENT_READ)
        self.jobs: dict[int, socket.socket] = {}  # by the child's pid
        self.spared: frozenset[int] = frozenset()

    def serve(self) -> None:
        """Until the parent is gone."""
        self.spared = frozenset(self.processes.children())  # of imported modules
        while True:
            for key, _ in self.selector.select():
                if key.data is not None:
                    self._reap(key)
                    continue
                folder, sockets, _, _ = socket.recv_fds(self.connection, 4096, 1, socket.MSG_CMSG_CLOEXEC)
                if not folder:
                    return
                self._start(Path(folder.decode()), socket.socket(fileno=sockets[0]))

    def end(self) -> NoReturn:
        """Leave nothing behind."""
        self.processes.end_children()
        shutil.rmtree(os.environ["VGPU_SERVER_FOLDER"], ignore_errors=True)
        os._exit(0)

    def _start(self, folder: Path, job: socket.socket) -> None:
        pid = os.fork()
        if pid == 0:
            self.selector.close()
            for ours in (self.connection, job, *self.jobs.values()):
                ours.close()
            _run_job(folder)
        self.jobs[pid] = job
        self.selector.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
        _say(job, pid)

    def _reap(self, key: selectors.SelectorKey) -> None:
        self.selector.unregister(key.fileobj)
        os.close(key.fd)
        _, status = os.waitpid(key.data, 0)
        _kill_group(key.data)  # what the job started and left behind
        if len(self.jobs) == 1:  # whose an orphan is that left the group is not known while others run
            self.processes.end_children(self.spared)
        with self.jobs.pop(key.data) as job:
            _say(job, os.waitstatus_to_exitcode(status))


def _say(job: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # nobody waits for it any more
        job.send(str(number).encode())


def _processes() -> Any:
    """The launcher's module, by its place: this script imports nothing of its package."""
    spec: Any = importlib.util.spec_from_file_location("vgpu_processes", os.environ.pop("VGPU_SERVER_PROCESSES"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Entry of the server process. It is killed when the parent closes it, and ends by itself if that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to handle
    server = _Server(socket.socket(fileno=int(sys.argv[1])), _processes())
    # Modules take seconds to import, in which nobody looks whether the parent is there.
    signal.signal(signal.SIGTERM, lambda *_: server.end())
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(os.environ.pop("VGPU_SERVER_PARENT")):
        server.end()
    sys.path[:] = json.loads(os.environ.pop("VGPU_SERVER_PATH"))
    try:
        _preload(json.loads(sys.argv[2]))
    except BaseException as error:
        traceback.print_exc()
        server.connection.send(f"{type(error).__name__}: {error}"[:10000].encode())
        return
    server.serve()
    server.end()


if __name__ == "__main__":
    main()
