"""BLAS held at one thread, whichever it is; a sentence where it cannot be."""

import pytest

from diba_np.cli.doctor import diagnose
from diba_np.machine import blas


@pytest.fixture
def no_wheels(monkeypatch):
    """NumPy and SciPy as built against a BLAS of the system."""
    monkeypatch.setattr(blas, "_wheel_libraries", lambda package: [])


def test_threadpoolctl_holds_what_the_wheels_do_not_carry(no_wheels):
    pytest.importorskip("threadpoolctl", reason="needs threadpoolctl")
    controls, without = blas._blas_controls()
    if not controls:
        pytest.skip("threadpoolctl knows no BLAS here")
    assert not without
    assert blas.blas_problem() is None
    before = [get() for _, get in controls]
    with blas.single_threaded_blas():
        assert [get() for _, get in controls] == [1] * len(controls)
    assert [get() for _, get in controls] == before


def test_without_it_doctor_says_so(no_wheels, monkeypatch):
    monkeypatch.setattr(blas, "_other_controls", lambda known: [])
    monkeypatch.setattr(blas, "_blas_name", lambda package: "mkl")
    problem = blas.blas_problem()
    assert problem.startswith("numpy's BLAS (mkl) and scipy's BLAS (mkl) cannot be held")
    assert "install threadpoolctl" in problem
    assert problem in diagnose()["problems"]
    with blas.single_threaded_blas():  # left alone, no error
        pass


def test_accelerate_cannot_be_held(no_wheels, monkeypatch):
    monkeypatch.setattr(blas, "_other_controls", lambda known: [(id, int)])
    monkeypatch.setattr(blas, "_blas_name", lambda package: "accelerate")
    assert "accelerate" in blas.blas_problem()
