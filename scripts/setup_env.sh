#!/usr/bin/env bash
# Creates or refreshes the virtual environment .venv for this checkout: scripts/setup_env.sh [EXTRA...]
#
# torch comes first and by itself. On a machine without an NVIDIA GPU, if the configured package index would deliver a
# CUDA build (gigabytes of libraries that nothing there can use), PyTorch's own index of CPU builds is asked instead;
# on a GPU machine, and where the index already offers a CPU build, plain pip decides.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
extras=$(IFS=,; echo "$*")
torch=$(sed -n 's/^\(torch==.*\)$/\1/p' constraints.txt)
cpu_index=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}

"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' ||
  { echo "Python 3.11 or 3.12 is needed; choose one with PYTHON=python3.12" >&2; exit 1; }

stamp=.venv/.installed
wanted=$( { cat pyproject.toml constraints.txt scripts/setup_env.sh; echo "$python"; "$python" --version; } | cksum)
if [[ -f $stamp ]] && [[ $(sed -n 1p "$stamp") == "$wanted" ]] &&
  [[ ,$(sed -n 2p "$stamp"), == *",$extras,"* || -z $extras ]]; then
  exit 0
fi

echo "Preparing .venv (a few minutes the first time)" >&2
[[ -x .venv/bin/python && $(.venv/bin/python --version) == $("$python" --version) ]] || "$python" -m venv --clear .venv
pip=(.venv/bin/python -m pip --disable-pip-version-check)

if ! "${pip[@]}" show -q torch 2>/dev/null; then
  offered=""
  if ! command -v nvidia-smi >/dev/null 2>&1; then
    offered=$("${pip[@]}" install -q --dry-run --no-deps --report - "$torch" |
      .venv/bin/python -c 'import json, sys
print(*json.load(sys.stdin)["install"][0]["metadata"].get("requires_dist", []))')
  fi
  if [[ $offered == *nvidia* || $offered == *cuda* ]]; then
    "${pip[@]}" install -q --retries 1 --timeout 10 --index-url "$cpu_index" "$torch" || "${pip[@]}" install -q "$torch"
  else
    "${pip[@]}" install -q "$torch"
  fi
fi
"${pip[@]}" install -q -c constraints.txt -e ".${extras:+[$extras]}"
printf '%s\n%s\n' "$wanted" "$extras" >"$stamp"
