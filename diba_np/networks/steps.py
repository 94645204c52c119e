"""The steps of a layer of a network: mixing, its sum, the feed-forward's inner half, its outer one.

A step takes a state and what runs a linear layer; it returns the next state and the step back.
Arrays of a state: hidden states x (S, T, width) of S rows of T tokens, mask (S, T).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diba_np.networks.blocks.activations import ACTIVATIONS
from diba_np.networks.blocks.attention import attend
from diba_np.networks.blocks.block import Back, Block
from diba_np.networks.blocks.gated import gated
from diba_np.networks.blocks.rotary import Rotary
from diba_np.networks.tensors import Tensors

Array = NDArray[Any]
State = dict[str, Array]
# takes the name of a linear layer, its inputs, and added= and keep= as in `compress_layers`
Linear = Callable[..., tuple[Array, Any]]
StateBack = Callable[[State], State]
Step = Callable[[State, Linear], tuple[State, StateBack]]


class LayerSteps:
    """Makes the four steps of each layer of a trunk.

    Parameters
    ----------
    tensors : Tensors
        Names and configuration.
    blocks : mapping of str to Block
        The norms by name.
    rotary : Rotary or None
        Turns queries and keys.
    """

    def __init__(
        self, tensors: Tensors, blocks: Mapping[str, Block], rotary: Rotary | None
    ) -> None:
        self._tensors, self._blocks, self._rotary = tensors, blocks, rotary

    def of_layer(self, i: int) -> list[Step]:
        """Return the steps of layer i, in their order."""
        return [self.mix(i), self.add_mixed(i), self.inner(i), self.outer(i)]

    def _norm(self, place: str, i: int) -> Any:
        return self._blocks[self._tensors.need(place, i)]

    def mix(self, i: int) -> Step:
        """Return the step from "x" to "x" and the mixed values."""
        c, find = self._tensors.config, self._tensors.find
        joined = find("joined", i)
        names = [joined] if joined else [find(p, i) for p in ("query", "key", "value")]
        turns = self._rotary is not None and i not in c.unrotated
        sizes = [heads * c.head_width for heads in (c.heads, c.key_heads)]

        def step(state: State, linear: Linear) -> tuple[State, StateBack]:
            x, mask = state["x"], state["mask"]
            h, back_norm = self._before("mix_norm", i, x)
            calls = [linear(name, h, keep=state.get("keep", mask)) for name in names]
            parts = [y for y, _ in calls]
            if joined:
                parts = np.split(parts[0], np.cumsum([sizes[0], sizes[1]]), axis=-1)
            q, k, v = parts
            back_turns: list[Back] = []
            if turns and self._rotary is not None:
                (q, back_q), (k, back_k) = self._rotary.forward(q), self._rotary.forward(k)
                back_turns = [back_q, back_k]
            mixed, back_mix = attend(
                q,
                k,
                v,
                c.heads,
                groups=c.key_heads,
                mask=None if mask.all() else mask,
                causal=self._tensors.kind.decoder,
                window=c.window,
            )

            def back(gradients: State) -> State:
                g = list(back_mix(gradients["mixed"]))
                for at, turn in enumerate(back_turns):
                    g[at] = turn(g[at])
                if joined:
                    g = [np.concatenate(g, axis=-1)]
                h = sum(pull(one) for (_, pull), one in zip(calls, g, strict=True))
                x = back_norm(h)
                return {"x": x + gradients["x"] if "x" in gradients else x}

            return {**state, "mixed": mixed}, back

        return step

    def _before(self, place: str, i: int, x: Array) -> tuple[Array, Back]:
        """Return what stands before attention or feed-forward: a norm, or nothing."""
        if not self._tensors.kind.norm_first:
            return x, lambda gradient: gradient
        y, back = self._norm(place, i).forward(x)
        return y, back

    def _sum(self, place: str, norm: str, read: str, i: int) -> Step:
        """Return the step that adds a layer's outputs to "x", with the norm after it, if any."""
        name = self._tensors.need(place, i)

        def step(state: State, linear: Linear) -> tuple[State, StateBack]:
            rest = dict(state)
            x, inputs = rest.pop("x"), rest.pop(read)
            y, pull = linear(name, inputs, added=x, keep=state.get("keep", state["mask"]))
            back_norm: Back = lambda gradient: gradient  # noqa: E731
            if not self._tensors.kind.norm_first:
                y, back_norm = self._norm(norm, i).forward(y)

            def back(gradients: State) -> State:
                g = back_norm(gradients["x"])
                return {"x": g, read: pull(g)}

            return {**rest, "x": y}, back

        return step

    def add_mixed(self, i: int) -> Step:
        """Return the step that adds the mixed values to "x"."""
        return self._sum("mix", "mix_norm", "mixed", i)

    def outer(self, i: int) -> Step:
        """Return the step that adds the feed-forward's outputs to "x"."""
        return self._sum("outer", "outer_norm", "inner", i)

    def inner(self, i: int) -> Step:
        """Return the step from "x" to "x" and the inner values of the feed-forward."""
        names = [self._tensors.find(place, i) for place in ("gate", "inner")]
        activation = ACTIVATIONS[self._tensors.config.activation]

        def step(state: State, linear: Linear) -> tuple[State, StateBack]:
            h, back_norm = self._before("outer_norm", i, state["x"])
            keep = state.get("keep", state["mask"])
            calls = [linear(name, h, keep=keep) for name in names if name is not None]
            back_act: Callable[[Array], Any]
            if len(calls) == 2:
                y, back_act = gated(calls[0][0], calls[1][0], activation)
            else:
                y, back_act = activation(calls[0][0])

            def back(gradients: State) -> State:
                g = back_act(gradients["inner"])
                parts = g if len(calls) == 2 else (g,)
                h = sum(pull(one) for (_, pull), one in zip(calls, parts, strict=True))
                x = back_norm(h)
                return {"x": x + gradients["x"] if "x" in gradients else x}

            return {**state, "inner": y}, back

        return step
