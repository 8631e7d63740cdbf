import json
import logging
import math
import os
import pickle
import re
import socket
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.tolerances import MODULE, ONE_OP, WHOLE_MODEL

from causalrt.errors import CheckpointError, ConfigError, ExecutorError, PromptError
from causalrt.install_hint import install_extra
from causalrt.model.prompt_cache import PromptCache
from causalrt.model.text.umt5 import MAX_PROMPT_CHARS, TextEncoder, clean_prompt
from causalrt.model.text.umt5_checkpoint import empty_encoder, infer_sizes, stored_key

pytest.importorskip("transformers")

WAN_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
TIED = "encoder.embed_tokens.weight"
SIZES = {"d_model": 32, "d_kv": 5, "d_ff": 48, "num_layers": 2, "num_heads": 3}
XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
PROMPTS = ["a cat", "", "A  red fox\n runs, &amp; jumps over the  lazy dog", "ﬁne “quotes” sâ€™il", "a </s> b <pad> c"]

# Wan's names, per block and outside, with transformers' beside them; written down a second time on purpose.
WAN_BLOCK = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
}
WAN_OUTSIDE = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}


def wan_names(num_layers):
    """Wan's key -> transformers' key."""
    pairs = dict(WAN_OUTSIDE)
    for i in range(num_layers):
        pairs |= {f"blocks.{i}.{wan}": f"encoder.block.{i}.{theirs}" for wan, theirs in WAN_BLOCK.items()}
    return {f"{wan}.weight": f"{theirs}.weight" for wan, theirs in pairs.items()}


def write_tokenizer(folder, *, byte_fallback=False):
    """A tokenizer.json like that of umt5: Unigram, blanks as ▁, each text ended by </s>, sentinels behind the pieces."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["▁a", "▁cat", "▁fox", "▁the", "▁over", "▁dog", "▁jump", "▁red", "s", "ing", "er"]
    letters = "abcdefghijklmnopqrstuvwxyzABCR,.&'\"<>/"
    pieces = [(token, 0.0) for token in ("<pad>", "</s>", *(("<s>", "<unk>") if byte_fallback else ("<unk>", "<s>")))]
    pieces += [(f"<0x{i:02X}>", 0.0) for i in range(256)] if byte_fallback else []
    pieces += [("▁", -3.0)] + [(word, -4.0) for word in words] + [(letter, -6.0) for letter in letters if letter != "s"]
    model = tokenizers.models.Unigram(pieces, unk_id=3 if byte_fallback else 2, byte_fallback=byte_fallback)
    tokenizer = tokenizers.Tokenizer(model)
    pre = tokenizers.pre_tokenizers
    tokenizer.pre_tokenizer = pre.Sequence([pre.WhitespaceSplit(), pre.Metaspace(prepend_scheme="always")])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    sentinels = [f"<extra_id_{i}>" for i in range(10)]
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", *sentinels])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config |= {"extra_ids": len(sentinels), "additional_special_tokens": sentinels}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size()


def random_encoder(*, vocab_size, seed=7, dtype=torch.float32, **sizes):
    """Parameters by transformers' names, large enough that position, mask and gate all show in the result."""
    generator = torch.Generator().manual_seed(seed)
    shapes = empty_encoder(vocab_size=vocab_size, **{**SIZES, **sizes}).state_dict()
    state = {}
    for name, tensor in shapes.items():
        if name != TIED:
            values = torch.randn(tensor.shape, generator=generator)
            scale = 1.0 if "relative" in name or name == "shared.weight" else 1.5 / math.sqrt(tensor.shape[-1])
            state[name] = (1 + 0.1 * values if tensor.dim() == 1 else scale * values).to(dtype)
    return state


def write_wan(folder, state, **tokenizer):
    theirs = wan_names(len({name for name in state if name.endswith("SelfAttention.q.weight")}))
    write_tokenizer(folder / "google" / "umt5-xxl", **tokenizer)
    torch.save({wan: state[name] for wan, name in theirs.items()}, folder / WAN_FILE)
    return folder


def write_config(folder, state, **changes):
    sizes = infer_sizes({name: tuple(tensor.shape) for name, tensor in state.items()}, "diffusers")
    fields = {"model_type": "umt5", "feed_forward_proj": "gated-gelu", **sizes, **changes}
    (folder / "config.json").write_text(json.dumps(fields))


def write_diffusers(folder, state, **tokenizer):
    encoder = folder / "text_encoder"
    encoder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder / "tokenizer", **tokenizer)
    write_config(encoder, state)
    save_file(state, encoder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    return random_encoder(vocab_size=write_tokenizer(tmp_path_factory.mktemp("vocabulary")) + 3)


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory, state):
    return write_wan(tmp_path_factory.mktemp("wan"), state)


@pytest.fixture(scope="module")
def diffusers_folder(tmp_path_factory, state):
    return write_diffusers(tmp_path_factory.mktemp("diffusers"), state)


@pytest.fixture(scope="module")
def encoder(wan_folder):
    return TextEncoder.from_folder(wan_folder, dtype=torch.float32)


def wan_pipeline(folder, tokenizer=None):
    """The reference, with weights and tokenizer loaded by transformers itself."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    model = transformers.UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    tokenizer = tokenizer or transformers.AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    return diffusers.WanPipeline(tokenizer=tokenizer, text_encoder=model.eval(), vae=None, scheduler=None)


def embeds_from_pipeline(pipeline, prompt):
    with torch.no_grad():
        padded, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=512)
    return padded[0]


def wan_forward(weights, ids):
    """What Wan's own T5Encoder computes from tensors under its own names, in float64."""
    w = {name.removesuffix(".weight"): tensor.double() for name, tensor in weights.items()}
    num_buckets, num_heads = w["blocks.0.pos_embedding.embedding"].shape

    def norm(x, scale):
        return scale * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    n, half = len(ids), num_buckets // 2
    distance = torch.arange(n)[None, :] - torch.arange(n)[:, None]
    near, exact = distance.abs(), half // 2
    far = exact + (torch.log(near.clamp(min=1) / exact) / math.log(128 / exact) * (half - exact)).long()
    bucket = (distance > 0).long() * half + torch.where(near < exact, near, far.clamp(max=half - 1))

    x = w["token_embedding"][ids]
    for i in range(sum(name.endswith("norm1") for name in w)):
        b = f"blocks.{i}."
        h = norm(x, w[b + "norm1"])
        q, k, v = ((h @ w[f"{b}attn.{part}"].T).unflatten(-1, (num_heads, -1)).transpose(0, 1) for part in "qkv")
        logits = q @ k.transpose(1, 2) + w[b + "pos_embedding.embedding"][bucket].permute(2, 0, 1)
        x = x + (logits.softmax(-1) @ v).transpose(0, 1).flatten(1) @ w[b + "attn.o"].T
        h = norm(x, w[b + "norm2"])
        gate = F.gelu(h @ w[b + "ffn.gate.0"].T, approximate="tanh")
        x = x + (h @ w[b + "ffn.fc1"].T * gate) @ w[b + "ffn.fc2"].T
    return norm(x, w["norm"])


def parameters(encoder):
    return encoder._model.parameters()


# ---- the numbers


@pytest.mark.parametrize("prompt", [*PROMPTS, "the cat jumps " * 200])
def test_equals_the_padded_run_of_wan_pipeline(encoder, diffusers_folder, prompt):
    reference = embeds_from_pipeline(wan_pipeline(diffusers_folder), prompt)
    rows = encoder.encode(prompt)
    assert (rows.dtype, rows.device.type, rows.shape[1]) == (torch.float32, "cpu", 32)
    torch.testing.assert_close(rows, reference[: len(rows)], atol=MODULE, rtol=MODULE)
    assert reference[len(rows) :].count_nonzero() == 0
    assert encoder.tokenize(prompt).truncated == (len(rows) == 512)


def test_equals_wans_own_formulas(encoder, wan_folder):
    weights = torch.load(wan_folder / WAN_FILE, weights_only=True)
    prompt = "the red fox jumps over a cat " * 30  # farther than the buckets that count single steps
    tokens = encoder.tokenize(prompt)
    expected = wan_forward(weights, torch.tensor(tokens.ids))
    assert len(expected) > 200
    torch.testing.assert_close(encoder.encode(prompt).double(), expected, atol=WHOLE_MODEL, rtol=WHOLE_MODEL)


def test_layouts_agree(tmp_path, encoder, state, diffusers_folder):
    together = tmp_path / "together"
    write_tokenizer(together)
    write_config(together, state)
    save_file(state | {TIED: state["shared.weight"].clone()}, together / "model.safetensors")

    sharded = write_diffusers(tmp_path / "sharded", state)
    place = sharded / "text_encoder"
    (place / "model.safetensors").unlink()
    state = state | {TIED: state["shared.weight"]}
    del state["shared.weight"]  # a release may have the embeddings under either name
    weight_map = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(state))}
    for shard in set(weight_map.values()):
        save_file({name: state[name] for name in state if weight_map[name] == shard}, place / shard)
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    for folder, layout in ((diffusers_folder, "diffusers"), (together, "transformers"), (sharded, "diffusers")):
        other = TextEncoder.from_folder(folder, dtype=torch.float32, text_dim=32)
        assert (other.layout, other.text_dim) == (layout, 32)
        assert all(torch.equal(*pair) for pair in zip(*map(parameters, (other, encoder)), strict=True))
        for prompt in PROMPTS:  # not bit for bit: a file's alignment decides which kernel multiplies
            torch.testing.assert_close(other.encode(prompt), encoder.encode(prompt), atol=ONE_OP, rtol=ONE_OP)
    assert encoder.layout == "wan"


def test_the_mask_is_needed_where_there_is_padding(encoder, state):
    tokens = encoder.tokenize("a red cat").ids
    padded = torch.tensor([[*tokens, *([0] * 20)]])
    with torch.no_grad():
        masked, unmasked = (
            encoder._model(input_ids=padded, attention_mask=mask).last_hidden_state[0, : len(tokens)]
            for mask in ((padded != 0).long(), torch.ones_like(padded))
        )
    rows = encoder.encode("a red cat")
    torch.testing.assert_close(masked, rows, atol=MODULE, rtol=MODULE)
    assert (unmasked - rows).abs().max() > 0.1


def test_bfloat16_is_near_float32(tmp_path, state):
    folder = write_wan(tmp_path, {name: tensor.bfloat16() for name, tensor in state.items()})
    exact, rounded = (TextEncoder.from_folder(folder, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert (rounded.dtype, exact.dtype) == (torch.bfloat16, torch.float32)
    for prompt in PROMPTS:
        one, other = rounded.encode(prompt), exact.encode(prompt)
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.03 * other.norm()


def test_characters_without_a_token_are_bytes_if_the_file_says_so(tmp_path):
    """The T5 class of transformers 5 reads the same file otherwise: its tokenizer knows no byte fallback."""
    transformers = pytest.importorskip("transformers")
    vocab_size = write_tokenizer(tmp_path / "tokenizer", byte_fallback=True)
    write_diffusers(tmp_path, random_encoder(vocab_size=vocab_size), byte_fallback=True)
    encoder = TextEncoder.from_folder(tmp_path, dtype=torch.float32)
    file = str(tmp_path / "tokenizer" / "tokenizer.json")
    as_it_stands = transformers.PreTrainedTokenizerFast(tokenizer_file=file, pad_token="<pad>", eos_token="</s>")
    prompt = "a cät 🦙"
    reference = embeds_from_pipeline(wan_pipeline(tmp_path, as_it_stands), prompt)
    rows = encoder.encode(prompt)
    assert len(encoder.tokenize("ä").ids) == 4  # blank, two bytes, end
    torch.testing.assert_close(rows, reference[: len(rows)], atol=MODULE, rtol=MODULE)
    assert reference[len(rows) :].count_nonzero() == 0


# ---- keys and sizes


def test_wan_keys_at_real_size():
    dim, attention, ffn = 4096, 4096, 10240
    shapes = {"token_embedding": (256384, dim), "norm": (dim,)}
    for i in range(24):
        block = {"norm1": (dim,), "norm2": (dim,), "attn.o": (dim, attention), "ffn.fc2": (dim, ffn)}
        block |= {f"attn.{part}": (attention, dim) for part in "qkv"}
        block |= {"ffn.gate.0": (ffn, dim), "ffn.fc1": (ffn, dim), "pos_embedding.embedding": (32, 64)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    shapes = {f"{name}.weight": shape for name, shape in shapes.items()}
    assert len(shapes) == 242

    sizes = infer_sizes(shapes, "wan")
    assert sizes == XXL | {"relative_attention_num_buckets": 32}
    model = {name: tuple(tensor.shape) for name, tensor in empty_encoder(**sizes).state_dict().items()}
    assert len(model) == 243
    assert {stored_key(name, "wan"): shape for name, shape in model.items()} == shapes
    assert {stored_key(name, "wan"): name for name in model if name != TIED} == wan_names(24)
    assert sum(math.prod(shape) for shape in shapes.values()) == 5_680_910_336
    assert infer_sizes(model, "diffusers") == sizes
    assert infer_sizes({}, "wan") == sizes


def damaged(state):
    state = dict(state)
    del state["blocks.0.attn.q.weight"], state["norm.weight"]
    state["blocks.1.ffn.fc1.weight"] = state["blocks.1.ffn.fc1.weight"].T.contiguous()
    state["blocks.1.attn.k.weight"] = state["blocks.1.attn.k.weight"].to(torch.int8)
    state["head.weight"] = torch.zeros(2)
    return state


def test_every_bad_tensor_is_listed_at_once(tmp_path, state):
    path = write_wan(tmp_path, state) / WAN_FILE
    torch.save(damaged(torch.load(path, weights_only=True)), path)
    with pytest.raises(CheckpointError) as caught:
        TextEncoder.from_folder(tmp_path, text_dim=4096)
    message = str(caught.value)
    assert "missing (2): blocks.0.attn.q.weight, norm.weight" in message
    assert "extra (1): head.weight" in message
    assert "misshapen (2): " in message
    assert "blocks.1.ffn.fc1.weight (got torch.float32 [32, 48], wanted floating [48, 32])" in message
    assert "blocks.1.attn.k.weight (got torch.int8" in message


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("writer", [write_wan, write_diffusers])
def test_every_stored_type_is_converted(tmp_path, state, writer, dtype):
    folder = writer(tmp_path, {name: tensor.to(dtype) for name, tensor in state.items()})
    for wanted in (torch.bfloat16, torch.float32):
        model = TextEncoder.from_folder(folder, dtype=wanted)._model
        assert model.shared.weight.data_ptr() == model.encoder.embed_tokens.weight.data_ptr()
        for name, parameter in model.state_dict().items():
            source = state["shared.weight" if name == TIED else name]
            assert torch.equal(parameter, source.to(dtype).to(wanted)), name
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())


# ---- text


def test_cleaning_of_the_reference():
    assert clean_prompt(" &amp;lt;b&amp;gt;\r\n\t\u3000sâ€™il\x0c ") == "<b> s'il"
    assert clean_prompt("") == clean_prompt(" \n ") == ""


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(exclude_categories=())))
@example("&#28;&#x1f;a&nbsp;b\x85c\u2028d")
@example("< &amp;lt;")  # with a < in the text, ftfy leaves entities alone
@example("\xa0\x1c")
def test_cleaning_equals_that_of_wan_pipeline(prompt):
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    try:
        cleaned = clean_prompt(prompt)
    except PromptError:
        return
    assert cleaned == prompt_clean(prompt)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "must be a str, got NoneType"),
        (["a cat"], "must be a str, got list"),
        ("a\x00cat", r"U\+0000 at position 1.*remove it"),
        ("\x1b[31mred", r"U\+001B at position 0"),
        ("a \ud83d cat", r"U\+D83D at position 2"),
        ("a" * (MAX_PROMPT_CHARS + 1), "20000 characters, got 20001; shorten it"),
        ("&#" + "9" * 5000 + ";", "an entity that is no character"),
    ],
    ids=["none", "list", "nul", "escape", "surrogate", "huge", "entity"],
)
def test_unusable_prompts(encoder, prompt, message):
    for call in (encoder.encode, encoder.tokenize):
        with pytest.raises(PromptError, match=message):
            call(prompt)


def test_a_long_prompt_loses_its_end(encoder, caplog):
    words = " ".join(["cat"] * 511)
    whole, cut, huge = words, words + " fox", "cat " * (MAX_PROMPT_CHARS // 4)
    assert len(encoder.tokenize(whole).ids) == len(encoder.tokenize(cut).ids) == 512
    assert [encoder.tokenize(prompt).truncated for prompt in (whole, cut, huge)] == [False, True, True]
    assert encoder.tokenize(cut).ids[-1] == 1
    with caplog.at_level(logging.WARNING):
        assert torch.equal(encoder.encode(whole), encoder.encode(cut))
    assert [record.message for record in caplog.records] == ["a prompt of 2047 characters was cut to 512 tokens"]


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_shorter_limit(wan_folder, max_tokens):
    encoder = TextEncoder.from_folder(wan_folder, max_tokens=max_tokens)
    assert encoder.encode("the cat jumps over the dog").shape == (max_tokens, 32)
    assert encoder.tokenize("the cat jumps over the dog").ids[-1] == 1
    assert encoder.encode("").shape == (1, 32)


# ---- cache


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_hits_return_the_same_values(wan_folder, dtype):
    encoder = TextEncoder.from_folder(wan_folder, dtype=dtype)
    first = encoder.encode("a cat")
    expected = first.clone()
    first.zero_()
    for same in ("a cat", "  a\n cat ", "a&nbsp;cat"):
        assert torch.equal(encoder.encode(same), expected)
    encoder.encode("a dog")
    info = encoder.cache_info()
    assert (info.hits, info.misses, info.entries) == (3, 2, 2)
    assert 0 < info.held_bytes <= info.max_bytes == 64 * 2**20


def test_no_cache(wan_folder):
    encoder = TextEncoder.from_folder(wan_folder, cache_bytes=0)
    assert torch.equal(encoder.encode("a cat"), encoder.encode("a cat"))
    info = encoder.cache_info()
    assert (info.hits, info.misses, info.entries, info.held_bytes) == (0, 2, 0, 0)


def test_the_prompt_unused_for_longest_goes_first():
    entry = torch.zeros(100)
    size = sys.getsizeof("a") + entry.nbytes
    cache = PromptCache(2 * size)
    cache.put("a", entry)
    cache.put("b", entry)
    assert cache.get("a") is entry
    cache.put("c", entry)
    assert [cache.get(text) is not None for text in "abc"] == [True, False, True]
    cache.put("c", entry)
    assert (cache.info().entries, cache.info().held_bytes) == (2, 2 * size)
    cache.put("d", torch.zeros(300))
    assert (cache.info().entries, cache.info().held_bytes) == (0, 0)


def test_threads_share_the_work(wan_folder, encoder):
    shared = TextEncoder.from_folder(wan_folder, dtype=torch.float32)
    results = []

    def work(offset):
        results.extend((prompt, shared.encode(prompt)) for prompt in PROMPTS[offset:] + PROMPTS[:offset])

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6 * len(PROMPTS)
    assert all(torch.equal(rows, encoder.encode(prompt)) for prompt, rows in results)
    info = shared.cache_info()
    assert (info.misses, info.hits) == (len(PROMPTS), 5 * len(PROMPTS))


# ---- unhappy folders


def test_what_was_looked_for(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        TextEncoder.from_folder(tmp_path / "nowhere")
    for file in (
        WAN_FILE,
        "google/umt5-xxl/tokenizer.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
    ):
        assert str(tmp_path / "nowhere" / file) in str(caught.value)


@pytest.mark.parametrize(
    ("writer", "file"),
    [
        (write_wan, "google/umt5-xxl/tokenizer.json"),
        (write_diffusers, "tokenizer/tokenizer.json"),
        (write_diffusers, "text_encoder/config.json"),
    ],
)
def test_weights_without_the_rest(tmp_path, state, writer, file):
    (writer(tmp_path, state) / file).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {tmp_path / file}; copy what is missing"):
        TextEncoder.from_folder(tmp_path)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_payload_is_refused(tmp_path, state, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_wan(tmp_path, state) / WAN_FILE
    torch.save({"token_embedding.weight": Payload()}, path)
    with pytest.raises(CheckpointError, match=r"holds code .*mkdir.*not executed"):
        TextEncoder.from_folder(tmp_path)
    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(CheckpointError, match="nothing was executed"):
        TextEncoder.from_folder(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda w: {"model": w}, "plain dict of tensors"),
        (lambda w: [*w.values()], "plain dict of tensors by name, got list"),
        (lambda w: {}, r"missing \(242\)"),
        (lambda w: {"norm.weight": torch.zeros(3).to_sparse()}, "plain dict of tensors"),
        (lambda w: {f"model.{name}": tensor for name, tensor in w.items()}, "extra .*model.blocks.0"),
    ],
    ids=["nested", "list", "empty", "sparse", "prefixed"],
)
def test_other_torch_files(tmp_path, state, content, message):
    path = write_wan(tmp_path, state) / WAN_FILE
    torch.save(content(torch.load(path, weights_only=True)), path)
    with pytest.raises(CheckpointError, match=message):
        TextEncoder.from_folder(tmp_path)


@pytest.mark.parametrize("writer", [write_wan, write_diffusers])
def test_cut_off_files(tmp_path, state, writer):
    folder = writer(tmp_path, state)
    path = folder / WAN_FILE if writer is write_wan else folder / "text_encoder" / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 5, 1000, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="damaged"):
            TextEncoder.from_folder(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "must map tensor names"),
        ("[]", "must map tensor names"),
        ('{"weight_map": {"shared.weight": 3}}', "must map tensor names"),
        ('{"weight_map": {"shared.weight": "../model.safetensors"}}', "plain name"),
        ('{"weight_map": {"shared.weight": "gone.safetensors"}}', "lacks 1 of 1 shards: gone.safetensors"),
    ],
)
def test_bad_indexes(tmp_path, state, index, message):
    folder = write_diffusers(tmp_path, state)
    (folder / "text_encoder" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        TextEncoder.from_folder(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "t5"}, "model_type 't5', wanted 'umt5'"),
        ({"feed_forward_proj": "relu"}, "feed_forward_proj 'relu'"),
        ({"num_heads": 5, "d_kv": 3}, "d_kv 3, wanted 5; num_heads 5, wanted 3"),
        ({"layer_norm_epsilon": "tiny"}, "layer_norm_epsilon 'tiny', wanted a positive float"),
        ({"relative_attention_max_distance": 0}, "wanted a positive int"),
    ],
)
def test_other_configurations(tmp_path, state, changes, message):
    folder = write_diffusers(tmp_path, state)
    write_config(folder / "text_encoder", state, **changes)
    with pytest.raises(CheckpointError, match=message):
        TextEncoder.from_folder(folder)


@pytest.mark.parametrize("text", ["{", "[]", '"umt5"'])
def test_configurations_that_are_none(tmp_path, state, text):
    folder = write_diffusers(tmp_path, state)
    (folder / "text_encoder" / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        TextEncoder.from_folder(folder)


def test_settings_of_the_configuration_count(tmp_path, state, encoder):
    folder = write_diffusers(tmp_path, state)
    write_config(folder / "text_encoder", state, layer_norm_epsilon=0.5)
    other = TextEncoder.from_folder(folder, dtype=torch.float32)
    assert (other.encode("a cat") - encoder.encode("a cat")).abs().max() > 0.01


def test_bad_tokenizers(tmp_path, state):
    folder = write_wan(tmp_path, state)
    path = folder / "google" / "umt5-xxl" / "tokenizer.json"
    plain = json.loads(path.read_text())
    path.write_text(json.dumps(plain | {"post_processor": None}))
    with pytest.raises(CheckpointError, match="must end each text with one token"):
        TextEncoder.from_folder(folder)
    path.write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer.json is damaged or no tokenizer"):
        TextEncoder.from_folder(folder)
    write_tokenizer(path.parent, byte_fallback=True)
    with pytest.raises(CheckpointError, match=r"has \d+ tokens, but .* has embeddings for \d+; take both"):
        TextEncoder.from_folder(folder)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"text_dim": 4096}, CheckpointError, "width 32, but the model wants text_dim 4096"),
        ({"dtype": torch.float16}, ConfigError, "bfloat16 or torch.float32, got torch.float16"),
        ({"max_tokens": 0}, ConfigError, "1 to 512, got 0"),
        ({"max_tokens": 513}, ConfigError, "1 to 512, got 513"),
        ({"cache_bytes": -1}, ConfigError, "negative"),
        ({"device": "warp"}, ConfigError, "choose cpu or cuda"),
        ({"device": "meta"}, ConfigError, "runs on cpu or cuda"),
        ({"device": "cuda:99"}, ExecutorError, "no device cuda:99 here"),
    ],
)
def test_settings_that_cannot_be(wan_folder, options, error, message):
    with pytest.raises(error, match=message):
        TextEncoder.from_folder(wan_folder, **options)


@pytest.mark.parametrize("library", ["transformers", "tokenizers", "ftfy"])
def test_libraries_of_the_extra(wan_folder, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ExecutorError, match=rf"needs {library}.*{re.escape(install_extra('video'))}"):
        TextEncoder.from_folder(wan_folder)


def test_nothing_is_asked_of_the_network(wan_folder, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert TextEncoder.from_folder(wan_folder).encode("a cat").shape[1] == 32


def test_the_libraries_are_imported_when_they_are_needed():
    code = "import sys, causalrt, causalrt.model.text.umt5; print({'transformers', 'tokenizers', 'ftfy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# ---- memory


MEASURE = textwrap.dedent("""
    import re, sys
    from pathlib import Path
    import torch
    from causalrt.model.text.umt5 import TextEncoder
    from causalrt.model.text.umt5_checkpoint import video_library

    def status(field):
        return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    TextEncoder.from_folder(Path(sys.argv[1])).encode("a cat")  # libraries and their first use
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    encoder = TextEncoder.from_folder(Path(sys.argv[2]), dtype=getattr(torch, sys.argv[3]))
    loaded = status("VmHWM") - before
    encoder.encode("the red fox jumps over the dog")
    num_bytes = sum(p.nbytes for p in {p.data_ptr(): p for p in encoder._model.parameters()}.values())
    print(num_bytes, loaded, status("VmHWM") - before)
""")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("writer", "stored", "wanted"),
    [
        (write_wan, "bfloat16", "bfloat16"),
        (write_wan, "bfloat16", "float32"),
        (write_diffusers, "bfloat16", "float32"),
        (write_diffusers, "float32", "bfloat16"),
    ],
)
def test_memory_is_that_of_the_target(tmp_path, wan_folder, writer, stored, wanted):
    sizes = {"d_model": 1024, "d_kv": 64, "d_ff": 2560, "num_layers": 12, "num_heads": 16}
    folder = writer(tmp_path, random_encoder(vocab_size=8192, dtype=getattr(torch, stored), **sizes))
    command = [sys.executable, "-c", MEASURE, str(wan_folder), str(folder), wanted]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    num_bytes, loaded, encoded = map(int, output.split())
    logging.getLogger(__name__).info(
        "%s, %s to %s: %.0f MiB, %.3f of it at load, %.3f with encoding",
        *(writer.__name__, stored, wanted, num_bytes / 2**20, loaded / num_bytes, encoded / num_bytes),
    )
    assert num_bytes > 250 * 2**20
    assert encoded < 1.3 * num_bytes
