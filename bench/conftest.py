"""The matrix: every recipe of bench/recipes/ but the demo, run once on the device of this session."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from matrix_recipes import ORDER, RECIPES
from qlora_lowmem import virtual_gpu
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.errors import EXIT_USAGE, UsageError
from qlora_lowmem.gate.cases import GpuRunner, Matrix, Runner, VirtualRunner
from qlora_lowmem.gate.plugin import DEFAULT_CARD
from qlora_lowmem.gate.session import GateSession
from qlora_lowmem.memory.device import driver_version, properties_of_this_machine
from qlora_lowmem.memory.profile import MemoryProfile
from qlora_lowmem.plan.recipe_runs import recipe_server
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import load_recipe
from qlora_lowmem.results.kinds.matrix import write_matrix

# What takes minutes: asked for by its file or by -m, not run with the matrix.
PROOFS = {
    "chaos": "a run killed again and again",
    "bad_inputs": "bad inputs, every command's",
    "faults": "every command under 300 faults and kills",
    "ranks": "what each of several cards needs",
    "phases": "every phase of a run's life on a 6 GB card",
    "newcomer": "from clone to an answer, and the demo's skill, timed",
    "data_stream": "a file of 5 GB in constant memory",
    "published": "peaks that others measured on real cards",
    "lean": "the lean implementations, one idea a step",
    "families": "every decoder-only family that transformers knows, trained for two steps",
    "witness": "a second method of knowing a recipe's peak",
    "claims": "the statements that guided the set-up, put to the test",
    "reality": "published fine-tuning peaks beside the plan's",
    "gate_property": "the gate on 200 random programs whose peak is known",
    "operators": "every operator that torch has samples of, on a virtual card",
    "plan": "ten (model, card) pairs planned, and each proposal run again",
}

TABLES = "outputs/results"  # not where the recorded ones are: a run leaves the tree as it was


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what the benchmark has beyond the gate's own options."""
    group = parser.getgroup("gpu memory")
    group.addoption("--results", metavar="DIR", default=TABLES, help=f"where tables are written (default: {TABLES})")
    group.addoption("--every-input", action="store_true", help="of bad inputs try near-duplicates too: 20 minutes")


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers of the proofs, and of what only a GPU can tell."""
    config.addinivalue_line("markers", "gpu: needs a real GPU; runs with --gpu only")
    for name, what in PROOFS.items():
        config.addinivalue_line("markers", f"{name}: {what}; runs with `pytest bench/test_{name}.py` or `-m {name}`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a GPU, without --gpu; leave the proofs out unless the command names their file or marker."""
    for item in items:
        if item.get_closest_marker("gpu") and not config.getoption("vram_gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a real GPU: pytest bench/ --gpu"))
    named = {Path(argument.partition("::")[0]).name for argument in config.args}
    expression = config.getoption("markexpr") or ""
    left_out = [
        item
        for item in items
        if item.path.name not in named
        and any(item.get_closest_marker(name) and name not in expression for name in PROOFS)
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
        config.stash[_LEFT_OUT] = sorted({item.path.stem for item in left_out})


_LEFT_OUT = pytest.StashKey[list[str]]()
_PRINTED = pytest.StashKey[list[str]]()
_TABLES = pytest.StashKey[tuple[Path, float]]()  # where they are written, and since when


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what was left out and how it is run; print what tests asked for, and where tables were written."""
    for name in config.stash.get(_LEFT_OUT, []):
        terminalreporter.write_line(f"left out, for it takes minutes: pytest bench/{name}.py")
    for text in config.stash.get(_PRINTED, []):
        terminalreporter.write_line(f"\n{text}\n")
    folder, since = config.stash.get(_TABLES, (Path(TABLES), time.time()))
    for path in sorted(folder.rglob("*.md")):
        if path.stat().st_mtime >= since:
            terminalreporter.write_line(f"written: {path} (and .json, .csv)")


@pytest.fixture(scope="session")
def on_gpu(request: pytest.FixtureRequest) -> bool:
    """Whether figures are measured on a real GPU."""
    return bool(request.config.getoption("vram_gpu"))


@pytest.fixture(scope="session")
def results_folder(request: pytest.FixtureRequest) -> Path:
    """Where tables are written."""
    folder = Path(request.config.getoption("results"))
    request.config.stash[_TABLES] = folder, time.time()
    return folder


@pytest.fixture(scope="session")
def printed_at_the_end(request: pytest.FixtureRequest) -> list[str]:
    """Markdown that is printed when all tests are through: append to it what people should see without a file."""
    return request.config.stash.setdefault(_PRINTED, [])


@pytest.fixture(scope="session")
def virtual_server() -> Iterator[virtual_gpu.Server]:
    """A server of virtual runs, two at a time."""
    with recipe_server(max_workers=2) as server:
        yield server


@pytest.fixture(scope="session")
def runner(request: pytest.FixtureRequest, on_gpu: bool) -> Runner:
    """Runs cases on the device that the options name."""
    if on_gpu:
        try:
            properties_of_this_machine()
        except UsageError as error:
            pytest.exit(str(error), returncode=EXIT_USAGE)
        return GpuRunner(request.config.getoption("vram_cap"))
    card = virtual_gpu.get_card(request.config.getoption("vram_card") or DEFAULT_CARD)
    return VirtualRunner(request.getfixturevalue("virtual_server"), card)


@pytest.fixture(scope="session")
def recipes() -> list[Recipe]:
    """The recipes of the matrix, from the baseline to the ways out."""
    return [load_recipe(RECIPES / f"{name}.yaml") for name in ORDER]


@pytest.fixture(scope="session")
def matrix(
    runner: Runner,
    recipes: list[Recipe],
    results_folder: Path,
    printed_at_the_end: list[str],
    on_gpu: bool,
    vram_gate: GateSession,  # noqa: ARG001 - makes its tests the gate's, which refuses reruns of them
) -> Iterator[Matrix]:
    """The results, all started at once; the tables are written and printed at the end, whatever the verdicts."""
    matrix = {recipe.name: runner.submit(recipe) for recipe in recipes}
    yield matrix
    results = [each.result() for each in matrix.values()]
    device = results[0].card
    driver = driver_version() if on_gpu else None
    record = provenance_record(device, results[0].provenance, driver)
    printed_at_the_end.append(f"{device}:\n\n{write_matrix(results_folder / device, results, record)}")


@pytest.fixture
def profile_of(matrix: Matrix, on_gpu: bool) -> Callable[[str], MemoryProfile]:
    """The peaks of a recipe; skips where a GPU is too small for it, and so cannot say what it would need."""

    def get(name: str) -> MemoryProfile:
        result = matrix[name].result()
        assert result.failure is None, result.failure
        if on_gpu and result.profile is None:
            pytest.skip(f"{name} does not fit this GPU, which cannot say what it would need")
        assert result.profile is not None, f"{name} has no peak: {result.out_of_memory}"
        return result.profile

    return get
