"""Viterbi: the best path through a shift-register trellis, exactly; and what a path stands for.

The state after a step is the last `width` bits of the path, the newest lowest; a step appends
`bits` of them. Step t stands for the V weights ``scale[t, v] * table[v, state]``.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from diba_np.kernels import _ir  # _ir.py c7dde7ed34db
from diba_np.kernels._jit import njit

_LANES = 16  # states that are compared at a time
_I8 = ir.IntType(8)


@intrinsic
def _take_least(typingctx, cost, step, fan, blocks, best, choice):
    """Write the least of `fan` costs that lie `step` bytes apart, and which it is: the first.

    For `blocks` times 16 states, all arguments but the two counts addresses: of float32, and of
    uint8 for the choice. Numba makes branches of this, half of which are mispredicted.
    """
    signature = types.void(*[types.intp] * 6)
    costs, codes = _ir.vector(_ir.F32, _LANES), _ir.vector(_I8, _LANES)

    def codegen(context, builder, signature, args):
        cost, step, fan, blocks, best, choice = args

        def block(i, nothing):
            at = builder.mul(i, _ir.index(4 * _LANES))
            first = builder.add(cost, at)

            def compare(h, carried):
                least, chosen = carried
                h = builder.add(h, _ir.index(1))
                other = _ir.load(builder, builder.add(first, builder.mul(h, step)), costs, 4)
                better = builder.fcmp_ordered("<", other, least)
                code = _ir.broadcast(builder, builder.trunc(h, _I8), codes)
                return [
                    builder.select(better, other, least),
                    builder.select(better, code, chosen),
                ]

            start = [_ir.load(builder, first, costs, 4), _ir.splat_constant(codes, 0)]
            others = builder.sub(fan, _ir.index(1))
            least, chosen = _ir.counted_loop(builder, others, start, compare)
            _ir.store(builder, least, builder.add(best, at), 4)
            _ir.store(builder, chosen, builder.add(choice, builder.mul(i, _ir.index(_LANES))), 1)
            return []

        _ir.counted_loop(builder, blocks, [], block)
        return context.get_dummy_value()

    return signature, codegen


@njit(fastmath=False)
def _spread(best, fan, common, cost):
    """Write ``cost[g * fan + u] = best[g] - common`` for all u; known strides are much faster."""
    groups = best.size
    if fan == 2:
        for g in range(groups):
            base = best[g] - common
            cost[2 * g] = base
            cost[2 * g + 1] = base
    elif fan == 4:
        for g in range(groups):
            base = best[g] - common
            cost[4 * g] = base
            cost[4 * g + 1] = base
            cost[4 * g + 2] = base
            cost[4 * g + 3] = base
    else:
        for g in range(groups):
            base = best[g] - common
            for u in range(fan):
                cost[g * fan + u] = base


@njit(fastmath=False)
def _leave(t, base, size, x, scale, table, bits, cost, best, choice):
    """Take a step from the states [base, base + size), the only ones reached; return the new base.

    They differ in their lowest bits alone, so no two of them have a common successor.
    """
    S = table.shape[1]
    groups = S >> bits
    fan = 1 << bits
    for p in range(size):
        best[p] = cost[base + p]
        cost[base + p] = np.float32(np.inf)
    oldest = np.uint8(base // groups)
    to = (base << bits) & (S - 1)
    common = best[0] if to == 0 else np.float32(0.0)
    for p in range(size):
        choice[(to >> bits) + p] = oldest
        for u in range(fan):
            s = to + p * fan + u
            total = best[p] - common
            for v in range(x.shape[1]):
                error = x[t, v] - scale[t, v] * table[v, s]
                total += error * error
            cost[s] = total
    return to


@njit(fastmath=False)
def _arrive(t, low, stride, x, scale, table, bits, cost, best, choice):
    """Take a step to the states low, low + stride, ... alone; `stride` is at least 2^bits."""
    S = table.shape[1]
    groups = S >> bits
    count = S // stride
    for k in range(count):
        g = (low + k * stride) >> bits
        least = cost[g]
        oldest = 0
        for h in range(1, 1 << bits):
            if cost[h * groups + g] < least:
                least = cost[h * groups + g]
                oldest = h
        best[k] = least
        choice[g] = np.uint8(oldest)
    for k in range(count):
        s = low + k * stride
        total = best[k]
        for v in range(x.shape[1]):
            error = x[t, v] - scale[t, v] * table[v, s]
            total += error * error
        cost[s] = total


@njit(fastmath=False)
def viterbi(x, scale, table, bits, start, end, cost, best, choices, codes):
    """Find the path of least squared error through the trellis.

    Parameters
    ----------
    x : (T, V) float32, C-order
        What each step should stand for.
    scale : (T, V) float32, C-order
        Factor of the table at each weight.
    table : (V, S) float32, C-order
        Values of the S = 2^width states.
    bits : int
        Bits a step; at most `width`.
    start, end : int
        State before the first and after the last step; -1 leaves it free.
    cost : (S,) float32, overwritten
        On return, with a free end, the error of the best path into each state, up to a common
        constant.
    best : (S / 2^bits,) float32, overwritten
    choices : (>= T, S / 2^bits) uint8, overwritten
    codes : (T,) uint8, overwritten
        The bits that each step appends.

    Returns
    -------
    int
        The state before the first step.

    Notes
    -----
    O(T V S), less of a path whose ends are given: of its first and last steps, whose bits are those
    of a state, few states are on it. Of equal predecessors the one with the lowest oldest bits
    wins; of equal ends the lowest state.
    """
    T, V = x.shape
    S = table.shape[1]
    fan = 1 << bits
    groups = S >> bits
    infinite = np.float32(np.inf)
    cost[:] = np.float32(0.0) if start < 0 else infinite
    width = 0
    while S >> (width + 1):
        width += 1
    # first steps with few states reached, last ones with few from which the end is; every end of
    # a path of so many steps can be reached
    leaving = arriving = 0
    if T * bits >= width:
        leaving = width // bits if start >= 0 else 0
        arriving = width // bits if end >= 0 else 0
    base = max(start, 0)
    if start >= 0:
        cost[start] = np.float32(0.0)
    for t in range(T):
        choice = choices[t]
        rest = T - 1 - t
        if t < leaving and (rest >= arriving or t <= rest):
            base = _leave(t, base, 1 << bits * t, x, scale, table, bits, cost, best, choice)
            continue
        if rest < arriving:
            stride = 1 << (width - bits * rest)
            low = end >> (bits * rest)
            _arrive(t, low, stride, x, scale, table, bits, cost, best, choice)
            continue
        # predecessors of a group of states differ in their oldest bits
        blocks = groups // _LANES
        _take_least(cost.ctypes.data, 4 * groups, fan, blocks, best.ctypes.data, choice.ctypes.data)
        for g in range(blocks * _LANES, groups):
            best[g] = cost[g]
            choice[g] = 0
            for h in range(1, fan):
                if cost[h * groups + g] < best[g]:
                    best[g] = cost[h * groups + g]
                    choice[g] = np.uint8(h)
        # any common constant keeps the sums small; one that is infinite would make them NaN
        common = best[0] if best[0] < infinite else np.float32(0.0)
        _spread(best, fan, common, cost)
        for v in range(V):
            goal = x[t, v]
            factor = scale[t, v]
            values = table[v]
            for s in range(S):
                error = goal - factor * values[s]
                cost[s] += error * error
    state = end
    if state < 0:
        state = 0
        for s in range(1, S):
            if cost[s] < cost[state]:
                state = s
    for t in range(T - 1, -1, -1):
        codes[t] = np.uint8(state & (fan - 1))
        g = state >> bits
        state = g + groups * int(choices[t, g])
    return state


@njit(fastmath=False)
def trellis_states(codes, bits, start, width, states):
    """Write the state after each step of a path.

    Parameters
    ----------
    codes : (T,) uint8
    bits : int
        Bits a step.
    start : int
        State before the first step.
    width : int
        Bits of a state.
    states : (T,) int64, overwritten
    """
    state = start
    mask = (1 << width) - 1
    for t in range(codes.size):
        state = ((state << bits) | int(codes[t])) & mask
        states[t] = state
