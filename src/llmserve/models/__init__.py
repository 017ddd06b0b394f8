# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""One model family per file: config reading, wiring, weight-name maps. No loading code."""
