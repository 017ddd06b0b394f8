# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""One file per subcommand. Knows flags, processes and terminals; nothing of HTTP or tensors."""
