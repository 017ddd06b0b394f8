# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Proposers by name."""

from llmserve.utils.registry import Registry

PROPOSERS = Registry("proposer", {"ngram": "llmserve.spec_decode.ngram:NgramProposer"})
