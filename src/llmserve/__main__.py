# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""`python -m llmserve`."""

from llmserve.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
