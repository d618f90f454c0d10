"""Store what `transformers` computes, for the tests to compare with. Needs torch; run by hand.

    python scripts/make_goldens.py tiny --out tests/goldens
    python scripts/make_goldens.py encoders --out tests/goldens
    python scripts/make_goldens.py greedy --model DIR --prompts DIR --out tests/goldens
    python scripts/make_goldens.py sentences --model DIR --prompts DIR --out tests/goldens

`--model` is what `resolve_model("smollm2-135m-instruct-q4_1")` (`arctic_jax/loading/hub.py`) gives;
for `sentences`, which needs sentence-transformers, what `resolve_model("minilm-l6")` gives.
`--prompts` holds gsm8k_test.jsonl, humaneval.jsonl and spec_bench.jsonl of those projects. Float32
on a CPU throughout. `arctic_jax` itself must be importable, but nothing of it that needs JAX is.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
NEW_TOKENS = 64
TOP = 5


def load_module(name: str, path: Path) -> Any:
    """Import one file, without the package around it and what that needs."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(str(path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def load(directory: Path) -> Any:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
        local_files_only=True,
    )
    wrong = {key: sorted(found) for key, found in info.items() if found}
    if wrong:
        raise SystemExit(f"{directory}: the checkpoint does not fit the config: {wrong}")
    return model.eval()


def make_tiny(out: Path) -> None:
    """Logits of every case of tests/models/cases.py for one prompt each."""
    load_module("arctic_jax.errors", ROOT / "arctic_jax" / "errors.py")
    testing = load_module("arctic_jax.testing", ROOT / "arctic_jax" / "testing.py")
    cases = load_module("cases", ROOT / "tests" / "models" / "cases.py")
    arrays = {}
    for i, (name, config) in enumerate(cases.CASES.items()):
        prompt = np.random.RandomState(i).randint(0, cases.VOCAB_SIZE, cases.PROMPT_TOKENS)
        with tempfile.TemporaryDirectory() as directory:
            path = testing.write_checkpoint(directory, config, cases.SEED)
            model = load(path)
        with torch.no_grad():
            logits = model(torch.tensor(prompt)[None]).logits[0].numpy()
        arrays[f"{name}/token_ids"] = prompt.astype(np.int32)
        arrays[f"{name}/logits"] = logits.astype(np.float32)
        print(f"{name:28} {type(model).__name__:22} deviation of the logits {logits.std():.2f}")
    np.savez_compressed(out / "tiny_logits.npz", **arrays)


def make_encoders(out: Path) -> None:
    """Hidden states of every case of tests/models/encoder_cases.py for texts of several lengths."""
    load_module("arctic_jax.errors", ROOT / "arctic_jax" / "errors.py")
    testing = load_module("arctic_jax.testing", ROOT / "arctic_jax" / "testing.py")
    cases = load_module("encoder_cases", ROOT / "tests" / "models" / "encoder_cases.py")
    arrays = {}
    for i, (name, config) in enumerate(cases.CASES.items()):
        random = np.random.RandomState(i)
        with tempfile.TemporaryDirectory() as directory:
            path = testing.write_checkpoint(directory, config, cases.SEED)
            model = load_encoder(path)
        for length in cases.LENGTHS:
            # From 4 on: transformers counts a XLM-R text's positions without its padding tokens.
            text = random.randint(4, cases.VOCAB_SIZE, length)
            with torch.no_grad():
                hidden = model(torch.tensor(text)[None]).last_hidden_state[0].numpy()
            arrays[f"{name}/{length}/token_ids"] = text.astype(np.int32)
            arrays[f"{name}/{length}/hidden"] = hidden.astype(np.float32)
        print(f"{name:28} {type(model).__name__}")
    np.savez_compressed(out / "tiny_encoders.npz", **arrays)


def load_encoder(directory: Path) -> Any:
    """Without the pooler, which sentence embeddings do not use and many checkpoints do not have."""
    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    is_decoder = config.architectures[0].endswith("ForCausalLM")
    model = transformers.AutoModel.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        **{} if is_decoder else {"add_pooling_layer": False},
    )
    return model.eval()


PLAIN = (
    "Hello there!",
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "1, 2, 3, 5, 8, 13,",
    "Zwölf Boxkämpfer jagen Viktor quer über den",
    "日本の首都は",
    "Dear Sir or Madam,\n\nI am writing to",
    '{"name": "Ada", "born": 1815, "',
    "Water boils at 100 °C 🌡️, and it freezes at",
)
CHATS = (
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": "What is gravity?"},
    ],
    [
        {"role": "user", "content": "Name three primary colours."},
        {"role": "assistant", "content": "Red, yellow and blue."},
        {"role": "user", "content": "And which two of them make green?"},
    ],
)


def prompts(folder: Path) -> list[dict[str, Any]]:
    """32 prompts of 3 to 800 tokens: plain text, code, questions, conversations."""

    def rows(file: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (folder / file).read_text("utf-8").splitlines()]

    gsm8k, code, bench = rows("gsm8k_test.jsonl"), rows("humaneval.jsonl"), rows("spec_bench.jsonl")
    found: list[dict[str, Any]] = [{"text": text} for text in PLAIN]
    found += [{"messages": chat} for chat in CHATS]
    found += [{"text": code[i]["prompt"]} for i in (0, 12, 31, 64, 107)]
    found += [{"text": f"Question: {gsm8k[i]['question']}\nAnswer:"} for i in (0, 5, 9)]
    shots = "\n\n".join(f"Question: {r['question']}\nAnswer: {r['answer']}" for r in gsm8k[20:23])
    found += [{"text": f"{shots}\n\nQuestion: {gsm8k[i]['question']}\nAnswer:"} for i in (3, 7)]
    ask = [gsm8k[i]["question"] for i in (1, 2, 4)]
    ask += [bench[i]["turns"][0] for i in (0, 95, 170, 255, 330, 410)]
    return found + [{"messages": [{"role": "user", "content": text}]} for text in ask]


def make_greedy(directory: Path, folder: Path, out: Path) -> None:
    """64 greedy tokens for each prompt (also past the end token), and how close the race was."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model = load(directory)
    found = prompts(folder)
    tokens = np.zeros((len(found), NEW_TOKENS), np.int32)
    margins = np.zeros((len(found), NEW_TOKENS), np.float32)
    top_ids = np.zeros((len(found), NEW_TOKENS, TOP), np.int32)
    top_logprobs = np.zeros((len(found), NEW_TOKENS, TOP), np.float32)
    for i, prompt in enumerate(found):
        if "messages" in prompt:
            ids = tokenizer.apply_chat_template(
                prompt["messages"], add_generation_prompt=True, return_dict=False
            )
        else:
            ids = tokenizer(prompt["text"])["input_ids"]
        prompt["token_ids"] = list(ids)
        past, given = None, torch.tensor([ids])
        for step in range(NEW_TOKENS):
            with torch.no_grad():
                output = model(given, past_key_values=past, use_cache=True, logits_to_keep=1)
            past, logits = output.past_key_values, output.logits[0, -1]
            values, best = torch.log_softmax(logits, -1).topk(TOP)
            tokens[i, step], top_ids[i, step] = int(best[0]), best.numpy()
            margins[i, step] = float(logits[best[0]] - logits[best[1]])
            top_logprobs[i, step] = values.numpy()
            given = best[:1][None]
        shown = tokenizer.decode(tokens[i])[:60]
        print(f"{i:2} {len(ids):4} tokens, least margin {margins[i].min():.5f} {shown!r}")
    np.savez_compressed(
        out / "smollm2_greedy.npz",
        token_ids=tokens,
        margins=margins,
        top_ids=top_ids,
        top_logprobs=top_logprobs,
    )
    text = json.dumps(found, ensure_ascii=False, indent=None, separators=(",", ":"))
    text = text.replace('},{"text"', '},\n{"text"').replace('},{"messages"', '},\n{"messages"')
    (out / "smollm2_prompts.json").write_text(text + "\n", "utf-8")


def sentences(folder: Path) -> list[str]:
    """100 texts: questions, code, other languages, none at all, and more than the model takes."""

    def rows(file: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (folder / file).read_text("utf-8").splitlines()]

    gsm8k, code, bench = rows("gsm8k_test.jsonl"), rows("humaneval.jsonl"), rows("spec_bench.jsonl")
    found = [*PLAIN, "", " ", "a", "naïve café\u0301 \U0001f9d1\u200d\U0001f680", "Привет, мир!"]
    found += [row["question"] for row in gsm8k[:40]]
    found += [row["prompt"] for row in code[:15]]
    found += [row["turns"][0] for row in bench[::16][:28]]
    found += [" ".join(row["question"] for row in gsm8k[40:60]), "word " * 255]
    return found


def make_sentences(directory: Path, folder: Path, out: Path) -> None:
    """Vectors of 100 real sentences by sentence-transformers, one at a time."""
    import sentence_transformers

    print(f"sentence-transformers {sentence_transformers.__version__}")
    model = sentence_transformers.SentenceTransformer(str(directory), device="cpu")
    found = sentences(folder)
    vectors = np.stack([model.encode(text) for text in found]).astype(np.float32)
    lengths = [len(model.tokenize([text])["input_ids"][0]) for text in found]
    print(f"{len(found)} sentences of {min(lengths)} to {max(lengths)} tokens, {vectors.shape}")
    np.savez_compressed(out / "minilm_vectors.npz", vectors=vectors, lengths=lengths)
    text = json.dumps(found, ensure_ascii=False, indent=0)
    (out / "minilm_sentences.json").write_text(text + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("tiny", "encoders", "greedy", "sentences"))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "goldens")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(versions)
    if arguments.what == "tiny":
        make_tiny(arguments.out)
    elif arguments.what == "encoders":
        make_encoders(arguments.out)
    elif arguments.model is None or arguments.prompts is None:
        parser.error(f"{arguments.what} needs --model and --prompts")
    elif arguments.what == "sentences":
        make_sentences(arguments.model, arguments.prompts, arguments.out)
    else:
        make_greedy(arguments.model, arguments.prompts, arguments.out)


if __name__ == "__main__":
    main()
