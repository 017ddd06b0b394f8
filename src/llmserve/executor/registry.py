# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Executors by name."""

from llmserve.utils.registry import Registry

EXECUTORS = Registry(
    "executor",
    {
        "uniproc": "llmserve.executor.uniproc:UniProcExecutor",
        "multiproc": "llmserve.executor.multiproc:MultiProcExecutor",
        "fake": "llmserve.executor.fake:FakeExecutor",
    },
)
