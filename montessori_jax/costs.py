"""The cost ledger: seconds, tokens, FLOPs and peak memory of every stage's every attempt."""

import json
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

# Dense bf16 peak in FLOP/s of one chip, as its maker publishes it; model FLOP utilisation is
# printed only for devices named here. GeForce: with sums in float32, NVIDIA's Ada GPU architecture
# white paper.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


# Columns that are means over an attempt's seconds; the others are summed.
RATES = ("model_flop_utilisation", "generated_tokens_per_second")


def device_peak() -> float | None:
    """Published bf16 FLOP/s of all devices of the job together, or None where it is not known."""
    kind = jax.devices()[0].device_kind
    for name, peak in PEAK_FLOPS.items():
        # A GeForce's name is the beginning of weaker cards' too.
        if kind == name if "GeForce" in name else kind.startswith(name):
            return peak * jax.device_count()
    return None


def peak_memory() -> int:
    """Peak bytes so far: the device's where it says, else this process's resident set."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass
class Meter:
    """Counts one attempt at a stage and adds it to the ledger when it ends, however it ends."""

    ledger: Path | None
    stage: str
    counts: dict[str, int] = field(default_factory=dict)
    flops: float = 0.0
    dollars: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def count(self, *, flops: float = 0.0, dollars: float = 0.0, **tokens: int) -> None:
        """Add tokens by kind (``prompt_tokens``, ``generated_tokens``, ...), FLOPs and money."""
        for kind, number in tokens.items():
            self.counts[kind] = self.counts.get(kind, 0) + int(number)
        self.flops += flops
        self.dollars += dollars

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def close(self, finished: bool) -> dict[str, Any]:
        """The attempt as a ledger row, appended to the ledger."""
        seconds = self.seconds
        row: dict[str, Any] = {
            "stage": self.stage,
            "finished": finished,
            "seconds": round(seconds, 3),
            **self.counts,
            "flops": self.flops,
            "peak_memory_bytes": peak_memory(),
            "device": jax.devices()[0].device_kind,
        }
        if generated := self.counts.get("generated_tokens"):
            row["generated_tokens_per_second"] = round(generated / seconds, 2)
        if self.dollars:
            row["dollars"] = round(self.dollars, 6)
        peak = device_peak()
        if peak and self.flops:
            row["model_flop_utilisation"] = round(self.flops / seconds / peak, 4)
        if self.ledger is not None:
            # A kill may have torn the last line: this one must not be joined to it.
            torn = self.ledger.exists() and not self.ledger.read_bytes().endswith(b"\n")
            with open(self.ledger, "a", encoding="utf-8") as file:
                file.write("\n" * torn + json.dumps(row) + "\n")
        return row


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """Ledger rows summed by stage over attempts, in order of first appearance."""
    stages: dict[str, dict[str, Any]] = {}
    if not path.exists():
        return []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # torn by a kill; its attempt is lost, not the run
        total = stages.setdefault(row["stage"], {"stage": row["stage"], "attempts": 0})
        total["attempts"] += 1
        for key, value in row.items():
            if key in RATES:
                done = total["seconds"] - row["seconds"]
                before = total.get(key, 0.0) * done
                total[key] = (before + value * row["seconds"]) / total["seconds"]
            elif key == "peak_memory_bytes":
                total[key] = max(total.get(key, 0), value)
            elif isinstance(value, int | float) and key != "finished":
                total[key] = total.get(key, 0) + value
    return list(stages.values())


def describe_cost(row: dict[str, Any]) -> str:
    """Seconds and tokens of a ledger row in a few words."""
    parts = [f"{row['seconds']:.0f} s"]
    for kind, number in row.items():
        if kind.endswith("_tokens"):
            parts.append(f"{number:,} {kind.removesuffix('_tokens')} tokens")
    if "dollars" in row:
        parts.append(f"${row['dollars']:.2f}")
    return ", ".join(parts)
