#!/usr/bin/env bash
# Prints what each CUDA kernel of the latest build takes: registers, stack and spills, for every GPU there is machine code for.
set -euo pipefail
cd "$(dirname "$0")/.."

report=$(ls -td target/*/build/quire-kernels-*/out/products_few.ptxas 2>/dev/null | head -n 1)
[ -n "$report" ] || { echo "no build with the feature cuda in target/" >&2; exit 1; }
python3 - "$(dirname "$report")" <<'PYTHON'
import pathlib, re, sys

kernels = {}
for report in sorted(pathlib.Path(sys.argv[1]).glob("*.ptxas")):
    kernel = None
    for line in report.read_text().splitlines():
        if found := re.search(r"Compiling entry function '(\w+)' for '(sm_\w+)'", line):
            kernel = kernels.setdefault(found[1], {}).setdefault(found[2], {})
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernel["stack"], kernel["stores"], kernel["loads"] = found.groups()
        elif found := re.search(r"Used (\d+) registers", line):
            kernel["registers"] = found[1]
targets = sorted({target for kernel in kernels.values() for target in kernel})
print(f"{'kernel':34}" + "".join(f"{target:>8}: registers, stack, spills" for target in targets))
for name, kernel in kernels.items():
    cells = [kernel[t] for t in targets]
    print(f"{name:34}" + "".join(f"{c['registers']:>19} {c['stack']:>6} {int(c['stores']) + int(c['loads']):>9}" for c in cells))
print(f"{len(kernels)} kernels for {', '.join(targets)}")
PYTHON
