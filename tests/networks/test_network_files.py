"""Networks written and read: the Hugging Face layout, GGUF, files of their own."""

import json
import pickle
import warnings

import numpy as np
import pytest
from safetensors.numpy import save_file
from small_networks import CONFIGS, DECODERS, config_of, inputs_of, network, tensors_of
from test_texts import packed, tokenizers, words

import diba_np as dn
from diba_np import networks
from diba_np.models.file import open_model
from diba_np.networks.evaluation import evaluate
from diba_np.networks.file import PARTS, bits_by_part, is_network


def folder_of(path, kind, head="masked", **more):
    """A small network in the Hugging Face layout."""
    head = "classes" if kind in ("vit", "audio-spectrogram-transformer") else head
    path.mkdir()
    arrays = {n: a.astype(np.float32) for n, a in tensors_of(kind, head, **more).items()}
    save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config_of(kind, **more)))
    return arrays


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_folder_is_the_network_of_its_tensors(kind, tmp_path):
    folder_of(tmp_path / "net", kind)
    net = networks.load(tmp_path / "net")
    inputs, mask = inputs_of(kind)
    assert np.array_equal(
        net.logits(inputs, mask), network(kind, dtype=np.float32).logits(inputs, mask)
    )
    assert net.tokenizer is None


@pytest.mark.parametrize("kind", CONFIGS)
def test_saved_loaded_exported_networks_say_the_same(kind, tmp_path):
    arrays = folder_of(tmp_path / "net", kind)
    small = packed(networks.load(tmp_path / "net"))
    small.tokenizer = words()
    for block in small.blocks.values():  # as after training
        for name in block.parameters:
            block.parameters[name] += 0.25
    size = small.save(tmp_path / "small.h5")
    assert size == (tmp_path / "small.h5").stat().st_size
    assert is_network(tmp_path / "small.h5")
    inputs, mask = inputs_of(kind)
    expected = small.logits(inputs, mask)
    loaded = networks.load(tmp_path / "small.h5")
    assert np.array_equal(loaded.logits(inputs, mask), expected)
    assert loaded.tokenizer.text == small.tokenizer.text
    assert list(loaded.compressed) == list(small.compressed) == list(loaded.layers)
    again = loaded.replaced({})
    assert np.array_equal(again.logits(inputs, mask), expected)
    for net in (networks.load(tmp_path / "net"), networks.load(tmp_path / "small.h5"), small):
        same = pickle.loads(pickle.dumps(net))
        assert np.array_equal(same.logits(inputs, mask), net.logits(inputs, mask))
    dense = networks.load(loaded.export(tmp_path / "dense"))
    assert np.allclose(dense.logits(inputs, mask), expected, atol=1e-4 * np.abs(expected).max())
    names = {e.name: e.shape for e in networks_entries(tmp_path / "dense")}
    sizes = {name: array.shape for name, array in arrays.items()}
    own = {n: s for n, s in sizes.items() if n in names}
    assert own == {n: names[n] for n in own}
    assert set(names) <= set(sizes)
    with pytest.raises(FileExistsError, match="new or empty"):
        loaded.export(tmp_path / "dense")


@pytest.mark.parametrize(("kind", "table"), [("gpt2", "transformer.wte"), ("bert", None)])
def test_a_head_that_is_no_copy_of_the_table_is_read(kind, table, tmp_path):
    tensors, ids = tensors_of(kind), np.array([[3, 4, 5]])
    head = "lm_head.weight" if table else "cls.predictions.decoder.weight"
    tokens = tensors[f"{table or 'bert.embeddings.word_embeddings'}.weight"]
    tied = network(kind)
    copied = networks.build(config_of(kind), tensors | {head: tokens.copy()}, dtype=np.float64)
    assert copied.head_name == copied.token_name
    assert np.array_equal(copied.logits(ids), tied.logits(ids))
    with pytest.warns(UserWarning, match="mine: tie_word_embeddings says .* the head stored is an"):
        own = networks.build(config_of(kind), tensors | {head: 2 * tokens}, label="mine")
    own.save(tmp_path / "net.h5")
    shift = 0 if table else tensors["cls.predictions.bias"]
    for net in (own, networks.load(tmp_path / "net.h5"), networks.load(own.export(tmp_path / "f"))):
        assert np.allclose(net.logits(ids) - shift, 2 * (tied.logits(ids) - shift), atol=1e-4)


def test_exported_weights_are_named_float32(tmp_path):
    """transformers loads weights in the type that the configuration names."""
    types = {"torch_dtype": "bfloat16", "dtype": "bfloat16"}
    net = networks.build(config_of("llama", **types), tensors_of("llama"))
    folder = net.export(tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text())
    assert config == config_of("llama", torch_dtype="float32", dtype="float32")


def test_files_for_other_software_are_kept(tmp_path):
    kept = {
        "tokenizer_config.json": '{"tokenizer_class": "BertTokenizer", "model_max_length": 9}',
        "chat_template.jinja": "{{ messages }} \u00e9",
        "generation_config.json": '{"temperature": 0.5}',
        "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
    }
    folder_of(tmp_path / "net", "bert")
    for name, text in (kept | {"README.md": "no", "onnx/config.json": "{}"}).items():
        (tmp_path / "net" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "net" / name).write_text(text, "utf-8")
    net = networks.load(tmp_path / "net")
    net.tokenizer = words()
    size = packed(net).save(tmp_path / "small.h5")
    small = networks.load(tmp_path / "small.h5")
    assert small.beside == net.beside == kept
    assert sum(bits for bits, _ in bits_by_part(small).values()) < 8 * size
    folder = small.export(tmp_path / "dense")
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert files == {*kept, "config.json", "model.safetensors", "tokenizer.json"}
    assert {name: (folder / name).read_text("utf-8") for name in kept} == kept
    (tmp_path / "net" / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(dn.FormatError, match="not readable as UTF-8"):
        networks.load(tmp_path / "net")


def test_a_tokenizer_without_settings_gets_some(tmp_path):
    ends = {"bos_token_id": 7, "eos_token_id": [8, 9]}
    for kind, more in (("llama", ends), ("bert", {})):
        net = networks.build(config_of(kind, **more), tensors_of(kind))
        net.tokenizer = words()
        folder = net.export(tmp_path / kind)
        told = json.loads((folder / "tokenizer_config.json").read_text())
        assert told.pop("tokenizer_class") == "PreTrainedTokenizerFast"
        assert told.pop("model_max_length") == config_of(kind)["max_position_embeddings"]
        named = {"unk_token": "[UNK]", "mask_token": "[MASK]"}
        named |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[MASK]"}
        if kind == "llama":
            named |= {"bos_token": "d", "eos_token": "e"}
        assert told == named | {"clean_up_tokenization_spaces": False}


def networks_entries(path):
    from diba_np.sources.opening import open_source

    return open_source(path)


def test_dense_layers_are_stored_as_they_are(tmp_path):
    net = network("gpt2", dtype=np.float32)
    net.save(tmp_path / "net.h5")
    loaded = networks.load(tmp_path / "net.h5")
    assert not loaded.compressed
    ids, mask = inputs_of("gpt2")
    assert np.array_equal(loaded.logits(ids, mask), net.logits(ids, mask))
    assert np.allclose(networks.load(tmp_path / "net.h5", dtype=np.float64).logits(ids, mask),
                       net.logits(ids, mask), atol=1e-4)  # fmt: skip


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_every_bit_is_counted(kind, tmp_path):
    tensors = tensors_of(kind)
    for name, tensor in tensors.items():
        if name.endswith("query.bias"):  # stored, since the source has it
            tensor[:] = 0
    small = packed(networks.build(config_of(kind), tensors))
    small.tokenizer = words()
    bits = bits_by_part(small)
    assert list(bits) == list(PARTS)
    size = small.save(tmp_path / "small.h5")
    total = sum(part for part, _ in bits.values()) / 8
    # beside the arrays a group takes some 2 KiB of headers
    groups = len(small.layers) + sum(len(b.parameters) for b in small.blocks.values()) + 20
    assert total < size < total + 6144 * groups
    assert total == open_model(tmp_path / "small.h5").storage_bits() / 8
    counted = {n: layer.to_matrix() for n, layer in small.layers.items()}
    assert bits["layers"][1] == sum(a.size for a in small.weights.values()) + sum(
        np.prod(small.layers[n].shape) for n in counted
        if n not in small.weights and n not in (small.token_name, small.head_name)
    )  # fmt: skip


def test_layers_that_stay_dense_are_told_apart():
    net = network("bert", dtype=np.float32)
    small = net.replaced({n: layer for n, layer in packed(net).layers.items() if n in net.weights})
    bits = bits_by_part(small)
    trunk = [small.layers[name].to_matrix() for name in small.weights]
    assert bits["layers"] == tuple(
        sum(values)
        for values in zip(*((f.storage_bits(), np.prod(f.shape)) for f in trunk), strict=True)
    )
    assert bits["layers kept dense"] == (32 * 8 * 8, 8 * 8)  # of the head
    rows = 19 + 16 + 2  # of tokens, positions, kinds of tokens
    assert bits["embeddings and head"] == (32 * 8 * rows, 8 * rows)


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json: no such file"):
        networks.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing: no such file"):
        networks.load(tmp_path / "nothing")
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(ValueError, match=r"expected a folder with config.json"):
        networks.load(tmp_path / "x.txt")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(dn.FormatError, match="found list, expected an object"):
        networks.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(dn.FormatError, match="not readable as JSON"):
        networks.load(tmp_path)
    (tmp_path / "a.h5").write_bytes(b"nothing")
    with pytest.raises(dn.FormatError):
        networks.load(tmp_path / "a.h5")
    dn.factorize(np.eye(4), k=2).save(tmp_path / "f.h5")
    with pytest.raises(dn.FormatError):
        networks.load(tmp_path / "f.h5")
    assert not is_network(tmp_path / "f.h5")
    dn.factorize_model({"a": np.eye(70)}, bits=2.0, output=tmp_path / "m.h5", min_size=1)
    with pytest.raises(
        dn.FormatError, match="expected a network with them; compress one with texts="
    ):
        networks.load(tmp_path / "m.h5")
    assert not is_network(tmp_path / "m.h5")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "t5"}, "model_type must be one of bert, .* gpt2, got 't5'; the weights"),
        ({"model_type": None}, "got None"),
    ],
)
def test_unknown_kinds(change, match):
    with pytest.raises(ValueError, match=match):
        networks.build({**config_of("bert"), **change}, {})


@pytest.mark.parametrize(
    ("kind", "change", "match"),
    [
        ("bert", {"hidden_size": None}, "hidden_size: found none"),
        ("bert", {"num_attention_heads": 3}, "width 8 for 3 heads"),
        ("bert", {"num_hidden_layers": "2"}, "layers: found '2'"),
        (
            "bert",
            {"hidden_act": "mish"},
            "activation 'mish'.*; the weights of any .* without texts",
        ),
        ("bert", {"vocab_size": 20}, r"found shape \(19, 8\), expected \(20, 8\)"),
        (
            "bert",
            {"num_hidden_layers": 3},
            r"encoder.layer.2.attention.self.query.weight: found none",
        ),
        ("llama", {"num_key_value_heads": 3}, "4 heads on 3 of keys"),
        ("llama", {"intermediate_size": 13}, r"found shape \(12, 8\), expected \(13, 8\)"),
        ("gpt2", {"n_inner": 16}, r"found shape \(8, 32\), expected \(8, 16\)"),
        ("vit", {"image_size": 12}, r"found shape \(1, 5, 8\), expected \(1, 10, 8\)"),
        ("vit", {"patch_size": "4"}, "patch: found .* expected ints from 1 on"),
        ("bert", {"layer_norm_eps": "1e-5"}, "epsilon: found '1e-5', expected a number from 0 on"),
        ("llama", {"rms_norm_eps": -1.0}, "epsilon: found -1.0, expected a number from 0 on"),
        ("llama", {"rms_norm_eps": float("nan")}, "epsilon: found nan"),
        ("llama", {"rope_theta": "a"}, "base: found 'a', expected a number from 0 on"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "factor must be a number, got NoneType"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be finite and"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "factors", "factors": [1.0, 2.0]}},
            "factors must be 1 numbers above 0",
        ),
        ("llama", {"hidden_act": ["gelu"]}, r"activation: found \['gelu'\], expected a name"),
        ("llama", {"tie_word_embeddings": "yes"}, "tied: found 'yes', expected true or false"),
        ("llama", {"pad_token_id": "x"}, "padding: found 'x', expected an int"),
        ("mistral", {"sliding_window": "x"}, "window: found 'x', expected an int from 1 on"),
    ],
)
def test_settings_that_contradict_the_tensors(kind, change, match):
    head = "classes" if kind == "vit" else "masked"
    with pytest.raises(dn.FormatError, match=match):
        networks.build({**config_of(kind), **change}, tensors_of(kind, head))


def test_older_configurations_name_a_class_alone():
    config = config_of("bert", architectures=["BertForMaskedLM"])
    del config["model_type"]
    net = networks.build(config, tensors_of("bert"))
    assert net.config.kind == net.config.source["model_type"] == "bert"


def test_a_configuration_without_any_kind(tmp_path):
    folder_of(tmp_path / "net", "bert")
    config = config_of("bert")
    del config["model_type"]
    (tmp_path / "net" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="got None"):
        networks.load(tmp_path / "net")
    assert networks.load(tmp_path / "net", kind="bert").config.kind == "bert"


def test_what_a_kind_does_otherwise():
    with pytest.raises(ValueError, match="must look at all tokens"):
        network("qwen2", use_sliding_window=True)
    with pytest.raises(ValueError, match="root of the heads' width"):
        network("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ValueError, match=r"rope_scaling must be .*'yarn'; the weights of any"):
        network("llama", rope_scaling={"rope_type": "yarn"})
    for kind in ("qwen2", "gpt2"):
        with pytest.raises(ValueError, match=rf"json: a {kind} must look at earlier .*is_causal"):
            network(kind, is_causal=False)
    with pytest.raises(ValueError, match="must turn all channels of a head"):
        network("llama", partial_rotary_factor=0.5)
    with pytest.raises(ValueError, match=r"json: a bert must have absolute positions, .*'rela"):
        network("bert", position_embedding_type="relative_key")
    with pytest.raises(ValueError, match="a roberta must be an encoder, this one is a decoder"):
        network("roberta", is_decoder=True)


@pytest.mark.parametrize(
    ("change", "unturned"),
    [
        ({"no_rope_layers": None}, [3]),
        ({"no_rope_layers": None, "no_rope_layer_interval": 2}, [1, 3]),
        ({"no_rope_layers": [1, 0, 0, 1], "no_rope_layer_interval": 2}, [1, 2]),
    ],
)
def test_every_fourth_layer_of_smollm3_has_no_rotary_positions(change, unturned):
    from diba_np.networks.kind import read_config

    found = read_config(config_of("smollm3", num_hidden_layers=4, **change))
    assert found.unrotated == tuple(unturned)
    assert (found.base, found.tied) == (2e6, True)
    assert read_config(config_of("llama", no_rope_layers=[0, 0])).unrotated == ()


def test_the_head_of_roberta_has_an_activation_of_its_own():
    one, two = network("roberta"), network("roberta", hidden_act="relu")
    x = np.random.default_rng(0).normal(size=(2, 3, 8))
    assert np.array_equal(one.predict(x)[0], two.predict(x)[0])
    bert = network("bert"), network("bert", hidden_act="relu")
    assert not np.allclose(bert[0].predict(x)[0], bert[1].predict(x)[0])


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("bert", "BertForTokenClassification"),
        ("distilbert", "DistilBertForMultipleChoice"),
        ("llama", "LlamaForSequenceClassification"),
        ("gpt2", "GPT2DoubleHeadsModel"),
    ],
)
def test_heads_that_would_be_misread(kind, name):
    with pytest.raises(ValueError, match=f"the head of a {name} is not read, only heads"):
        network(kind, "classes", architectures=[name])
    # without such a tensor there is nothing to misread
    if kind == "bert":
        assert network(kind, "none", architectures=[name]).head_name is None
    if kind == "llama":
        tensors = tensors_of(kind)
        del tensors["lm_head.weight"]
        config = config_of(kind, architectures=[name], tie_word_embeddings=False)
        assert networks.build(config, tensors).head_name is None


@pytest.mark.parametrize(
    ("kind", "name", "head"),
    [
        ("bert", "BertForQuestionAnswering", "qa_outputs"),
        ("bert", "BertForNextSentencePrediction", "cls.seq_relationship"),
        ("distilbert", "DistilBertForQuestionAnswering", "qa_outputs"),
        ("llama", "LlamaForSequenceClassification", "score"),
        ("vit", "ViTForMaskedImageModeling", "decoder.0"),
    ],
)
def test_heads_that_would_be_lost(kind, name, head):
    tensors = tensors_of(kind, "none")
    tensors.pop("lm_head.weight", None)
    config = config_of(kind, architectures=[name], tie_word_embeddings=kind != "llama")
    assert networks.build(config, tensors).head_name is None  # the trunk alone
    tensors[f"{head}.weight"] = np.ones((2, 8))
    with pytest.raises(ValueError, match=f"the head of a {name} is not read, only heads"):
        networks.build(config, tensors)
    # beside a head that is read, as checkpoints of pretraining have it
    if head == "cls.seq_relationship":
        both = tensors_of(kind) | {f"{head}.weight": np.ones((2, 8))}
        assert networks.build(config_of(kind, architectures=["BertForMaskedLM"]), both).head_name


Q = "attention.self.query"


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        (
            "llama",
            "model.layers.1.self_attn.q_norm.weight",
            "no place of a llama takes it, .* adapt",
        ),
        ("qwen2", "layers.0.mlp.router.weight", "no place of a qwen2 takes it"),
        ("llama", "model.layers.0.input_layernorm.bias", "no place of a llama takes it"),
        ("llama", "lm_head.bias", "no place of a llama takes it"),
        ("llama", "model.layers.2.mlp.up_proj.weight", "of number 2, .* num_hidden_layers is 2;"),
        ("gpt2", "h.12.ln_1.bias", "of number 12, expected the last to be 1, since n_layer is 2"),
        ("bert", f"bert.encoder.layer.0.{Q}.lora_A.weight", "adapters are to be merged"),
        ("distilbert", "distilbert.transformer.layer.1.ffn.lin3.bias", "no place of a distilbert"),
        ("vit", "vit.encoder.layer.0.layer_scale1", "no place of a vit takes it"),
    ],
)
def test_parts_of_another_network_are_refused(kind, name, words):
    tensors = tensors_of(kind, "classes" if kind == "vit" else "masked") | {name: np.ones(8)}
    with pytest.raises(dn.FormatError, match=f"tensor {name}: .*{words}"):
        networks.build(config_of(kind), tensors)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("bert", ["bert.embeddings.position_ids", "cls.seq_relationship.bias"]),
        ("bert", ["cls.predictions.decoder.bias"]),
        ("roberta", ["roberta.embeddings.position_ids", "lm_head.decoder.bias"]),
        ("gpt2", ["transformer.h.0.attn.bias", "h.1.attn.masked_bias"]),
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]),
    ],
)
def test_what_usual_folders_hold_beside_is_left_out_in_silence(kind, names):
    more = {name: np.ones(8) for name in names}
    assert networks.build(config_of(kind), more | tensors_of(kind)).head_name


@pytest.mark.parametrize("kind", ["roberta", "vit"])
def test_a_pooler_that_other_software_alone_reads_is_kept(kind):
    weight = np.eye(8)
    net = networks.build(
        config_of(kind), tensors_of(kind, "none") | {f"{kind}.pooler.dense.weight": weight}
    )
    assert np.array_equal(net.layers[f"{kind}.pooler.dense"].to_matrix().to_dense(), weight)


def test_what_else_no_place_takes_is_told_once():
    more = {f"extra.{i}.weight": np.ones(2) for i in range(5)}
    with pytest.warns(
        UserWarning, match=r"takes extra.0.weight, .*2.weight and 2 more; left"
    ) as told:
        networks.build(config_of("bert"), tensors_of("bert") | more)
    assert len(told) == 1


@pytest.mark.parametrize(
    ("kind", "change", "match"),
    [
        ("smollm3", {"no_rope_layers": 3}, "no_rope_layers must be a list, got 3"),
        ("smollm3", {"no_rope_layers": [1]}, "an entry for each of 2 layers, got 1"),
        (
            "smollm3",
            {"no_rope_layers": None, "no_rope_layer_interval": 0},
            "no_rope_layer_interval must be an int from 1 on, got 0",
        ),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling must be an object, got 'linear'"),
        ("llama", {"rope_theta": 0}, "rope_theta must be above 0, got 0"),
        ("vit", {"image_size": [8, 8, 8]}, "must be one count or two, got"),
        ("vit", {"patch_size": 0}, "must be one count or two, got 0"),
    ],
)
def test_settings_of_the_wrong_form(kind, change, match):
    with pytest.raises(ValueError, match=match):
        network(kind, **change)


@pytest.mark.parametrize("token", [-1, 19, 500])
def test_a_padding_that_the_table_has_not(token):
    net = network("llama", pad_token_id=token)
    rows = [[3, 4, 5], [3, 4, 5, 6, 7]]
    assert net.perplexity(rows) == pytest.approx(network("llama").perplexity(rows), rel=1e-12)


def test_numbers_that_are_not_finite_are_named():
    tensors = tensors_of("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][2, 3] = np.nan
    net = networks.build(config_of("llama"), tensors, label="mine")
    with pytest.raises(dn.FormatError, match=rf"mine: tensor {name}: found nan at \(2, 3\)"):
        net.logits(np.array([[1, 2]]))


def test_codes_of_another_quantization_are_not_taken_for_weights(tmp_path):
    folder_of(tmp_path / "net", "llama")
    config = config_of("llama", quantization_config={"quant_method": "fp8"})
    (tmp_path / "net" / "config.json").write_text(json.dumps(config))
    with pytest.raises(dn.FormatError, match=r"quantized already \(fp8\).* bring the network"):
        networks.load(tmp_path / "net")


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("config.json", '"compression_config": {"quant_method": "w8a8"}', r"already \(w8a8\)"),
        ("hf_quant_config.json", '"producer": "modelopt"', r"already \(modelopt\)"),
    ],
)
def test_other_places_that_tell_of_codes(tmp_path, file, text, words):
    folder_of(tmp_path / "net", "llama")
    given = json.loads(f"{{{text}}}") | (config_of("llama") if file == "config.json" else {})
    (tmp_path / "net" / file).write_text(json.dumps(given))
    with pytest.raises(dn.FormatError, match=words):
        networks.load(tmp_path / "net")


@pytest.mark.parametrize(
    ("kind", "name", "shape", "words"),
    [
        ("llama", "model.layers.0.mlp.up_proj.weight_scale", (1,), "quantized already"),
        ("gpt2", "transformer.ln_f.bias", None, r"ln_f\.bias: found none, expected it"),
        ("gpt2", "transformer.h.0.attn.c_proj.weight", None, r"c_proj\.weight: found none"),
        ("gpt2", "transformer.ln_f.bias", (3,), r"ln_f\.bias: found shape \(3,\), expected"),
        (
            "gpt2",
            "transformer.h.0.mlp.c_fc.bias",
            (3,),
            r"c_fc\.bias: found shape \(3,\), expected",
        ),
    ],
)
def test_parts_of_a_layer_that_are_not_there_or_of_another_shape(kind, name, shape, words):
    tensors = tensors_of(kind)
    name = next((n for n in tensors if n in (name, name.removeprefix("transformer."))), name)
    if shape is None:
        del tensors[name]
    else:
        tensors[name] = np.ones(shape, np.float32)
    with pytest.raises(dn.FormatError, match=words):
        networks.build(config_of(kind), tensors)


def test_old_names_of_norms_and_prefixes():
    config, tensors = config_of("bert"), tensors_of("bert")
    renamed = {
        name.removeprefix("bert.")
        .replace("LayerNorm.weight", "LayerNorm.gamma")
        .replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in tensors.items()
    }
    ids, mask = inputs_of("bert")
    one, two = (networks.build(config, t).logits(ids, mask) for t in (tensors, renamed))
    assert np.array_equal(one, two)


# -- what stands beside a configuration ------------------------------------------------------------


def test_generation_ends_where_its_own_file_says(tmp_path):
    folder_of(tmp_path / "net", "llama")
    start = [3, 4, 5]
    written = networks.load(tmp_path / "net").generate(start, 8)
    ends = {"eos_token_id": [written[2], 18]}
    (tmp_path / "net" / "generation_config.json").write_text(json.dumps(ends))
    net = networks.load(tmp_path / "net")
    assert net.generate(start, 8) == written[: written.index(written[2])]
    net.save(tmp_path / "net.h5")
    for path in (tmp_path / "net.h5", net.export(tmp_path / "again")):
        assert networks.load(path).config.source["eos_token_id"] == ends["eos_token_id"]
    (tmp_path / "net" / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(dn.FormatError, match="eos_token_id: found '</s>', expected a token's"):
        networks.load(tmp_path / "net")


def sentences_of(path, modes, *more, **settings):
    """A folder of sentence-transformers."""
    folder_of(path, "bert", "none")
    (path / "1_Pooling").mkdir()
    flags = {f"pooling_mode_{mode}": True for mode in modes} | {"pooling_mode_max_tokens": False}
    if "max" in modes:
        flags = {"pooling_mode": modes}
    (path / "1_Pooling" / "config.json").write_text(json.dumps(flags))
    for name in more:
        (path / name).mkdir()
    if settings:
        (path / "sentence_bert_config.json").write_text(json.dumps(settings))
    return networks.load(path)


@pytest.mark.parametrize(
    ("mode", "first", "last"),
    [
        ("mean_tokens", 0, None),
        ("mean_sqrt_len_tokens", 0, None),
        ("cls_token", 0, 1),
        ("lasttoken", -1, None),
    ],
)
def test_vectors_are_of_the_tokens_that_the_folder_names(mode, first, last, tmp_path):
    from diba_np.networks.tasks import SENTENCES

    net = sentences_of(tmp_path / "net", [mode], "2_Normalize")
    rows = [[3, 4, 5, 6], [7, 8, 9]]
    found = net.embed(rows)
    for row, vector in zip(rows, found, strict=True):
        mean = net.hidden([row])[-1][0][first:last].mean(axis=0)
        assert np.allclose(vector, mean / np.linalg.norm(mean), atol=1e-6)
    ids, mask = np.array([[3, 4, 5, 6], [7, 8, 9, 1]]), np.array([[1] * 4, [1, 1, 1, 0]], bool)
    y = SENTENCES.outputs(net, net.last_hidden(ids, mask), mask, mask)[0]
    assert np.allclose(y, found, atol=1e-6)
    net.save(tmp_path / "net.h5")
    for path in (tmp_path / "net.h5", net.export(tmp_path / "again")):
        assert np.allclose(networks.load(path).embed(rows), found, atol=1e-6)


def test_vectors_that_are_made_otherwise(tmp_path):
    for i, (modes, more, made) in enumerate(
        [
            (["mean_tokens"], ["2_Dense"], "mean and dense"),
            (["weightedmean_tokens"], [], "weightedmean"),
            (["cls_token", "mean_tokens"], [], "cls and mean"),
            (["max", "mean_sqrt_len_tokens"], [], "max and mean"),  # as a list, in newer folders
        ]
    ):
        net = sentences_of(tmp_path / str(i), modes, *more)
        for call in (
            lambda net=net: net.embed([[3, 4]]),
            lambda net=net: evaluate(net, [[3, 4]], against=net),
            lambda net=net: networks.compress(net, [[3, 4]], method="rtn", bits=4.0),
        ):
            with pytest.raises(ValueError, match=f"this network's vectors are made by {made}"):
                call()
        assert net.hidden([[3, 4]])


def test_modules_whose_weights_are_not_kept_are_not_exported(tmp_path):
    for more, lost in ((["2_Normalize"], []), (["2_Dense"], ["2_Dense"])):
        folder = tmp_path / "-".join(more)
        sentences_of(folder, ["mean_tokens"], *more)
        (folder / "modules.json").write_text("[]")
        for name in more:
            (folder / name / "config.json").write_text("{}")
        out = folder.with_suffix(".out")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            networks.load(folder).export(out)
        assert [str(one.message).partition(": ")[2] for one in told] == [
            f"{name} of sentence-transformers has weights that are not kept; modules.json is left "
            "out, so that other software reads the network alone"
            for name in lost
        ]
        assert (out / "modules.json").exists() == (not lost)
        assert (out / "1_Pooling" / "config.json").exists() == (not lost)


def test_what_is_stored_beside_matrices_takes_32_bits(tmp_path):
    net = network("bert", dtype=np.float64)
    bits = bits_by_part(net)
    for part in ("embeddings and head", "norms and biases"):
        assert bits[part][0] == 32 * bits[part][1]


def test_padding_that_is_no_int_is_named(tmp_path):
    for kind in ("bert", "roberta"):
        with pytest.raises(dn.FormatError, match="padding: found '1', expected an int"):
            network(kind, pad_token_id="1")


def test_texts_are_as_long_as_the_folder_says(tmp_path):
    net = sentences_of(tmp_path / "net", ["mean_tokens"], max_seq_length=3)
    net.tokenizer = words()
    assert np.array_equal(net.embed(["a b c d"]), net.embed(["a b d"]))
    assert not np.allclose(net.embed(["a b c d"], 4), net.embed(["a b d"]))
    told = tmp_path / "net" / "sentence_bert_config.json"
    told.rename(told.with_name("sentence_roberta_config.json"))
    assert networks.load(tmp_path / "net").config.sentence_length == 3


@pytest.mark.parametrize(("said", "length"), [(5, 5), (10**30, 16), (None, 16)])
def test_texts_of_newer_folders_are_as_long_as_their_tokenizer_says(said, length, tmp_path):
    folder = tmp_path / "net"
    sentences_of(folder, ["mean_tokens"], transformer_task="feature-extraction")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": said}))
    assert networks.load(folder).config.sentence_length == 0  # a tokenizer's limit alone
    (folder / "modules.json").write_text("[]")
    assert networks.load(folder).config.sentence_length == length


def test_texts_are_read_as_the_folder_of_vectors_says(tmp_path):
    prompts = {"prompts": {"query": "b C "}, "default_prompt_name": "query"}
    told = tmp_path / "net" / "config_sentence_transformers.json"
    net = sentences_of(tmp_path / "net", ["mean_tokens"], do_lower_case=True)
    plain = net.tokenizer = words()
    assert np.array_equal(net.embed(["A b"]), net.embed([[4, 5]]))
    assert net.rows_of(["A b"]) == [[4, 5]]
    told.write_text(json.dumps(prompts))
    net = networks.load(tmp_path / "net")
    net.tokenizer = plain
    net.save(tmp_path / "net.h5")
    for again in (net, networks.load(tmp_path / "net.h5")):
        assert np.array_equal(again.embed(["A"]), net.embed([[5, 6, 4]]))
    pooling = {"pooling_mode_mean_tokens": True, "include_prompt": False}
    (tmp_path / "net" / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    with pytest.raises(ValueError, match="vectors are made by mean without the prompt"):
        networks.load(tmp_path / "net").embed([[4]])
    told.write_text('{"default_prompt_name": "query"}')
    with pytest.raises(dn.FormatError, match="default_prompt_name: found 'query', expected one"):
        networks.load(tmp_path / "net")


def test_a_decoders_text_is_cut_off_where_nothing_closes_it():
    net = network("llama", sentence_pooling="lasttoken")
    net.tokenizer = words()
    assert np.array_equal(net.embed(["a b c d"], 3), net.embed([[4, 5, 6]]))
    inner = tokenizers.Tokenizer.from_str(net.tokenizer.text)
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A [SEP]", special_tokens=[("[SEP]", 3)]
    )
    net.tokenizer = type(net.tokenizer)(inner.to_str())
    assert np.array_equal(net.embed(["a b c d"], 3), net.embed([[4, 5, 3]]))


# -- GGUF ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_gguf_is_the_same_network(kind, tmp_path):
    gguf = pytest.importorskip("gguf", reason="GGUF files need the extra networks")
    config = config_of(kind, tie_word_embeddings=kind == "qwen2")
    tensors = {n: a.astype(np.float32) for n, a in tensors_of(kind).items()}
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), kind)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(12)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_chat_template("{{ messages }}")
    names = {hf: own for own, hf in gguf_names().items()}
    for name, values in tensors.items():
        array = values
        parts = name.split(".")
        own = (
            names[".".join(parts[3:-1])] if parts[1] == "layers" else names[name.rsplit(".", 1)[0]]
        )
        own = f"blk.{parts[2]}.{own}" if parts[1] == "layers" else own
        if kind == "llama" and own.endswith(("attn_q", "attn_k")):  # neighbours are turned
            heads = 4 if own.endswith("q") else 2
            array = array.reshape(heads, 2, -1, 8).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(f"{own}.{parts[-1]}", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ids, mask = inputs_of(kind)
    found = networks.load(tmp_path / "x.gguf")
    assert np.allclose(
        found.logits(ids, mask), networks.build(config, tensors).logits(ids, mask), atol=1e-5
    )
    assert list(found.weights) == list(networks.build(config, tensors).weights)
    assert found.beside == {"chat_template.jinja": "{{ messages }}"}


def gguf_names():
    from diba_np.networks.gguf_layout import _NAMES

    return _NAMES


def test_parts_of_gguf_layers_that_have_no_other_name_stay_in_their_layer():
    from diba_np.networks.gguf_layout import name_of

    assert name_of("blk.1.attn_q_norm.weight") == "model.layers.1.attn_q_norm.weight"
    assert name_of("blk.11.ffn_up.bias") == "model.layers.11.mlp.up_proj.bias"
    assert [name_of(name) for name in ("output.weight", "other")] == ["lm_head.weight", "other"]


def test_gguf_of_another_architecture():
    from diba_np.networks.gguf_layout import config_of as read

    with pytest.raises(ValueError, match=r"general\.architecture must be one of llama, qwen2"):
        read({"general.architecture": "mamba"}, [], "x.gguf")
    with pytest.raises(dn.FormatError, match=r"llama.block_count: found none"):
        read({"general.architecture": "llama"}, [], "x.gguf")


def test_a_gguf_that_stretches_by_no_factor():
    from diba_np.networks.gguf_layout import _OPTIONAL, _SETTINGS
    from diba_np.networks.gguf_layout import config_of as read

    metadata = {f"llama.{end}": 1 for key, end in _SETTINGS.items() if key not in _OPTIONAL}
    metadata |= {"general.architecture": "llama", "llama.rope.scaling.type": "linear"}
    with pytest.raises(dn.FormatError, match=r"x.gguf: llama.rope.scaling.factor: found none"):
        read(metadata, [], "x.gguf")


GGUF_SETTINGS = {
    "block_count": 2,
    "embedding_length": 8,
    "feed_forward_length": 12,
    "attention.head_count": 4,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "context_length": 64,
}


def gguf_config(**more):
    from diba_np.networks.gguf_layout import config_of as read

    settings = {**GGUF_SETTINGS, **{key.replace("__", "."): value for key, value in more.items()}}
    metadata = {f"llama.{key}": value for key, value in settings.items()}
    metadata |= {"tokenizer.ggml.eos_token_id": 7, "tokenizer.ggml.eot_token_id": 9}
    return read({"general.architecture": "llama", **metadata}, [], "x.gguf")


def test_gguf_stretches_positions():
    linear = {"rope_type": "linear", "factor": 4.0}
    assert "rope_scaling" not in gguf_config(rope__dimension_count=2)
    assert gguf_config(rope__scale_linear=4.0)["rope_scaling"] == linear
    assert gguf_config(rope__scaling__factor=4.0)["rope_scaling"] == linear
    stated = {"rope__scaling__type": "none", "rope__scaling__factor": 4.0}
    assert "rope_scaling" not in gguf_config(**stated)


def test_gguf_ends_at_turns_too():
    assert gguf_config()["eos_token_id"] == [7, 9]


def test_gguf_says_how_vectors_are_made():
    from diba_np.networks.kind import read_config

    def read(**settings):
        return read_config(gguf_config(**settings) | {"vocab_size": 9})

    found = [read(pooling_type=number).pooling for number in (0, 3, 4, 9)]
    assert found == ["mean", "lasttoken", "rank", "pooling_type 9"]
    with pytest.raises(ValueError, match="this one looks at later ones too"):
        read(attention__causal=False)


def test_gguf_settings_that_are_not_read():
    with pytest.raises(ValueError, match=r"dimension_count must be the 2 channels of a head, got"):
        gguf_config(rope__dimension_count=1)
    with pytest.raises(dn.FormatError, match=r"head_count: found \[4, 4\], expected a number"):
        gguf_config(attention__head_count=[4, 4])


def test_factors_of_rotary_positions_are_exported_by_name(tmp_path):
    from diba_np.networks.blocks.rotary import frequencies

    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain, stretched = (frequencies(16, 5e5, scaling) for scaling in (None, llama3))
    factors = np.float32(plain / stretched).tolist()
    assert len(set(factors)) == 3
    for made, named in ((factors, llama3), ([2.0] * 8, {"rope_type": "linear", "factor": 2.0})):
        scaling = {"rope_type": "factors", "factors": made}
        net = network("llama", head_dim=16, rope_theta=5e5, rope_scaling=scaling)
        folder = net.export(tmp_path / named["rope_type"])
        assert json.loads((folder / "config.json").read_text())["rope_scaling"] == named
        ids = np.array([[3, 4, 5]])
        found = networks.load(folder, dtype=np.float64).logits(ids)
        assert np.allclose(found, net.logits(ids), atol=1e-4)
    scaling = {"rope_type": "factors", "factors": [1.0, *factors[1:-1], 7.0]}
    net = network("llama", head_dim=16, rope_theta=5e5, rope_scaling=scaling)
    with pytest.raises(ValueError, match=r"are not those of a Llama 3.* save keeps them"):
        net.export(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_decoders_are_all_there():
    assert set(DECODERS) < set(CONFIGS)
