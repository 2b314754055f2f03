"""Peak memory and seconds of loading and exporting a checkpoint as large as Llama-3-8B.

    python -m benchmarks.loading [--layers 32] [--folder build/loading] [--transformers]

A checkpoint with the shapes of Llama-3-8B (16 GB of random bfloat16 in shards of 5 GB) is written
to ``--folder``, which needs room for two and is removed afterwards. Each measurement is a process
of its own. Two peaks are told, both above what the process held before: ``peak_gib`` is all
resident memory, pages of mapped files included (the kernel's own high-water mark), and
``anonymous_gib`` is what cannot be dropped, sampled every 10 ms. ``bound_gib`` is the size of the
parameters plus 1.3 times the largest shard. The export is compared with the source tensor by
tensor. transformers leaves bfloat16 weights where they are in the mapped files, to be read when
they are first used: its figures are those of a model that is not in memory yet.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.record import ROOT, write_result

GIB = 2**30
SHARD_BYTES = 5 * 10**9
# The published config.json of Llama-3-8B, as far as it decides shapes.
LLAMA_3_8B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}


def write_checkpoint(folder: Path, config: dict[str, Any], shard_bytes: int = SHARD_BYTES) -> None:
    """A checkpoint of random bfloat16 by the safetensors library, one shard in memory."""
    from safetensors.numpy import save_file

    from montessori_jax.models.families import family_of
    from montessori_jax.models.weights import stored_shapes

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    _write_tokenizer(folder)
    rng = np.random.default_rng(0)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, shape in stored_shapes(family_of(config, "benchmark")).items():
        size = 2 * math.prod(shape)
        if shards[-1] and held + size > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = shape
        held += size
    weight_map = {}
    for number, shapes in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _random(rng, shape) for name, shape in shapes.items()}
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shapes, file)
        del tensors
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Bfloat16 of either sign and magnitude 0.008 to 0.12: random bits, four exponents."""
    bits = np.frombuffer(rng.bytes(2 * math.prod(shape)), np.uint16)
    return ((bits & 0x81FF) | 0x3C00).view(ml_dtypes.bfloat16).reshape(shape)


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"w0": 0, "w1": 1, "w2": 2}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="w0", bos_token="w1", eos_token="w2"
    ).save_pretrained(folder)


def memory() -> dict[str, int]:
    """Bytes of this process by ``/proc/self/status``: ``VmHWM``, ``VmRSS``, ``RssAnon``, ..."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if rest.endswith("kB"):
            found[name] = int(rest.split()[0]) * 1024
    return found


@contextmanager
def measured(result: dict[str, float]) -> Iterator[None]:
    """Fill ``result`` with ``seconds``, ``peak_bytes`` and ``anonymous_bytes`` of the block."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
    before = memory()
    peak, done = before["RssAnon"], threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, memory()["RssAnon"])

    sampler = threading.Thread(target=sample)
    sampler.start()
    began = time.perf_counter()
    try:
        yield
    finally:
        result["seconds"] = time.perf_counter() - began
        done.set()
        sampler.join()
        after = memory()
        result["peak_bytes"] = after["VmHWM"] - before["VmRSS"]
        result["anonymous_bytes"] = max(peak, after["RssAnon"]) - before["RssAnon"]


def child_ours(folder: Path) -> dict[str, Any]:
    """Load in bfloat16, then export from that state; each peak above what there was before."""
    import jax
    import jax.numpy as jnp

    from montessori_jax.models.folder import load_folder, save_folder

    jax.block_until_ready(jnp.zeros(1))
    loading: dict[str, float] = {}
    exporting: dict[str, float] = {}
    with measured(loading):
        model = load_folder(folder, dtype=jnp.bfloat16)
        jax.block_until_ready(model.params)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    with measured(exporting):
        save_folder(
            folder / "export", model.model, model.params, model.tokenizer, model.generation,
            dtype="bfloat16",
        )  # fmt: skip
    return {"kept_bytes": kept, "load": loading, "export": exporting}


def child_transformers(folder: Path) -> dict[str, Any]:
    """transformers' loading of the same files in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    loading: dict[str, float] = {}
    with measured(loading):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    kept = sum(parameter.nbytes for parameter in model.parameters())
    return {"kept_bytes": kept, "load": loading}


CHILDREN = {"ours": child_ours, "transformers": child_transformers}


def in_child(name: str, folder: Path) -> dict[str, Any]:
    """What ``CHILDREN[name]`` reports, from a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.loading", "--child", name, "--folder", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{name} exited with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two folders hold the same tensors, bit for bit."""
    from montessori_jax.models.shards import Shards

    a, b = (Shards(sorted(place.glob("*.safetensors"))) for place in (one, other))
    return a.keys() == b.keys() and all(
        np.array_equal(a[name].view(np.uint16), b[name].view(np.uint16)) for name in a
    )


def _readable(report: dict[str, Any], largest: int) -> dict[str, Any]:
    kept = report["kept_bytes"]
    shown = {"kept_gib": round(kept / GIB, 2), "bound_gib": round((kept + 1.3 * largest) / GIB, 2)}
    for part in ("load", "export"):
        if part in report:
            shown[part] = {
                "seconds": round(report[part]["seconds"], 1),
                "peak_gib": round(report[part]["peak_bytes"] / GIB, 2),
                "anonymous_gib": round(report[part]["anonymous_bytes"] / GIB, 2),
            }
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=32, help="32 are Llama-3-8B's")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "loading")
    parser.add_argument("--transformers", action="store_true", help="measure transformers too")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.child:
        print(json.dumps(CHILDREN[parsed.child](parsed.folder)))
        return
    shutil.rmtree(parsed.folder, ignore_errors=True)
    try:
        began = time.perf_counter()
        write_checkpoint(parsed.folder, LLAMA_3_8B | {"num_hidden_layers": parsed.layers})
        print(f"checkpoint written in {time.perf_counter() - began:.0f} s", flush=True)
        sizes = [file.stat().st_size for file in parsed.folder.glob("*.safetensors")]
        result: dict[str, Any] = {
            "layers": parsed.layers,
            "checkpoint_gib": round(sum(sizes) / GIB, 2),
            "shards": len(sizes),
            "largest_shard_gib": round(max(sizes) / GIB, 2),
        }
        result["ours"] = _readable(in_child("ours", parsed.folder), max(sizes))
        print(json.dumps(result, indent=2), flush=True)
        result["export_is_identical"] = same_tensors(parsed.folder, parsed.folder / "export")
        shutil.rmtree(parsed.folder / "export")
        if parsed.transformers:
            theirs = in_child("transformers", parsed.folder)
            result["transformers"] = _readable(theirs, max(sizes))
        print(write_result("loading", result))
        print(json.dumps(result, indent=2))
    finally:
        shutil.rmtree(parsed.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
