"""Functions and arrays as arguments of compiled programs."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import numpy as np

T = TypeVar("T", bound=Callable[..., Any])


def as_argument(function: T) -> T:
    """``function`` in a form that a jitted function takes as an ordinary argument.

    One that is a pytree already (a registered dataclass, a `jax.tree_util.Partial`) is given back:
    its arrays become arguments of the program. Any other becomes static, and programs are cached
    by its hash; arrays that it closes over are constants of the program.
    """
    if jax.tree_util.all_leaves([function]):
        return cast(T, jax.tree_util.Partial(function))
    return function


def on_device(tree: Any) -> Any:
    """NumPy's arrays as JAX's on the default device; all other leaves as they are."""
    return jax.tree.map(
        lambda leaf: jax.device_put(leaf) if isinstance(leaf, np.ndarray) else leaf, tree
    )
