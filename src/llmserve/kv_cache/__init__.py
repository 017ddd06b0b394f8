# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Who owns which KV block. Pure Python and numpy; never sees a tensor."""
