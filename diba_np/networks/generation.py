"""Text from a decoder, token by token, with a cache of keys and values."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diba_np.checks import check_count, check_number
from diba_np.kernels import norms
from diba_np.kernels.token import attend_token, gate_token
from diba_np.layers.linear import Layer
from diba_np.networks.blocks.activations import ACTIVATIONS
from diba_np.networks.inputs import as_ids
from diba_np.products.stack import Stack

if TYPE_CHECKING:
    from diba_np.networks.network import Network
    from diba_np.networks.tokenizer import Tokenizer

Array = NDArray[Any]
# of a vector (n,): what linear layers give one below the other (m,), with added= and out=
Apply = Callable[..., Array]

_LEAST = 64  # places of a new cache
_TAIL = 8  # tokens before a new one that tell how its text begins, where they hold any


def one_below_the_other(layers: Sequence[Layer], dtype: np.dtype[Any]) -> Apply:
    """Return what multiplies a vector by several layers of one input in one call.

    Factorizations and linear trellises in one compiled call; others through dense copies.
    """
    bias = np.concatenate([layer.parameters["bias"] for layer in layers])
    if dtype == np.float32:
        try:
            return Stack([layer.to_matrix() for layer in layers], bias if bias.any() else None)
        except TypeError:  # not all of them are packed
            pass
    applied = [layer.frozen() for layer in layers]

    def apply(x: Array, *, added: Array | None = None, out: Array | None = None) -> Array:
        y = np.concatenate([f(x[None])[0] for f in applied])
        if added is not None:
            y += added
        if out is None:
            return y
        out[...] = y
        return out

    return apply


class _LayerParts(NamedTuple):
    """A layer of a decoder for one token: what multiplies, its norms, whether positions turn it."""

    names: list[str]  # of the linear layers that give queries, keys and values
    read: Apply
    mix: Apply
    inner: Apply
    outer: Apply
    before: Callable[[Array], Array]
    after: Callable[[Array], Array]
    turns: bool


class Session:
    """A decoder that reads on where it stopped.

    Parameters
    ----------
    net : Network
        A decoder; its parameters are taken as they are now.
    capacity : int
        Tokens for which there is room at first; more is made when it is needed.

    Attributes
    ----------
    length : int
        Tokens read so far.

    Notes
    -----
    Memory: ``2 layers key_heads head_width`` numbers a token. A token allocates nothing of the
    network's width or larger but its row of the table.
    """

    def __init__(self, net: Network, capacity: int = _LEAST) -> None:
        c = net.config
        self.net, self.length, self.capacity = net, 0, check_count(capacity, "capacity")
        self._cache: Array = np.empty(0)
        find, dtype = net.tensors.find, net.dtype
        self._layers = [self._layer(i) for i in range(c.layers)]
        self._end = self._norm(net.tensors.need("end_norm"))
        head = net.layers[net.need_head()]
        self._head = one_below_the_other([head], dtype)
        places = find("positions")
        self._places = None if places is None else net.blocks[places].parameters["weight"]
        wide = (c.heads + 2 * c.key_heads) * c.head_width
        self._gated = find("gate") is not None and c.activation in ("silu", "swish")
        self._joined, self._mixed = np.empty(wide, dtype), np.empty(c.heads * c.head_width, dtype)
        self._inner = np.empty(c.inner * (2 if find("gate") else 1), dtype)
        self._active = np.empty(c.inner, dtype)
        self._logits = np.empty(head.shape[0], dtype)
        self._room(self.capacity)

    def _layer(self, i: int) -> _LayerParts:
        """Return the parts of layer i."""
        net = self.net

        def named(*places: str) -> list[str]:
            return [name for place in places if (name := net.tensors.find(place, i))]

        def stack(names: list[str]) -> Apply:
            return one_below_the_other([net.layers[name] for name in names], net.dtype)

        read = named("joined") or named("query", "key", "value")
        return _LayerParts(
            read,
            stack(read),
            stack(named("mix")),
            stack(named("gate", "inner")),
            stack(named("outer")),
            self._norm(net.tensors.need("mix_norm", i)),
            self._norm(net.tensors.need("outer_norm", i)),
            net.rotary is not None and i not in net.config.unrotated,
        )

    def _norm(self, name: str) -> Callable[[Array], Array]:
        """Return a norm of a vector, which writes to a place of its own."""
        block, dtype = self.net.blocks[name], self.net.dtype
        weight, epsilon = block.parameters["weight"], dtype.type(self.net.config.epsilon)
        y, inverse = np.empty((1, len(weight)), dtype), np.empty(1, dtype)
        flat: Array = y[0]
        unit = np.empty_like(y)
        if "bias" in block.parameters:
            shift = block.parameters["bias"]

            def centred(x: Array) -> Array:
                norms.layer_norm(x[None], weight, shift, epsilon, unit, inverse, y)
                return flat

            return centred

        def scaled(x: Array) -> Array:
            norms.rms_norm(x[None], weight, epsilon, inverse, y)
            return flat

        return scaled

    def _room(self, capacity: int) -> None:
        """Make room for so many tokens; what has been read stays."""
        c = self.net.config
        shape = (2, c.layers, c.key_heads, capacity, c.head_width)
        try:
            cache = np.zeros(shape, self.net.dtype)
        except MemoryError as error:
            size = math.prod(shape) * self.net.dtype.itemsize / 1e9
            raise MemoryError(
                f"keys and values of {capacity} tokens take {size:.1f} GB, for which there is no "
                "memory; read and write fewer tokens"
            ) from error
        if self.length:
            cache[..., : self.length, :] = self._cache[..., : self.length, :]
        self._cache, self.capacity = cache, capacity
        self._keys, self._values = ([one for one in part] for part in cache)
        self._scores = np.empty(capacity, self.net.dtype)
        if self.net.rotary is not None:
            self._cos, self._sin = self.net.rotary.tables(capacity)
        self._still = np.empty(0, self.net.dtype)

    def _check_room(self, tokens: int) -> None:
        most = self.net.config.positions
        if most and self.length + tokens > most:
            raise ValueError(f"the network has {most} positions, got {self.length + tokens} tokens")
        if self.length + tokens > self.capacity:
            twice = min(2 * self.capacity, most or 2 * self.capacity)
            self._room(max(self.length + tokens, twice))

    def read(self, ids: ArrayLike) -> Array:
        """Read the first tokens (T,) together; return the logits (vocabulary,) after the last.

        Raises
        ------
        TypeError, ValueError
            `ids` are no tokens, or something has been read before.
        MemoryError
            There is none for so many tokens.
        """
        if self.length:
            raise ValueError("read must come first; go on with step")
        row = as_ids(ids, self.net.config)
        if len(row) > 1:
            raise ValueError(f"ids must be one row, got {len(row)}")
        tokens = row.shape[1]
        self._check_room(tokens)
        seen: dict[str, Array] = {}
        wanted = {name for layer in self._layers for name in layer.names}

        def linear(name: str, x: Array, **how: Any) -> tuple[Array, None]:
            y, _ = self.net.plain(name, x, **how)
            if name in wanted:
                seen[name] = y
            return y, None

        x = self.net.last_hidden(row, None, linear)
        c = self.net.config
        for i, layer in enumerate(self._layers):
            parts = np.concatenate([seen[name] for name in layer.names], axis=-1)
            keys, values = np.split(parts[..., c.heads * c.head_width :], 2, axis=-1)
            if self.net.rotary is not None and layer.turns:
                keys = self.net.rotary.forward(keys)[0]
            for cache, part in ((self._keys[i], keys), (self._values[i], values)):
                cache[:, :tokens] = part.reshape(tokens, c.key_heads, -1).swapaxes(0, 1)
        self.length = tokens
        return self._head(np.ascontiguousarray(x[0, -1]), out=self._logits)

    def step(self, token: int) -> Array:
        """Read one token more; return the logits (vocabulary,) after it, overwritten by the next.

        Raises
        ------
        ValueError
            The network has no position for it.
        MemoryError
            There is none for so many tokens.
        """
        self._check_room(1)
        net, c, at = self.net, self.net.config, self.length
        row = net.layers[str(net.token_name)].lookup(np.array([token]))[0][0]
        x = row + self._places[at] if self._places is not None else row
        x = np.array(x, net.dtype)
        first = max(at + 1 - c.window, 0) if c.window else 0
        for i, layer in enumerate(self._layers):
            joined = layer.read(layer.before(x), out=self._joined)
            cos, sin = (self._cos[at], self._sin[at]) if layer.turns else (self._still, self._still)
            keys, values = self._keys[i], self._values[i]
            attend_token(
                joined, cos, sin, keys, values, first, at, c.heads, self._scores, self._mixed
            )
            layer.mix(self._mixed, added=x, out=x)
            both = layer.inner(layer.after(x), out=self._inner)
            if self._gated:
                gate_token(both, self._active)
                active = self._active
            else:
                active = self._activated(both)
            layer.outer(active, added=x, out=x)
        self.length += 1
        return self._head(self._end(x), out=self._logits)

    def _activated(self, both: Array) -> Array:
        """Return the feed-forward's inner values where no kernel makes them."""
        activation = ACTIVATIONS[self.net.config.activation]
        if len(both) == len(self._active):
            return activation(both)[0]
        gate, value = np.split(both, 2)
        active: Array = activation(gate)[0] * value
        return active


def choose(
    logits: Array, rng: np.random.Generator, temperature: float, top_k: int | None, top_p: float
) -> int:
    """Return the most probable token at temperature 0, else one drawn.

    Parameters
    ----------
    logits : (vocabulary,) array
    rng : Generator
    temperature : float
        Logits are divided by it.
    top_k : int or None
        Among so many of the most probable.
    top_p : float
        Among the fewest that have this share of all probability together.
    """
    if temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")[:top_k]
    p = np.exp((logits[order] - logits[order[0]]).astype(np.float64) / temperature)
    p /= p.sum()
    if top_p < 1:
        count = int(np.searchsorted(np.cumsum(p), top_p)) + 1
        order, p = order[:count], p[:count] / p[:count].sum()
    return int(rng.choice(order, p=p))


def stream_tokens(
    net: Network,
    ids: ArrayLike,
    tokens: int = 40,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """Yield the tokens that a decoder writes after others, until it ends or there are enough.

    Parameters
    ----------
    net : Network
    ids : (T,) int array_like
    tokens : int
        Most of them.
    temperature, top_k, top_p
        See `choose`; 0 takes the most probable token.
    seed : int
        Draws them.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind or value, or the network is no decoder.

    Warns
    -----
    UserWarning
        The network has no position for further tokens.
    """
    _check_decoder(net)
    check_count(tokens, "tokens", least=0)
    if check_number(temperature, "temperature") < 0:
        raise ValueError(f"temperature must not be negative, got {temperature:g}")
    if not 0 < check_number(top_p, "top_p") <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p:g}")
    if top_k is not None:
        check_count(top_k, "top_k")
    rng = np.random.default_rng(check_count(seed, "seed", least=0))
    start = as_ids(ids, net.config)
    session = Session(net, start.shape[1] + min(tokens, _LEAST))

    def run() -> Iterator[int]:
        logits = session.read(start)
        for at in range(tokens):
            token = choose(logits, rng, temperature, top_k, top_p)
            if token in net.config.ends:
                return
            yield token
            if at + 1 == tokens:
                return
            if session.length == net.config.positions:
                warnings.warn(
                    f"the text ends at the last of the network's {session.length} positions, after "
                    f"{at + 1} of {tokens} tokens",
                    stacklevel=2,
                )
                return
            logits = session.step(token)

    return run()


def _check_decoder(net: Network) -> None:
    if not net.kind.decoder:
        raise ValueError("generate needs a decoder, the network is an encoder")


def stream_text(net: Network, text: str, tokens: int = 40, **how: Any) -> Iterator[str]:
    """Yield the text that a decoder writes after another, piece by piece.

    Parameters
    ----------
    net : Network
    text : str
    tokens : int
    how
        As of `stream_tokens`.

    Raises
    ------
    TypeError, ValueError
        The network has no tokenizer, or as of `stream_tokens`.
    """
    _check_decoder(net)
    tokenizer = net.need_tokenizer()
    ids = tokenizer.encode(text)
    if not ids:
        raise ValueError("text must hold at least one token, got none")
    source = stream_tokens(net, ids, tokens, **how)

    def run() -> Iterator[str]:
        tail, shown = _tail(tokenizer, ids)
        for token in source:
            tail.append(token)
            whole = tokenizer.decode(tail)
            if whole.endswith("\ufffd"):  # a character may come in several tokens
                continue
            yield whole[len(shown) :]
            shown = whole
            if len(tail) > 4 * _TAIL:
                tail, shown = _tail(tokenizer, tail)
        whole = tokenizer.decode(tail)
        if len(whole) > len(shown):
            yield whole[len(shown) :]

    return run()


def _tail(tokenizer: Tokenizer, tokens: list[int]) -> tuple[list[int], str]:
    """Return the last tokens with their text: what comes next is decoded after them.

    Alone it would lose the space that a decoder takes off, or never puts, at the beginning.
    """
    count = _TAIL
    while count < len(tokens):
        text = tokenizer.decode(tokens[-count:])
        if text and not text.startswith("\ufffd"):  # else nothing, or a character cut in two
            return tokens[-count:], text
        count *= 2
    return list(tokens), tokenizer.decode(tokens)
