"""Components in stages: their sizes, the rest that each is fitted to, what they gain."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import diba_np as dn
from diba_np.machine.thread_pool import ThreadPool
from diba_np.search import relaxation as admm
from diba_np.search import stages as staged
from diba_np.search.exact_steps import squared_error
from diba_np.search.halves import FEWEST
from diba_np.search.progress import Run
from diba_np.search.state import State
from diba_np.search.target import Target
from diba_np.search.weighted_target import WeightedTarget
from diba_np.search.weights import as_weights

sides = st.integers(1, 3000)


@given(st.integers(1, 5000), sides, sides, st.sampled_from([staged.ONCE, staged.ONCE_COUPLED]))
def test_sizes(k, m, n, once):
    sizes = staged.stage_sizes(k, (m, n), once)
    assert sum(sizes) == k
    most = min(once * np.sqrt(m * n), staged.MOST_BITS * m * n / (m + n))
    assert (len(sizes) == 1) == (k <= max(most, staged.LEAST))
    if len(sizes) > 1:
        assert min(sizes) >= FEWEST
        assert sizes[0] <= max(FEWEST, staged.MOST_FIRST * m * n / (m + n) + 1)


def random_state(rng, m, n, k, shift):
    bits = [rng.integers(0, 2, (size, k), dtype=np.uint8) for size in (m, n)]
    d1, d3 = (rng.uniform(0.5, 2.0, size) * rng.choice([-1.0, 1.0], size) for size in (m, n))
    return State(d1, bits[0], rng.standard_normal(k) / k, bits[1], d3, shift)


def dense(state):
    return state.left.scaled() @ (state.d2[:, None] * state.right.scaled().T)


@pytest.mark.parametrize("block", [None, 64 * 30], ids=["whole", "in blocks"])
@pytest.mark.parametrize("weighed", [False, True])
def test_rest_is_what_a_state_leaves_over(weighed, block):
    rng = np.random.default_rng(0)
    A = 3.0 * rng.standard_normal((130, 30))
    with ThreadPool(1, block) as pool:
        weights = as_weights(rng.standard_normal((90, 30)), None, None, A.shape, pool)
        target = WeightedTarget(A, pool, weights) if weighed else Target(A, pool)
        state = random_state(rng, 130, 30, 7, 0.0)
        rest = staged.rest_of(target, state)
        left_over = A - target.unit * dense(state)
        assert type(rest) is WeightedTarget or not weighed
        assert rest.unit == pytest.approx(np.sqrt(np.mean(left_over**2)))
        for dtype, tol in ((np.float64, 1e-12), (np.float32, 1e-5)):
            N = rng.standard_normal((30, 4)).astype(dtype)
            np.testing.assert_allclose(
                rest.matmul(N) * rest.unit, left_over @ N, atol=tol * 300, rtol=0
            )
        wanted = squared_error(target, state) * target.unit**2
        assert rest.energy * rest.unit**2 == pytest.approx(wanted)


@pytest.mark.parametrize("block", [None, 64 * 30], ids=["whole", "in blocks"])
@pytest.mark.parametrize("weighed", [False, True])
def test_a_part_of_the_rest_is_what_is_left_over_there(weighed, block):
    rng = np.random.default_rng(0)
    A = (50.0 + rng.standard_normal((130, 30))).astype(np.float32)
    rows, columns = np.array([2, 3, 5, 70, 71, 129]), np.arange(4, 20)
    with ThreadPool(1, block) as pool:
        weights = as_weights(None, None, rng.random(130), A.shape, pool)
        target = WeightedTarget(A, pool, weights) if weighed else Target(A, pool)
        mean = State(np.ones(130), np.ones((130, 1), np.uint8), np.full(1, 50.0 / target.unit),
                     np.ones((30, 1), np.uint8), np.ones(30), 0.0)  # fmt: skip
        part = staged.rest_of(target, mean).part(rows, columns)
        left_over = (A.astype(np.float64) - 50.0)[np.ix_(rows, columns)]
        assert part.unit == pytest.approx(np.sqrt(np.mean(left_over**2)))
        np.testing.assert_allclose(part.matmul(np.eye(16)) * part.unit, left_over, atol=1e-10)
        if weighed:
            of_part = weights.outputs[rows] / weights.outputs[rows].mean()
            np.testing.assert_allclose(part.w, of_part)


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_a_stage_keeps_scales_and_never_loses(weighed, shift):
    rng = np.random.default_rng(1)
    A = rng.standard_normal((60, 50))
    with ThreadPool(1) as pool:
        weights = as_weights(rng.standard_normal((90, 50)), None, None, A.shape, pool)
        target = WeightedTarget(A, pool, weights) if weighed else Target(A, pool)
        state = random_state(rng, 60, 50, 3, shift)
        how = {"shift": shift, "rng": rng, "iterations": 20, "run": Run()}
        rest = staged.rest_of(target, state)
        relax = staged.relax_coupled if weighed else admm.relax
        found = relax(rest, 24, held=(state.d1, state.d3), **how).state
        for own, new in zip(state.sides, found.sides, strict=True):
            ratio = new.scales / np.abs(own.scales)
            np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)
        alone = squared_error(rest, found) * (rest.unit / target.unit) ** 2
        joined = staged._joined(target, state, rest, found)
        assert len(joined.d2) == 27
        np.testing.assert_array_equal(joined.d1, state.d1)
        before, after = (squared_error(target, s) for s in (state, joined))
        assert after < 0.7 * before
        if shift == 0.5:  # a row of +-1 turns its sign by its bits
            assert after <= alone * (1 + 1e-6)


@pytest.mark.parametrize("bits", [3.0, 4.0])
@pytest.mark.parametrize("weighed", [False, True])
def test_stages_beat_one_relaxation(bits, weighed, monkeypatch):
    rng = np.random.default_rng(2)
    A = rng.standard_normal((96, 80))
    how = {"k": int(bits * 96 * 80 / 176), "effort": "fast", "threads": 1}
    if weighed:
        how["inputs"] = rng.standard_normal((400, 80))
    name = "output_snr_db" if weighed else "snr_db"
    several = dn.factorize(A, **how).record[name]
    monkeypatch.setattr(staged, "stage_sizes", lambda k, shape, once: [k])
    assert several > dn.factorize(A, **how).record[name] + 0.5


@pytest.mark.parametrize("options", [{}, {"block_rows": 64}], ids=["whole", "in blocks"])
def test_every_number_of_threads_gives_the_same_bits(options):
    A = np.random.default_rng(5).standard_normal((200, 150)).astype(np.float32)
    how = {"bits": 4.0, "terms": 1, "effort": "fast", "max_sweeps": 20} | options
    one, two = (dn.factorize(A, threads=threads, **how) for threads in (1, 2))
    assert one.b1 == two.b1 and one.b2 == two.b2
    for name in ("d1", "d2", "d3"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def test_nothing_left_over_ends_the_stages():
    with ThreadPool(1) as pool:
        target = Target(np.zeros((96, 96)), pool)
        how = {"shift": 0.0, "seed": 0, "iterations": 5, "uneven": 0, "run": Run()}
        state = staged.relax_staged(target, 192, **how).state
    assert len(state.d2) == 192
    np.testing.assert_array_equal(dense(state), np.zeros((96, 96)))


def test_cut_where_a_stage_ends_is_about_a_fresh_search():
    A = np.random.default_rng(7).standard_normal((120, 100))
    f = dn.factorize(A, bits=4.0, terms=1, threads=1)
    k = f.record["stages"][0]
    assert sum(f.record["stages"]) == f.k > k
    fresh = dn.factorize(A, k=k, threads=1).snr(A)
    assert f.truncate(k).snr(A) > fresh - 0.8
    assert f.truncate(k, A).snr(A) > fresh - 0.3
    assert dn.factorize(A, k=k, solver="greedy", threads=1).record["stages"] is None


def test_a_time_limit_reaches_every_stage(monkeypatch):
    begun = []
    A = np.random.default_rng(3).standard_normal((96, 96))
    # a clock that every step moves on by one
    steps = []
    monkeypatch.setattr(Run, "seconds", property(lambda self: float(len(steps))))

    def callback(state):
        steps.append(state)
        if state.phase == "relaxation" and state.step == 1:
            begun.append(state.seconds)

    how = {"effort": "best", "time_limit": 200.0, "threads": 1}
    f = dn.factorize(A, k=300, callback=callback, **how)
    sizes = staged.stage_sizes(f.k, A.shape)
    assert len(sizes) > 2
    shares = 160.0 * np.cumsum([0, *sizes[:-1]]) / f.k
    np.testing.assert_allclose(begun, shares, atol=10.0)  # steps of the polish come in between


def test_components_of_stages_not_begun_are_off():
    A = np.random.default_rng(4).standard_normal((96, 96))
    with pytest.warns(dn.ConvergenceWarning):
        f = dn.factorize(A, k=192, callback=lambda state: state.step == 5, threads=1)
    first = staged.stage_sizes(192, A.shape)[0]
    assert f.k == 192 and np.count_nonzero(f.d2) <= first < 192


def test_what_is_left_over_may_be_smaller_than_any_matrix(rng):
    # the matrix is just large enough, what its first stage leaves over is not
    A, X = rng.normal(size=(48, 48)) * 5e-36, rng.normal(size=(200, 48))
    f = dn.factorize(A, bits=4.0, inputs=X, effort="fast")
    assert f.snr(A) > 10 and f.record["stages"]
