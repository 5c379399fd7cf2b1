"""A pytest plugin: what fails is recorded when it fails; a test that hangs costs itself alone.

A test that does not end, or breaks the CUDA context, ends pytest with RESTART; first_light.py
starts it again with --skip-tried, which leaves out the tests up to that one.
"""

import time
from pathlib import Path
from typing import Any

import pytest
from cells import RESTART, Watchdog, is_lost
from records import SINCE, Records

TEST_S = 45.0  # the first one loads the GPU's libraries, some start ranks


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("records of first_light.py")
    group.addoption("--records", type=Path, required=True, help="file of JSON lines to append to")
    group.addoption("--every", type=int, default=1, help="run every n-th test of the file")
    group.addoption("--skip-tried", choices=SINCE, help="leave out tests up to the last lost one")
    group.addoption("--test-limit", type=float, default=TEST_S, help="seconds of one test")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Recorder(config), "recorder")


class _Recorder:
    def __init__(self, config: pytest.Config) -> None:
        self.records = Records(config.option.records, Path(config.args[0]).stem)
        self.options = config.option
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.slowest = ("", 0.0)
        self.started = time.monotonic()

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = items[:: self.options.every]
        since = self.options.skip_tried
        lost = self.records.mine("lost", since_begin=since == "begin") if since else []
        names = [item.nodeid for item in items]
        if lost and lost[-1]["test"] in names:
            del items[: names.index(lost[-1]["test"]) + 1]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        def give_up(stack: str) -> None:
            self.lose(item.nodeid, f"no result after {self.options.test_limit:g} s", stack)

        with Watchdog(self.options.test_limit, give_up):
            done = yield
        if self.counts["failed"] and is_lost():
            self.lose(item.nodeid, "the CUDA context is lost", "")
            pytest.exit("the CUDA context is lost", RESTART)
        return done

    def lose(self, test: str, why: str, stack: str) -> None:
        """Writes down a test behind which this process is of no more use, and the counts so far."""
        self.records.add("lost", test=test, error=why, message=stack)
        self.counts["failed"] += 1
        self.say_counts()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.duration > self.slowest[1]:
            self.slowest = (report.nodeid, report.duration)
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed:
            self.fail(report, str(report.when), report.longrepr)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.counts["failed"] += 1
            self.fail(report, "import", report.longrepr)

    def fail(self, report: Any, when: str, traceback: Any) -> None:
        crash = getattr(traceback, "reprcrash", None)
        error = crash.message if crash else str(traceback).strip().split("\n")[-1]
        self.records.add(
            "failure",
            test=report.nodeid,
            when=when,
            error=" ".join(error.split()),
            message=str(traceback),
        )

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus != RESTART:
            self.say_counts()

    def say_counts(self) -> None:
        name, seconds = self.slowest
        self.records.add(
            "tests",
            **self.counts,
            seconds=round(time.monotonic() - self.started, 1),
            slowest={"test": name, "seconds": round(seconds, 2)},
        )
