# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Output that is bound to a grammar. xgrammar and llguidance are imported in the engine only."""
