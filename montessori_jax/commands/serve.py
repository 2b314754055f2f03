"""`montessori serve`."""

import argparse
from pathlib import Path
from typing import Any

from montessori_jax.commands.arguments import add_command
from montessori_jax.config import VllmConfig
from montessori_jax.flags import add_settings, settings_from
from montessori_jax.stopping import Stop

# Of a server that a run asks for texts and hands tuned teachers to.
NOT_HERE = (
    *("url", "handover", "stay_up", "seeds", "concurrency", "stall_seconds", "request_seconds"),
    "retries",
)


def add_serve(commands: Any) -> None:
    """Declare ``serve``."""
    parser = add_command(
        commands,
        "serve",
        "A model behind a vLLM server of this machine, until Ctrl-C: a judge, or a teacher.",
        _serve,
        epilog="Example: montessori serve org/judge-model --port 8001 --devices 1",
    )
    parser.add_argument("model", metavar="MODEL", help="folder, hf:NAME, wheel:NAME or GGUF file")
    parser.add_argument("--name", default="", help="what requests call it; its own by default")
    parser.add_argument("--port", type=int, default=8001, help="0: a free one (default 8001)")
    parser.add_argument(
        "--logs", type=Path, default=Path("vllm-logs"), help="folder for its logs (vllm-logs)"
    )
    add_settings(parser, VllmConfig, "server", skip=NOT_HERE)


def _serve(parsed: argparse.Namespace, stop: Stop) -> None:
    from montessori_jax.devices import keep_off_accelerator
    from montessori_jax.serving.environment import api_key, environment_for
    from montessori_jax.serving.served import Served
    from montessori_jax.serving.sidecar import Sidecar

    keep_off_accelerator()
    name = parsed.name or parsed.model.rstrip("/").rsplit("/", 1)[-1]
    settings = settings_from(parsed, VllmConfig, {}, skip=NOT_HERE)
    sidecar = Sidecar(
        environment_for(settings), settings, parsed.logs, stop=stop, name=name,
        port=parsed.port,
    )  # fmt: skip
    given = api_key(settings.api_key_env)
    sidecar.key = given or sidecar.key
    folder = Served.of(parsed.model, sidecar.dtype, print).folder

    def ready() -> None:
        print(f"judge:\n  base_url: {sidecar.url}/v1\n  model: {name}")
        print(f"  api_key_env: {settings.api_key_env}")
        if sidecar.environment.platform == "cpu":
            print("  seeds: false")
        if not given:
            print(f"and where it is asked: export {settings.api_key_env}={sidecar.key}")
        print("Ctrl-C ends it", flush=True)

    try:
        sidecar.keep(folder, ready)
    finally:
        sidecar.end()
