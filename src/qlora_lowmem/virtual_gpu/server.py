"""Many short jobs on virtual GPUs: modules are imported once, and every job is a forked child with its own card."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from . import account
from .account import ACCOUNT_FILE, Report, read_report
from .build import ensure_built
from .cards import Card, VirtualGPUError
from .launch import card_variables, variables

_SCRIPT = Path(__file__).with_name("worker") / "vgpu_server.py"
_TAIL_BYTES = 4096


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


@dataclass
class _Job:
    number: int
    function: str
    kwargs: dict[str, Any]
    card: Card
    timeout: float | None
    future: "Future[JobResult]"
    folder: Path
    timer: threading.Timer | None = None
    timed_out: bool = False
    pid: int | None = None


class Server:
    """Runs functions in processes that are forked from one that has imported `preload` already.

        with Server(["torch", "transformers"]) as server:
            future = server.submit("package.module:function", {"seq": 1024}, get_card("rtx-4050-laptop-6gb"))
            future.result().report.peak_allocated_bytes

    A job's peaks are those of a process of its own. Libraries decide things by the card's compute capability when they
    are imported, so there is one such process a compute capability, started with its first job. At most `max_workers`
    jobs run at once; the others wait.

    Where the machine cannot host a virtual GPU, futures fail with VirtualGPUUnavailable.

    Raises:
        ValueError: `max_workers` is less than 1.
    """

    def __init__(self, preload: Sequence[str] = (), *, max_workers: int = 1) -> None:
        if max_workers < 1:
            raise ValueError(f"max_workers is {max_workers}; it must be at least 1")
        self._preload = list(preload)
        self._max_workers = max_workers
        self._lock = threading.RLock()
        self._folder = Path(tempfile.mkdtemp(prefix="vgpu-server-"))
        self._waiting: deque[_Job] = deque()
        self._running = 0
        self._next = 0
        self._closed = False
        self._parents: dict[tuple[int, int], _ForkParent] = {}

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
            self._next += 1
            job = _Job(self._next, function, kwargs, card, timeout, Future(), self._folder / str(self._next))
            self._waiting.append(job)
            self._start_waiting()
        return job.future

    def close(self) -> None:
        """Ends everything: running jobs are killed, waiting ones fail, nothing stays behind."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            waiting, self._waiting = list(self._waiting), deque()
            parents = list(self._parents.values())
        for job in waiting:
            _fail(job, "the server was closed before the job began")
        for parent in parents:
            parent.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start_waiting(self) -> None:
        while self._waiting and self._running < self._max_workers:
            job = self._waiting.popleft()
            if not job.future.set_running_or_notify_cancel():
                continue
            self._running += 1
            try:
                self._parent_for(job.card).start(job)
            except Exception as error:  # this may be the thread that reads for another job
                self._running -= 1
                job.future.set_exception(error)

    def _parent_for(self, card: Card) -> "_ForkParent":
        parent = self._parents.get(card.compute_capability)
        if parent is None or parent.ended:
            folder = self._folder / f"parent-{len(list(self._folder.glob('parent-*')))}"
            parent = _ForkParent(self._preload, card, folder, self._job_ended)
            self._parents[card.compute_capability] = parent
        return parent

    def _job_ended(self) -> None:
        with self._lock:
            self._running -= 1
            if not self._closed:
                self._start_waiting()


class _ForkParent:
    """One server process and the jobs that run under it."""

    def __init__(self, preload: list[str], card: Card, folder: Path, on_job_end: Callable[[], None]) -> None:
        self._on_job_end = on_job_end
        self._lock = threading.RLock()
        self._jobs: dict[int, _Job] = {}
        self._closing = False
        self._failure = ""
        self.ended = False
        environment = dict(os.environ) | variables(ensure_built(), card, 1, folder, os.environ)
        environment |= {
            "VGPU_SERVER_CAPABILITY": json.dumps(card.compute_capability),
            "VGPU_SERVER_TITLE": card.title,
            "VGPU_SERVER_FOLDER": str(folder.parent),
            "VGPU_SERVER_PATH": json.dumps([str(_SCRIPT.parent), *sys.path]),
            # Asking whether there is a card must not make a context either.
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        }
        self._output = folder / "output"
        ours, theirs = socket.socketpair()
        with self._output.open("wb") as output, theirs:
            command = [sys.executable, str(_SCRIPT), str(theirs.fileno()), json.dumps(preload)]
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._connection = ours
        self._reader = threading.Thread(target=self._read, name="virtual-gpu-server", daemon=True)
        self._reader.start()

    def start(self, job: _Job) -> None:
        """Asks for the job to be forked; it fails through its future if the process is gone."""
        job.folder.mkdir()
        account.create(job.folder / ACCOUNT_FILE, job.card, 1)
        message = {
            "id": job.number,
            "function": job.function,
            "kwargs": job.kwargs,
            "variables": card_variables(job.card, job.folder),
            "output": str(job.folder / "output"),
            "result": str(job.folder / "result.json"),
        }
        text = json.dumps(message).encode() + b"\n"
        with self._lock:
            self._jobs[job.number] = job
            # Should it have ended, the reader fails the job.
            with contextlib.suppress(OSError):
                self._connection.sendall(text)
            late = self.ended
        if late:
            self._fail_jobs()

    def close(self) -> None:
        """Kills the jobs, ends the process, and waits for both."""
        self._closing = True
        with self._lock:
            for job in self._jobs.values():
                _kill(job)
        with contextlib.suppress(OSError):
            self._connection.sendall(b'{"bye": true}\n')
            self._connection.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._connection.close()

    def _read(self) -> None:
        with self._connection.makefile("rb") as lines, contextlib.suppress(OSError):
            for line in lines:
                self._handle(json.loads(line))
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with self._lock:
            self.ended = True
            for job in self._jobs.values():
                _kill(job)
        self._fail_jobs()

    def _handle(self, message: dict[str, Any]) -> None:
        event = message["event"]
        if event == "failed":
            self._failure = message["error"]
        elif event == "started":
            with self._lock:
                job = self._jobs[message["id"]]
                job.pid = message["pid"]
                if self._closing:
                    _kill(job)
                elif job.timeout is not None:
                    job.timer = threading.Timer(job.timeout, _time_out, [job])
                    job.timer.daemon = True
                    job.timer.start()
        elif event == "ended":
            with self._lock:
                job = self._jobs.pop(message["id"])
                job.pid = None
            _finish(job, message["status"])
            self._on_job_end()

    def _fail_jobs(self) -> None:
        with self._lock:
            jobs, self._jobs = list(self._jobs.values()), {}
        if self._closing:
            reason = "the server was closed while the job ran"
        elif self._failure:
            reason = f"the server process could not import its modules: {self._failure}"
        else:
            reason = f"the server process ended with {self._process.returncode}\n{_tail(self._output)}"
        for job in jobs:
            _fail(job, reason)
            self._on_job_end()


def _kill(job: _Job) -> None:
    if job.pid is None:
        return
    for send in (os.killpg, os.kill):  # the group exists once the child has made it
        with contextlib.suppress(ProcessLookupError, PermissionError):
            send(job.pid, signal.SIGKILL)


def _time_out(job: _Job) -> None:
    job.timed_out = True
    _kill(job)


def _fail(job: _Job, reason: str) -> None:
    if job.timer is not None:
        job.timer.cancel()
    with contextlib.suppress(Exception):  # cancelled meanwhile
        job.future.set_exception(JobFailedError(f"{job.function} on {job.card.name}: {reason}"))
    shutil.rmtree(job.folder, ignore_errors=True)


def _finish(job: _Job, status: int) -> None:
    """Completes the future of a job that ended with `status`: an exit code, or minus a signal's number."""
    if job.timer is not None:
        job.timer.cancel()
    exit_code = status if status >= 0 else 128 - status
    result_file = job.folder / "result.json"
    try:
        result = json.loads(result_file.read_text(encoding="utf-8")) if result_file.exists() else {}
        outcome = JobResult(
            value=result.get("value"),
            report=read_report(job.folder, job.card, exit_code),
            exit_code=exit_code,
            signal=-status if status < 0 else None,
            error=result.get("error"),
            timed_out=job.timed_out,
            output_tail=_tail(job.folder / "output"),
        )
    except (OSError, ValueError) as error:
        _fail(job, f"its report cannot be read: {error}")
        return
    job.future.set_result(outcome)
    shutil.rmtree(job.folder, ignore_errors=True)


def _tail(path: Path) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        return file.read().decode(errors="replace")
