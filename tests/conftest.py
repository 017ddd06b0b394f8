# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""A skip that tests/house/skips.txt does not list is a failure; a test that only a deadline failed
has a second chance."""

from collections.abc import Generator
from pathlib import Path

import pytest

from tests.helpers.clock import TooSlow

_LIST = Path(__file__).parent / "house" / "skips.txt"
_LISTED = tuple(
    line.split()[0]
    for line in _LIST.read_text().splitlines()
    if line.strip() and not line.startswith("#")
)
_LATE = "missed a deadline"


def _refuse_unlisted(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        if report.nodeid.startswith(_LISTED):
            return
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid}: skip not listed in tests/house/skips.txt: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_unlisted(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_unlisted(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    try:
        return (yield)
    except TooSlow as error:
        pyfuncitem.user_properties.append((_LATE, str(error)))
    names = pyfuncitem._fixtureinfo.argnames
    pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names})
    return True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    late = [
        f"{report.nodeid}: {text}"
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, text in report.user_properties
        if name == _LATE
    ]
    if late:
        terminalreporter.section("missed a deadline, and were run once more")
        terminalreporter.write_line("\n".join(late))
