import pytest
import torch


def precision() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


@pytest.fixture
def low_precision():
    """Lower precision than the default, which must be in force again once `exact_float32` has ended."""
    before = precision()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
        assert precision() == ("high", True)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.usefixtures("low_precision", "exact_float32")
def test_exact_float32_holds_for_one_test():
    assert precision() == ("highest", False)
    assert not torch.backends.cuda.matmul.allow_tf32
