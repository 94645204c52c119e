"""What a network is made of beside its linear layers, from its tensors: norms, tables, its head."""

from __future__ import annotations

from collections.abc import Iterator

from numpy.typing import DTypeLike

from diba_np.networks.blocks.block import Block
from diba_np.networks.blocks.embedding import Embedding
from diba_np.networks.blocks.layer_norm import LayerNorm
from diba_np.networks.blocks.rms_norm import RMSNorm
from diba_np.networks.tensors import BARE, Tensors

TABLES = ("positions", "types")  # beside that of the tokens
EMBEDDINGS = (*TABLES, *BARE)


def head_of(tensors: Tensors) -> str | None:
    """Return the name of the layer that gives logits over the vocabulary, if there is one."""
    own = tensors.find("head")
    stored = own is not None and tensors.has(f"{own}.weight")
    if not tensors.kind.decoder and tensors.find("masked_dense") is None:
        return None
    tied = not stored if tensors.config.tied is None else tensors.config.tied
    if tied:
        # configurations of trunks that make vectors still say what was true of their decoders
        bare = tensors.kind.decoder and tensors.config.makes_vectors
        return None if bare else tensors.find("tokens")
    return own if stored else None


def blocks_of(tensors: Tensors, dtype: DTypeLike) -> Iterator[tuple[str, Block]]:
    """Yield norms, tables and what else is no linear layer, with their names.

    The bias of the head for masked tokens may have the name of that layer, which a dot tells apart.
    """
    for i in range(tensors.config.layers):
        for place in ("mix_norm", "outer_norm"):
            yield _norm(tensors, tensors.need(place, i), dtype)
    for place in ("start_norm", "end_norm", "masked_norm", "classifier_norm"):
        name = tensors.find(place)
        if name is not None:
            yield _norm(tensors, name, dtype)
    for place in TABLES:
        name = tensors.find(place)
        if name is not None:
            yield name, Embedding(tensors.array(f"{name}.weight"), dtype)
    for place in BARE:
        name = tensors.find(place)
        if name is not None:
            yield name, Block({"": tensors.array(name)}, dtype)
    name = tensors.find("masked_bias")
    if name is not None:
        yield f"{name}.", Block({"bias": tensors.array(f"{name}.bias")}, dtype)


def tensor_name(owner: str, what: str) -> str:
    """Return the name of a parameter in the source, given its block's in `blocks_of`.

    >>> tensor_name("ln_f", "weight"), tensor_name("lm_head.", "bias"), tensor_name("cls_token", "")
    ('ln_f.weight', 'lm_head.bias', 'cls_token')
    """
    return f"{owner}.{what}".replace("..", ".").rstrip(".")


def _norm(tensors: Tensors, name: str, dtype: DTypeLike) -> tuple[str, Block]:
    weight = tensors.array(f"{name}.weight")
    if tensors.kind.rms:
        return name, RMSNorm(weight, tensors.config.epsilon, dtype)
    bias = tensors.array(f"{name}.bias")
    return name, LayerNorm(weight, bias, tensors.config.epsilon, dtype)
