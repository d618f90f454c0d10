"""From texts to rows: order, packing, prompts, lengths, errors; on a tiny BERT."""

import json
from pathlib import Path

import jax
import numpy as np
import plain_model
import pytest
import tiny_encoder
from safetensors.numpy import load_file, save_file

from arctic_jax.config import EngineConfig
from arctic_jax.embedding import runner
from arctic_jax.embedding.embedder import Embedder, EmbeddingParams, _chunks
from arctic_jax.embedding.pooling import Pooling, pool
from arctic_jax.embedding.settings import EmbeddingSettings
from arctic_jax.encoder_batch import EncoderBucket, pack, unpack
from arctic_jax.errors import CheckpointError, InvalidRequestError, UnsupportedModelError
from arctic_jax.models.registry import is_encoder
from arctic_jax.testing import TINY_LLAMA

TEXTS = ["a", "Hello there", "x" * 200, "naïve 日本語 🧑‍🚀", "the end", "y" * 512, "z" * 37]


def make(directory: Path, **options: object) -> Embedder:
    """In float32, whatever the processor is fastest in: results are compared closely."""
    options = {"dtype": "float32"} | options
    return Embedder(EngineConfig.from_keywords(model=str(directory), **options))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder.write(tmp_path_factory.mktemp("encoder") / "model")


@pytest.fixture(scope="module")
def embedder(directory: Path) -> Embedder:
    return make(directory, max_num_batched_tokens=512)


def test_packed_equals_one_by_one_in_any_order(embedder: Embedder) -> None:
    random = np.random.default_rng(0)
    texts = TEXTS * 5 + ["w" * int(n) for n in random.integers(1, 512, 60)]
    alone = np.concatenate([embedder.embed([text]) for text in texts])
    assert alone.dtype == np.float32
    assert alone.shape == (len(texts), 32)
    for order in (np.arange(len(texts)), random.permutation(len(texts))):
        together = embedder.embed([texts[i] for i in order])
        np.testing.assert_allclose(together, alone[order], atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1, atol=1e-6)
    assert len(np.unique(alone.round(4), axis=0)) == len(set(texts))


def test_many_texts(embedder: Embedder) -> None:
    texts = [f"text number {i}" for i in range(10_000)]
    reports: list[tuple[str, int, int]] = []
    rows = embedder.embed(texts, report=lambda *report: reports.append(report))
    some = [0, 1023, 1024, 5000, 9999]
    np.testing.assert_allclose(rows[some], embedder.embed([texts[i] for i in some]), atol=2e-6)
    assert reports[-1] == ("Embedding", 10_000, 10_000)


def test_no_texts(embedder: Embedder) -> None:
    assert embedder.embed([]).shape == (0, 32)


def test_nothing_is_compiled_after_the_start(embedder: Embedder) -> None:
    compiled: list[str] = []

    def listen(event: str, *_: object, **__: object) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        embedder.embed(["v" * n for n in range(1, 512, 7)])
        embedder.embed(["short"])
        assert compiled == []
        jax.jit(lambda x: x + 12345.0)(1.0)
        assert compiled  # the listener does hear compilations
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(("pooling", "row"), [("cls", 0), ("last", -1), ("mean", None)])
def test_pooling(pooling: Pooling, row: int | None) -> None:
    bucket = EncoderBucket(16, 2)
    packed = pack([[[1] * 5, [2] * 9], [[3]]], bucket)
    hidden = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
    rows = np.asarray(pool(hidden, unpack(packed, bucket), pooling))[:3]
    texts = hidden[:5], hidden[5:14], hidden[16:17]
    wanted = [text.mean(0) if row is None else text[row] for text in texts]
    np.testing.assert_allclose(rows, wanted, atol=1e-6)


def test_a_model_that_does_not_normalize(tmp_path: Path) -> None:
    model = make(tiny_encoder.write(tmp_path / "m", "cls_token", normalize=False), max_model_len=32)
    (row,), (short,) = (model.embed(["hello"], EmbeddingParams(dimensions=n)) for n in (32, 8))
    assert abs(np.linalg.norm(row) - 1) > 0.1
    np.testing.assert_array_equal(short, row[:8])
    assert np.abs(model.embed(["jello"])[0] - row).max() > 0.1  # another first token


def test_prompts(embedder: Embedder) -> None:
    query = EmbeddingParams(prompt_name="query")
    plain = embedder.embed(["query: hi", "hi", "say: hi"])
    np.testing.assert_allclose(embedder.embed(["hi"], query), plain[:1], atol=2e-6)
    document = EmbeddingParams(prompt_name="document")
    np.testing.assert_allclose(embedder.embed(["hi"], document), plain[1:2], atol=2e-6)
    own = EmbeddingParams(prompt="say: ")
    np.testing.assert_allclose(embedder.embed(["hi"], own), plain[2:], atol=2e-6)
    with pytest.raises(InvalidRequestError, match=r"no prompt 'passage'.*'document', 'query'"):
        embedder.embed(["hi"], EmbeddingParams(prompt_name="passage"))
    with pytest.raises(InvalidRequestError, match="not both"):
        embedder.embed(["hi"], EmbeddingParams(prompt_name="query", prompt="x"))


def test_matryoshka_dimensions(embedder: Embedder) -> None:
    rows = embedder.embed(TEXTS)
    short = embedder.embed(TEXTS, EmbeddingParams(dimensions=8))
    assert short.shape == (len(TEXTS), 8)
    wanted = rows[:, :8] / np.linalg.norm(rows[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(short, wanted, atol=1e-6)
    for wrong in (0, 33, -1, True, 2.5):
        with pytest.raises(InvalidRequestError, match="dimensions must be"):
            embedder.embed(TEXTS, EmbeddingParams(dimensions=wrong))


def test_long_texts_are_cut_or_refused(embedder: Embedder) -> None:
    exactly, long = "a" * 512, "a" * 600
    np.testing.assert_allclose(*embedder.embed([exactly, long]), atol=2e-6)
    strict = EmbeddingParams(truncate=False)
    embedder.embed([exactly], strict)
    with pytest.raises(InvalidRequestError, match=r"text 1: the text has 600 tokens.*takes 512"):
        embedder.embed([exactly, long], strict)


def test_the_limit_of_the_model_and_of_the_user(tmp_path: Path) -> None:
    directory = tiny_encoder.write(tmp_path / "m", max_seq_length=20)
    assert make(directory).runner.max_length == 20
    assert make(directory, max_model_len=40).runner.max_length == 40
    with pytest.raises(ValueError, match="max_model_len=513"):
        make(directory, max_model_len=513)


def test_chunks_are_short_and_hold_every_text() -> None:
    texts = ["x" * (n % 300) for n in range(5000)] + ["y" * 500_000, [1] * 9, "z"]
    chunks = list(_chunks(texts))
    assert [text for chunk in chunks for text in chunk] == texts
    assert all(len(chunk) <= 1024 for chunk in chunks)
    assert all(len(chunk) == 1 or sum(map(len, chunk)) <= 100_009 for chunk in chunks)
    assert [sum(map(len, chunk)) > 12_500 for chunk in chunks[:3]] == [False, True, True]
    assert list(_chunks([])) == []


def test_token_ids_are_texts_too(embedder: Embedder) -> None:
    ids = list(b"Hello there")
    text, listed, array = embedder.embed(["Hello there", ids, np.array(ids)])
    np.testing.assert_allclose(listed, text, atol=2e-6)
    np.testing.assert_allclose(array, text, atol=2e-6)


@pytest.mark.parametrize("bad", ["", None, 7, "\ud800", [], [-1], [10**6], ["a"], ("a", "b")])
def test_a_bad_text_fails_alone(embedder: Embedder, bad: object) -> None:
    texts = ["good", bad, "fine"]
    rows = embedder.embed(texts, on_error="nan")
    assert np.isnan(rows[1]).all()
    np.testing.assert_allclose(rows[[0, 2]], embedder.embed(["good", "fine"]), atol=2e-6)
    with pytest.raises(InvalidRequestError, match="text 1"):
        embedder.embed(texts)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="is about CPUs")
@pytest.mark.parametrize(
    ("features", "dtype"),
    [("avx2 avx512f avx512_bf16", "bfloat16"), ("avx2 avx512f", "float32"), (None, "float32")],
)
def test_cpus_that_multiply_bfloat16_do(
    directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    features: str | None,
    dtype: str,
) -> None:
    described = tmp_path / "cpuinfo"
    if features is not None:
        described.write_text(f"processor\t: 0\nflags\t\t: fpu {features}\n")
    monkeypatch.setattr(runner, "_PROCESSOR", described)
    embedder = make(directory, dtype="auto", max_num_batched_tokens=64, max_model_len=32)
    assert embedder.runner.dtype == dtype
    assert embedder.embed(["one", "two"]).dtype == np.float32


def test_random_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_encoder.CONFIG))
    rows = make(tmp_path, load_format="dummy", max_model_len=32).embed([[1, 2], [3]])
    assert np.isfinite(rows).all()


def test_a_decoder_embeds_by_its_last_token(tmp_path: Path) -> None:
    """With and without `model.` before the names, which `AutoModel` leaves out."""
    directory = tiny_encoder.write(tmp_path / "m", "lasttoken", config=TINY_LLAMA)
    texts = ["Hello there", "x" * 100, "naïve", "end"]
    embedder = make(directory, max_num_batched_tokens=256)
    rows = embedder.embed(texts)
    tensors = load_file(directory / "model.safetensors")
    no_head = {"lm_head.weight": np.eye(TINY_LLAMA["hidden_size"])}
    for text, row in zip(texts, rows, strict=True):
        token_ids = embedder.text_encoder.encode([text])[0]
        last = plain_model.logits(TINY_LLAMA, tensors | no_head, list(token_ids))[-1]
        np.testing.assert_allclose(row, last / np.linalg.norm(last), atol=1e-5)
    save_file(
        {name.removeprefix("model."): tensor for name, tensor in tensors.items()},
        directory / "model.safetensors",
    )
    np.testing.assert_array_equal(make(directory, max_num_batched_tokens=256).embed(texts), rows)


def test_a_decoder_is_for_vectors_if_its_files_say_so(tmp_path: Path) -> None:
    directory = tiny_encoder.write(tmp_path / "m", "lasttoken", config=TINY_LLAMA)
    assert is_encoder(TINY_LLAMA, directory)
    (directory / "modules.json").unlink()
    assert not is_encoder(TINY_LLAMA, directory)
    assert not is_encoder(TINY_LLAMA, None)
    assert is_encoder(tiny_encoder.CONFIG, None)


def test_a_decoder_without_its_tensors_is_refused(tmp_path: Path) -> None:
    directory = tiny_encoder.write(tmp_path / "m", "lasttoken", config=TINY_LLAMA)
    save_file({"x": np.zeros(1, np.float32)}, directory / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"embed_tokens\.weight"):
        make(directory)


def test_settings_of_sentence_transformers_6(tmp_path: Path) -> None:
    tiny_encoder.write(tmp_path / "m", normalize=False)
    (tmp_path / "m/1_Pooling/config.json").write_text('{"pooling_mode": "lasttoken"}')
    settings = EmbeddingSettings.read(tmp_path / "m")
    assert (settings.pooling, settings.normalize) == ("last", False)
    assert settings.prompt("query") == "query: "


@pytest.mark.parametrize(
    ("file", "content", "error", "words"),
    [
        ("modules.json", '[{"type": "x.Dense"}]', UnsupportedModelError, "x.Dense"),
        ("modules.json", "[", CheckpointError, "modules.json"),
        ("modules.json", '[{"type": "x.Pooling", "path": "../.."}]', CheckpointError, r"\.\./\.\."),
        (
            "1_Pooling/config.json",
            '{"pooling_mode_max_tokens": true}',
            UnsupportedModelError,
            "max",
        ),
        ("1_Pooling/config.json", "{}", UnsupportedModelError, r"pooling \[\]"),
        (
            "1_Pooling/config.json",
            '{"pooling_mode": "mean", "include_prompt": false}',
            UnsupportedModelError,
            "include_prompt",
        ),
    ],
)
def test_settings_that_are_not_understood(
    file: str, content: str, error: type[Exception], words: str, tmp_path: Path
) -> None:
    directory = tiny_encoder.write(tmp_path / "m")
    (directory / file).write_text(content)
    with pytest.raises(error, match=words):
        EmbeddingSettings.read(directory)
