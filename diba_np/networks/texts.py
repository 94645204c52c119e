"""`TextMethods`: what a network does with texts; the base of `Network`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_softmax, softmax

from diba_np.checks import check_count
from diba_np.networks.beside import TOKENIZER_CONFIG
from diba_np.networks.generation import stream_text, stream_tokens
from diba_np.networks.inputs import Batch, batches, padded, unpadded

if TYPE_CHECKING:
    from diba_np.networks.kind import Config, Kind
    from diba_np.networks.tokenizer import Tokenizer

Array = NDArray[Any]
Texts = str | Sequence[str] | Sequence[Sequence[int]] | ArrayLike

BATCH = 1024  # tokens of a batch
LENGTH = 128  # tokens of a row that texts are cut into
_SENTENCE = 512  # most tokens of a text that becomes a vector, where the folder does not say

_MOST_LOGITS = 1 << 26  # of a batch of which every token is asked for


class TextMethods:
    """Texts to rows of tokens, and what a network says of them."""

    if TYPE_CHECKING:
        config: Config
        kind: Kind
        tokenizer: Tokenizer | None
        dtype: np.dtype[Any]
        last_hidden: Any
        frozen: Any
        head: Any
        logits: Any
        head_name: str | None
        tensors: Any
        beside: dict[str, str]

    def need_tokenizer(self) -> Tokenizer:
        """Return the tokenizer.

        Raises
        ------
        ValueError
            The network has none.
        """
        if self.tokenizer is None:
            raise ValueError("texts need a tokenizer, the network has none; give token ids")
        return self.tokenizer

    def rows_of(self, texts: Texts, length: int = LENGTH) -> list[list[int]]:
        """Return texts as rows of tokens.

        Parameters
        ----------
        texts : str, sequence of str, sequence of sequences of int, or (S, T) int array
            Sequences of token ids stay as they are. Rows of an array end before the tokens at their
            end that tokenizer or configuration name as padding, unless that is also what ends a
            text. Of texts a decoder reads all joined and cut into rows, each behind what the
            tokenizer puts before a text, a rest that fills no row left out where there are others;
            an encoder, and a decoder that makes vectors, read one a row, as far as the row goes.
        length : int
            Most tokens of a row that is made of texts.

        Raises
        ------
        TypeError, ValueError
            They are neither texts nor tokens, or nothing; texts need a tokenizer.

        Warns
        -----
        UserWarning
            Texts that are read one a row are longer than that.
        """
        check_count(length, "length", least=2)
        if isinstance(texts, np.ndarray) and texts.ndim == 2 and texts.dtype.kind in "iu":
            texts = unpadded(texts, self.config, self._padding())
        parts: list[Any] = [texts] if isinstance(texts, str) else list(texts)  # type: ignore[arg-type]
        strings = [isinstance(part, str) for part in parts]
        if any(strings) and not all(strings):
            raise TypeError("texts must be all strings or all rows of token ids, got both")
        if not any(strings):
            rows = [np.asarray(part) for part in parts]
            wrong = next(
                (r for r in rows if r.ndim != 1 or (r.size and r.dtype.kind not in "iu")), None
            )
            if wrong is not None:
                raise TypeError(
                    "texts must be strings or rows of token ids, got a part of shape "
                    f"{wrong.shape} and dtype {wrong.dtype}"
                )
            ids = [[int(i) for i in row] for row in rows]
        else:
            ids = self._cut(parts, length)
        if not any(ids):
            raise ValueError("texts must hold at least one token, got none")
        return ids

    def _cut(self, texts: Sequence[str], length: int) -> list[list[int]]:
        tokenizer, length = self.need_tokenizer(), self._most(length)
        if not self.joins_texts:
            rows = [tokenizer.encode(self._as_sentence(text)) for text in texts]
            longer = sum(len(row) > length for row in rows)
            if longer:
                warnings.warn(
                    f"{longer} of {len(rows)} texts are longer than {length} tokens; no more of "
                    "them are read",
                    stacklevel=3,
                )
            return [self._shortened(row, length) for row in rows]
        joined = [token for text in texts for token in tokenizer.encode(text, special=False)]
        first = tokenizer.opening  # what it is used with every text begins with
        step = max(1, length - len(first))
        cut = [joined[at : at + step] for at in range(0, len(joined), step)]
        whole = cut[:-1] if len(cut) > 1 and len(cut[-1]) < step else cut
        return [[*first, *row] for row in whole]

    @property
    def joins_texts(self) -> bool:
        """Whether texts are one to it: a decoder that tells the next tokens."""
        return self.kind.decoder and self.head_name is not None

    def _padding(self) -> int:
        """Return the token that fills up rows: the tokenizer's, or as the configuration says."""
        own = self.config.padding
        if self.tokenizer is None:
            return own
        settings = json.loads(self.beside.get(TOKENIZER_CONFIG, "{}"))
        token = settings.get("pad_token")
        named = token.get("content") if isinstance(token, dict) else token
        return own if named is None else self.tokenizer.ids.get(named, own)

    def _most(self, length: int) -> int:
        """Return how many tokens of a row there are positions of, at most `length`."""
        most = self.config.most_tokens
        return length if most is None else min(length, most)

    def _as_sentence(self, text: str) -> str:
        """Return a text as a folder of sentence-transformers reads it."""
        whole = self.config.sentence_prompt + text
        whole = whole.strip() if self.config.makes_vectors else whole
        return whole.lower() if self.config.sentence_lower else whole

    def _shortened(self, row: list[int], length: int) -> list[int]:
        """Return at most `length` tokens of a text, with the last one if that closes it."""
        if len(row) <= length:
            return row
        closed = not self.kind.decoder or self.need_tokenizer().closes
        return [*row[: length - 1], row[-1]] if closed else row[:length]

    # -- what it says ------------------------------------------------------------------------------

    def token_losses(
        self, texts: Texts, length: int = LENGTH
    ) -> Iterator[tuple[Array, Array, Array]]:
        """Yield ``(logits, targets, losses)`` of the tokens that a decoder is to tell, by batches.

        Parameters
        ----------
        texts, length
            As of `rows_of`.

        Yields
        ------
        (N, vocabulary) logits, (N,) targets and (N,) losses in nats: of all tokens of a row but
        the first, rows in the order of their length.

        Raises
        ------
        TypeError, ValueError
            As of `rows_of`; the network is no decoder; no row has two tokens.
        """
        if not self.kind.decoder:
            raise ValueError("perplexity needs a decoder, the network is an encoder")
        rows = [row for row in self.rows_of(texts, length) if len(row) > 1]
        if not rows:
            raise ValueError("texts must hold a row of two tokens or more, got none")
        linear = self.frozen()
        for batch in following(rows, self.config):
            x = self.last_hidden(batch.inputs, batch.mask, linear)
            logits, targets = self.head(x[batch.asked], linear=linear)[0], np.asarray(batch.targets)
            yield logits, targets, -log_softmax(logits, axis=1)[np.arange(len(targets)), targets]

    def perplexity(self, texts: Texts, length: int = LENGTH) -> float:
        """Return the exponential of the mean loss of every token given those before it in its row.

        Parameters
        ----------
        texts : str, sequence of str, sequence of sequences of int, or (S, T) int array
            Texts are joined and cut into rows; of token ids see `rows_of`.
        length : int, default 128
            Tokens of a row that is made of texts.

        Returns
        -------
        float

        Raises
        ------
        TypeError, ValueError
            As of `token_losses`.
        """
        losses = np.concatenate([loss for *_, loss in self.token_losses(texts, length)])
        return float(np.exp(losses.astype(np.float64).mean()))

    @property
    def sentence_length(self) -> int:
        """Most tokens of a text that `embed` reads where it is not told."""
        return self.config.sentence_length or _SENTENCE

    def embed(self, texts: Texts, length: int | None = None) -> Array:
        """Return vectors of length 1 of texts: the means of the last hidden states of their tokens.

        Those of the first or the last token alone where the network's folder is one of
        sentence-transformers that says so (``1_Pooling``); so are texts read in small letters
        (``do_lower_case``), with what its ``default_prompt_name`` names before them, and without
        the spaces at their ends.

        Parameters
        ----------
        texts : sequence of str, sequence of sequences of int, or (S, T) int array
            One vector each; padding at the ends of an array's rows is left out as by `rows_of`.
        length : int, optional
            Most tokens of a text; more are cut off. Default: as many as the folder says
            (``sentence_bert_config.json``; newer ones the tokenizer's settings), else 512.

        Returns
        -------
        (S, width) ndarray

        Raises
        ------
        TypeError, ValueError
            As of `rows_of`; a text has no token; the folder's vectors are made in another way.
        """
        if length is None:
            length = self.sentence_length
        check_count(length, "length")
        if isinstance(texts, np.ndarray) and texts.ndim == 2:
            rows = self.rows_of(texts)
            if [] in rows:
                raise ValueError(
                    f"texts must hold at least one token each, got none in row {rows.index([])}"
                )
        else:
            parts = [texts] if isinstance(texts, str) else list(texts)  # type: ignore[arg-type]
            rows = [row for part in parts for row in self._whole(part, length)]
        linear = self.frozen()
        vectors = np.empty((len(rows), self.config.width), self.dtype)
        for places in batches(rows, BATCH):
            ids, mask = padded([rows[i] for i in places], self.config.padding)
            chosen = pooled(mask, self.config.pooling)
            vectors[places] = unit_means(self.last_hidden(ids, mask, linear), chosen)[0]
        return vectors

    def _whole(self, text: Any, length: int) -> list[list[int]]:
        """Return one text as one row, cut off where it is longer."""
        if not isinstance(text, str):
            return self.rows_of([text])
        row = self.need_tokenizer().encode(self._as_sentence(text))
        if not row:
            raise ValueError("texts must hold at least one token each, got none")
        return [self._shortened(row, self._most(length))]

    def fill_mask(self, text: str, most: int = 5) -> list[list[tuple[str, float]]]:
        """Return the most probable tokens in the place of each mask of a text.

        Parameters
        ----------
        text : str
            With the tokenizer's mask, "[MASK]" or "<mask>", where a token is asked for.
        most : int, default 5
            Tokens of each.

        Returns
        -------
        list of list of (str, float)
            For each mask tokens and their probabilities, the most probable first; ``<id 7>``
            stands for one that the tokenizer does not have.

        Raises
        ------
        ValueError
            The network has no head for masked tokens or no tokenizer, the text has no mask.
        """
        if self.kind.decoder or self.head_name is None:
            raise ValueError("fill_mask needs a head for masked tokens, the network has none")
        check_count(most, "most")
        tokenizer = self.need_tokenizer()
        if tokenizer.mask is None or tokenizer.mask not in text:
            raise ValueError(f"text must hold {tokenizer.mask or 'a mask'} at least once, got none")
        ids = np.array(tokenizer.encode(text))
        logits = self.logits(ids)[0][ids == tokenizer.id_of(tokenizer.mask)]
        p = softmax(logits, axis=1)
        order = np.argsort(-p, axis=1, kind="stable")[:, :most]
        return [
            [(tokenizer.token_of(i), float(row[i])) for i in best]
            for row, best in zip(p, order, strict=True)
        ]

    def generate(
        self,
        text: str | Sequence[int],
        tokens: int = 40,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        stream: Callable[[str], Any] | None = None,
    ) -> Any:
        """Return what a decoder writes after a text.

        Parameters
        ----------
        text : str or sequence of int
        tokens : int, default 40
            Most of them; the network may end before.
        temperature : float, default 0.0
            0 takes the most probable token each time, else one is drawn, logits divided by this.
        top_k : int, optional
            Drawn among so many of the most probable.
        top_p : float, default 1.0
            Drawn among the fewest that have this share of all probability together.
        seed : int, default 0
        stream : callable, optional
            Called with each piece of the text as soon as it is there.

        Returns
        -------
        str, or a list of int if `text` was tokens.

        Raises
        ------
        TypeError, ValueError
            An argument is of the wrong kind or value; no decoder, or no tokenizer.
        """
        how: Any = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        if not isinstance(text, str):
            return list(stream_tokens(self, text, tokens, **how))  # type: ignore[arg-type]
        pieces = []
        for piece in stream_text(self, text, tokens, **how):  # type: ignore[arg-type]
            pieces.append(piece)
            if stream is not None:
                stream(piece)
        return "".join(pieces)


def following(rows: Sequence[Sequence[int]], config: Config) -> Iterator[Batch]:
    """Yield batches that ask for every token of a row but the first, rows of like length together.

    They are ``asked`` for at the tokens before them.
    """
    for places in batches(rows, min(BATCH, _MOST_LOGITS // config.vocabulary)):
        ids, mask = padded([rows[i] for i in places], config.padding)
        asked = np.zeros_like(mask)
        asked[:, :-1] = mask[:, 1:]
        yield Batch(ids, mask, asked, ids[:, 1:][mask[:, 1:]])


POOLINGS = ("mean", "cls", "lasttoken")  # as sentence-transformers has them


def pooled(mask: Array, pooling: str) -> Array:
    """Return which tokens (S, T) stand for a row: all in `mask`, the first or the last of them.

    Raises
    ------
    ValueError
        The pooling is none of `POOLINGS`.
    """
    if pooling not in POOLINGS:
        raise ValueError(
            f"a text's vector must be made by {', '.join(POOLINGS)} of its tokens, this network's "
            f"vectors are made by {pooling}"
        )
    if pooling == "mean":
        return mask
    back = slice(None, None, 1 if pooling == "cls" else -1)
    first: Array = np.cumsum(mask[:, back], axis=1)[:, back] == 1
    return mask & first


def unit_means(x: Array, mask: Array) -> tuple[Array, Callable[[Array], Array]]:
    """Return the unit vectors (S, width) of the means over the tokens, and the step back."""
    share = (mask / mask.sum(axis=1, keepdims=True)).astype(x.dtype)
    y = np.einsum("st,std->sd", share, x)
    length = np.sqrt(np.einsum("sd,sd->s", y, y))[:, None]
    unit = y / length

    def back(gradient: Array) -> Array:
        g = gradient - unit * np.einsum("sd,sd->s", gradient, unit)[:, None]
        spread: Array = share[:, :, None] * (g / length)[:, None]
        return spread

    return unit, back
