# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Text on one side, token ids on the other. Imports no torch, transformers or xgrammar."""
