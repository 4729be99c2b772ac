"""Worker processes that read ahead of the model, for encoding and for training.

    for inputs in run_ahead(function, tasks, workers=4):      # function(task) of each task, in the order of the tasks

Workers are never forked from the process that calls: by then it has threads (gloo, tokenizers, OpenMP), and a lock that
one of them holds at that moment stays locked in the child for good. A server is started instead, a fresh interpreter
with one thread, which imports what workers need once and forks them. It lives as long as its caller, so subsets, epochs
and evaluations share it. As it never imports the caller's main module, scripts need no ``__main__`` guard.

What travels: the function once per worker, tasks and results through sockets, all pickled; they come from and go to our
own processes only. Large arrays and Arrow columns inside the function go to files that all workers map, not to copies.
Workers leave signals to their caller, die with it, and one that gives no result for `TIME_LIMIT` seconds ends the run
with an error that names it and what it was reading.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import io
import os
import pickle
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from b3 import locks
from b3.errors import InputError, RunError

# Seconds to wait for a result; a slow store can be given more through the environment.
TIME_LIMIT = float(os.environ.get("B3_WORKER_SECONDS", "600"))
TASKS_AHEAD = 3  # tasks per worker that may be under way or finished but not yet taken
MAPPED_BYTES = 1 << 20  # arrays of a function above this size are mapped from a file
PREFIX = "b3-pool-"  # of temporary folders
KEPT_FUNCTIONS = 4  # per worker
MOST_WORKERS = 8  # of `workers_for`: more decode faster than a GPU encodes
# Imported once, in the server. None of these starts a thread (pyarrow does, so workers import it themselves).
PRELOAD = ("torch", "transformers.tokenization_utils_tokenizers", "PIL.Image", "b3.data.datasets")
SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}


def workers_for(device: str) -> int:
    """Workers that suit a model on this kind of device: on a GPU this rank's share of the cores but one, else none.

    A model on the CPU needs the cores itself.
    """
    if device != "cuda":
        return 0
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(0, min(MOST_WORKERS, len(os.sched_getaffinity(0)) // ranks - 1))


def run_ahead(
    function: Callable[[Any], Any],
    tasks: Iterable[Any],
    workers: int,
    describe: Callable[[Any], str] = str,
) -> Iterator[Any]:
    """`function(task)` of each task in order, computed ahead by so many processes; 0: here, when it is asked for.

    Args:
        function: picklable; given the same object again, workers keep what they have.
        tasks: picklable.
        workers: number of processes.
        describe: what a task reads, in words, for errors.

    Raises:
        InputError: as the function raised it; a `RunError` if a worker died or gave no result in time.
    """
    if workers == 0:
        yield from map(function, tasks)
        return
    pool = _shared_pool(workers)
    job = pool.job(function)
    waiting: deque[_Task] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(job, task, describe))
            if len(waiting) >= TASKS_AHEAD * workers:
                yield pool.result(waiting.popleft())
        while waiting:
            yield pool.result(waiting.popleft())
    finally:
        for rest in waiting:
            rest.future.cancel()


@dataclass(frozen=True, slots=True)
class _Job:
    """A function as workers get it."""

    digest: bytes
    payload: bytes


@dataclass(slots=True)
class _Task:
    job: _Job
    payload: bytes
    description: Callable[[], str]
    future: Future[bytes] = field(default_factory=Future)
    worker: str | None = None  # who has it

    def fail(self, what: str) -> None:
        self.future.set_exception(RunError(f"{self.worker} {what}; it was reading {self.description()}"))


class WorkerPool:
    """A server and its `num_workers` forks; one thread of ours per worker hands out tasks and takes results."""

    def __init__(self, num_workers: int, time_limit: float | None = None) -> None:
        self.time_limit = TIME_LIMIT if time_limit is None else time_limit
        self.owner = os.getpid()
        self.is_open = True
        self.folder, lock = _own_folder()
        self.processes: list[int | None] = [None] * num_workers
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._last: tuple[Callable[[Any], Any], _Job] | None = None
        pairs = [Pipe() for _ in range(num_workers)]
        life, self._life = os.pipe()
        fds = [there.fileno() for _, there in pairs]
        code = f"from b3.model.workers import serve; serve({life}, {str(self.folder)!r}, {fds}, {PRELOAD})"
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # inherited by the server and its forks
        try:
            self.server = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                pass_fds=[life, lock, *fds],
                env={**os.environ, **threads, "PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(life)
        os.close(lock)  # the server has it, and its forks
        for number, (here, there) in enumerate(pairs):
            there.close()
            threading.Thread(target=self._attend, args=(number, here), daemon=True).start()

    def job(self, function: Callable[[Any], Any]) -> _Job:
        if self._last is None or self._last[0] is not function:
            payload = _dumps(function, self.folder)
            self._last = function, _Job(hashlib.sha256(payload).digest(), payload)
        return self._last[1]

    def submit(self, job: _Job, task: Any, describe: Callable[[Any], str]) -> _Task:
        entry = _Task(job, _dumps(task), lambda: describe(task))
        self._tasks.put(entry)
        return entry

    def result(self, task: _Task) -> Any:
        """Wait for a task. Raises what the function raised, or `RunError` when the time is up or its worker died."""
        try:
            data = task.future.result(self.time_limit)
        except FutureTimeoutError:
            self.close()
            raise RunError(
                f"{task.worker or 'no worker took a task and'} gave no result for {self.time_limit:.0f} seconds; it was"
                f" reading {task.description()}. Look at the storage, or raise B3_WORKER_SECONDS if it is that slow"
            ) from None
        except RunError:
            self.close()
            raise
        error, value = pickle.loads(data)
        if error is not None:
            raise error
        return value

    def _attend(self, number: int, connection: Connection) -> None:
        """Hand tasks to one worker, one at a time, until the pool is closed or the worker dies."""
        known: dict[bytes, None] = {}
        task: _Task | None = None
        try:
            self.processes[number] = int(connection.recv_bytes())
            while (task := self._tasks.get()) is not None:
                if not task.future.set_running_or_notify_cancel():
                    continue
                task.worker = f"worker {number} (process {self.processes[number]})"
                if task.job.digest not in known:
                    _keep(known, task.job.digest, None)
                    connection.send_bytes(b"F" + task.job.digest + task.job.payload)
                connection.send_bytes(b"T" + task.job.digest + task.payload)
                task.future.set_result(connection.recv_bytes())
        except (EOFError, OSError):
            self.is_open = False
            task = task or self._tasks.get()  # it died before it took any
            while task is not None:
                task.worker = task.worker or f"worker {number}"
                if not task.future.done():
                    task.fail("died (out of memory? then give fewer workers)")
                task = self._tasks.get()

    def close(self) -> None:
        """End all workers, at once and whatever they are doing."""
        self.is_open = False
        if self._life >= 0 and os.getpid() == self.owner:
            os.close(self._life)
            self._life = -1
            for _ in self.processes:
                self._tasks.put(None)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.server.wait(10)
            shutil.rmtree(self.folder, ignore_errors=True)  # if the server was killed


def _own_folder() -> tuple[Path, int]:
    """A new temporary folder, and its lock: whose holders were all killed is deleted when the next one is made."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            lock = os.open(folder, os.O_RDONLY)
            if locks.take(lock):
                shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue  # taken for a leftover before it was locked
        if locks.take(lock) is not False and locks.is_named(lock, folder):
            return folder, lock
        os.close(lock)


_POOLS: dict[int, WorkerPool] = {}


def _shared_pool(num_workers: int) -> WorkerPool:
    """The pool of this process with so many workers, started when it is first needed."""
    pool = _POOLS.get(num_workers)
    if pool is None or not pool.is_open or pool.owner != os.getpid():
        if pool is not None:
            pool.close()
        pool = _POOLS[num_workers] = WorkerPool(num_workers)
    return pool


@atexit.register
def close_pools() -> None:
    for pool in _POOLS.values():
        pool.close()


def serve(life: int, folder: str, sockets: list[int], preload: tuple[str, ...]) -> None:
    """The server: forks one worker per socket and ends with them when the pipe `life` is closed at its other end."""
    for name in preload:
        with contextlib.suppress(ImportError):
            import_module(name)
    children = []
    for socket in sockets:
        child = os.fork()
        if child == 0:
            for other in sockets:
                if other != socket:
                    os.close(other)
            _work(life, Connection(socket))
        children.append(child)
    for socket in sockets:
        os.close(socket)
    os.read(life, 1)
    for child in children:
        os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def _work(life: int, connection: Connection) -> None:
    """A worker: answers each task with (error, value)."""
    threading.Thread(target=lambda: (os.read(life, 1), os._exit(0)), daemon=True).start()
    functions: dict[bytes, Any] = {}
    try:
        connection.send_bytes(str(os.getpid()).encode())
        while True:
            message = connection.recv_bytes()
            digest, payload = message[1:33], message[33:]
            if message[:1] == b"F":
                _keep(functions, digest, payload)
            else:
                connection.send_bytes(_answer(functions, digest, payload))
    except (EOFError, OSError):
        os._exit(0)  # the caller is gone


def _answer(functions: dict[bytes, Any], digest: bytes, task: bytes) -> bytes:
    try:
        if isinstance(functions[digest], bytes):
            functions[digest] = pickle.loads(functions[digest])
        return _dumps((None, functions[digest](pickle.loads(task))))
    except InputError as error:
        return pickle.dumps((error, None))
    except BaseException:
        return pickle.dumps((RuntimeError(f"in a worker:\n{traceback.format_exc()}"), None))


def _keep(functions: dict[bytes, Any], digest: bytes, value: Any) -> None:
    """Both ends forget the same functions, the oldest first."""
    while len(functions) >= KEPT_FUNCTIONS:
        del functions[next(iter(functions))]
    functions[digest] = value


class _Pickler(pickle.Pickler):
    """Pickles tensors as arrays and, given a folder, large arrays and Arrow columns as names of files there."""

    def __init__(self, file: io.BytesIO, folder: Path | None) -> None:
        super().__init__(file, protocol=5)
        self.folder = folder

    def reducer_override(self, value: Any) -> Any:
        kind = type(value)
        if kind.__module__ == "torch" and kind.__name__ == "Tensor":
            return import_module("torch").from_numpy, (value.numpy(),)
        if self.folder is None or getattr(value, "nbytes", 0) < MAPPED_BYTES:
            return NotImplemented
        if kind.__module__ == "numpy" and kind.__name__ in ("ndarray", "memmap") and not value.dtype.hasobject:
            return _mapped_array, (_write_array(value, self.folder),)
        if kind.__module__ == "pyarrow.lib" and kind.__name__.endswith("Array"):
            return _mapped_column, (_write_column(value, self.folder),)
        return NotImplemented


def _dumps(value: Any, folder: Path | None = None) -> bytes:
    file = io.BytesIO()
    _Pickler(file, folder).dump(value)
    return file.getvalue()


def _write_array(array: Any, folder: Path) -> str:
    import numpy as np

    from b3.files import write_array

    digest = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data.cast("B"))
    file = folder / f"{digest.hexdigest()}.npy"
    if not file.exists():
        write_array(file, array, durable=False)
    return str(file)


def _mapped_array(file: str) -> Any:
    import numpy as np

    return np.load(file, mmap_mode="r")


def _write_column(column: Any, folder: Path) -> str:
    import pyarrow as pa

    from b3.files import atomic

    table = pa.table({"column": column})
    digest = hashlib.sha256()
    for chunk in table.column("column").chunks:
        digest.update(f"{chunk.type} {chunk.offset} {len(chunk)}".encode())
        for buffer in chunk.buffers():
            digest.update(buffer or b"-")
    file = folder / f"{digest.hexdigest()}.arrow"
    if not file.exists():
        with atomic(file, durable=False) as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    return str(file)


def _mapped_column(file: str) -> Any:
    import pyarrow as pa

    return pa.ipc.open_file(pa.memory_map(file)).read_all().column("column")
