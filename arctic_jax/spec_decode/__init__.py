"""Speculative decoding: who guesses the next tokens. Importing it loads no jax."""

from arctic_jax.spec_decode.suffix_decoding import SuffixDecodingCache as SuffixDecodingCache
from arctic_jax.spec_decode.suffix_decoding import SuffixTree as SuffixTree
from arctic_jax.spec_decode.suffix_forest import SuffixDecodingDraft as SuffixDecodingDraft

__all__ = ["SuffixDecodingCache", "SuffixDecodingDraft", "SuffixTree"]
