"""Eight CPU devices for every test; nothing of one test leaks into another."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
