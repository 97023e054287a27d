"""Recipes: one file each with `get_config(arg="")`; installed as `brgsa_jax.configs`."""
