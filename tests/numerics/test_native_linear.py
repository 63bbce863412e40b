"""The native fp32 and bf16 products against torch in fp64, at each level of this CPU; and the loader's refusals."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fireflyer.numerics.native.library import Library, dense_matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (37, 131), (16, 64), (576, 100), (3, 4099), (50, 7)])
def test_float_product(native: Library, dtype: torch.dtype, rows: int, cols: int) -> None:
    torch.manual_seed(rows * cols)
    wide = torch.randn(rows, cols + 5).to(dtype)
    weight = wide[:, 2 : 2 + cols]  # odd stride, odd start
    for m in (0, 1, 2, 3, 4, 5, 7, 16, 20):
        x = torch.randn(m, cols + 3)[:, :cols]
        got = native.linear(x, dense_matrix(weight))
        want = x.double() @ weight.double().T
        bound = 1e-6 * (x.double().abs() @ weight.double().abs().T) + 1e-30
        assert ((got - want).abs() <= bound).all(), (m, (got - want).abs().max())


def test_float_product_does_not_know_the_thread_count(native: Library) -> None:
    weight, x = torch.randn(515, 1030), torch.randn(3, 1030)
    matrix = dense_matrix(weight)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = native.linear(x, matrix)
        torch.set_num_threads(2)
        assert torch.equal(native.linear(x, matrix), alone)
        assert torch.equal(native.linear(x[1:2], matrix)[0], alone[1]), "a row does not know its neighbours"
    finally:
        torch.set_num_threads(before)


def test_not_a_number_and_infinity_stay_in_their_row_and_column(native: Library) -> None:
    weight, x = torch.randn(40, 70), torch.randn(3, 70)
    x[1, 69] = float("nan")
    weight[5, 3] = float("inf")
    got = native.linear(x, dense_matrix(weight))
    assert got[1].isnan().all()
    assert not got[0, :5].isnan().any()
    assert not got[2, 6:].isnan().any()
    assert got[0, 5].isinf()


@pytest.mark.parametrize(("value", "says"), [("0", "None"), ("avx3", "UserError")])
def test_switched_off_or_misspelt(value: str, says: str) -> None:
    program = (
        "from fireflyer.numerics.native.library import library\n"
        "try: print(library())\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    environment = {**os.environ, "FIREFLYER_NATIVE": value}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(says)
    assert says == "None" or "'avx3'" in done.stdout
