"""What networks say of rows of tokens: perplexity, generation, embeddings, masks filled in."""

import json

import numpy as np
import pytest
from small_networks import DECODERS, TOKENS, config_of, inputs_of, network

import diba_np as dn
from diba_np.layers.trellis_linear import TrellisLinear
from diba_np.methods.linear_trellis import LinearTrellis
from diba_np.networks import generation
from diba_np.networks import texts as texts_module
from diba_np.networks.calibration import calibration
from diba_np.networks.evaluation import evaluate
from diba_np.networks.generation import Session, choose
from diba_np.networks.inputs import padded
from diba_np.networks.tasks import SENTENCES, task_of
from diba_np.products import Stack

tokenizers = pytest.importorskip("tokenizers", reason="texts need the extra networks")


def words(special=("[UNK]", "[MASK]", "[CLS]", "[SEP]")):
    """A tokenizer of whole words for the 19 tokens of the small networks."""
    from diba_np.networks.tokenizer import Tokenizer

    names = [*special, *"abcdefghijklmno"]
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(list(special))
    return Tokenizer(inner.to_str())


def packed(net, seed=0, trellises=False):
    """The network with factorizations of random bits in the place of all its layers.

    Or in the place of every other one, and linear trellises in that of the rest.
    """
    rng = np.random.default_rng(seed)
    made = {}
    for name, layer in net.layers.items():
        (m, n), k = layer.shape, 9
        if trellises and len(made) % 2:
            f = LinearTrellis.fit(rng.normal(size=(m, n)) / 2, 3.0, rotation="both", threads=1)
            made[name] = TrellisLinear(f, layer.parameters["bias"])
            continue
        b1, b2 = (rng.integers(0, 2, shape, np.uint8) for shape in ((m, k), (k, n)))
        d = [rng.normal(size=size).astype(np.float16) / 2 for size in (m, k, n)]
        f = dn.DiBAFactors(d[0], b1, d[1], b2, d[2], 0.5)
        made[name] = dn.DiBALinear(f, layer.parameters["bias"])
    return net.replaced(made)


@pytest.mark.parametrize("kind", DECODERS)
def test_perplexity_is_of_each_token_given_those_before(kind):
    net = network(kind)
    rows = [[3, 4, 5, 6], [7, 8], [9], [2, 3, 4]]
    total, count = 0.0, 0
    for row in rows:
        for at in range(1, len(row)):
            logits = net.logits([row[:at]])[0, -1]
            p = np.exp(logits - logits.max())
            total, count = total - np.log(p[row[at]] / p.sum()), count + 1
    assert net.perplexity(rows) == pytest.approx(np.exp(total / count))


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("form", ["dense", "packed", "trellises too"])
def test_a_token_read_alone_is_as_in_its_row(kind, form):
    net = network(kind, dtype=np.float32)
    net = net if form == "dense" else packed(net, trellises=form != "packed")
    ids = inputs_of(kind)[0][0]
    whole = net.logits(ids)[0]
    session = Session(net, capacity=4)  # smaller than the row: it grows
    assert all(isinstance(layer.read, Stack) == (form != "dense") for layer in session._layers)
    found = [session.read(ids[:3]).copy()]
    found += [session.step(int(token)).copy() for token in ids[3:]]
    assert np.allclose(found, whole[2:], atol=2e-4 * np.abs(whole).max())
    with pytest.raises(ValueError, match="read must come first"):
        session.read(ids)


def test_generation_takes_the_most_probable_and_stops_at_the_end():
    net = network("llama")
    start = [3, 4, 5]
    expected = list(start)
    for _ in range(8):
        expected.append(int(net.logits([expected])[0, -1].argmax()))
    assert net.generate(start, 8) == expected[3:]
    ended = network("llama", eos_token_id=expected[5])
    assert ended.generate(start, 8) == expected[3 : expected.index(expected[5], 3)]
    listed = network("llama", eos_token_id=[expected[5]])
    assert listed.generate(start, 8) == ended.generate(start, 8)
    assert net.generate(start, 0) == []


def test_generation_ends_with_the_positions():
    with pytest.warns(UserWarning, match="last of the network's 16 positions, after 5 of 99"):
        written = network("gpt2").generate([3] * 12, 99)
    assert len(written) == 5  # the last one needs no position
    with pytest.raises(ValueError, match="16 positions"):
        session = Session(network("gpt2"))
        session.read([3] * 16)
        session.step(3)


def test_drawn_tokens_follow_seed_and_bounds():
    net = network("llama")
    drawn = [net.generate([3], 9, temperature=2.0, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert net.generate([3], 9, temperature=2.0, top_k=1) == net.generate([3], 9)
    assert net.generate([3], 9, temperature=2.0, top_p=1e-9) == net.generate([3], 9)
    logits = np.log(np.array([0.5, 0.2, 0.3]))
    rng = np.random.default_rng(0)
    counts = np.bincount([choose(logits, rng, 1.0, None, 1.0) for _ in range(4000)], minlength=3)
    assert np.allclose(counts / 4000, [0.5, 0.2, 0.3], atol=0.03)
    assert {choose(logits, rng, 1.0, 2, 1.0) for _ in range(200)} == {0, 2}
    assert {choose(logits, rng, 1.0, None, 0.6) for _ in range(200)} == {0, 2}


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"tokens": -1}, "tokens must be at least 0"),
        ({"temperature": -1.0}, "temperature must not be negative"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
        ({"top_k": 0}, "top_k must be at least 1"),
    ],
)
def test_bad_options_of_generation(how, match):
    with pytest.raises(ValueError, match=match):
        network("llama").generate([3], **how)


def test_texts_stream():
    net = network("llama")
    net.tokenizer = words()
    pieces = []
    text = net.generate("a b c", 6, stream=pieces.append)
    assert "".join(pieces) == text
    assert text.split() == [w for w in (net.tokenizer.decode([i]) for i in
                            net.generate(net.tokenizer.encode("a b c"), 6)) if w]  # fmt: skip


def pieces_of_sentences(decoder=True):
    """A tokenizer that marks spaces before words and falls back to bytes, as Llama's does."""
    from diba_np.networks.tokenizer import Tokenizer

    names = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "▁b", "ab", "▁ab"]
    names += [f"<0x{byte:02X}>" for byte in (0xC3, 0xA9, 0xF0, 0x9F, 0x98, 0x80)]
    vocabulary = {name: number for number, name in enumerate(names)}
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b")]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, byte_fallback=True))
    norms, decoders = tokenizers.normalizers, tokenizers.decoders
    inner.normalizer = norms.Sequence([norms.Prepend("▁"), norms.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    if decoder:
        inner.decoder = decoders.Sequence(parts)
    inner.add_special_tokens(names[:3])
    return Tokenizer(inner.to_str())


@pytest.mark.parametrize("decoder", [True, False])
@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("ab ab", ["▁ab"] * 3),
        ("ab ab", ["▁ab", "</s>", "▁a", "b"] * 20),
        ("ab<s><s><s><s><s><s><s><s><s>", ["▁ab", "ab"]),
        ("é" * 20, ["<0xC3>", "<0xA9>", "▁ab"]),
        ("é" * 20, ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"] * 12 + ["a", "<0xC3>"]),
        ("<s>", ["▁ab"]),
    ],
)
def test_pieces_go_on_where_the_text_before_them_ends(text, written, decoder, monkeypatch):
    net = network("llama")
    net.tokenizer = made = pieces_of_sentences(decoder)
    added = [made.id_of(name) for name in written]
    monkeypatch.setattr(generation, "stream_tokens", lambda *args, **how: iter(added))
    before = made.encode(text)
    pieces = []
    found = net.generate(text, len(added), stream=pieces.append)
    assert made.decode(before) + found == made.decode(before + added)
    assert "".join(pieces) == found
    assert "\ufffd" not in "".join(pieces[:-1])


def test_room_grows_with_what_is_written():
    net = network("gpt2", n_positions=100)
    session = Session(net, 3)
    session.read([3, 4])
    sizes = set()
    for _ in range(98):
        session.step(5)
        sizes.add(session.capacity)
    assert sorted(sizes) == [3, 6, 12, 24, 48, 96, 100]
    assert next(generation.stream_tokens(network("llama"), [3], 10**15)) >= 0
    with pytest.raises(MemoryError, match=r"keys and values of \d+ tokens take \d+\.\d GB"):
        Session(net, 10**15)


@pytest.mark.parametrize("kind", TOKENS)
def test_embed_is_the_mean_of_each_alone(kind):
    net = network(kind)
    rows = [[3, 4, 5, 6, 2], [7, 8], [9], [2, 3, 4]]
    found = net.embed(rows)
    for row, vector in zip(rows, found, strict=True):
        mean = net.hidden([row])[-1][0].mean(axis=0)
        assert np.allclose(vector, mean / np.linalg.norm(mean))
    net.tokenizer = words()
    assert np.allclose(net.embed(["a b", "c"]), net.embed([[4, 5], [6]]))
    assert net.embed("a b").shape == (1, 8)
    assert np.allclose(net.embed(np.array(["a b", "c"])), net.embed(["a b", "c"]))
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        net.embed(["a b"], 0)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta"])
def test_fill_mask(kind):
    net = network(kind)
    net.tokenizer = words()
    found = net.fill_mask("a [MASK] c [MASK]", most=3)
    ids = net.tokenizer.encode("a [MASK] c [MASK]")
    logits = net.logits(ids)[0]
    for at, best in zip((1, 3), found, strict=True):
        p = np.exp(logits[at]) / np.exp(logits[at]).sum()
        order = np.argsort(-p)[:3]
        assert [name for name, _ in best] == [net.tokenizer.token_of(i) for i in order]
        assert np.allclose([share for _, share in best], p[order])
    with pytest.raises(ValueError, match=r"text must hold \[MASK\]"):
        net.fill_mask("a b")
    with pytest.raises(ValueError, match="needs a head for masked tokens"):
        network("llama").fill_mask("a [MASK]")


def test_rows_of_texts():
    net = network("llama")
    with pytest.raises(ValueError, match="texts need a tokenizer"):
        net.perplexity("a b")
    net.tokenizer = words()
    assert net.rows_of(["a b c", "d e"], 2) == [[4, 5], [6, 7]]
    assert net.rows_of("a b c", 8) == [[4, 5, 6]]
    assert net.rows_of(np.array([[1, 2], [3, 4]])) == [[1, 2], [3, 4]]
    encoder = network("bert")
    encoder.tokenizer = words()
    with pytest.warns(UserWarning, match="1 of 2 texts are longer than 2 tokens; no more"):
        assert encoder.rows_of(["a b c", "d"], 2) == [[4, 6], [7]]
    for wrong, match in (([["a"]], "strings or rows"), ([[0.5]], "strings or rows"),
                         (["a", [1]], "all strings or all rows")):  # fmt: skip
        with pytest.raises(TypeError, match=match):
            net.rows_of(wrong)
    for nothing in ([], "", [[]]):
        with pytest.raises(ValueError, match="at least one token"):
            net.rows_of(nothing)
    with pytest.raises(ValueError, match="two tokens or more"):
        net.perplexity([[3]])
    with pytest.raises(ValueError, match="perplexity needs a decoder"):
        encoder.perplexity([[3, 4]])
    with pytest.raises(ValueError, match="generate needs a decoder"):
        encoder.generate([3])


def opened(tokenizer, *first):
    """The tokenizer with tokens before every text."""
    inner = tokenizers.Tokenizer.from_str(tokenizer.text)
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=" ".join([*first, "$A", "[SEP]"]),
        special_tokens=[(token, inner.token_to_id(token)) for token in {*first, "[SEP]"}],
    )
    return type(tokenizer)(inner.to_str())


def test_rows_begin_with_what_begins_a_text():
    net = network("llama", dtype=np.float32)
    net.tokenizer = opened(words(), "[CLS]")
    assert net.tokenizer.opening == (2,)
    assert words().opening == ()
    assert opened(words(), "[CLS]", "[MASK]").opening == (2, 1)
    assert net.rows_of(["a b c", "d e"], 3) == [[2, 4, 5], [2, 6, 7]]  # a rest fills no row
    assert net.rows_of("a", 9) == [[2, 4]]
    assert net.perplexity("a b c d", 3) == net.perplexity([[2, 4, 5], [2, 6, 7]])
    assert calibration(net, "a b c d", 3).inputs.tolist() == [[2, 4, 5], [2, 6, 7]]
    with pytest.raises(ValueError, match="at least one token"):
        net.rows_of("")


def test_a_decoder_that_makes_vectors_reads_a_text_a_row():
    net = network("qwen2", dtype=np.float32, sentence_pooling="lasttoken")
    net.tokenizer = opened(words(), "[CLS]")
    texts = ["a b c", "d", "e f"]
    whole = [[2, 4, 5, 6, 3], [2, 7, 3], [2, 8, 9, 3]]
    assert net.rows_of(texts) == whole
    assert calibration(net, texts).lengths.tolist() == [5, 3, 4]
    other = network("qwen2", dtype=np.float32, sentence_pooling="lasttoken", seed=3)
    found = evaluate(net, texts, against=other)
    assert found["targets"] == 3
    cosines = (net.embed(texts) * other.embed(whole)).sum(axis=1)
    assert found["cosine"] == pytest.approx(cosines.mean(), abs=1e-6)


def test_vectors_are_judged_on_as_much_of_a_text_as_embed_reads():
    net = network("bert", "none", dtype=np.float32, sentence_length=4)
    net.tokenizer = words()
    long = ["a b c d e f", "g"]
    with pytest.warns(UserWarning, match="longer than 4 tokens"):
        found = evaluate(net, long, against=network("bert", "none", dtype=np.float32, seed=3))
    other = network("bert", "none", dtype=np.float32, seed=3).embed([[4, 5, 6, 9], [10]])
    assert found["cosine"] == pytest.approx((net.embed(long) * other).sum(axis=1).mean(), abs=1e-6)


def test_a_table_that_only_vectors_are_made_with_is_no_head():
    assert network("qwen2", tie_word_embeddings=True).head_name is not None
    net = network("qwen2", tie_word_embeddings=True, sentence_pooling="lasttoken")
    assert net.head_name is None
    assert task_of(net) is SENTENCES
    with pytest.raises(ValueError, match="or that it makes vectors of texts"):
        net.logits([[3, 4]])


def test_spaces_at_the_ends_of_a_text_are_no_part_of_its_vector():
    net = network("bert", "none", sentence_pooling="mean")
    net.tokenizer = words()
    inner = tokenizers.Tokenizer.from_str(net.tokenizer.text)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "isolated")  # spaces are tokens
    net.tokenizer = type(net.tokenizer)(inner.to_str())
    assert net.rows_of([" a b "]) == net.rows_of(["a b"]) == [[4, 0, 5]]
    net.config.source.pop("sentence_pooling")
    assert net.rows_of([" a b "]) == [[0, 4, 0, 5, 0]]


def test_the_tokenizers_padding_counts_more_than_the_configurations():
    net = network("bert", "none", pad_token_id=0)
    net.tokenizer = words()
    ids = np.array([[4, 5, 6], [7, 3, 3], [4, 0, 0]])
    assert net.rows_of(ids) == [[4, 5, 6], [7, 3, 3], [4]]
    for said in ('"[SEP]"', '{"content": "[SEP]"}'):
        net.beside["tokenizer_config.json"] = f'{{"pad_token": {said}}}'
        assert net.rows_of(ids) == [[4, 5, 6], [7], [4, 0, 0]]
    for said in ("null", '"none of all"'):
        net.beside["tokenizer_config.json"] = f'{{"pad_token": {said}}}'
        assert net.rows_of(ids) == [[4, 5, 6], [7, 3, 3], [4]]


def test_logits_of_a_batch_are_bounded(monkeypatch):
    net = network("llama", dtype=np.float32)
    rows = np.random.default_rng(0).integers(2, 19, (9, 8)).tolist()
    whole, size = net.perplexity(rows), len(next(net.token_losses(rows))[0])
    monkeypatch.setattr(texts_module, "_MOST_LOGITS", 2 * 8 * net.config.vocabulary)
    parts = [len(logits) for logits, *_ in net.token_losses(rows)]
    assert (size, max(parts), sum(parts)) == (9 * 7, 2 * 7, 9 * 7)
    assert net.perplexity(rows) == pytest.approx(whole, rel=1e-6)
    assert evaluate(net, rows)["perplexity"] == pytest.approx(whole, rel=1e-6)


def test_rows_of_other_questions_are_other_rows():
    net = network("bert", "masked")
    rows = [[3, 1, 4], [1, 5, 6]]
    all_asked = calibration(net, rows)
    net.tokenizer = words()
    some_asked = calibration(net, rows)
    assert np.array_equal(all_asked.inputs, some_asked.inputs)
    assert (all_asked.hidden, some_asked.hidden) == (None, 1)
    assert all_asked.digest() != some_asked.digest()


def test_pixels_that_nobody_scaled_get_a_warning():
    net = network("vit", dtype=np.float32)
    images = inputs_of("vit")[0]
    with pytest.warns(UserWarning, match="inputs are uint8: networks read arrays that are scaled"):
        net.hidden(np.zeros(images.shape, np.uint8))


@pytest.mark.parametrize("kind", TOKENS)
def test_padding_at_the_ends_of_an_array_is_not_read(kind):
    rows = [[3, 1, 4, 5], [7, 2], [2, 2, 3]]
    ids = padded(rows, 1)[0]
    net = network(kind)
    assert net.rows_of(ids) == rows
    assert net.rows_of(ids.tolist()) == ids.tolist()
    np.testing.assert_allclose(net.embed(ids), net.embed(rows))
    data = calibration(net, ids)
    np.testing.assert_array_equal(data.mask, padded(rows)[1])
    if net.kind.decoder:
        assert net.perplexity(ids) == net.perplexity(rows)
    with pytest.raises(ValueError, match="hold more than padding, row 1 does not"):
        net.rows_of(np.array([[3, 1], [1, 1]]))
    unnamed = network(kind, pad_token_id=None)
    ending = [network(kind, eos_token_id=token) for token in (1, [2, 1])]
    for other in (unnamed, *ending):
        assert other.rows_of(ids) == ids.tolist()


def test_padded_rows_of_classes_are_judged_alike():
    net = network("bert", "classes", dtype=np.float32)
    rows, labels = [[3, 4, 5, 6], [7], [8, 9]], [0, 1, 2]
    one = evaluate(net, rows, labels=labels)
    for given in ({"texts": padded(rows, 1)[0]}, {"inputs": padded(rows, 1)[0]}):
        assert evaluate(net, labels=labels, **given)["perplexity"] == one["perplexity"]


# -- tokenizers ------------------------------------------------------------------------------------


def test_gguf_tokenizer_of_bytes():
    from diba_np.networks.tokenizer import gguf_tokenizer

    tokens = ["<s>", "a", "b", "ab", "Ġ", "Ġa", "1", "2"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["a b", "Ġ a"],
        "tokenizer.ggml.token_type": [3] + [1] * 7,
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.bos_token_id": 0,
    }
    made = gguf_tokenizer(metadata, "x.gguf")
    assert made.encode("ab a 12") == [3, 5, 4, 6, 7]
    assert made.decode([0, 3, 5, 4, 6, 7]) == "ab a 12"
    assert made.encode("<s>ab") == [0, 3]
    before = gguf_tokenizer({**metadata, "tokenizer.ggml.add_bos_token": True}, "x.gguf")
    assert before.encode("ab") == [0, 3]
    assert before.encode("ab", special=False) == [3]
    assert gguf_tokenizer({}, "x.gguf") is None
    with pytest.raises(dn.FormatError, match=r"tokenizer.ggml.model: found rwkv"):
        gguf_tokenizer({"tokenizer.ggml.model": "rwkv"}, "x.gguf")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"tokens": None}, r"x.gguf: tokenizer.ggml.tokens: found none, expected it; convert"),
        ({"merges": None}, r"x.gguf: tokenizer.ggml.merges: found none"),
        ({"model": "llama"}, r"x.gguf: tokenizer.ggml.scores: found none"),
        ({"bos_token_id": None}, r"x.gguf: tokenizer.ggml.bos_token_id: found none"),
        ({"bos_token_id": 3}, r"bos_token_id: found 3, expected an int in \[0, 2\]"),
        ({"add_eos_token": True, "eos_token_id": "a"}, "eos_token_id: found 'a', expected an int"),
        ({"tokens": 3}, "x.gguf: not readable as a tokenizer"),
        ({"merges": ["a c"]}, "x.gguf: not readable as a tokenizer"),
        ({"merges": [["a", "b"]]}, "x.gguf: not readable as a tokenizer"),
        ({"token_type": [1]}, "token_type: found 1 entries, expected one for each of 3 tokens"),
        ({"model": "llama", "scores": [0]}, "scores: found 1 entries, expected one for each of 3"),
    ],
)
def test_gguf_tokenizers_that_are_damaged(change, match):
    from diba_np.networks.tokenizer import gguf_tokenizer

    whole = {
        "model": "gpt2",
        "tokens": ["a", "b", "ab"],
        "merges": ["a b"],
        "add_bos_token": True,
        "bos_token_id": 0,
    } | change
    metadata = {f"tokenizer.ggml.{name}": v for name, v in whole.items() if v is not None}
    with pytest.raises(dn.FormatError, match=match):
        gguf_tokenizer(metadata, "x.gguf")


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"tokenizer.json": b"\xe9"}, r"tokenizer.json: not readable as a tokenizer"),
        ({"vocab.txt": b"\xe9"}, r"vocab.txt: not readable as a tokenizer"),
        ({"vocab.txt": b"a", "tokenizer_config.json": b"[]"}, "config.json: found list, expected"),
        ({"vocab.json": b"{", "merges.txt": b""}, r"vocab.json: not readable as JSON"),
        ({"vocab.json": b"[]", "merges.txt": b""}, r"vocab.json: found list, expected an object"),
        ({"vocab.json": b'{"a": "b"}', "merges.txt": b""}, "not readable as a tokenizer"),
        ({"vocab.json": b"{}", "merges.txt": b"a b"}, r"merges.txt: not readable as a tokenizer"),
    ],
)
def test_tokenizers_of_folders_that_are_damaged(files, match, tmp_path):
    from diba_np.networks.tokenizer import read_tokenizer

    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(dn.FormatError, match=match):
        read_tokenizer(tmp_path)


def test_gguf_tokenizer_of_sentence_pieces():
    from diba_np.networks.tokenizer import gguf_tokenizer

    tokens = ["<unk>", "<s>", "</s>", "<0xC3>", "<0xA9>", "▁", "a", "b", "ab", "▁ab"]
    scores = [0, 0, 0, 0, 0, -9, -9, -9, -1, -2]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3, 6, 6, 1, 1, 1, 1, 1],
        "tokenizer.ggml.bos_token_id": 1,
    }
    made = gguf_tokenizer(metadata, "x.gguf")
    assert made.encode("ab abé") == [1, 9, 9, 3, 4]
    assert made.decode([1, 9, 9, 3, 4]) == "ab abé"
    bare = gguf_tokenizer({**metadata, "tokenizer.ggml.add_space_prefix": False}, "x.gguf")
    assert bare.encode("ab ab") == [1, 8, 9]
    assert bare.decode([1, 9, 8]) == " abab"


def test_tokenizers_of_older_folders(tmp_path):
    from diba_np.networks.tokenizer import read_tokenizer

    assert read_tokenizer(tmp_path) is None
    lines = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##do", "it"]
    (tmp_path / "vocab.txt").write_text("\n".join(lines) + "\n")
    assert read_tokenizer(tmp_path).encode("Undo IT what") == [2, 5, 6, 7, 1, 3]
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    assert read_tokenizer(tmp_path).encode("abb") == [2, 1]
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(dn.FormatError, match="not readable as a tokenizer"):
        read_tokenizer(tmp_path).encode("a")


def test_settings_of_llama_say_what_stands_around_a_text(tmp_path):
    from diba_np.networks.tokenizer import read_tokenizer

    bare = words(("<unk>", "<s>", "</s>")).text
    inner = tokenizers.Tokenizer.from_str(bare)
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    opened = inner.to_str()

    def read(text, **settings):
        (tmp_path / "tokenizer.json").write_text(text)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        return read_tokenizer(tmp_path)

    llama = {"tokenizer_class": "LlamaTokenizerFast"}
    token = {"content": "</s>", "special": True}
    for text, settings, expected in (
        (bare, llama | {"add_bos_token": True}, [1, 3]),
        (bare, llama | {"add_eos_token": True, "eos_token": token}, [3, 2]),
        (bare, {"add_bos_token": True}, [3]),  # of other classes the file alone tells
        (opened, llama | {"add_bos_token": False}, [3]),
        (opened, llama | {"add_eos_token": True}, [1, 3, 2]),
        (opened, llama, [1, 3]),
    ):
        assert read(text, **settings).encode("a") == expected
    same = read(opened, **llama, add_bos_token=True)
    assert same.text == opened
    with pytest.raises(dn.FormatError, match="token <bos>: found none, its settings add it"):
        read(bare, **llama, add_bos_token=True, bos_token="<bos>")


def test_settings_of_bert_say_what_becomes_of_letters(tmp_path):
    from diba_np.networks.tokenizer import read_tokenizer

    inner = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1, "A": 2, "Ä": 3}))
    inner.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    (tmp_path / "tokenizer.json").write_text(inner.to_str())
    for settings, expected in (
        ({}, [1]),
        ({"do_lower_case": True}, [1]),
        ({"do_lower_case": False}, [3]),
        ({"do_lower_case": False, "strip_accents": True}, [2]),
        ({"do_lower_case": False, "tokenizer_class": "PreTrainedTokenizerFast"}, [1]),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        assert read_tokenizer(tmp_path).encode("Ä") == expected


def older_folder(path, vocabulary, merges=(), **files):
    """Files of a byte-level tokenizer as they were before tokenizer.json."""
    path.mkdir(exist_ok=True)
    (path / "vocab.json").write_text(json.dumps(vocabulary))
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def test_an_older_folder_of_roberta(tmp_path):
    from diba_np.networks.tokenizer import read_tokenizer

    names = ["<s>", "<pad>", "</s>", "<unk>", "a", "b", "Ġ", "ab", "Ġa", "<mask>"]
    vocabulary = {token: i for i, token in enumerate(names)}
    merges = ["a b", "Ġ a"]
    made = read_tokenizer(older_folder(tmp_path, vocabulary, merges))
    assert made.encode("ab a <mask>") == [0, 7, 8, 9, 2]  # the mask takes the space before it
    assert made.encode("ab", special=False) == [7]
    assert made.decode([0, 7, 8, 9, 2]) == "ab a"
    assert made.mask == "<mask>"
    spaced = older_folder(tmp_path, vocabulary, merges, tokenizer_config={"add_prefix_space": True})
    assert read_tokenizer(spaced).encode("a") == [0, 8, 2]


def test_tokens_that_are_named_beside_a_vocabulary(tmp_path):
    from diba_np.networks.tokenizer import read_tokenizer

    vocabulary = {"a": 0, "b": 1, "<|endoftext|>": 2, "1": 3, "2": 4, "12": 5}
    folder = older_folder(
        tmp_path,
        vocabulary,
        ["1 2"],
        added_tokens={"<end>": 7, "<tool>": 6},
        special_tokens_map={"eos_token": {"content": "<end>"}, "pad_token": "<not there>"},
        tokenizer_config={
            "added_tokens_decoder": {"9": {"content": "<x>", "special": True}},
            "add_bos_token": False,
        },
    )
    made = read_tokenizer(folder)
    ids = made.encode("a<|endoftext|>12<tool><end><x>b")
    assert ids == [0, 2, 5, 6, 7, 9, 1]
    assert made.decode(ids) == "a12<tool>b"
    folder = older_folder(
        tmp_path, vocabulary, ["1 2"], tokenizer_config={"tokenizer_class": "Qwen2Tokenizer"}
    )
    assert read_tokenizer(folder).encode("12") == [3, 4]  # each digit alone
    folder = older_folder(tmp_path, vocabulary, tokenizer_config={"added_tokens_decoder": {"a": 1}})
    with pytest.raises(dn.FormatError, match="not readable as a tokenizer"):
        read_tokenizer(folder)


def test_settings_that_name_no_token_are_no_tokens(tmp_path):
    from diba_np.networks.tokenizer import read_tokenizer

    vocabulary = {"None": 0, "False": 1, "<x>": 2, "N": 3, "F": 4}
    settings = {
        "pad_token": None,
        "add_bos_token": False,
        "mask_token": {"content": None},
        "eos_token": "<x>",
        "added_tokens_decoder": None,
    }
    made = read_tokenizer(older_folder(tmp_path, vocabulary, tokenizer_config=settings))
    assert made.encode("N<x>F") == [3, 2, 4]
    assert made.decode([0, 2, 1]) == "NoneFalse"


def test_a_vocabulary_of_words_is_read_as_it_stands(tmp_path):
    from diba_np.networks.tokenizer import read_tokenizer

    lines = ["[PAD]", "", "[UNK]", "[CLS]", "[SEP]", "é", "e", "日", "##本", "本"]
    (tmp_path / "vocab.txt").write_text("\n".join(lines) + "\n", "utf-8")
    assert read_tokenizer(tmp_path).encode("É 日本") == [3, 6, 7, 9, 4]
    settings = {"do_lower_case": True, "strip_accents": False, "tokenize_chinese_chars": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert read_tokenizer(tmp_path).encode("É 日本") == [3, 5, 7, 8, 4]


def gguf_bytes(**more):
    """The tokenizer of a GGUF file with a few tokens of bytes."""
    from diba_np.networks.tokenizer import gguf_tokenizer

    tokens = ["<s>", *"hello123", "Ġ", "hello", "<tool>", "A", "</s>"]
    tokens[4] = "L"  # each token is there once
    metadata = {
        "model": "gpt2",
        "tokens": tokens,
        "merges": [],
        "token_type": [3] + [1] * 10 + [4, 1, 3],
        "bos_token_id": 0,
        "eos_token_id": 13,
    } | more
    named = {f"tokenizer.ggml.{n}": v for n, v in metadata.items() if v is not None}
    return gguf_tokenizer(named, "x.gguf")


def test_words_that_are_tokens_stay_whole_in_llama_3():
    assert gguf_bytes(pre="gpt-2").encode("hello") == [1, 2, 3, 3, 5]
    assert gguf_bytes(pre="llama-bpe").encode("hello") == [0, 10]
    assert gguf_bytes(pre="llama-bpe", add_bos_token=False).encode("hello") == [10]
    assert gguf_bytes(pre="tekken").encode("helloAhello") == [0, 10, 12, 1, 2, 3, 3, 5]


@pytest.mark.parametrize("cut", ["llama-bpe", "tekken"])
def test_no_token_opens_texts_where_the_file_has_none(cut):
    assert gguf_bytes(pre=cut, bos_token_id=None).encode("hello") == [10]
    with pytest.raises(dn.FormatError, match="bos_token_id: found none, expected it"):
        gguf_bytes(pre=cut, bos_token_id=None, add_bos_token=True)


def test_tokens_of_users_are_kept_in_texts():
    made = gguf_bytes()
    assert made.encode("1<tool></s>") == [6, 11, 13]
    assert made.decode([0, 6, 11, 13]) == "1<tool>"
    assert made.token_of(11) == "<tool>"
    assert made.token_of(14) == "<id 14>"


def test_a_token_may_close_texts():
    assert gguf_bytes(add_eos_token=True).encode("1") == [6, 13]
    assert gguf_bytes(add_eos_token=True, add_bos_token=True).encode("1") == [0, 6, 13]


def test_cuts_that_are_not_known():
    with pytest.warns(UserWarning, match=r"x.gguf: tokenizer.ggml.pre: found 'viking', known are"):
        assert gguf_bytes(pre="viking") is None


def test_the_configurations_of_all_small_networks_are_plain():
    assert json.loads(json.dumps(config_of("llama"))) == config_of("llama")


def test_texts_that_hold_no_token_or_no_unicode():
    net = network("bert", "classes")
    net.tokenizer = words()
    with pytest.raises(ValueError, match="at least one token each, got none in text 1"):
        evaluate(net, ["a", "", "b"], labels=[0, 1, 2])
    assert len(calibration(net, ["a", "", "b"])) == 2
    with pytest.raises(ValueError, match="texts must hold at least one token, got none"):
        calibration(net, ["", ""])
    decoder = network("llama")
    decoder.tokenizer = words()
    assert decoder.rows_of(["a", "", "b"]) == [[4, 5]]  # which reads all joined
    wrong = "a " + b"\xff".decode("utf-8", "surrogateescape")  # as an argument of a command line
    for read in (net.embed, net.rows_of, lambda texts: decoder.generate(texts[0])):
        with pytest.raises(ValueError, match=r"must be Unicode, got '.udcff' at character 2; read"):
            read([wrong])
