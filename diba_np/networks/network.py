"""`Network`: the trunk that encoders and decoders share, run in steps, forwards and backwards.

Arrays of a step: hidden states x (S, T, width) of S rows of T tokens, mask (S, T).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from diba_np.files.atomic import PathLike
from diba_np.layers.dense_linear import DenseLinear
from diba_np.layers.linear import Layer, check_float
from diba_np.layers.registry import as_layer
from diba_np.networks.assembly import blocks_of, head_of
from diba_np.networks.blocks.block import Back
from diba_np.networks.blocks.linear import linear as apply_linear
from diba_np.networks.blocks.rotary import Rotary, frequencies
from diba_np.networks.export import export_network
from diba_np.networks.file import save_network
from diba_np.networks.layers import Layers
from diba_np.networks.stages import Stage
from diba_np.networks.steps import LayerSteps, Linear, State, StateBack, Step
from diba_np.networks.tensors import HEADS, Lazy, Tensors
from diba_np.networks.texts import TextMethods
from diba_np.training.optimisers import gather

Array = NDArray[Any]


class Network(TextMethods):
    """An encoder or a decoder whose linear layers are of any kind.

    Parameters
    ----------
    tensors : Tensors
        Of the source.
    tokenizer : Tokenizer, optional
        Needed where texts are given instead of token ids.
    dtype : {float32, float64}
        Of the arithmetic.

    Attributes
    ----------
    config : Config
    weights : mapping of str to (m, n) array
        Weights of the trunk's linear layers by their names in the source without ".weight", in the
        order in which they are called; decoded or read from the source at every access.
    biases : mapping of str to (m,) array
        Of those that have one.
    layers : mapping of str to Layer
        Of all linear layers, those of the embedding and the heads too; set an item to put another
        layer in the place of a dense one.
    blocks : dict of str to Block
        Norms and tables by name.
    record : dict
        How the network was made.
    beside : dict of str to str
        Files of the source that other software reads, their texts by name; see `export`.

    Notes
    -----
    A pickle of a network holds its dense weights, or, of one from a file that `save` wrote, the
    file's path and what has taken the place of what is in it.
    """

    def __init__(
        self, tensors: Tensors, tokenizer: Any = None, dtype: DTypeLike = np.float32
    ) -> None:
        self.tensors, self.config, self.kind = tensors, tensors.config, tensors.kind
        self.tokenizer = tokenizer
        self.dtype = check_float(dtype)
        self.record: dict[str, Any] = {}
        self.beside: dict[str, str] = {}
        self.heads = [name for name in map(tensors.find, HEADS) if name is not None]
        self.token_name = tensors.find("tokens")
        self.head_name = head_of(tensors)
        outside = [self.token_name, self.head_name, tensors.find("patches")]
        everything = [*outside, *tensors.names, *self.heads]
        self.layers = Layers(Lazy([name for name in everything if name], self._make_layer))
        self.blocks = dict(blocks_of(tensors, self.dtype))
        c = self.config
        self.rotary = (
            Rotary(frequencies(c.head_width, c.base, c.scaling), self.dtype) if c.base else None
        )

    # -- what it is made of ------------------------------------------------------------------------

    def need_head(self) -> str:
        """Return the name of the layer that gives logits over the vocabulary.

        Raises
        ------
        ValueError
            There is none.
        """
        if self.head_name is None:
            raise ValueError(
                f"{self.tensors.label}: logits need a head over the vocabulary, the network has "
                "none: the head's own weight is not there, and the configuration says that the "
                "table of tokens is none (tie_word_embeddings), or that it makes vectors of texts"
            )
        return self.head_name

    @property
    def weights(self) -> Mapping[str, Array]:
        return Lazy(self.tensors.names, self._weight)

    @property
    def biases(self) -> Mapping[str, Array]:
        held, has = self.layers.held(), self.tensors.has
        return Lazy(
            [
                name
                for name in self.tensors.names
                if has(f"{name}.bias") or (name in held and held[name].parameters["bias"].any())
            ],
            self._bias,
        )

    def _weight(self, name: str) -> Array:
        layer = self.layers.held().get(name)
        if layer is None:
            return np.asarray(self.tensors.matrix(name), self.dtype)
        dense = layer.weight if isinstance(layer, DenseLinear) else layer.to_matrix().to_dense()
        return np.asarray(dense, self.dtype)

    def _bias(self, name: str) -> Array:
        layer = self.layers.held().get(name)
        if layer is None:
            return np.asarray(self.tensors.array(f"{name}.bias"), self.dtype)
        return layer.parameters["bias"]

    def _make_layer(self, name: str) -> Layer:
        if name in self.tensors.compressed:
            bias = self.tensors.bias(name)
            return as_layer(self.tensors.compressed[name](), bias, self.dtype)
        bias = None if name in (self.token_name, self.head_name) else self.tensors.bias(name)
        return DenseLinear(self.tensors.matrix(name), bias, self.dtype)

    @property
    def parameters(self) -> dict[str, Array]:
        """Everything that may be trained: of the blocks, and of the layers that are not dense."""
        return gather(self.blocks | self.compressed)[0]

    @property
    def gradients(self) -> dict[str, Array]:
        """Sums since the last `zero_grad`, under the same names."""
        return gather(self.blocks | self.compressed)[1]

    @property
    def compressed(self) -> dict[str, Layer]:
        """The layers that took the place of dense ones."""
        held = self.layers.held()
        for name in self.tensors.compressed.keys() - held.keys():
            held[name] = self.layers[name]
        return {
            name: held[name]
            for name in self.layers
            if name in held and not isinstance(held[name], DenseLinear)
        }

    def zero_grad(self) -> None:
        """Set the accumulated gradients to zero."""
        for block in self.blocks.values():
            block.zero_grad()
        for layer in self.layers.held().values():
            layer.zero_grad()

    def replaced(self, layers: Mapping[str, Layer]) -> Network:
        """Return a network with some layers in the place of its own; norms and tables are copies.

        Parameters
        ----------
        layers : mapping of str to Layer
            By the names of `layers`.

        Raises
        ------
        KeyError, TypeError
            Another name, or no layer.
        """
        other = copy.copy(self)
        other.blocks = {name: copy.copy(block) for name, block in self.blocks.items()}
        for block in other.blocks.values():
            block.parameters = {name: value.copy() for name, value in block.parameters.items()}
            block.gradients = {name: np.zeros_like(v) for name, v in block.parameters.items()}
        other.layers, other.record = Layers(self.layers.source), dict(self.record)
        for name, layer in (self.layers.held() | dict(layers)).items():
            other.layers[name] = layer
        return other

    def save(self, path: PathLike) -> int:
        """Write everything that the network needs to run into one file.

        Parameters
        ----------
        path : path-like
            An HDF5 file, written whole or not at all; `diba_np.networks.load` reads it.

        Returns
        -------
        int
            Its bytes.

        Raises
        ------
        OSError
            It cannot be written.
        """
        return save_network(self, path)

    def export(self, folder: str | os.PathLike[str]) -> Path:
        """Write dense weights, configuration and tokenizer in the Hugging Face layout.

        What other software reads beside these is written as the source had it: settings of the
        tokenizer and of what is generated, the chat template, settings of images and sounds, the
        files of sentence-transformers. A tokenizer without settings gets some that name its
        special tokens.

        Parameters
        ----------
        folder : path-like
            New or empty.

        Returns
        -------
        Path
            The folder, which other software loads.

        Raises
        ------
        FileExistsError
            The folder holds something.
        ValueError
            A layer has a bias for which the layout has no name.

        Warns
        -----
        UserWarning
            The source makes vectors with weights of its own (``2_Dense``), which are not kept.
        """
        return export_network(self, folder)

    # -- linear layers -----------------------------------------------------------------------------

    def linear(
        self, name: str, x: Array, added: Array | None = None, keep: Array | None = None
    ) -> tuple[Array, Back]:
        """Return what a layer gives for x (..., n), plus what is added, and the step back."""
        return apply_linear(self.layers[name], x, added)

    def plain(
        self, name: str, x: Array, added: Array | None = None, keep: Array | None = None
    ) -> tuple[Array, None]:
        """Return the same without a step back; nothing is kept."""
        y = self.layers[name](x)
        if added is not None:
            y += added
        return y, None

    def frozen(self) -> Linear:
        """Return what takes the place of `plain` for many samples, until a parameter changes.

        Layers above a bit a weight go through a dense copy, made once.
        """
        held: dict[str, Callable[[ArrayLike], Array]] = {}

        def linear(
            name: str, x: Array, added: Array | None = None, keep: Array | None = None
        ) -> tuple[Array, None]:
            if name not in held:
                held[name] = self.layers[name].frozen()
            y = held[name](x)
            if added is not None:
                y = y + added
            return y, None

        return linear

    # -- steps -------------------------------------------------------------------------------------

    def begin(self, inputs: ArrayLike, mask: ArrayLike | None = None) -> State:
        """Return the state before the first step.

        Parameters
        ----------
        inputs : (S, T) int array_like
            Token ids; images (S, channels, rows, columns) or spectrograms (S, frames, bins) where
            the network reads patches.
        mask : (S, T) bool array_like, optional
            False for padding.

        Raises
        ------
        TypeError, ValueError
            An argument is of the wrong kind, value or shape.
        """
        raise NotImplementedError

    def start(self, state: State, linear: Linear) -> tuple[State, StateBack]:
        """Return the state with the embeddings "x" in the place of what was read."""
        raise NotImplementedError

    def layer_steps(self) -> list[list[Step]]:
        """Return the steps of each layer after the embedding, `start`.

        Of each of a layer's four a linear layer is the first thing but for a norm: queries, keys
        and values; the mixed values' matrix; the feed-forward's inner ones; its outer one.
        """
        layers = LayerSteps(self.tensors, self.blocks, self.rotary)
        return [layers.of_layer(i) for i in range(self.config.layers)]

    def stages(self, names: Sequence[str] | None = None) -> list[Stage]:
        """Return the trunk as `diba_np.networks.layerwise.compress_layers` takes it.

        The first reads states as `begin` returns them; entries of a state that the network does
        not know are passed on, and ``"keep"`` (S, T) takes the place of the mask in what it tells
        of how much a row counts.

        Parameters
        ----------
        names : sequence of str, optional
            Layers to be asked for through ``linear``; the others are the network's own. By default
            all of the trunk.
        """
        chosen = set(self.weights if names is None else names)

        def stage(step: Step) -> Stage:
            def run(state: Any, linear: Any) -> Any:
                def call(name: str, x: Array, **how: Any) -> tuple[Array, None]:
                    if name in chosen:
                        return linear(name, x, **how), None
                    return self.plain(name, x, **how)

                return step(state, call)[0]

            return run

        return [stage(step) for step in chain([self.start], *self.layer_steps())]

    # -- whole passes ------------------------------------------------------------------------------

    def forward(
        self, inputs: ArrayLike, mask: ArrayLike | None = None, linear: Linear | None = None
    ) -> tuple[list[Array], Callable[[Mapping[int, Array]], None]]:
        """Run the trunk.

        Parameters
        ----------
        inputs, mask
            As of `begin`.
        linear : callable, optional
            Takes the place of the method of that name; with `plain` there is no way back.

        Returns
        -------
        hidden : list of (S, T, width) array
            The embeddings and the hidden states after each layer; the last ones after the final
            norm, where there is one.
        back : callable
            Takes the gradients with respect to some of `hidden`, by place (negative ones count
            from the end), and adds to those of the parameters.
        """
        hidden: list[Array] = []
        backs: list[tuple[StateBack, int | None]] = []
        for x, back, ends in self._pass(inputs, mask, linear or self.linear):
            if ends is not None:
                hidden.append(x)
            backs.append((back, ends))
        hidden[-1], back_end = self.ended(hidden[-1])

        def run_back(gradients: Mapping[int, Array]) -> None:
            given = {at % len(hidden): gradient for at, gradient in gradients.items()}
            if len(hidden) - 1 in given:
                given[len(hidden) - 1] = back_end(given[len(hidden) - 1])
            g: State = {}
            for back, at in reversed(backs):
                if at is not None and at in given:
                    g["x"] = g["x"] + given[at] if "x" in g else given[at]
                if g:
                    g = back(g)

        return hidden, run_back

    def _pass(
        self, inputs: ArrayLike, mask: ArrayLike | None, call: Linear
    ) -> Iterator[tuple[Array, StateBack, int | None]]:
        """Yield "x" after each step, the step back, and the layer that it ends, 0 the embedding."""
        state = self.begin(inputs, mask)
        first: Step = self.start
        for layer, steps in enumerate([[first], *self.layer_steps()]):
            for number, step in enumerate(steps, 1):
                state, back = step(state, call)
                yield state["x"], back, layer if number == len(steps) else None
                del back  # holds what the step read

    def ended(self, x: Array) -> tuple[Array, Back]:
        """Return what the norm after the last layer, if there is one, makes of x; the step back."""
        end = self.tensors.find("end_norm")
        if end is None:
            return x, lambda gradient: gradient
        norm: Any = self.blocks[end]
        y, back = norm.forward(x)
        return y, back

    @contextmanager
    def released(self) -> Iterator[None]:
        """Forget at the end what was read of dense layers meanwhile; they are read again."""
        before = self.layers.held()
        try:
            yield
        finally:
            for name, layer in self.layers.held().items():
                if name not in before and isinstance(layer, DenseLinear):
                    del self.layers[name]

    def hidden(
        self, inputs: ArrayLike, mask: ArrayLike | None = None, linear: Linear | None = None
    ) -> list[Array]:
        """Return the hidden states, as `forward` does; nothing is kept for a way back.

        Parameters
        ----------
        inputs, mask
            As of `begin`.
        linear : callable, optional
            Takes the place of `plain`.

        Returns
        -------
        list of (S, T, width) ndarray
        """
        found = self._pass(inputs, mask, linear or self.plain)
        hidden = [x for x, _, ends in found if ends is not None]
        hidden[-1] = self.ended(hidden[-1])[0]
        return hidden

    def last_hidden(
        self, inputs: ArrayLike, mask: ArrayLike | None = None, linear: Linear | None = None
    ) -> Array:
        """Return the last of `hidden` (S, T, width) alone, the others are not held."""
        x: Array = np.empty(0)
        for x, _, _ in self._pass(inputs, mask, linear or self.plain):  # noqa: B007
            pass
        return self.ended(x)[0]

    def logits(self, inputs: ArrayLike, mask: ArrayLike | None = None) -> Array:
        """Return the logits.

        Parameters
        ----------
        inputs, mask
            As of `begin`.

        Returns
        -------
        (S, T, vocabulary) ndarray, or (S, classes) of a network that tells classes apart.

        Raises
        ------
        ValueError
            The network has no head, or an argument is wrong.
        """
        return self.head(self.last_hidden(inputs, mask), linear=self.plain)[0]

    def head(self, x: Array, *, linear: Linear | None = None) -> tuple[Array, Back]:
        """Return the logits of last hidden states (..., width) and the step back."""
        raise NotImplementedError
