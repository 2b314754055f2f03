"""Synthetic instruction data made for your student model: Montessori-Instruct in JAX."""

from importlib.metadata import version

__version__ = version("montessori-jax")
