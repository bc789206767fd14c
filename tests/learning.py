"""What tests that prove learning share: the seeds that they run with, and a comparison that leaves room.

A number that a trained network reaches follows from its seed and from the rounding of the processor. So such a test
takes its seed from the fixture `learning_seed` and compares with `assert_learned`. An ordinary run has seed 0 and
demands the bound itself. `make test-seeds` runs every test of that kind with ten seeds and demands a tenth of the bound
as well, which rounding does not use up; at its end a table says how near to its bound each test came.

pytest loads this module as a plugin (`addopts` in pyproject.toml), because both tests/ and recipes/ need it.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator

import pytest

# The share of its bound by which a value must keep clear of it where several seeds are asked for.
ROOM = 0.1
_room = 0.0
_running: list[pytest.Item] = []
NEARNESS = "value over bound"


def assert_learned(value: float, *, below: float | None = None, above: float | None = None) -> None:
    """Demand that `value` is below or above a positive bound; by a tenth of it where several seeds are asked for."""
    if _running:
        nearness = value / below if below is not None else above / value if value > 0 else float("inf")
        _running[-1].user_properties.append((NEARNESS, float(nearness)))  # plain numbers, which workers can send
    if below is not None:
        assert value < below
        assert value <= (1 - _room) * below, f"too near to the bound {below}"
    if above is not None:
        assert value > above
        assert value >= (1 + _room) * above, f"too near to the bound {above}"


@pytest.fixture
def learning_seed(request: pytest.FixtureRequest) -> int:
    """The seed of a test that proves learning: 0, or in turn every seed that was asked for."""
    return getattr(request, "param", 0)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --learning-seeds."""
    parser.addoption(
        "--learning-seeds",
        type=int,
        default=1,
        metavar="N",
        help="run tests that prove learning with N seeds, and room",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Demand room of every seed but the only one."""
    global _room
    _room = ROOM if config.getoption("learning_seeds") > 1 else 0.0


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """With several seeds a test for each of them; with one the names of the tests stay as they are."""
    seeds = metafunc.config.getoption("learning_seeds")
    if "learning_seed" in metafunc.fixturenames and seeds > 1:
        names = [f"seed{seed}" for seed in range(seeds)]
        metafunc.parametrize("learning_seed", range(seeds), indirect=True, ids=names)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that takes a seed, before `-m` chooses."""
    for item in items:
        if "learning_seed" in getattr(item, "fixturenames", ()):
            item.add_marker("learning")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Know which test a comparison belongs to."""
    _running.append(item)
    yield
    _running.pop()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """With several seeds, list how near to its bound each comparison came at worst; 1 is the bound itself."""
    if config.getoption("learning_seeds") <= 1:
        return
    found: dict[tuple[str, int], list[float]] = {}
    for report in (r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, [])):
        values = [value for name, value in getattr(report, "user_properties", []) if name == NEARNESS]
        for place, value in enumerate(values):
            found.setdefault((re.sub(r"-?seed\d+", "", report.nodeid), place), []).append(value)
    if found:
        terminalreporter.section("value over bound, worst and median of all seeds (1 is the bound)")
    for (name, place), values in sorted(found.items(), key=lambda entry: -max(entry[1])):
        terminalreporter.line(
            f"{max(values):.3f} {statistics.median(values):.3f} ({len(values)} seeds) {name} #{place + 1}"
        )
