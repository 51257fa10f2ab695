"""Many pairs, side by side: one thread a pair, and all runs in one server's workers."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from qlora_lowmem import virtual_gpu
from qlora_lowmem.errors import QloraLowmemError
from qlora_lowmem.plan.answers import Plan
from qlora_lowmem.plan.kept_runs import Runs
from qlora_lowmem.plan.pair import Extent, Pair, Planner


def sweep(
    pairs: Sequence[Pair], extent: Extent, runs: Runs, server: virtual_gpu.Server, *, workers: int
) -> Iterator[tuple[int, Plan]]:
    """Each pair's number and answer as it is ready. A pair that fails says why, and the others go on.

    Ended early, it closes the server, so that nothing is waited for; the cache has what was made until then.

    Raises:
        virtual_gpu.VirtualGPUUnavailable: this machine cannot host a virtual GPU.
    """
    pool = ThreadPoolExecutor(workers)
    try:
        planned = {pool.submit(_plan, pair, extent, runs): number for number, pair in enumerate(pairs)}
        for done in as_completed(planned):
            yield planned[done], done.result()
    except BaseException:
        server.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _plan(pair: Pair, extent: Extent, runs: Runs) -> Plan:
    planner = Planner(pair, extent, runs, _SILENT)
    try:
        return planner.plan()
    except QloraLowmemError as error:
        return planner.nothing(failure=str(error))


_SILENT: Callable[[str], None] = lambda _what: None  # noqa: E731
