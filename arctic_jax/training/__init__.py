"""Making SwiftKV models: transformation, distillation and evaluation. `optax` is an extra."""
