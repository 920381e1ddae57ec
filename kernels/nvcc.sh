#!/usr/bin/env bash
# Installs nvcc from PyPI into target/nvcc and prints where it is. Needs Python 3 and a C++ compiler; no GPU, no driver, no root.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=target/nvcc
wheels=(nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85)
[ -x "$venv/bin/python" ] || python3 -m venv "$venv" >&2
"$venv/bin/pip" install --quiet --disable-pip-version-check "${wheels[@]}" >&2
nvcc=$(echo "$PWD/$venv"/lib/python3*/site-packages/nvidia/cu13/bin/nvcc)
[ -x "$nvcc" ] || { echo "the wheels hold no nvcc where it was expected: $nvcc" >&2; exit 1; }
echo "$nvcc"
