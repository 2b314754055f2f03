"""Decoders, their configuration, and their weights' way in and out."""

from montessori_jax.models.config import ModelConfig, RopeScaling
from montessori_jax.models.decoder import KeyValue, Model, Params

__all__ = ["KeyValue", "Model", "ModelConfig", "Params", "RopeScaling"]
