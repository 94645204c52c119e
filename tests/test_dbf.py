"""The peer: what it owes on a real matrix, and its budget."""

import pytest

from diba_np.baselines.dbf import dbf


def test_the_peer_reaches_its_published_quality(attention):
    f = dbf(attention, k=192)
    assert f.snr(attention) == pytest.approx(6.549, abs=0.03)


def test_the_peers_scales_are_counted(attention):
    f = dbf(attention, bits=1.0, outer=10)
    assert (f.k, f.shift, f.scale_bits) == (172, 0.5, 16)
    assert f.bits_per_weight <= 1.0
    assert f.snr(attention) > 4
