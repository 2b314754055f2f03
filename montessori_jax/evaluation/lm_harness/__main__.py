"""The harness's own command with our model class: ``python -m montessori_jax.evaluation.lm_harness
--model montessori --model_args pretrained=DIR --tasks ...``, arguments as those of ``lm-eval``."""

import sys
from importlib import import_module

from montessori_jax.errors import UserError
from montessori_jax.evaluation.lm_harness import check_installed


def main() -> None:
    check_installed()
    from lm_eval.__main__ import cli_evaluate

    import_module("montessori_jax.evaluation.lm_harness.model")  # which registers it
    cli_evaluate()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"lm_harness: error: {error}")
