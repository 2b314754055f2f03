"""The meshes that sharded programs are tested on: every axis alone and every two together."""

from itertools import combinations

from montessori_jax.config import MeshConfig
from montessori_jax.mesh import AXES, make_mesh

SHAPES = [(name,) for name in AXES] + list(combinations(AXES, 2))
IDS = ["-".join(names) for names in SHAPES]


def mesh_on(*names: str):
    """Two devices on each axis named, one on the others."""
    return make_mesh(MeshConfig(**{name: 2 if name in names else 1 for name in AXES}))
