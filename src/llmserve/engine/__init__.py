# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The step loop and the process around it. Knows token ids; never text, never tensors."""
