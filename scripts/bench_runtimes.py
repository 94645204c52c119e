"""Time one layer of a language model beside other runtimes, on one thread, in processor seconds.

    python scripts/bench_runtimes.py [--bits 1] [--rounds 15] [--json]

The seven matrices of a layer of SmolLM2-135M (576 wide, 1536 inside), with one token and with 128,
random numbers in all of them, so that there is no error to compare: NumPy in float32, our products
(a call each, and four stacks), and onnxruntime where it is installed with ``onnx``, in float32 and
as 4-bit weights (`MatMulNBits`, float32 and int8 activations), the layer as one graph of seven
products, which spares it six calls. Sides take turns; a time is a median of processor time for the
whole layer, a ratio NumPy's time over it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from bench_products import pin, random_factors
from bench_stack import compare

SHAPES = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
SMOKE = [(32, 48), (16, 48), (48, 32)]
Side = Callable[[], Any]


def our_sides(
    shapes: list[tuple[int, int]], bits: float, tokens: int
) -> Iterator[tuple[str, Side]]:
    import numpy as np

    from diba_np.products import Stack

    rng = np.random.default_rng(0)
    matrices = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    factors = [random_factors(m, n, bits, i) for i, (m, n) in enumerate(shapes)]
    rows = {n: rng.normal(size=(tokens, n)).astype(np.float32) for _, n in shapes}
    if tokens == 1:
        vectors = {n: x[0] for n, x in rows.items()}
        yield "numpy float32", lambda: [A @ vectors[A.shape[1]] for A in matrices]
        yield "f @ x", lambda: [f @ vectors[f.shape[1]] for f in factors]
        yield (
            "f.matvec_rounded(x)",
            lambda: [f.matvec_rounded(vectors[f.shape[1]]) for f in factors],
        )
        groups = [[0, 1, 2], [3], [4, 5], [6]] if len(factors) == 7 else [[0, 1], [2]]
        stacks = [Stack([factors[i] for i in group]) for group in groups]
        outs = [np.empty(stack.shape[0], np.float32) for stack in stacks]

        def run_stacks() -> None:
            for stack, out in zip(stacks, outs, strict=True):
                stack(vectors[stack.shape[1]], out=out)

        yield f"{len(stacks)} stacks", run_stacks
        return
    yield "numpy float32", lambda: [rows[A.shape[1]] @ A.T for A in matrices]
    columns = {n: np.ascontiguousarray(x.T) for n, x in rows.items()}
    yield "f @ X", lambda: [f @ columns[f.shape[1]] for f in factors]


def onnx_sides(shapes: list[tuple[int, int]], tokens: int) -> Iterator[tuple[str, Side]]:
    """The layer as one graph: seven products of inputs of their own."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    feed = {
        f"x{i}": rng.normal(size=(tokens, n)).astype(np.float32) for i, (_, n) in enumerate(shapes)
    }

    def session(kind: str) -> Any:
        nodes, constants = [], []
        for i, (m, n) in enumerate(shapes):
            if kind == "float32":
                weights = rng.normal(size=(n, m)).astype(np.float32)
                constants.append(numpy_helper.from_array(weights, f"b{i}"))
                nodes.append(helper.make_node("MatMul", [f"x{i}", f"b{i}"], [f"y{i}"]))
                continue
            block = 32
            blocks = -(-n // block)
            packed = rng.integers(0, 256, (m, blocks, block // 2), np.uint8)
            scales = np.ones(m * blocks, np.float32)
            constants += [
                numpy_helper.from_array(packed, f"b{i}"),
                numpy_helper.from_array(scales, f"s{i}"),
            ]
            about = {"K": n, "N": m, "bits": 4, "block_size": block}
            about["accuracy_level"] = 4 if kind == "int8" else 1
            nodes.append(
                helper.make_node(
                    "MatMulNBits", [f"x{i}", f"b{i}", f"s{i}"], [f"y{i}"],
                    domain="com.microsoft", **about,
                )
            )  # fmt: skip
        graph = helper.make_graph(
            nodes,
            "layer",
            [
                helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, [tokens, n])
                for i, (_, n) in enumerate(shapes)
            ],
            [
                helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [tokens, m])
                for i, (m, _) in enumerate(shapes)
            ],
            constants,
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    for label, kind in (
        ("onnxruntime float32", "float32"),
        ("onnxruntime 4 bit, float32", "4 bit"),
        ("onnxruntime 4 bit, int8", "int8"),
    ):
        made = session(kind)
        yield label, lambda made=made: made.run(None, feed)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--bits", type=float, default=1.0, help="bits a weight of ours")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each side")
    parser.add_argument("--smoke", action="store_true", help="a tiny layer, a second")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    pin(1)

    shapes = SMOKE if args.smoke else SHAPES
    rows = []
    for tokens in (1, 8) if args.smoke else (1, 128):
        sides = dict(our_sides(shapes, args.bits, tokens))
        try:
            sides |= dict(onnx_sides(shapes, tokens))
        except ImportError:
            sys.stderr.write("onnxruntime and onnx are not installed: left out\n")
        times = compare(sides, *((2, 0.0) if args.smoke else (args.rounds, 0.02)))
        for way, us in times.items():
            rows.append(
                {"tokens": tokens, "way": way, "us": us, "ratio": times["numpy float32"] / us}
            )
    if args.json:
        print(json.dumps({"bits": args.bits, "rows": rows}))
        return
    print("| tokens | way | us a layer | x NumPy |\n|--:|---|--:|--:|")
    for row in rows:
        print(f"| {row['tokens']} | {row['way']} | {row['us']:.4g} | {row['ratio']:.2f} |")


if __name__ == "__main__":
    main()
