"""What is said when a device's memory is not enough."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax

from montessori_jax.errors import UserError


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device had too little memory."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


@contextmanager
def fits_in_memory(what: str, advice: str, split: str = "mesh.fsdp, mesh.tensor") -> Iterator[None]:
    """In the block, a device that runs out of memory is a `UserError`.

    Args:
        what: the work, as the message names it.
        advice: which settings to change, and what they are now.
        split: the axes that would split the model.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"{what} does not fit in a device's memory: {advice}, or split the model over more "
            f"devices ({split}); montessori plan tells beforehand"
        ) from error
