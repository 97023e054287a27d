"""Weights in and out: the native folder, released checkpoints, encoders other people trained."""

from brgsa_jax.weights.bert import load_bert
from brgsa_jax.weights.checkpoints import import_checkpoint
from brgsa_jax.weights.native import FORMAT, load_native, read_native_config, save_model
from brgsa_jax.weights.reference import export_checkpoint

__all__ = ["FORMAT", "export_checkpoint", "import_checkpoint", "load_bert", "load_native",
           "read_native_config", "save_model"]
