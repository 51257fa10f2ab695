#!/usr/bin/env bash
# torch 2.14.1: the first `empty_like`, `zeros_like` or `Module.to_empty` of a tensor on the meta device imports SymPy:
# some 480 modules and 0.4 s, where the tensor that is asked for has no bytes, or a few.
#
# `import torch` leaves SymPy out on purpose, and `torch.empty(shape, device="meta")` does too. But a factory "like" a
# meta tensor is PyTorch's reference in Python, which asks for the strides' order, and that asks
# torch.fx.experimental.symbolic_shapes whether a size is symbolic. So `to_empty`, the usual way to
# fill a model that was built on the meta device, pays for an algebra system that nothing there uses. Each process
# pays once; `torch.empty(parameter.shape, dtype=parameter.dtype, device=...)` does not.
#
# Seen (2026-12-01, Python 3.11, two cores):
#   import torch                        SymPy imported: False
#   torch.empty(4, 4, device="meta")    SymPy imported: False
#   torch.empty(meta.shape)             SymPy imported: False, 0 more modules
#   Linear.to_empty(device="cpu")       SymPy imported: True, 487 more modules, 0.4 s
#   zeros_like(meta), a new process     SymPy imported: True, 487 more modules, 0.4 s
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
cat > "$folder/like.py" <<'PY'
import sys
import time

import torch


def does(what, call):
    before, started = len(sys.modules), time.perf_counter()
    call()
    more, seconds = len(sys.modules) - before, time.perf_counter() - started
    print(f"{what:35} SymPy imported: {'sympy' in sys.modules}, {more} more modules, {seconds:.1f} s")
    return more


assert "sympy" not in sys.modules, "import torch"
meta = torch.empty(4, 4, device="meta")
assert "sympy" not in sys.modules, "empty on meta"
assert does("torch.empty(meta.shape)", lambda: torch.empty(meta.shape, dtype=meta.dtype)) == 0
if sys.argv[1] == "to_empty":
    more = does('Linear.to_empty(device="cpu")', lambda: torch.nn.Linear(4, 4, device="meta").to_empty(device="cpu"))
else:
    more = does("zeros_like(meta), a new process", lambda: torch.zeros_like(meta))
assert "sympy" in sys.modules and more > 300, more
PY
"$folder/venv/bin/python" "$folder/like.py" to_empty
"$folder/venv/bin/python" "$folder/like.py" zeros_like
echo "as described"
