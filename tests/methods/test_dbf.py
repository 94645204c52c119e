"""The peer: what it owes on a real matrix, and its budget."""

import numpy as np
import pytest

from diba_np.matrix.quality import output_snr_db
from diba_np.methods.dbf import dbf


def test_the_peer_reaches_its_published_quality(attention):
    f = dbf(attention, k=192)
    assert f.snr(attention) == pytest.approx(6.549, abs=0.03)


def test_the_peers_scales_are_counted(attention):
    f = dbf(attention, bits=1.0, outer=10)
    assert (f.k, f.shift, f.scale_bits) == (172, 0.5, 16)
    assert f.bits_per_weight <= 1.0
    assert f.snr(attention) > 4


def test_known_inputs_weigh_the_columns(attention, rng):
    A = attention[:96, :96]
    X = rng.normal(size=(200, 96)) * np.where(np.arange(96) < 24, 5.0, 0.2)
    plain, weighted = (dbf(A, k=40, inputs=given, outer=60) for given in (None, X))
    assert output_snr_db(A, weighted.to_dense(), X) > output_snr_db(A, plain.to_dense(), X) + 3
    assert weighted.scale_bits == 16
    with pytest.raises(ValueError, match=r"inputs must have shape \(N, 96\), .*, 3\)"):
        dbf(A, k=4, inputs=np.ones((5, 3)))
