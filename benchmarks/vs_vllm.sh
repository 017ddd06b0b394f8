#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
# Both engines on this machine, side by side: benchmarks/vs_vllm.sh RESULTS [SHAPE...]
#   RESULTS is a file of JSON lines; what is in it is not run again, so an interrupted run goes on.
#   PYTHON_VLLM and PYTHON_LLMSERVE are the interpreters (python3 without), PATH_VLLM and
#   PATH_LLMSERVE what PYTHONPATH is to be for each; LIMIT the seconds of one engine and shape (580).
set -euo pipefail
results=${1:?file for the results}
shift
root=$(cd "$(dirname "$0")/.." && pwd)
shapes=("${@:-qwen3-0.6b}")
nvidia-smi --query-gpu=name,clocks.sm,clocks.mem,driver_version --format=csv,noheader || true

with() { # ENGINE COMMAND...: runs the engine's Python
  local engine=$1 python=PYTHON_${1^^} path=PATH_${1^^}
  shift
  PYTHONPATH=$root:${!path:-${PYTHONPATH:-}} timeout "${LIMIT:-580}" "${!python:-python3}" "$@"
}

for shape in "${shapes[@]}"; do
  for engine in vllm llmserve; do
    for part in "offline run" http_load "offline long"; do
      # shellcheck disable=SC2086
      with "$engine" -m benchmarks.$part "$engine" "$shape" "$results" >"$results.$engine.log" 2>&1 ||
        echo "$part $engine $shape ended with $?: see $results.$engine.log"
    done
  done
done
PYTHONPATH=$root python3 -m benchmarks.offline table "$results"
