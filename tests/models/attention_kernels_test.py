"""Every implementation of attention against one reference: torch in float64, masks by loops."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from montessori_jax.config import DpoConfig, EvaluationConfig, MeshConfig, SftConfig
from montessori_jax.data.packing import pack
from montessori_jax.errors import UserError
from montessori_jax.evaluation.reference_loss import reference_loss
from montessori_jax.mesh import make_mesh
from montessori_jax.models.attention import packed_attention, visible
from montessori_jax.models.attention_kernels import by_dot_product, by_splash, choose
from montessori_jax.training.optimizer import make_optimizer
from montessori_jax.training.pairs import pack_pairs
from montessori_jax.training.reference_log_probs import pair_log_probs
from montessori_jax.training.state import start
from montessori_jax.training.steps import dpo_step, sft_step
from tests.training import samples

HEADS, KV_HEADS, DIM = 4, 2, 8


@dataclass(frozen=True)
class Case:
    """What is asked of attention; ``sliding`` may be passed as a traced value."""

    length: int = 12
    branches: bool = False
    window: int | None = None
    sliding: bool = True
    scale: float | None = None
    soft_cap: float | None = None

    def segments(self) -> np.ndarray:
        """Two rows: samples of 5/12 and 4/12 of it with padding, and one sample."""
        ends = np.array([5, 9]) * self.length // 12
        split = np.searchsorted(ends, np.arange(self.length), side="right") + 1
        return np.stack([np.where(split == 3, 0, split), np.ones_like(split)]).astype(np.int32)

    def tree(self) -> tuple[np.ndarray, np.ndarray]:
        """Branches and positions: a trunk of 4 with branches of 5 and 3, in both rows."""
        one = np.array([0] * 4 + [1] * 5 + [2] * 3, np.int32)
        places = np.array([*range(9), *range(4, 7)], np.int32)
        return np.stack([one, one]), np.stack([places, places])

    def arrays(self, dtype: type = np.float32) -> list[np.ndarray]:
        rng = np.random.default_rng(0)
        heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)  # the last weighs the result
        return [rng.normal(size=(2, self.length, n, DIM)).astype(dtype) for n in heads]

    def seen(self) -> np.ndarray:
        """Who sees whom, one pair of tokens at a time."""
        segments = self.segments()
        branches = places = None
        if self.branches:
            segments = np.ones_like(segments)
            branches, places = self.tree()
        found = np.zeros((2, self.length, self.length), bool)
        for row, to in np.ndindex(2, self.length):
            for of in range(to + 1):
                apart = to - of if places is None else places[row, to] - places[row, of]
                found[row, to, of] = (
                    segments[row, to] == segments[row, of]
                    and (branches is None or branches[row, of] in (0, branches[row, to]))
                    and (self.window is None or not self.sliding or apart < self.window)
                )
        return found


def reference(case: Case) -> tuple[np.ndarray, list[np.ndarray]]:
    """The result, and the gradients of its weighted sum."""
    query, key, value, weight = (torch.tensor(a.astype(np.float64)) for a in case.arrays())
    leaves = [leaf.requires_grad_() for leaf in (query, key, value)]
    group = HEADS // KV_HEADS
    wide_key, wide_value = (leaf.repeat_interleave(group, dim=2) for leaf in leaves[1:])
    scores = torch.einsum("bthd,bshd->bhts", query, wide_key)
    scores = scores * (DIM**-0.5 if case.scale is None else case.scale)
    if case.soft_cap is not None:
        scores = case.soft_cap * torch.tanh(scores / case.soft_cap)
    scores = scores.masked_fill(~torch.tensor(case.seen())[:, None], -torch.inf)
    mixed = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), wide_value)
    (mixed * weight).sum().backward()
    return mixed.detach().numpy(), [leaf.grad.numpy() for leaf in leaves]


def check(case: Case, attend: Callable[..., jax.Array], tolerance: float = 1e-5) -> None:
    """Value and gradients against the reference's."""
    *arrays, weight = case.arrays()

    @jax.jit
    def total(*arrays):
        mixed = attend(*arrays)
        return jnp.sum(mixed * weight), mixed

    gradients, found = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*arrays)
    expected, expected_gradients = reference(case)
    np.testing.assert_allclose(found, expected, atol=tolerance)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max())


def plain(case: Case, traced: bool = False) -> Callable[..., jax.Array]:
    """`packed_attention` as `case` says."""

    def attend(query, key, value):
        segments, options = case.segments(), {}
        if case.branches:
            branches, positions = case.tree()
            segments, options = np.ones_like(segments), {"positions": positions}
        else:
            branches = None
        return packed_attention(
            query,
            key,
            value,
            segments,
            branches,
            window=case.window,
            sliding=jnp.asarray(case.sliding) if traced else case.sliding,
            scale=case.scale,
            soft_cap=case.soft_cap,
            **options,
        )

    return attend


CASES = [
    Case(),
    Case(branches=True),
    Case(window=3),
    Case(window=3, branches=True),
    Case(window=1),
    Case(window=3, sliding=False),
    Case(scale=0.7),
    Case(soft_cap=0.5),
    Case(window=4, scale=0.7, soft_cap=0.5, branches=True),
]


def test_cases_differ():
    """But for the window that does not hold, which is as good as none."""
    results = [reference(case)[0] for case in CASES]
    pairs = combinations(range(len(CASES)), 2)
    alike = [(i, j) for i, j in pairs if np.abs(results[i] - results[j]).max() < 1e-3]
    assert alike == [(0, CASES.index(Case(window=3, sliding=False)))]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plain(case: Case):
    check(case, plain(case))


@pytest.mark.parametrize("sliding", [True, False])
def test_plain_where_only_a_traced_value_tells_whether_it_slides(sliding: bool):
    case = Case(window=3, sliding=sliding)
    check(case, plain(case, traced=True))


@pytest.mark.parametrize("case", [Case(), CASES[-1]], ids=str)
def test_plain_in_forward_mode(case: Case):
    *arrays, weight = case.arrays()
    rng = np.random.default_rng(1)
    tangents = [rng.normal(size=array.shape).astype("f4") for array in arrays]
    attend = plain(case)
    _, found = jax.jvp(lambda *args: jnp.sum(attend(*args) * weight), arrays, tangents)
    _, gradients = reference(case)
    expected = sum(np.vdot(g, t) for g, t in zip(gradients, tangents, strict=True))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("case", [c for c in CASES if c.soft_cap is None], ids=str)
def test_dot_product_with_the_masks_that_cudnn_gets(case: Case):
    def attend(query, key, value):
        branches, positions = case.tree() if case.branches else (None, None)
        segments = np.ones((2, 12), np.int32) if case.branches else case.segments()
        allowed = visible(segments, branches, positions, case.window, case.sliding)
        scale = DIM**-0.5 if case.scale is None else case.scale
        return by_dot_product(query, key, value, allowed, scale, kernel="xla")

    check(case, attend)


@pytest.mark.parametrize("window", [None, 21])
def test_splash(window: int | None):
    """On a CPU, interpreted: segments of 106 tokens, a window inside them, a cap, grouped heads."""
    case = Case(length=256, window=window, scale=0.7, soft_cap=0.5)

    def attend(query, key, value):
        return by_splash(
            query,
            key,
            value,
            jnp.asarray(case.segments()),
            window=window,
            sliding=True,
            scale=0.7,
            soft_cap=0.5,
            interpret=True,
        )

    check(case, attend)


@pytest.mark.parametrize("taken", [set(), {"candidate"}], ids=["all-axes", "within-candidates"])
def test_splash_on_a_mesh(taken: set[str]):
    """Each device attends for its rows and heads, in a `jax.shard_map` over candidates too."""
    case = Case(length=128, scale=0.7)
    sizes = {"candidate": 2, "fsdp": 1, "tensor": 2} if taken else {"fsdp": 2, "tensor": 2}
    mesh = make_mesh(MeshConfig(**{"candidate": 1, "data": 1} | sizes))

    def attend(query, key, value):
        def inner(query, key, value, segments):
            options = {"window": None, "sliding": True, "scale": 0.7, "soft_cap": None}
            return by_splash(query, key, value, segments, interpret=True, **options)

        segments = jnp.asarray(case.segments())
        if not taken:
            return inner(query, key, value, segments)
        rows = jax.sharding.PartitionSpec("candidate")
        split = jax.shard_map(
            inner, in_specs=rows, out_specs=rows, axis_names=taken, check_vma=False
        )
        return split(query, key, value, segments)

    with jax.set_mesh(mesh):
        check(case, attend)


def test_auto_looks_at_the_platform_of_the_mesh_that_is_set():
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert choose("auto", query(), branches=False, soft_cap=None) == "splash"
    assert choose("auto", query(), branches=False, soft_cap=None) == "xla"


def test_splash_where_only_a_traced_value_tells_whether_it_slides():
    case = Case(length=128, window=21)
    *arrays, _ = case.arrays()

    @jax.jit
    def attend(sliding):
        options = {"scale": DIM**-0.5, "soft_cap": None, "interpret": True}
        segments = jnp.asarray(case.segments())
        return by_splash(*arrays, segments, window=21, sliding=sliding, **options)

    for sliding in (True, False):
        expected, _ = reference(dataclasses.replace(case, sliding=sliding))
        np.testing.assert_allclose(attend(jnp.asarray(sliding)), expected, atol=1e-5)


def query(length: int = 256, dtype: type = jnp.bfloat16, dim: int = 128) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((2, length, 8, dim), dtype)


@pytest.mark.parametrize(
    ("backend", "asked", "options", "expected"),
    [
        ("cpu", query(), {}, "xla"),
        ("gpu", query(), {}, "cudnn"),
        ("gpu", query(), {"branches": True}, "cudnn"),
        ("gpu", query(192), {}, "xla"),
        ("gpu", query(dtype=jnp.float32), {}, "xla"),
        ("gpu", query(dim=256), {}, "xla"),
        ("gpu", query(), {"soft_cap": 50.0}, "xla"),
        ("tpu", query(), {"soft_cap": 50.0}, "splash"),
        ("tpu", query(dtype=jnp.float32, dim=256), {}, "splash"),
        ("tpu", query(), {"branches": True}, "xla"),
        ("tpu", query(200), {}, "xla"),
    ],
)
def test_auto_takes_the_backends_kernel_where_it_is_exact(backend, asked, options, expected):
    options = {"branches": False, "soft_cap": None} | options
    assert choose("auto", asked, backend=backend, **options) == expected
    if backend == "cpu":
        return
    named = {"gpu": "cudnn", "tpu": "splash"}[backend]
    if expected == named:
        assert choose(named, asked, backend=backend, **options) == named
    else:
        with pytest.raises(
            UserError, match=f"attention '{named}' .*; set attention to auto or xla"
        ):
            choose(named, asked, backend=backend, **options)
    assert choose("xla", asked, backend=backend, **options) == "xla"


def test_kernels_that_do_not_run_here_are_refused_by_name():
    *arrays, _ = Case().arrays()
    for name, part in (("cudnn", "needs a GPU, but"), ("splash", "needs a TPU"), ("x", "choose")):
        with pytest.raises(UserError, match=part):
            packed_attention(*arrays, Case().segments(), implementation=name)


def test_settings_reach_the_kernel():
    """On a CPU a fused kernel is refused, by training, DPO's reference and the evaluation."""
    model, params = samples.student()
    chats, pairs = samples.chats(2), samples.pairs(2)
    batch = jax.tree.map(lambda leaf: leaf[None], pack(chats, [[0], [1]], row_length=32, slots=32))
    settings = SftConfig(attention="splash", max_length=32)
    tx = make_optimizer(settings, 1)
    with pytest.raises(UserError, match="'splash' needs a TPU"):
        jax.eval_shape(sft_step(model, tx, settings), start(params, tx), batch)
    with pytest.raises(UserError, match="'cudnn' needs a GPU"):
        pair_log_probs(model, params, pairs, DpoConfig(attention="cudnn"))
    with pytest.raises(UserError, match="'cudnn' needs a GPU"):
        reference_loss(model, params, chats, EvaluationConfig(attention="cudnn"))
    packed = jax.tree.map(lambda leaf: leaf[None], pack_pairs(
        pairs, [np.zeros(pair.targets) for pair in pairs], row_length=32, slots=32, rows=2
    ))  # fmt: skip
    dpo = DpoConfig(attention="splash")
    with pytest.raises(UserError, match="'splash' needs a TPU"):
        jax.eval_shape(dpo_step(model, tx, dpo), start(params, tx), packed)
