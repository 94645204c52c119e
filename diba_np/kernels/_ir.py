"""LLVM IR building blocks that the vector kernels share; plain Python that runs at compile time.

Numba's cache is stamped by each kernel's own file and does not see an edit here. So every file
that imports this one carries a digest of it (``# _ir.py <digest>``); a test tells when it is out
of date, and renewing it changes the file's stamp.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

F32 = ir.FloatType()
F64 = ir.DoubleType()
I16 = ir.IntType(16)
I32 = ir.IntType(32)
I64 = ir.IntType(64)


def vector(element, lanes):
    """Return the LLVM type of `lanes` elements."""
    return ir.VectorType(element, lanes)


def splat_constant(type_, value):
    """Return the constant vector whose lanes all hold `value`."""
    return ir.Constant(type_, [value] * type_.count)


def index(value):
    """Return a 64-bit constant."""
    return ir.Constant(I64, value)


def load(builder, address, type_, align):
    """Load a `type_` from an integer address."""
    return builder.load(builder.inttoptr(address, type_.as_pointer()), align=align)


def store(builder, value, address, align):
    """Store `value` at an integer address."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=align)


def offset(builder, address, constant):
    """Return ``address + constant``."""
    return builder.add(address, index(constant)) if constant else address


def broadcast(builder, scalar, type_):
    """Return a vector whose lanes all hold `scalar`."""
    lane0 = builder.insert_element(ir.Constant(type_, ir.Undefined), scalar, ir.Constant(I32, 0))
    mask = splat_constant(vector(I32, type_.count), 0)
    return builder.shuffle_vector(lane0, ir.Constant(type_, ir.Undefined), mask)


def opaque(builder, value):
    """Hide a constant vector from the optimizer (x86), which would turn a product into a shift."""
    function = ir.FunctionType(value.type, [value.type])
    return builder.asm(function, "", "=v,0", [value], False)


def transposed(builder, rows):
    """Return the transpose of as many vectors as each has lanes, a power of two."""
    rows, count = list(rows), len(rows)
    step = count // 2
    while step:  # swap the off-diagonal blocks of every block of 2 step rows
        picks = [
            [lane if not lane & step else count + lane - step for lane in range(count)],
            [lane + step if not lane & step else count + lane for lane in range(count)],
        ]
        picks = [ir.Constant(vector(I32, count), pick) for pick in picks]
        for i in range(count):
            if not i & step:
                pair = rows[i], rows[i + step]
                rows[i], rows[i + step] = (builder.shuffle_vector(*pair, pick) for pick in picks)
        step //= 2
    return rows


def prefetch(builder, address):
    """Ask for the cache line at an address; never faults."""
    byte_pointer = ir.IntType(8).as_pointer()
    function = declare(builder, "llvm.prefetch.p0", ir.VoidType(), [byte_pointer, I32, I32, I32])
    read, keep, data = (ir.Constant(I32, value) for value in (0, 3, 1))
    builder.call(function, [builder.inttoptr(address, byte_pointer), read, keep, data])


def declare(builder, name, result, arguments):
    """Return the LLVM function `name`, declared on first use."""
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


def counted_loop(builder, count, carried, body):
    """Emit ``for i in range(count): carried = body(i, carried)`` and return the final `carried`.

    `count` may be zero. `body` may emit loops of its own.
    """
    before = builder.basic_block
    head = builder.append_basic_block("head")
    inside = builder.append_basic_block("body")
    after = builder.append_basic_block("after")
    builder.branch(head)
    builder.position_at_end(head)
    i = builder.phi(I64)
    i.add_incoming(index(0), before)
    phis = []
    for value in carried:
        phi = builder.phi(value.type)
        phi.add_incoming(value, before)
        phis.append(phi)
    builder.cbranch(builder.icmp_signed("<", i, count), inside, after)
    builder.position_at_end(inside)
    results = body(i, list(phis))
    i.add_incoming(builder.add(i, index(1)), builder.basic_block)
    for phi, value in zip(phis, results, strict=True):
        phi.add_incoming(value, builder.basic_block)
    builder.branch(head)
    builder.position_at_end(after)
    return phis
