"""Text to token ids and back, for a Hugging Face directory or a GGUF file. Host only.

Thin over `transformers`' fast tokenizers. Nothing from a model's repository is executed, and chat
templates, which are programs from the same source, run in `arctic_jax.loading.chat_template`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from arctic_jax.errors import (
    ChatTemplateError,
    CheckpointError,
    InvalidRequestError,
    ModelNotFoundError,
)
from arctic_jax.loading import gguf_tokenizer
from arctic_jax.loading.chat_template import ChatTemplateRenderer
from arctic_jax.loading.gguf_file import GGUFFile

_advice = logging.getLogger("transformers")
_advice.addFilter(_no_torch := lambda record: "PyTorch was not found" not in record.getMessage())
try:  # only tokenizers are wanted of it; its advice to install torch would come with every start
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
finally:
    _advice.removeFilter(_no_torch)

CACHED_WORDS = 1024
"""Of a thread; the library's default is 10,000, in as many threads as ever encode."""


class Tokenizer:
    """What the engine needs of a tokenizer; `hf` is the `transformers` object behind it."""

    def __init__(self, hf: PreTrainedTokenizerFast) -> None:
        self.hf = hf
        bound_cache(self.backend)
        self._renderer = ChatTemplateRenderer()

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The `tokenizers.Tokenizer`, for incremental decoding."""
        return self.hf.backend_tokenizer

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included; the model may have more rows."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def max_characters_per_token(self) -> int | None:
        """No text has more characters for each of its tokens; `None` if nothing is known of it.

        Known of byte-level tokenizers, which leave nothing out: there a token's spelling has a
        character for each byte of text.
        """
        backend, normalizer = self.backend, self.backend.normalizer
        bytewise = isinstance(backend.decoder, tokenizers.decoders.ByteLevel)
        composing = isinstance(normalizer, tokenizers.normalizers.NFC)
        if not bytewise or not (composing or normalizer is None):
            return None
        longest = max(map(len, backend.get_vocab(with_added_tokens=True)), default=1)
        return longest * (4 if composing else 1)  # no character is composed of more than four

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends a text; a model's generation config may name more."""
        return self.hf.eos_token_id  # pyright: ignore[reportReturnType]

    @property
    def bos_token_id(self) -> int | None:
        """The id that begins a text."""
        return self.hf.bos_token_id  # pyright: ignore[reportReturnType]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Turn text into token ids.

        Raises:
            InvalidRequestError: it holds half a surrogate pair, as JSON can, and is no Unicode.
        """
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:
            message = f"the text {text!r:.100} cannot be encoded: {error}"
            raise InvalidRequestError(message, "prompt") from error

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Turn texts into token ids, by several threads."""
        found = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in found]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Turn token ids into text."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the vocabulary's spelling of each id, empty for one that has none."""
        return [self.backend.id_to_token(i) or "" for i in ids]

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> list[int]:
        """Render messages with `render_chat_template` and encode them."""
        text = self.render_chat_template(messages, add_generation_prompt, **kwargs)
        return self.encode(text, add_special_tokens=False)  # a template writes its own BOS

    def render_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """Render messages with the model's template, or with `chat_template`.

        Other keywords are `continue_final_message` and variables of the template, such as
        `enable_thinking`.

        Raises:
            ChatTemplateError: there is no template, it fails, or it exceeds its time or size.
        """
        try:
            source = self.hf.get_chat_template(chat_template, tools)  # pyright: ignore[reportArgumentType]
        except ValueError as error:
            raise ChatTemplateError("the model has no chat template", "chat_template") from error
        return self._renderer.render(
            source,
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            **{**self.hf.special_tokens_map, **kwargs},
        )


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load from a directory with `tokenizer.json`, or from a GGUF file.

    Raises:
        ModelNotFoundError: the path does not exist.
        CheckpointError: there is no tokenizer in it that can be read.
        UnsupportedModelError: a GGUF file's tokenizer is of a kind that is not implemented.
    """
    path = Path(path)
    if path.is_dir():
        return Tokenizer(_from_directory(path))
    if path.is_file():
        return Tokenizer(_from_gguf(path))
    raise ModelNotFoundError(f"no tokenizer: {str(path)!r} does not exist")


def _from_directory(path: Path) -> PreTrainedTokenizerFast:
    # It looks into the model's config, too, and warns of model types that it does not have.
    configs = logging.getLogger("transformers.configuration_utils")
    configs.addFilter(_knows_model_type)
    try:
        # local_files_only: a directory is complete; a missing file must not become a download.
        loaded = AutoTokenizer.from_pretrained(
            str(path), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # `tokenizers` raises plain Exception for a faulty file
        raise CheckpointError(f"no tokenizer could be read from {path}: {error}") from error
    finally:
        configs.removeFilter(_knows_model_type)
    if not isinstance(loaded, PreTrainedTokenizerFast):
        raise CheckpointError(f"{path} has no fast tokenizer (tokenizer.json)")
    return loaded


def _knows_model_type(record: logging.LogRecord) -> bool:
    return "You are using a model of type" not in record.getMessage()


def _from_gguf(path: Path) -> PreTrainedTokenizerFast:
    metadata = GGUFFile(path).metadata
    backend, special = gguf_tokenizer.build(metadata)
    template = metadata.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=template if isinstance(template, str) else None,
        clean_up_tokenization_spaces=False,
        **special,
    )


def bound_cache(backend: tokenizers.Tokenizer) -> None:
    """Have each thread keep the tokens of `CACHED_WORDS` words (BPE and unigram models do).

    A word may have 256 bytes, of which 8 KiB are kept: strangers could fill 80 MiB a thread.
    """
    resize = getattr(backend.model, "_resize_cache", None)
    if resize is not None:
        resize(CACHED_WORDS)


def numbered_tokenizer(vocab_size: int) -> Tokenizer:
    """Make a tokenizer whose token `i` is the word `<i>`, for random weights without one."""
    words = {f"<{i}>": i for i in range(vocab_size)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<0>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
