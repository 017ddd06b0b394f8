# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""One op per file: the torch reference first, then Triton or CUDA with the same signature."""
