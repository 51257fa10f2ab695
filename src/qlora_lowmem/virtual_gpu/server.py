"""Many short jobs on virtual GPUs: modules are imported once, and every job is a forked child with its own card."""

import contextlib
import json
import os
import queue
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_lowmem.scratch import scratch_folder

from . import account, processes
from .account import ACCOUNT_FILE, Report, read_report
from .cards import Card, VirtualGPUError
from .launch import card_variables, environment
from .processes import send
from .streams import open_standard_streams

_SCRIPT = Path(__file__).with_name("worker") / "vgpu_server.py"
_TAIL_BYTES = 4096
_END_SECONDS = 10.0  # that a server gets to end what its jobs left behind


class JobFailedError(VirtualGPUError):
    """The server that ran a job ended before the job did."""


@dataclass(frozen=True)
class JobResult:
    """How a job ended.

    Attributes:
        value: what the function returned; None if it did not.
        report: what the job used.
        exit_code: 0, 1 for an exception, the argument of `sys.exit`, or 128 plus a signal's number.
        signal: the number of the signal that ended it, or None.
        error: `Type: message` of an exception, or None.
        timed_out: it ran longer than its time limit, and was killed.
        output_tail: the end of what it wrote to stdout and stderr.
    """

    value: Any
    report: Report
    exit_code: int
    signal: int | None
    error: str | None
    timed_out: bool
    output_tail: str


@dataclass(eq=False)
class _Job:
    function: str
    kwargs: dict[str, Any]
    card: Card
    timeout: float | None
    folder: Path
    future: "Future[JobResult]"
    pid: int | None = None

    def failed(self, reason: str) -> JobFailedError:
        return JobFailedError(f"{self.function} on {self.card.name}: {reason}")

    def kill(self) -> None:
        if self.pid is not None:
            for how in (os.killpg, os.kill):  # the group exists once the child has made it
                send(how, self.pid)


class Server:
    """Runs functions in processes that are forked from one that has imported `preload` already.

        with Server(["torch", "transformers"]) as server:
            future = server.submit("package.module:function", {"seq": 1024}, get_card("rtx-4050-laptop-6gb"))
            future.result().report.peak_allocated_bytes

    A job's peaks are those of a process of its own. Libraries decide things by the card's compute capability when they
    are imported, so there is one such process a compute capability, started with its first job. At most `max_workers`
    jobs run at once; the others wait.

    Where the machine cannot host a virtual GPU, futures fail with VirtualGPUUnavailable.

    Args:
        preload: modules, or `package.module:function` for a function of one that is called to import more.

    Raises:
        ValueError: `max_workers` is less than 1.
    """

    def __init__(self, preload: Sequence[str] = (), *, max_workers: int = 1) -> None:
        if max_workers < 1:
            raise ValueError(f"max_workers is {max_workers}; it must be at least 1")
        self._preload = list(preload)
        self._temporary = contextlib.ExitStack()
        self._folder = self._temporary.enter_context(scratch_folder())
        self._lock = threading.RLock()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._submitted = 0
        self._running: set[_Job] = set()
        self._closed = False
        self._parents: dict[tuple[int, int], _ForkParent] = {}
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(max_workers)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def submit(
        self, function: str, kwargs: dict[str, Any], card: Card, *, timeout: float | None = None
    ) -> "Future[JobResult]":
        """Runs `package.module:function(**kwargs)` on the card; arguments and result are what JSON can hold.

        The future's result says how the job ended, whatever that was; the future fails with JobFailedError only if
        the process that jobs are forked from ends. `timeout` is in seconds from the job's start.

        Raises:
            ValueError: `function` is not written like that.
            RuntimeError: the server is closed.
        """
        module, _, name = function.partition(":")
        if not module or not name.isidentifier():
            raise ValueError(f"function is {function!r}; write package.module:function")
        with self._lock:
            if self._closed:
                raise RuntimeError("the server is closed; submit jobs inside its with block")
            self._submitted += 1
            job = _Job(function, kwargs, card, timeout, self._folder / str(self._submitted), Future())
            self._jobs.put(job)
        return job.future

    def close(self) -> None:
        """Ends everything: running jobs are killed, waiting ones fail, nothing stays behind."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for job in self._running:
                job.kill()
        for parent in self._parents.values():
            parent.close()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._temporary.close()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if not job.future.set_running_or_notify_cancel():
                continue
            try:
                job.future.set_result(self._run(job))
            except Exception as error:  # whatever it is, it is the caller's
                job.future.set_exception(error)

    def _run(self, job: _Job) -> JobResult:
        with self._lock:
            if self._closed:
                raise job.failed("the server was closed before the job began")
            parent = self._parent_for(job.card)
            self._running.add(job)
        try:
            job.folder.mkdir()
            account.create(job.folder / ACCOUNT_FILE, job.card, 1)
            order = {"function": job.function, "kwargs": job.kwargs, "variables": _variables(job)}
            (job.folder / "job.json").write_text(json.dumps(order), encoding="utf-8")
            status, timed_out = self._wait(job, parent)
            return _result(job, status, timed_out)
        finally:
            shutil.rmtree(job.folder, ignore_errors=True)
            with self._lock:
                self._running.discard(job)

    def _wait(self, job: _Job, parent: "_ForkParent") -> tuple[int, bool]:
        """The exit code, or minus a signal's number, of the child that runs the job; whether it took too long."""
        status, timed_out = b"", False
        with parent.start(job.folder) as connection:
            if pid := connection.recv(32):
                job.pid = int(pid)
                if self._closed:  # meanwhile
                    job.kill()
                connection.settimeout(job.timeout)
                try:
                    status = connection.recv(32)
                except (TimeoutError, BlockingIOError):  # the second, of a limit of 0
                    timed_out = True
                    job.kill()
                    connection.settimeout(None)
                    status = connection.recv(32)
        if self._closed:
            raise job.failed("the server was closed while the job ran")
        if not status:
            job.kill()
            raise job.failed(parent.why_it_ended())
        job.pid = None
        return int(status), timed_out

    def _parent_for(self, card: Card) -> "_ForkParent":
        parent = self._parents.get(card.compute_capability)
        if parent is None or parent.ended:
            folder = Path(tempfile.mkdtemp(dir=self._folder, prefix="parent-"))
            parent = self._parents[card.compute_capability] = _ForkParent(self._preload, card, folder)
        return parent


class _ForkParent:
    """The process that jobs on cards of one compute capability are forked from (`worker/vgpu_server.py`)."""

    def __init__(self, preload: list[str], card: Card, folder: Path) -> None:
        variables = environment(card, report=folder) | {
            "VGPU_SERVER_CAPABILITY": json.dumps(card.compute_capability),
            "VGPU_SERVER_TITLE": card.title,
            "VGPU_SERVER_FOLDER": str(folder.parent),
            "VGPU_SERVER_PROCESSES": processes.__file__,
            "VGPU_SERVER_PARENT": str(os.getpid()),
            "VGPU_SERVER_PATH": json.dumps([str(_SCRIPT.parent), *sys.path]),
            # Asking whether there is a card must not make a context either.
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        }
        self._output = folder / "output"
        self._lock = threading.Lock()
        self._failure = b""
        open_standard_streams()
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with self._output.open("wb") as output, theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(_SCRIPT), str(theirs.fileno()), json.dumps(preload)],
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def start(self, folder: Path) -> socket.socket:
        """Asks for a child that runs the job in the folder; its pid, then its end, are told through the result."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, contextlib.suppress(OSError):
            socket.send_fds(self._connection, [str(folder).encode()], [theirs.fileno()])
        return ours

    def why_it_ended(self) -> str:
        with self._lock:
            self._end()
            with contextlib.suppress(OSError):
                self._failure = self._failure or self._connection.recv(1 << 16)
        if self._failure:
            return f"the server process could not import its modules: {self._failure.decode()}"
        return f"the server process ended with {self._process.returncode}\n{_tail(self._output)}"

    def close(self) -> None:
        with self._lock:
            self._connection.close()  # then it ends what it has started, and itself
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_SECONDS)
            self._end()

    def _end(self) -> None:
        send(os.killpg, self._process.pid)
        self._process.wait()


def _result(job: _Job, status: int, timed_out: bool) -> JobResult:
    exit_code = status if status >= 0 else 128 - status
    file = job.folder / "result.json"
    try:
        result = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        return JobResult(
            value=result.get("value"),
            report=read_report(job.folder, job.card, exit_code),
            exit_code=exit_code,
            signal=-status if status < 0 else None,
            error=result.get("error"),
            timed_out=timed_out,
            output_tail=_tail(job.folder / "output"),
        )
    except (OSError, ValueError) as error:
        raise job.failed(f"its report cannot be read: {error}") from error


def _variables(job: _Job) -> dict[str, str]:
    # What a job that is killed leaves in its folder for temporary files goes with its own folder.
    return card_variables(job.card, job.folder) | {"TMPDIR": str(job.folder)}


def _tail(path: Path) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        return file.read().decode(errors="replace")
