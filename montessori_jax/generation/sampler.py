"""The built-in sampler: a prompt's samples side by side in a slot, slots refilled, under jit.

A prompt is prefilled once for all its samples. When the texts of a slot have ended, the next
prompt takes it, so one long text does not hold the others up. Between chunks of steps the host
looks for stop strings, ends what is finished and fills what is vacant.
"""

from collections import deque
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import jax.numpy as jnp
import numpy as np

from montessori_jax.config import SamplingConfig
from montessori_jax.data.packing import shared_buckets
from montessori_jax.dtypes import compute_dtype
from montessori_jax.errors import UserError
from montessori_jax.generation.endings import Ending, Turns, find_ending
from montessori_jax.generation.generator import Completion, PromptRequest
from montessori_jax.generation.slots import Written, enter, vacant, write
from montessori_jax.mesh import fetch, mesh_of, place, row_ways, use_mesh
from montessori_jax.models import Model, Params
from montessori_jax.models.inference import unstack

# Decode steps between two looks at the text. A look costs a few milliseconds, a row that ended
# with a stop string half a chunk of steps on average.
CHUNK = 16


@dataclass(frozen=True)
class JaxSampler:
    """A `Generator` on the devices that its parameters lie on.

    What a completion's text depends on is in `Generator.generate`. Whole numbers and keys come
    from the request alone. Prompts are padded to a few lengths that the list of requests decides,
    what is in ``finished`` included: in another list float32 sums may be rounded differently,
    which shows only where two tokens tie to within that rounding.

    Attributes:
        model: the decoder.
        params: its parameters; a copy laid out for decoding is made on first use and kept.
        chat: decodes ids, and knows which of them end a turn.
        refill: give a vacant slot to the next prompt at once; without it, prompts enter when all
            slots are vacant. Texts do not depend on it.
        programs: what was compiled so far, as ``(name, shapes)``.
    """

    model: Model
    params: Params
    chat: Turns
    refill: bool = True
    programs: set[tuple[object, ...]] = field(default_factory=set, compare=False, repr=False)
    _weights: dict[str, Params] = field(default_factory=dict, compare=False, repr=False)

    def generate(
        self,
        requests: Sequence[PromptRequest],
        settings: SamplingConfig,
        *,
        samples: int,
        stop: tuple[str, ...] = (),
        seed: int,
        finished: Collection[str] = (),
    ) -> Generator[list[Completion], None, None]:
        """See `Generator.generate`; prompts come one at a time, in the order of ``requests``.

        That order makes a journal of them the same whether or not a run was interrupted; a prompt
        that is done before an earlier one waits for it.

        Raises:
            UserError: a prompt is empty, or exceeds the model's positions together with
                ``settings.max_tokens``; or the model's logits are not numbers.
        """
        self._check(requests, settings)
        lengths = shared_buckets(
            [len(request.tokens) for request in requests], settings.prompts_per_batch
        )
        queue = [
            (request, length)
            for request, length in zip(requests, lengths, strict=True)
            if request.id not in finished
        ]
        if not queue:
            return
        longest = max(lengths)
        done: dict[str, list[Completion]] = {}
        due = deque(request.id for request, _ in queue)
        for made in self._run(queue, longest, settings, samples, stop, seed):
            done[made[0].prompt_id] = made
            while due and due[0] in done:
                yield done.pop(due.popleft())

    def _check(self, requests: Sequence[PromptRequest], settings: SamplingConfig) -> None:
        limit = self.model.config.max_position_embeddings
        for request in requests:
            if request.pattern:
                raise UserError("only vLLM holds texts to a pattern: set generation.structured off")
            if not request.tokens:
                raise UserError(f"prompt {request.id} is empty: give it at least one token")
            if len(request.tokens) + settings.max_tokens > limit:
                raise UserError(
                    f"prompt {request.id} has {len(request.tokens)} tokens, and with max_tokens "
                    f"{settings.max_tokens} it exceeds the model's {limit} positions: lower "
                    "max_tokens, or shorten the prompt"
                )

    def _run(
        self,
        queue: Sequence[tuple[PromptRequest, int]],
        longest: int,
        settings: SamplingConfig,
        samples: int,
        stop: tuple[str, ...],
        seed: int,
    ) -> Generator[list[Completion], None, None]:
        """The completions of each prompt as soon as they are done."""
        mesh = mesh_of(self.params)
        # A slot for each part of the mesh, however few prompts were asked for side by side.
        slots = -(-settings.prompts_per_batch // row_ways(mesh)) * row_ways(mesh)
        dtype = compute_dtype(settings.dtype)
        model, weights, shared = self.model, self._laid_out(dtype), drawing(settings)
        static: dict[str, Any] = {"settings": shared, "stop_ids": self.chat.stop_ids}
        about = (slots, samples, longest, dtype, *static.values())
        self.programs.add(("vacant", *about))
        with use_mesh(mesh):
            asked, written, own = vacant(
                model, settings=shared, slots=slots, samples=samples, length=longest, dtype=dtype
            )
        waiting = deque(queue)
        held: dict[int, _Held] = {}
        while waiting or held:
            free = [slot for slot in range(slots) if slot not in held]
            entering = free[: len(waiting)] if self.refill or not held else []
            for slot in entering:
                request, length = waiting.popleft()
                held[slot] = _Held(request)
                tokens = np.zeros((1, length), np.int32)
                tokens[0, : len(request.tokens)] = request.tokens
                numbers = np.int32(len(request.tokens)), np.uint32(request.row), np.uint32(seed)
                self.programs.add(("enter", length, *about))
                with use_mesh(mesh):
                    asked, written = enter(
                        model,
                        weights,
                        asked,
                        written,
                        *place((np.int32(slot), tokens, *numbers), mesh),
                        samples=samples,
                        **static,
                    )
            if not entering:
                finished = np.ones(slots * samples, bool)
                for slot, one in held.items():
                    for sample in range(samples):
                        finished[slot * samples + sample] = sample in one.endings
                self.programs.add(("write", *about))
                with use_mesh(mesh):
                    written, own = write(
                        model,
                        weights,
                        asked,
                        written,
                        own,
                        *place((finished, np.bool_(self.refill and bool(waiting))), mesh),
                        chunk=CHUNK,
                        **static,
                    )
            self._look(written, held, samples, settings, stop)
            for slot in [slot for slot, one in held.items() if len(one.endings) == samples]:
                yield held.pop(slot).completions()

    def _look(
        self,
        written: Written,
        held: dict[int, "_Held"],
        samples: int,
        settings: SamplingConfig,
        stop: tuple[str, ...],
    ) -> None:
        """Note how long the texts are by now, and how those ended that did since the last look."""
        lengths, tokens, finished, finite = fetch(
            (written.lengths, written.tokens, written.finished, written.finite)
        )
        for slot, one in held.items():
            if not finite[slot]:
                raise UserError(
                    f"the model's logits for prompt {one.request.id} are not finite: its weights "
                    "are broken; train with a lower learning rate"
                )
            one.count = int(lengths[slot])
            for sample in range(samples):
                row = slot * samples + sample
                if sample in one.endings or not (stop or finished[row]):
                    continue
                text = tokens[row, : one.count].tolist()
                ending = find_ending(
                    text,
                    self.chat.decode,
                    stop_ids=self.chat.stop_ids,
                    stop=stop,
                    limit=settings.max_tokens,
                )
                if ending is not None:
                    one.endings[sample] = ending
                    one.tokens[sample] = tuple(text[: ending.used])

    def _laid_out(self, dtype: str) -> Params:
        if dtype not in self._weights:
            self._weights.clear()
            self._weights[dtype] = unstack(self.model, self.params, jnp.dtype(dtype))
        return self._weights[dtype]


@dataclass
class _Held:
    """The prompt in a slot, and what is known of its texts."""

    request: PromptRequest
    count: int = 1
    endings: dict[int, Ending] = field(default_factory=dict)
    tokens: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def completions(self) -> list[Completion]:
        return [
            Completion(
                prompt_id=self.request.id,
                index=sample,
                tokens=self.tokens[sample],
                text=ending.text,
                finish=ending.finish,
                prompt_tokens=0 if sample else len(self.request.tokens),
                generated_tokens=len(self.tokens[sample]),
                stop=ending.stop,
            )
            for sample, ending in sorted(self.endings.items())
        ]


def drawing(settings: SamplingConfig) -> SamplingConfig:
    """The settings that programs depend on: stages with other settings beside share them."""
    shared = {one.name: getattr(settings, one.name) for one in fields(SamplingConfig)}
    return SamplingConfig(**{**shared, "prompts_per_batch": 1})
