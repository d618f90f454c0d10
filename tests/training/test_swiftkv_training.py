"""Making a SwiftKV model: initial values, the loss, training, resumption, evaluation."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import plain_model
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from arctic_jax import LLM, SamplingParams, testing
from arctic_jax.config import LoadConfig
from arctic_jax.errors import CheckpointError, UnsupportedModelError
from arctic_jax.loading.model_files import open_model
from arctic_jax.loading.safetensors_checkpoint import SafetensorsCheckpoint
from arctic_jax.loading.tokenizer import load_tokenizer
from arctic_jax.models.registry import model_class
from arctic_jax.training import data, evaluate, generate, losses, swiftkv_checkpoint
from arctic_jax.training.distill import Recipe, distill, distillation_loss
from arctic_jax.training.forward import Batch

BASE = dict(testing.TINY_LLAMA) | {"num_hidden_layers": 4, "max_position_embeddings": 256}
QWEN2 = BASE | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
CONVERSATION = [
    {"role": "user", "content": "hi there"},
    {"role": "assistant", "content": "good day"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "fine"},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return testing.write_model(tmp_path_factory.mktemp("base"), BASE)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.jsonl"
    rng = np.random.default_rng(0)
    lines = [{"messages": CONVERSATION}]
    for _ in range(30):
        words = " ".join(rng.choice(["red", "green", "blue", "one", "two"], 8))
        lines.append({"text": words})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def recipe_of(**changes: Any) -> Recipe:
    defaults: dict[str, Any] = {
        "num_key_value_layers": 2,
        "steps": 8,
        "batch_size": 8,
        "max_length": 64,
        "learning_rate": 3e-3,
        "dtype": "float32",
        "save_every": 3,
    }
    return Recipe(**defaults | changes)


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    checkpoint = SafetensorsCheckpoint(directory)
    return {name: np.array(checkpoint.read(name)) for name in checkpoint}


@pytest.mark.parametrize(("group", "config"), [(1, BASE), (2, BASE), (2, QWEN2)])
def test_initial_values(group: int, config: dict, tmp_path: Path) -> None:
    """The norm and the queries of their layers; keys and values are means over their group."""
    testing.write_model(tmp_path / "base", config)
    load = LoadConfig(model=str(tmp_path / "base"))
    swiftkv_checkpoint.convert(load, tmp_path / "student", 2, group)
    old, new = tensors_of(tmp_path / "base"), tensors_of(tmp_path / "student")
    first = "model.layers.2.input_layernorm.weight"
    np.testing.assert_array_equal(new["model.norm_swiftkv.weight"], old[first])
    kinds = ("weight", "bias") if config is QWEN2 else ("weight",)
    for layer in (2, 3):
        there = f"model.layers.{layer}.self_attn"
        for kind in kinds:
            q = new[f"{there}.q_proj_swiftkv.{kind}"]
            np.testing.assert_array_equal(q, old[f"{there}.q_proj.{kind}"])
            for p in "kv":
                name = f"{there}.{p}_proj_swiftkv.{kind}"
                if group == 2 and layer == 3:
                    assert name not in new
                    continue
                members = range(layer, layer + group)
                of_group = [old[f"model.layers.{i}.self_attn.{p}_proj.{kind}"] for i in members]
                np.testing.assert_allclose(new[name], sum(of_group) / group, rtol=1e-6)
            assert f"{there}.q_proj.{kind}" not in new
    shared = {n for n in old if n in new}
    assert "model.layers.1.self_attn.q_proj.weight" in shared
    for name in shared:
        np.testing.assert_array_equal(old[name], new[name])
    written = json.loads((tmp_path / "student" / "config.json").read_text())
    assert written["num_key_value_layers"] == 2
    assert written["key_value_group_size"] == group
    assert model_class(written).__name__.startswith(("LlamaSwiftKV", "Qwen2SwiftKV"))
    assert set(new) == set(testing.tensor_shapes(written))


def test_a_converted_model_runs(base: Path, tmp_path: Path) -> None:
    swiftkv_checkpoint.convert(LoadConfig(model=str(base)), tmp_path / "student", 2, 2)
    llm = LLM(str(tmp_path / "student"), progress=False, num_blocks=16, max_num_seqs=4)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    (output,) = llm.generate(["hello"], params, use_tqdm=False)
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    tensors = tensors_of(tmp_path / "student")
    expected = plain_model.greedy(config, tensors, list(b"hello"), 6)
    assert output.outputs[0].token_ids == expected


def test_what_cannot_be_converted_is_named(base: Path, tmp_path: Path) -> None:
    qwen3 = {**BASE, "architectures": ["Qwen3ForCausalLM"]}
    with pytest.raises(UnsupportedModelError, match=r"Qwen3ForCausalLM.* have no SwiftKV form"):
        swiftkv_checkpoint.student_config(qwen3, 2)
    load = LoadConfig(model=str(base))
    with pytest.raises(UnsupportedModelError, match=r"4 - num_key_value_layers 1 = 3"):
        swiftkv_checkpoint.convert(load, tmp_path / "student", 1, 2)
    with pytest.raises(FileExistsError):
        swiftkv_checkpoint.convert(load, tmp_path, 2)
    swiftkv_checkpoint.save_own({"a": np.zeros(3)}, tmp_path / "own.safetensors")
    with pytest.raises(CheckpointError, match=r"own\.safetensors does not hold the tensors of"):
        swiftkv_checkpoint.convert(
            load, tmp_path / "student", 2, parameters=tmp_path / "own.safetensors"
        )
    assert not (tmp_path / "student").exists()


def test_only_what_the_assistant_says_counts(base: Path) -> None:
    (sample,) = _samples(base, {"messages": CONVERSATION})
    counted = bytes(
        t for t, c in zip(sample.token_ids, sample.counts, strict=True) if c and t < 256
    )
    assert counted == b"good dayfine"
    eos = [c for t, c in zip(sample.token_ids, sample.counts, strict=True) if t == 257]
    assert eos == [False, True, False, True]  # it learns where to end
    template = load_tokenizer(base).apply_chat_template(CONVERSATION, add_generation_prompt=False)
    assert sample.token_ids == template


def _samples(base: Path, *lines: Any) -> list[data.Sample]:
    path = base / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return list(data.read_samples(path, load_tokenizer(base)))


def test_a_line_of_neither_form_is_named(base: Path) -> None:
    with pytest.raises(ValueError, match=r"lines\.jsonl:2: .*neither"):
        _samples(base, {"text": "a"}, {"texts": "a"})
    with pytest.raises(ValueError, match=r"lines\.jsonl:2: .*surrogates"):
        _samples(base, {"text": "a"}, {"text": "half \ud800"})


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=12), min_size=1, max_size=9))
def test_packing_keeps_every_sequence(sequences: list[list[int]]) -> None:
    samples = [data.Sample(ids, [i % 2 == 0 for i in range(len(ids))]) for ids in sequences]
    rows = data.pack(samples, 10)
    found = []
    for row in range(len(rows)):
        for segment in range(1, rows.segment_ids[row].max() + 1):
            here = rows.segment_ids[row] == segment
            ids = rows.token_ids[row, here].tolist()
            assert rows.positions[row, here].tolist() == list(range(len(ids)))
            counts = rows.counts[row, here].tolist()
            assert counts == [i % 2 == 1 for i in range(len(ids) - 1)] + [False]
            found.append(ids)
    assert sorted(found) == sorted(ids[:10] for ids in sequences)
    assert not rows.counts[rows.segment_ids == 0].any()


def test_batches_go_through_all_rows_each_epoch() -> None:
    order = data.batches(7, 2, seed=1)
    seen = np.concatenate([next(order) for _ in range(7)])
    assert sorted(seen[:7]) == sorted(seen[7:]) == list(range(7))
    assert seen[:7].tolist() != seen[7:].tolist()


def make_batch(sequences: list[list[int]], length: int = 24, counted: int = 3) -> Batch:
    """Packed sequences of which the first `counted` tokens do not count."""
    samples = [data.Sample(s, [i >= counted for i in range(len(s))]) for s in sequences]
    rows = data.pack(samples, length)
    return Batch(**{name: jnp.asarray(value) for name, value in vars(rows).items()})


def student_and_own(base: Path, group: int) -> tuple[dict, dict, dict, Any]:
    """The student's config and tensors, those of its own (disturbed), and its numbers."""
    files = open_model(LoadConfig(model=str(base)))
    hf = swiftkv_checkpoint.student_config(files.config, 2, group)
    config = model_class(hf).config_from_hf(hf)
    own = swiftkv_checkpoint.initial_values(swiftkv_checkpoint.original_weights(files), config)
    rng = np.random.default_rng(0)
    own = {n: (t + 0.05 * rng.normal(size=t.shape)).astype(np.float32) for n, t in own.items()}
    return hf, tensors_of(base), own, config


@pytest.mark.parametrize("group", [1, 2])
def test_the_loss_is_the_formula(base: Path, group: int) -> None:
    """In float64, sequence by sequence: T² KL over what counts, and the error over all tokens."""
    hf, tensors, own, config = student_and_own(base, group)
    sequences = [list(b"one sequence"), list(b"another"), list(b"and a third one, longer")]
    recipe = recipe_of(key_value_group_size=group, temperature=2.0, hidden_weight=0.5)
    batch = make_batch(sequences)
    loss, parts = distillation_loss(own, tensors, batch, config=config, recipe=recipe)

    kl, squares, counted, tokens = 0.0, 0.0, 0, 0
    for ids in sequences:
        before, logits = plain_model.forward(BASE, tensors, ids)
        before_s, logits_s = plain_model.forward(hf, tensors | own, ids)
        p, q = (x / 2 - np.log(np.exp(x / 2).sum(-1, keepdims=True)) for x in (logits, logits_s))
        kl += (np.exp(p) * (p - q)).sum(-1)[2:-1].sum()  # the token at 2 predicts the one at 3
        counted += len(ids) - 3
        squares += ((before - before_s) ** 2).sum()
        tokens += len(ids)
    mse = squares / tokens / BASE["hidden_size"]
    assert mse > 0.01
    assert float(parts["mse"]) == pytest.approx(mse, rel=1e-4)
    assert float(parts["kl"]) == pytest.approx(4 * kl / counted, rel=1e-3)
    assert float(loss) == pytest.approx(4 * kl / counted + 0.5 * mse, rel=1e-3)


def test_the_student_alone_has_gradients(base: Path) -> None:
    _, tensors, own, config = student_and_own(base, 2)
    batch = make_batch([list(b"one sequence"), list(b"another")])

    def loss(own: dict, tensors: dict) -> jax.Array:
        return distillation_loss(own, tensors, batch, config=config, recipe=recipe_of())[0]

    tensors = {name: jnp.asarray(value) for name, value in tensors.items()}
    for_own, for_shared = jax.jit(jax.grad(loss, argnums=(0, 1)))(own, tensors)
    assert all(np.abs(g).max() > 0 for g in for_own.values())
    assert not any(np.abs(g).any() for g in for_shared.values())


def test_the_gradient_of_the_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is that of the formula, for any temperature and factor, over several parts."""
    monkeypatch.setattr(losses, "LOGIT_TOKENS", 4)
    keys = jax.random.split(jax.random.key(0), 4)
    student, teacher = (jax.random.normal(key, (2, 12, 8)) for key in keys[:2])
    head = jax.random.normal(keys[2], (32, 8))
    counts = jax.random.bernoulli(keys[3], 0.7, (2, 12))

    def formula(student: jax.Array) -> jax.Array:
        p, q = (jax.nn.log_softmax(x @ head.T / 3.0) for x in (teacher, student))
        return 5 * jnp.where(counts, (jnp.exp(p) * (p - q)).sum(-1), 0).sum()

    def ours(student: jax.Array) -> jax.Array:
        return 5 * losses.divergence(student, teacher, (head, counts), 3.0)[0]

    expected, gradient = jax.value_and_grad(formula)(student)
    value, found = jax.jit(jax.value_and_grad(ours))(student)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(found, gradient, rtol=1e-4, atol=1e-5)
    assert np.abs(gradient).max() > 0.1


def test_masked_tokens_do_not_change_the_divergence(base: Path) -> None:
    """But they do count in the error of the hidden states."""
    _, tensors, own, config = student_and_own(base, 1)
    one, other = list(b"one sequence"), list(b"another")

    def parts(*sequences: list[int], counted: int) -> dict[str, float]:
        batch = make_batch(list(sequences), counted=counted)
        found = distillation_loss(own, tensors, batch, config=config, recipe=recipe_of())[1]
        return {name: float(value) for name, value in found.items()}

    alone, both = parts(one, counted=10), parts(one, other, counted=10)  # `other` is shorter
    assert both["kl"] == pytest.approx(alone["kl"], rel=1e-4)
    assert both["mse"] != pytest.approx(alone["mse"], rel=1e-3)


def test_training_makes_a_better_student(base: Path, text: Path, tmp_path: Path) -> None:
    load = LoadConfig(model=str(base))
    lines: list[Any] = []
    recipe = recipe_of(steps=40, key_value_group_size=2)
    distill(load, text, tmp_path / "out", recipe, on_step=lines.append)
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    logged = [
        json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    ]
    assert logged == lines
    assert [line["step"] for line in lines] == list(range(40))
    assert all(line["tokens_per_s"] > 0 for line in lines)
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "out" / "loss.png").stat().st_size > 1000
    swiftkv_checkpoint.convert(load, tmp_path / "untrained", 2, 2)
    own = tmp_path / "out" / "swiftkv.safetensors"
    swiftkv_checkpoint.convert(load, tmp_path / "again", 2, 2, parameters=own)
    found = {}
    for name, student in (
        ("untrained", tmp_path / "untrained"),
        ("trained", tmp_path / "out" / "model"),
        ("again", tmp_path / "again"),
        ("teacher", base),
    ):
        found[name] = evaluate.compare_on_text(
            LoadConfig(model=str(student)), load, [text], max_length=64, batch_size=4
        )[text.name]
    assert found["trained"]["kl"] < 0.8 * found["untrained"]["kl"]
    assert found["trained"]["agreement"] > found["untrained"]["agreement"]
    assert found["again"]["kl"] == pytest.approx(found["trained"]["kl"], rel=0.05)
    assert found["teacher"]["kl"] == pytest.approx(0, abs=1e-6)
    assert found["teacher"]["agreement"] == found["teacher"]["perplexity_ratio"] == 1
    own_dtypes = {t.dtype.name for t in load_file(own).values()}
    assert own_dtypes == {"bfloat16"}
    assert {t.dtype.name for t in tensors_of(tmp_path / "out" / "model").values()} == {"float32"}


def test_comparison_is_that_of_the_plain_models(base: Path, text: Path, tmp_path: Path) -> None:
    load = LoadConfig(model=str(base))
    swiftkv_checkpoint.convert(load, tmp_path / "student", 2)
    student = LoadConfig(model=str(tmp_path / "student"))
    results = evaluate.compare_on_text(student, load, [text], max_length=64, batch_size=4)
    found = results[text.name]
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    teacher_tensors, student_tensors = tensors_of(base), tensors_of(tmp_path / "student")
    kl, nll, nll_of_teacher, same, counted = 0.0, 0.0, 0.0, 0, 0
    for sample in data.read_samples(text, load_tokenizer(base)):
        ids = sample.token_ids[:64]
        p = _log_softmax(plain_model.logits(BASE, teacher_tensors, ids))
        q = _log_softmax(plain_model.logits(config, student_tensors, ids))
        for i in range(len(ids) - 1):
            if sample.counts[i + 1]:
                kl += (np.exp(p[i]) * (p[i] - q[i])).sum()
                nll -= q[i, ids[i + 1]]
                nll_of_teacher -= p[i, ids[i + 1]]
                same += p[i].argmax() == q[i].argmax()
                counted += 1
    assert found["tokens"] == counted
    assert found["kl"] == pytest.approx(kl / counted, rel=1e-3)
    assert found["perplexity"] == pytest.approx(np.exp(nll / counted), rel=1e-3)
    assert found["teacher_perplexity"] == pytest.approx(np.exp(nll_of_teacher / counted), rel=1e-3)
    assert found["agreement"] == pytest.approx(same / counted, abs=2 / counted)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


KILLED = """
import os, signal, sys
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 8)
sys.path.insert(0, "tests/training")
from test_swiftkv_training import recipe_of
from arctic_jax.config import LoadConfig
from arctic_jax.training.distill import distill

def on_step(line):
    if line["step"] == 4:
        os.kill(os.getpid(), signal.SIGKILL)

base, text, out = sys.argv[1:]
distill(LoadConfig(model=base), Path(text), Path(out), recipe_of(), on_step=on_step)
"""


def test_a_killed_run_goes_on_as_if_nothing_had_been(
    base: Path, text: Path, tmp_path: Path
) -> None:
    """Killed after step 4, saved after step 2: the same losses, the same student."""
    root = Path(__file__).parents[2]
    out, whole = tmp_path / "killed", tmp_path / "whole"
    path = f"{root}:{root / 'tests'}:{root / 'tests' / 'models'}"
    command = [sys.executable, "-c", KILLED, str(base), str(text), str(out)]
    done = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": path}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len((out / "log.jsonl").read_text().splitlines()) == 5
    load, resumed = LoadConfig(model=str(base)), []
    distill(load, text, out, recipe_of(), on_step=resumed.append)
    assert [line["step"] for line in resumed] == [3, 4, 5, 6, 7]
    distill(load, text, whole, recipe_of())
    logs = [
        [json.loads(line) for line in (d / "log.jsonl").read_text().splitlines()]
        for d in (out, whole)
    ]
    for one, other in zip(*logs, strict=True):
        assert one["step"] == other["step"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
    students = [load_file(d / "swiftkv.safetensors") for d in (out, whole)]
    for name, tensor in students[0].items():
        np.testing.assert_array_equal(tensor, students[1][name])


def test_an_interrupted_run_keeps_what_it_has(base: Path, text: Path, tmp_path: Path) -> None:
    """Ctrl-C after step 4, not a step of which a checkpoint is due."""

    def on_step(line: Any) -> None:
        if line["step"] == 4:
            raise KeyboardInterrupt

    out, load = tmp_path / "interrupted", LoadConfig(model=str(base))
    with pytest.raises(KeyboardInterrupt):
        distill(load, text, out, recipe_of(), on_step=on_step)
    assert load_file(out / "swiftkv.safetensors")
    assert not (out / "model").exists()
    resumed: list[Any] = []
    distill(load, text, out, recipe_of(), on_step=resumed.append)
    # The device had begun step 5: it is finished, and saved.
    assert [line["step"] for line in resumed] == [6, 7]
    logged = (out / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in logged] == list(range(8))
    assert (out / "model").exists()


def test_another_recipe_does_not_go_on(base: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(json.dumps({"batch_size": 16}))
    with pytest.raises(ValueError, match=r"begun with other settings: .*'batch_size': \(16, 8\)"):
        distill(LoadConfig(model=str(base)), text, tmp_path, recipe_of())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup": 1.0}, r"warmup must be in \[0, 1\), got 1.0"),
        ({"schedule": "linear"}, "schedule must be cosine or constant, got 'linear'"),
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
    ],
)
def test_bad_recipes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe_of(**changes)


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.0), ("constant", 1e-3)])
def test_learning_rates(schedule: Any, last: float) -> None:
    rates = recipe_of(learning_rate=1e-3, schedule=schedule, warmup=0.1).learning_rates(100)
    values = [float(np.asarray(rates(step))) for step in range(101)]
    assert values[0] == pytest.approx(1e-4)
    assert values[9] == pytest.approx(1e-3)
    assert max(values) == pytest.approx(1e-3)
    assert values[100] == pytest.approx(last, abs=1e-6)


def test_a_model_writes_its_own_text(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        '{"question": "one?", "answer": "1"}\n{"turns": ["two?", "three?"]}\n{"prompt": "four?"}\n'
    )
    conversations = list(generate.read_prompts([prompts]))
    assert [c[0]["content"] for c in conversations] == ["one?", "two?", "four?"]
    llm = LLM(str(base), progress=False, num_blocks=32, max_num_seqs=4)
    out, held_back = tmp_path / "out.jsonl", tmp_path / "held_back.jsonl"
    params = SamplingParams(n=2, temperature=1.0, max_tokens=8, seed=0)
    lines, tokens = generate.generate(llm, conversations, params, out, held_back, every=3)
    assert lines == 6
    assert 6 <= tokens <= 48
    written = [json.loads(line)["messages"] for line in out.read_text().splitlines()]
    assert [m[0]["content"] for m in written] == ["one?", "one?", "two?", "two?"]
    assert all(m[-1]["role"] == "assistant" for m in written)
    assert len(held_back.read_text().splitlines()) == 2

    invented = generate.invent_prompts(llm, 6, seed=1)
    assert 1 <= len(invented) <= 6
    assert all(text["role"] == "user" and text["content"] for (text,) in invented)
    assert generate.invent_prompts(llm, 6, seed=1) == invented

    monkeypatch.setattr(generate, "WRITTEN_TOGETHER", 2)
    chat, calls = llm.chat, iter([None, KeyboardInterrupt])

    def interrupted_later(*arguments: Any) -> Any:
        if error := next(calls):
            raise error
        return chat(*arguments)

    monkeypatch.setattr(llm, "chat", interrupted_later)
    with pytest.raises(KeyboardInterrupt):
        generate.generate(llm, conversations, params, out, held_back, every=3)
    kept = [json.loads(line)["messages"] for line in out.read_text().splitlines()]
    assert [m[0]["content"] for m in kept] == ["one?", "one?", "two?", "two?"]


def test_gsm8k_counts_right_answers(base: Path, tmp_path: Path) -> None:
    llm = LLM(str(base), progress=False, num_blocks=32, max_num_seqs=4)
    params = SamplingParams(temperature=0, max_tokens=8)
    (output,) = llm.chat([{"role": "user", "content": "1?"}], params, use_tqdm=False)
    said = evaluate.last_number(output.outputs[0].text)
    problems = tmp_path / "problems.jsonl"
    right = "so\n#### " + ("1" if said is None else f"{said}")
    problems.write_text(
        "".join(json.dumps({"question": "1?", "answer": a}) + "\n" for a in (right, "#### 9876543"))
    )
    expected = 0.0 if said is None else 0.5
    assert evaluate.gsm8k(llm, problems, max_tokens=8) == {"problems": 2, "exact_match": expected}
    assert evaluate.gsm8k(llm, problems, limit=1, max_tokens=8)["problems"] == 1


@pytest.mark.parametrize(
    ("answer", "number"),
    [("so 3 + 4 = 7", 7), ("#### 1,234", 1234), ("it is -2.50.", -2.5), ("none", None), ("5.", 5)],
)
def test_the_last_number(answer: str, number: float | None) -> None:
    assert evaluate.last_number(answer) == number
