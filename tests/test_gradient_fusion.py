"""Products that add to gradients where Apex is not installed. Losses with them: harness/parity.py."""

import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from harness.entry import gradient_fusion  # noqa: E402

ADDS = """
import sys, types
{before}
from harness.entry import gradient_fusion
gradient_fusion.install()
import fused_weight_gradient_mlp_cuda as taken
print(taken.__name__)
"""


@pytest.mark.parametrize(
    ("before", "taken"),
    [
        ("", "harness.entry.gradient_fusion"),
        ("sys.modules['fused_weight_gradient_mlp_cuda'] = types.ModuleType('of_apex')", "of_apex"),
    ],
)
def test_apex_comes_first(before, taken):
    done = subprocess.run(
        [sys.executable, "-c", ADDS.format(before=before)], capture_output=True, text=True
    )
    assert done.stdout.strip() == taken, done.stderr


def added(device: str, precision: "torch.dtype") -> tuple["torch.Tensor", "torch.Tensor"]:
    """What the product adds to, and what the same is in double precision."""
    torch.manual_seed(1)
    inputs = torch.randn(96, 64).to(device, torch.bfloat16)
    grad_output = torch.randn(96, 32).to(device, torch.bfloat16)
    main_grad = torch.randn(32, 64).to(device, precision)
    wanted = main_grad.double() + grad_output.double().t() @ inputs.double()
    gradient_fusion.wgrad_gemm_accum_fp32(inputs, grad_output, main_grad)
    return main_grad, wanted


def test_a_product_is_added_in_the_precision_of_gradients(monkeypatch):
    monkeypatch.setenv("HARNESS_DEVICE", "cpu")
    fused, wanted = added("cpu", torch.float32)
    assert torch.allclose(fused.double(), wanted, rtol=1e-5, atol=1e-5)
    fused, wanted = added("cpu", torch.bfloat16)
    assert torch.allclose(fused.double(), wanted, rtol=2e-2, atol=0.2)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_on_a_gpu_transformer_engine_adds_the_same(precision, tolerance):
    fused, wanted = added("cuda", getattr(torch, precision))
    assert torch.allclose(fused.double(), wanted, rtol=tolerance, atol=10 * tolerance)
