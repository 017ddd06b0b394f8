# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""A skip that tests/house/skips.txt does not list is a failure."""

from collections.abc import Generator
from pathlib import Path

import pytest

_LIST = Path(__file__).parent / "house" / "skips.txt"
_LISTED = tuple(
    line.split()[0]
    for line in _LIST.read_text().splitlines()
    if line.strip() and not line.startswith("#")
)


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
