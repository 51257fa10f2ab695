"""The scan by Triton kernels against the plain one, in Triton's interpreter, and how a model comes to either."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlora_lowmem.lean import LeanOptions, apply_lean, scan_triton
from qlora_lowmem.lean.scan_triton import choose_scan

from .conftest import hybrid

needs_kernels = pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="fla-core is not installed")


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    script = Path(__file__).with_name("triton_on_cpu.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_kernels
@pytest.mark.parametrize(("case", "of_dt"), [("groups", 1e-5), ("deep", 2e-5)])
def test_equals_the_plain_scan(interpreted: dict[str, Any], case: str, of_dt: float) -> None:
    """The kernels' gradient of a decay is a difference of sums: it loses most where the decay is deepest."""
    allowed = dict.fromkeys(interpreted[case], 1e-5) | {"dt": of_dt}
    assert {name: error for name, error in interpreted[case].items() if not error <= allowed[name]} == {}


@needs_kernels
def test_as_exact_as_the_plain_scan_with_16_bit_products(interpreted: dict[str, Any]) -> None:
    plain, found = interpreted["16 bits"]["plain"], interpreted["16 bits"]["triton"]
    assert min(plain.values()) > 1e-5  # the products did run in 16 bits
    assert {name: error for name, error in found.items() if not error <= 1.5 * plain[name]} == {}


@needs_kernels
def test_backward_starts_from_the_state_that_forward_had(interpreted: dict[str, Any]) -> None:
    assert interpreted["advanced equals the last state"]


@needs_kernels
def test_the_kernels_keep_their_configurations(interpreted: dict[str, Any]) -> None:
    assert interpreted["configurations offered again"]


def mixer(**changes: Any) -> Any:
    fields: dict[str, Any] = {"head_dim": 64, "ssm_state_size": 128}
    return SimpleNamespace(D=SimpleNamespace(device=torch.device("cuda")), **fields | changes)


@pytest.fixture
def working(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card on which the kernels are installed and agree."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(scan_triton, "_difference", lambda *_: 3e-3)


@pytest.mark.usefixtures("working")
def test_auto_takes_triton_where_it_works() -> None:
    assert choose_scan("auto", mixer())[0] == choose_scan("triton", mixer())[0] == "triton"
    assert choose_scan("plain", mixer())[0] == "plain"


def _fails(*_: Any) -> float:
    raise RuntimeError("Failed to find C compiler.\nSet CC.")


@pytest.mark.parametrize(
    ("target", "name", "value", "changes", "reason"),
    [
        (torch.cuda, "get_device_capability", lambda _: (7, 5), {}, "compute capability 7.5 is below 8.0"),
        (importlib.util, "find_spec", lambda _: None, {}, "fla-core is not installed"),
        (scan_triton, "_difference", _fails, {}, "RuntimeError: Failed to find C compiler."),
        (scan_triton, "_difference", lambda *_: 0.3, {}, "differ from PyTorch's by 3.0e-01"),
        (scan_triton, "_difference", lambda *_: float("nan"), {}, "differ from PyTorch's by nan"),
        (scan_triton, "_difference", lambda *_: 0.0, {"head_dim": 24}, "head_dim=24"),
    ],
    ids=["old card", "not installed", "does not run", "wrong", "not a number", "shape"],
)
@pytest.mark.usefixtures("working")
def test_falls_back_and_says_why(
    monkeypatch: pytest.MonkeyPatch, target: Any, name: str, value: Any, changes: dict[str, int], reason: str
) -> None:
    monkeypatch.setattr(target, name, value)
    kind, words = choose_scan("auto", mixer(**changes))
    assert kind == "plain"
    assert reason in words
    with pytest.raises(ValueError, match=r"scan='triton': .*set scan to auto or plain"):
        choose_scan("triton", mixer(**changes))


def test_a_model_on_the_cpu_reports_the_plain_scan() -> None:
    report = apply_lean(hybrid("ma"), LeanOptions())
    assert "on cpu" in next(idea.detail for idea in report.ideas if idea.name == "scan")
    with pytest.raises(ValueError, match="the model is on cpu"):
        apply_lean(hybrid("ma"), LeanOptions(scan="triton"))


def test_an_unknown_scan_is_refused() -> None:
    with pytest.raises(ValueError, match="scan='fast': allowed are auto, plain and triton"):
        LeanOptions(scan="fast")  # type: ignore[arg-type]
