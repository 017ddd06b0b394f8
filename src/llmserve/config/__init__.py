# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""One frozen dataclass per file; a field is a flag, its help and its check."""
