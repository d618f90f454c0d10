"""From the form that a user wants of an answer to a grammar, compiled, checked and kept.

The work is llguidance's: a lexer by derivatives of regular expressions and an Earley parser, which
walk the vocabulary as a trie. Grammars come from strangers, so they are bounded in size and depth,
and compiled by threads of their own within a time limit; the library itself stops when a grammar
has used up its fuel. Any thread may call.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

from arctic_jax.engine.grammar_matcher import Grammar, Matcher, mask_threads, short
from arctic_jax.errors import InvalidRequestError
from arctic_jax.loading.tokenizer import Tokenizer
from arctic_jax.structured_outputs import (
    StructuredOutputsConfig,
    StructuredOutputsParams,
    refuse,
)

if TYPE_CHECKING:  # it is loaded when the first grammar comes
    from llguidance import LLTokenizer

NUM_THREADS = 2
# The library recurses where rules nest: 60,000 characters of rules that name each other overflow
# a thread's usual 8 MB, and that ends the process.
STACK_PER_CHARACTER = 1 << 10  # bytes
# Bounds on the library's work: of a grammar, and for one mask. Its time for one byte grows by the
# square of the symbols that may be next (6,000: some 50 ms), and is not bounded otherwise.
MAX_SYMBOLS, MAX_ITEMS = 6_000, 10_000
# Between two parts of JSON: enough to indent by, and an end for models that love line breaks.
WHITESPACE = r"[ \n\r\t]{1,40}"


class GrammarCompiler:
    """Compiles grammars, and keeps those that were asked for last.

    Args:
        tokenizer: of the model.
        vocab_size: of the model, which may be more or less than the tokenizer's.
        eos_token_ids: that end an answer.
        config: bounds.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        config: StructuredOutputsConfig,
    ) -> None:
        self.config = config
        self._tokenizer = tokenizer
        self._vocab_size = max(vocab_size, tokenizer.vocab_size)
        known = min(vocab_size, tokenizer.vocab_size)
        self._eos_token_ids = frozenset(token for token in eos_token_ids if token < known)
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="arctic-jax-grammar")
        self._mask_threads = mask_threads()
        self._lock, self._vocabulary_lock = threading.Lock(), threading.Lock()
        self._vocabulary: LLTokenizer | None = None
        self._cache: OrderedDict[tuple[str, str, bool], Future[Grammar]] = OrderedDict()

    def compile(self, params: StructuredOutputsParams) -> Grammar:
        """Return the grammar of what a user wants, compiled now or before.

        Raises:
            InvalidRequestError: it is too large or too deep, is none, or takes too long.
        """
        future = self.submit(params)
        wait([future], self.config.grammar_time_limit)
        return self.result(params, future)

    def submit(self, params: StructuredOutputsParams) -> Future[Grammar]:
        """Begin to compile; `result` says what came of it.

        Raises:
            InvalidRequestError: it is too large or too deep.
        """
        source = self._source(params)
        key = (params.kind, source, params.disable_any_whitespace)
        with self._lock:
            future = self._cache.get(key)
            if future is None or future.cancelled():
                self._cache[key] = future = self._start(self._compile, *key)
            self._cache.move_to_end(key)
            while len(self._cache) > self.config.grammar_cache_size:
                self._cache.popitem(last=False)[1].cancel()  # if nobody has begun with it
        return future

    def result(self, params: StructuredOutputsParams, future: Future[Grammar]) -> Grammar:
        """Return what came of `submit` after `grammar_time_limit`.

        Raises:
            InvalidRequestError: nothing yet, or it is no grammar.
        """
        if future.cancelled():
            refuse(params.kind, "was not compiled, too many grammars come at once")
        if not future.done():
            limit = self.config.grammar_time_limit
            refuse(params.kind, f"takes more than {limit:g} seconds to compile")
        return future.result()

    def prepare(self) -> None:
        """Read the vocabulary now (0.2 s for 49,152 tokens), not with the first request."""
        if self._eos_token_ids:
            self._start(self._read_vocabulary).exception()

    def _start[**P, T](
        self, function: Callable[P, T], *arguments: P.args, **keywords: P.kwargs
    ) -> Future[T]:
        """Call a function in a thread that has stack enough for the largest grammar."""
        size = STACK_PER_CHARACTER * self.config.max_grammar_size
        before = threading.stack_size(max(size + -size % (1 << 20), 8 << 20))
        try:
            return self._threads.submit(function, *arguments, **keywords)
        finally:
            threading.stack_size(before)

    def _compile(self, kind: str, source: str, compact: bool) -> Grammar:
        from llguidance import LLMatcher, LLParserLimits

        vocabulary = self._read_vocabulary()
        limits = LLParserLimits(
            max_grammar_size=MAX_SYMBOLS, step_max_items=MAX_ITEMS, verbose_errors=False
        )
        try:
            grammar = _translate(kind, source, compact)
            start = LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
        except ValueError as error:
            refuse(kind, f"is not valid: {short(str(error))}")
        if start.is_error():
            refuse(kind, f"is not valid: {short(start.get_error())}")
        num_words = -(-vocabulary.vocab_size // 32)
        first = Matcher(start.deep_copy(), self._eos_token_ids, num_words, self._mask_threads)
        masks = first.compute(())
        if first.state.is_error() or (first.state.is_stopped() and not first.state.is_accepting()):
            refuse(kind, f"matches no text, or is too complex: {short(first.state.get_error())}")
        return Grammar(start, self._eos_token_ids, masks, self._mask_threads)

    def _read_vocabulary(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        with self._vocabulary_lock:
            if self._vocabulary is None:
                if not self._eos_token_ids:
                    refuse("", "needs a model that has an end-of-sequence token")
                try:
                    self._vocabulary = LLTokenizer(
                        self._tokenizer.backend.to_str(),
                        n_vocab=self._vocab_size,
                        eos_token=sorted(self._eos_token_ids),
                    )
                except ValueError as error:
                    why = f"cannot be had with this model's tokenizer: {short(str(error))}"
                    refuse("", why)
            return self._vocabulary

    def _source(self, params: StructuredOutputsParams) -> str:
        """Return a grammar as text that is neither too large nor too deep."""
        kind = params.kind
        value: Any = getattr(params, kind)
        if kind == "json_object":
            value = {"type": "object"}
        try:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            most = self.config.max_grammar_size
            if len(text) > most:
                refuse(kind, f"must have at most {most} characters, got {len(text)}")
            text.encode()
            if kind == "json":
                self._check_schema(json.loads(text))
        except (TypeError, ValueError, RecursionError) as error:
            if isinstance(error, InvalidRequestError):
                raise
            refuse(kind, f"is not valid: {short(str(error))}")
        return text

    def _check_schema(self, schema: Any) -> None:
        if not isinstance(schema, Mapping):
            refuse("json", "must be a JSON schema, that is an object", schema)
        level, depth = [schema], 0
        while level:
            depth += 1
            if depth > self.config.max_schema_depth:
                most = self.config.max_schema_depth
                refuse("json", f"must be nested at most {most} deep")
            inner = [v.values() if isinstance(v, Mapping) else v for v in level]
            level = [v for values in inner for v in values if isinstance(v, Mapping | list)]


def _translate(kind: str, source: str, compact: bool) -> str:
    """Write a grammar in llguidance's way."""
    from llguidance import LLMatcher, grammar_from

    if kind not in ("json", "json_object"):
        return grammar_from(kind, source)  # pyright: ignore[reportArgumentType]
    whitespace = {"whitespace_flexible": False} if compact else {"whitespace_pattern": WHITESPACE}
    return LLMatcher.grammar_from_json_schema(source, overrides=whitespace)  # pyright: ignore
