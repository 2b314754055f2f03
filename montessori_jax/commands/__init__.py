"""The subcommands of `montessori`, a module each: what its arguments are, and what it does.

A module has ``add_NAME(commands)``, which declares the subcommand, and the function that it runs;
`montessori_jax.cli.COMMANDS` lists them. ``--help`` imports all of these modules, so what takes
long to import (JAX, the stages) is imported by the functions that need it.
"""
