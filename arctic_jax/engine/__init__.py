"""The engine's machinery: scheduler, block pool, step programs, sampler, detokenizer."""
