"""From a model's name to its config, weights and tokenizer: paths, the hub, safetensors, GGUF."""
