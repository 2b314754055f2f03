"""`montessori preferences`."""

import argparse
from pathlib import Path
from typing import Any

from montessori_jax.commands.arguments import add_stage_command, stage_section, stage_work
from montessori_jax.config import PreferencesConfig
from montessori_jax.flags import add_settings, settings_from
from montessori_jax.stopping import Stop


def add_preferences(commands: Any) -> None:
    """Declare ``preferences``."""
    parser = add_stage_command(
        commands,
        "preferences",
        "Scored candidates -> preference pairs within each prompt.",
        _preferences,
        epilog="Example: montessori preferences --candidates runs/data --scores scores.jsonl "
        "--rule extremes --out runs/pairs",
    )
    parser.add_argument(
        "--candidates", required=True, help="rows with id, prompt_id and raw (what generate wrote)"
    )
    parser.add_argument("--scores", required=True, help="rows with id and influence")
    parser.add_argument(
        "--prompts",
        help="rows with prompt_id and prompt (default: prompts.jsonl beside candidates)",
    )
    parser.add_argument("--out", required=True, help="folder for the data sets pairs and heldout")
    add_settings(parser, PreferencesConfig, "preferences")


def _preferences(parsed: argparse.Namespace, stop: Stop) -> None:
    from montessori_jax.stages.preferences import preferences, prompts_beside

    settings = settings_from(parsed, PreferencesConfig, stage_section(parsed, "preferences"))
    work = stage_work(parsed, stop, Path(parsed.out), "preferences")
    result = preferences(
        parsed.candidates,
        parsed.scores,
        settings,
        work,
        prompts=parsed.prompts or prompts_beside(parsed.candidates),
    )
    print(
        f"{parsed.out}: {result['pairs']} pairs ({result['heldout']} held out) by rule "
        f"'{result['rule']}'; {result['prompts_without']} of {result['prompts']} prompts gave none "
        f"{result['without'] or ''}"
    )
