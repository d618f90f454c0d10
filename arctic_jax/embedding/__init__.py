"""Texts to vectors: encoders, their batches, and the pipeline that feeds them."""
