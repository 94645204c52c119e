"""BERT in NumPy, forwards and backwards by hand, with linear layers of any kind.

One encoder (post-norm, exact GELU, masked attention) serves MiniLM and the reaction networks; three
heads stand on it: masked tokens, classes, mean of the tokens. A linear layer is a dense matrix, or
a layer of `diba_np` in its place.

Every step returns its result and a function that turns the gradient of the result into that of its
input; what is not used is never computed. Samples are flat: (S T, width) for S texts of T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diba_np.layers.linear import Layer
from diba_np.networks.blocks.activations import gelu
from diba_np.networks.blocks.attention import attend as blocks_attend
from diba_np.networks.blocks.layer_norm import LayerNorm
from diba_np.training.optimisers import gather

Array = np.ndarray
Back = Callable[[Array], Array]
# takes the name of a linear layer, its inputs and what is added to its outputs or None
Linear = Callable[[str, Array, "Array | None"], tuple[Array, Any]]

PROJECTIONS = ("query", "key", "value")
LINEAR = (
    *(f"attention.self.{name}" for name in PROJECTIONS),
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)


# -- steps -----------------------------------------------------------------------------------------


def softmax(x: Array) -> Array:
    """Return the softmax over the last axis."""
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    x /= x.sum(axis=-1, keepdims=True)
    return x


def attend(q: Array, k: Array, v: Array, mask: Array, heads: int) -> tuple[Array, Back]:
    """Mix values by masked softmax attention.

    Parameters
    ----------
    q, k, v : (S T, width) array
    mask : (S, T) bool
        False for padding.
    heads : int

    Returns
    -------
    (S T, width) array, and a function that gives the gradients of q, k and v, (S T, width) each.
    """
    rows = (x.reshape(*mask.shape, -1) for x in (q, k, v))
    mixed, pull = blocks_attend(*rows, heads, mask=mask)

    def back(gradient: Array) -> list[Array]:
        parts = pull(gradient.reshape(mixed.shape))
        return [part.reshape(gradient.shape) for part in parts]

    return mixed.reshape(q.shape), back


# -- the network -----------------------------------------------------------------------------------


class Bert:
    """An encoder with its heads.

    Parameters
    ----------
    tensors : mapping of str to array
        By their usual names; a leading "bert." is dropped.
    heads : int
    epsilon : float
        Of the layer norms.
    dtype : float32 or float64

    Attributes
    ----------
    matrices : dict of str to (m, n) array
        Dense weights of the linear layers, by name without ".weight"; nothing trains them.
    made : dict of str to Layer
        What stands in the place of some of them; `replace` puts it there.
    own : dict of str to array
        Layer norms, and biases of the encoder; those of `made` are the layers' own.
    parameters : dict of str to array
        Everything that may be trained: `own` and the parameters of `made`.
    gradients : dict of str to array
        Sums since the last `zero_grad`, of the `parameters` that were used.
    watch : callable or None
        Called on the way back with the name of a linear layer and the gradient of its outputs.
    """

    def __init__(
        self,
        tensors: Mapping[str, Array],
        heads: int,
        epsilon: float = 1e-12,
        dtype: Any = np.float32,
    ) -> None:
        self.tensors = {
            name.removeprefix("bert."): np.asarray(value, dtype)
            for name, value in tensors.items()
            if value.dtype.kind == "f"
        }
        self.heads, self.epsilon, self.dtype = heads, epsilon, np.dtype(dtype)
        numbers = {int(n.split(".")[2]) for n in self.tensors if n.startswith("encoder.layer.")}
        self.layers = len(numbers)
        self.made: dict[str, Layer] = {}
        self.matrices = {
            name.removesuffix(".weight"): value
            for name, value in self.tensors.items()
            if value.ndim == 2 and not name.startswith("embeddings.")
        }
        self.own = {
            name: value.copy()
            for name, value in self.tensors.items()
            if value.ndim == 1 and name.startswith(("encoder.", "embeddings."))
        }
        self.watch: Callable[[str, Array], None] | None = None
        self.zero_grad()

    def encoder_names(self, only: Sequence[str] = LINEAR) -> list[str]:
        """Return the names of the encoder's linear layers in the order in which they are read."""
        return [f"encoder.layer.{i}.{name}" for i in range(self.layers) for name in only]

    def replace(self, made: Mapping[str, Layer]) -> None:
        """Put layers, with their biases, in the place of some linear layers."""
        self.made.update(made)
        self.own |= {f"{name}.bias": layer.parameters["bias"] for name, layer in made.items()}

    @property
    def parameters(self) -> dict[str, Array]:
        return self.own | gather(self.made)[0]

    @property
    def gradients(self) -> dict[str, Array]:
        return self._sums | gather(self.made)[1]

    def zero_grad(self) -> None:
        """Set the accumulated gradients to zero."""
        self._sums: dict[str, Array] = {}
        for layer in self.made.values():
            layer.zero_grad()

    def _add(self, name: str, gradient: Array) -> None:
        if name in self._sums:
            self._sums[name] += gradient
        else:
            self._sums[name] = gradient

    def _vector(self, name: str) -> Array:
        return self.own[name] if name in self.own else self.tensors[name]

    def linear(self, name: str, x: Array, added: Array | None = None) -> tuple[Array, Back]:
        """Return ``x W^T + b``, and what is added to it, and the step back to x."""
        if name in self.made:
            layer = self.made[name].twin()
            y, pull = layer.forward(x), layer.backward
        else:
            matrix, bias = self.matrices[name], f"{name}.bias"
            y = x @ matrix.T
            y += self._vector(bias)

            def pull(gradient: Array) -> Array:
                if bias in self.own:
                    self._add(bias, gradient.sum(axis=0))
                return gradient @ matrix

        if added is not None:
            y += added

        def back(gradient: Array) -> Array:
            if self.watch is not None:
                self.watch(name, gradient)
            return pull(gradient)

        return y, back

    def norm(self, name: str, x: Array) -> tuple[Array, Back]:
        """Return the layer norm called `name`."""
        scale, shift = f"{name}.LayerNorm.weight", f"{name}.LayerNorm.bias"
        block = LayerNorm(self._vector(scale), self._vector(shift), self.epsilon, self.dtype)
        y, pull = block.forward(x)

        def back(gradient: Array) -> Array:
            g = pull(gradient)
            if scale in self.own:
                self._add(scale, block.gradients["weight"])
                self._add(shift, block.gradients["bias"])
            return g

        return y, back

    def embed(self, ids: Array) -> tuple[Array, Back]:
        """Return the embeddings (S T, width) of token ids (S, T); the tables stay as they are."""
        x = self.tensors["embeddings.word_embeddings.weight"][ids]
        x = x + self.tensors["embeddings.position_embeddings.weight"][: ids.shape[1]]
        x += self.tensors["embeddings.token_type_embeddings.weight"][0]
        y, back = self.norm("embeddings", x.reshape(ids.size, -1))
        return y, back

    def _caller(self, i: int, linear: Linear | None) -> Linear:
        """Return `linear`, or the method of that name, for names within the encoder's layer i."""

        def call(name: str, x: Array, added: Array | None = None) -> tuple[Array, Any]:
            return (linear or self.linear)(f"encoder.layer.{i}.{name}", x, added)

        return call

    def mix(
        self, i: int, x: Array, mask: Array, linear: Linear | None = None
    ) -> tuple[Array, Back]:
        """Return what the attention of layer i makes of hidden states, and the step back.

        `linear` takes the place of the method of that name; without a step back there is none.
        """
        call = self._caller(i, linear)
        parts = [call(f"attention.self.{name}", x, None) for name in PROJECTIONS]
        mixed, back_mix = attend(*(y for y, _ in parts), mask, self.heads)

        def back(gradient: Array) -> Array:
            steps = [step for _, step in parts]
            query, key, value = (
                step(part) for step, part in zip(steps, back_mix(gradient), strict=True)
            )
            return query + key + value

        return mixed, back

    def feed(
        self, i: int, x: Array, mixed: Array, linear: Linear | None = None
    ) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
        """Return the hidden states after layer i, and the step back to `x` and to `mixed`."""
        call, at = self._caller(i, linear), f"encoder.layer.{i}"
        y, back_out = call("attention.output.dense", mixed, x)
        h, back_mid = self.norm(f"{at}.attention.output", y)
        inner, back_inner = call("intermediate.dense", h, None)
        active, back_gelu = gelu(inner)
        y, back_outer = call("output.dense", active, h)
        y, back_end = self.norm(f"{at}.output", y)

        def back(gradient: Array) -> tuple[Array, Array]:
            g = back_end(gradient)
            g = back_mid(g + back_inner(back_gelu(back_outer(g))))
            return g, back_out(g)

        return y, back

    def layer(
        self, i: int, x: Array, mask: Array, linear: Linear | None = None
    ) -> tuple[Array, Back]:
        """Return the hidden states after the encoder's layer i, and the step back."""
        mixed, back_mix = self.mix(i, x, mask, linear)
        y, back_feed = self.feed(i, x, mixed, linear)

        def back(gradient: Array) -> Array:
            g, through = back_feed(gradient)
            return g + back_mix(through)

        return y, back

    def encode(
        self, ids: Array, mask: Array, linear: Linear | None = None
    ) -> tuple[list[Array], Callable[[Mapping[int, Array]], None]]:
        """Run the encoder.

        Parameters
        ----------
        ids : (S, T) int
        mask : (S, T) bool
            False for padding.
        linear : callable, optional
            As of `mix`.

        Returns
        -------
        hidden : list of (S T, width) array
            The embeddings and the hidden states after each layer.
        back : callable
            Takes the gradients with respect to some of `hidden`, by place (negative ones count
            from the end), and adds to those of the parameters.
        """
        x, back_embed = self.embed(ids)
        hidden, backs = [x], []
        for i in range(self.layers):
            x, step = self.layer(i, x, mask, linear)
            hidden.append(x)
            backs.append(step)

        def back(gradients: Mapping[int, Array]) -> None:
            given = {at % len(hidden): gradient for at, gradient in gradients.items()}
            g: Array | None = None
            for at in range(len(backs), -1, -1):
                if at in given:
                    g = given[at] if g is None else g + given[at]
                if g is not None:
                    g = backs[at - 1](g) if at else back_embed(g)

        return hidden, back

    def classify(self, x: Array, mask: Array) -> tuple[Array, Back]:
        """Return the logits (S, classes): tanh of the pooled first token, then the classifier."""
        first = x.reshape(*mask.shape, -1)[:, 0]
        y, back_pool = self.linear("pooler.dense", first)
        pooled = np.tanh(y)
        logits, back_out = self.linear("classifier", pooled)

        def back(gradient: Array) -> Array:
            g = np.zeros((*mask.shape, x.shape[1]), x.dtype)
            g[:, 0] = back_pool(back_out(gradient) * (1 - pooled * pooled))
            return g.reshape(x.shape)

        return logits, back

    def predict(self, x: Array, places: Array) -> tuple[Array, Back]:
        """Return the logits (N, vocabulary) of the masked tokens at `places` (N,) of `x`."""
        y, back_dense = self.linear("cls.predictions.transform.dense", x[places])
        y, back_gelu = gelu(y)
        y, back_norm = self.norm("cls.predictions.transform", y)
        decoder = self.matrices["cls.predictions.decoder"]
        logits = y @ decoder.T + self.tensors["cls.predictions.bias"]

        def back(gradient: Array) -> Array:
            g = np.zeros_like(x)
            g[places] = back_dense(back_gelu(back_norm(gradient @ decoder)))
            return g

        return logits, back

    def mean(self, x: Array, mask: Array) -> tuple[Array, Back]:
        """Return the unit vectors (S, width) of the means over the tokens."""
        share = (mask / mask.sum(axis=1, keepdims=True)).astype(x.dtype)
        y = np.einsum("st,std->sd", share, x.reshape(*mask.shape, -1))
        length = np.sqrt(np.einsum("sd,sd->s", y, y))[:, None]
        unit = y / length

        def back(gradient: Array) -> Array:
            g = gradient - unit * np.einsum("sd,sd->s", gradient, unit)[:, None]
            return (share[:, :, None] * (g / length)[:, None]).reshape(x.shape)

        return unit, back


def random_tensors(
    seed: int,
    layers: int = 2,
    width: int = 8,
    inner: int = 12,
    words: int = 9,
    classes: int = 3,
    length: int = 16,
) -> dict[str, Array]:
    """Return random tensors of a small network with every head, float64."""
    rng = np.random.default_rng(seed)
    made = {
        "embeddings.word_embeddings.weight": rng.normal(size=(words, width)),
        "embeddings.position_embeddings.weight": rng.normal(size=(length, width)),
        "embeddings.token_type_embeddings.weight": rng.normal(size=(2, width)),
        "cls.predictions.decoder.weight": rng.normal(size=(words, width)),
        "cls.predictions.bias": rng.normal(size=words),
    }
    shapes = {"pooler.dense": (width, width), "classifier": (classes, width)}
    shapes["cls.predictions.transform.dense"] = (width, width)
    norms = ["embeddings", "cls.predictions.transform"]
    for i in range(layers):
        at = f"encoder.layer.{i}"
        sizes = [(width, width)] * 4 + [(inner, width), (width, inner)]
        shapes |= {f"{at}.{name}": size for name, size in zip(LINEAR, sizes, strict=True)}
        norms += [f"{at}.attention.output", f"{at}.output"]
    for name, shape in shapes.items():
        made[f"{name}.weight"] = rng.normal(size=shape) / np.sqrt(shape[1])
        made[f"{name}.bias"] = rng.normal(size=shape[0]) / 4
    for name in norms:
        made[f"{name}.LayerNorm.weight"] = 1 + rng.normal(size=width) / 4
        made[f"{name}.LayerNorm.bias"] = rng.normal(size=width) / 4
    return made
