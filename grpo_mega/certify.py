"""Certify a policy loss: its gradient is that of its value, and neither depends on how the batch is laid out.

Works on the loss of a recipe and on any callable with PolicyLoss's signature.

# T packed tokens, B sequences
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import torch

from grpo_mega.algo.aggregate import Denominators
from grpo_mega.algo.objective import PolicyLossOutput
from grpo_mega.monitor.metrics import merge, reduce

Loss = Callable[..., Any]
EPSILON = 1e-5
"""Step of numerical differentiation in float64."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One law: by how much it was missed at worst, and how much is allowed."""

    law: str
    worst: float
    allowed: float
    detail: str = ""

    @property
    def holds(self) -> bool:
        return self.worst <= self.allowed  # false for nan


@dataclass(frozen=True, slots=True)
class Trial:
    """A batch as the loss takes it, one entry for each sequence."""

    trainer: tuple[torch.Tensor, ...]
    sampler: tuple[torch.Tensor, ...]
    reference: tuple[torch.Tensor, ...]
    entropy: tuple[torch.Tensor, ...]
    sq_prob: tuple[torch.Tensor, ...]
    mask: tuple[torch.Tensor, ...]
    segments: tuple[torch.Tensor, ...]
    advantages: tuple[torch.Tensor, ...]

    def take(self, order: Sequence[int]) -> Trial:
        """These sequences, in this order."""
        return Trial(**{f.name: tuple(getattr(self, f.name)[i] for i in order) for f in fields(self)})

    @property
    def denominators(self) -> Denominators:
        lengths = [int(mask.sum()) for mask in self.mask]
        return Denominators(float(sum(lengths)), float(sum(length > 0 for length in lengths)))


LENGTHS = (5, 0, 1, 70, 12, 3, 33, 8)
"""Response tokens: none, one, more than a row of the fused layout, and some between."""


def trial(dtype: torch.dtype = torch.float64, seed: int = 0, lengths: Sequence[int] = LENGTHS) -> Trial:
    """Off-policy enough that clips, caps and dual bounds act; prompts before responses and a hole in each."""
    generator = torch.Generator().manual_seed(seed)

    def noise(count: int, scale: float) -> torch.Tensor:
        return torch.randn(count, generator=generator, dtype=torch.float64) * scale

    rows: list[list[torch.Tensor]] = [[] for _ in range(8)]
    for index, length in enumerate(lengths):
        prompt, hole = index % 3, length // 4
        tokens = prompt + length + hole
        mask = torch.arange(tokens) >= prompt
        holes = torch.randperm(length + hole, generator=generator)[:hole] + prompt
        mask[holes] = False
        sampler = -noise(tokens, 1.0).abs() - 0.05
        trainer = sampler + noise(tokens, 0.4)
        entropy, probability = noise(tokens, 1.0).abs(), trainer.clamp(max=-0.01).exp()
        spread = (1 - probability) ** 2 * torch.rand(tokens, generator=generator, dtype=torch.float64)
        advantage = noise(1, 1.0)[0] if index % 4 else noise(1, 0.0)[0]
        values = (trainer, sampler, trainer + noise(tokens, 0.3), entropy, probability**2 + spread)
        segments = _segments(tokens, prompt, parsed=index % 2 == 0)
        for row, value in zip(rows, (*values, mask, segments, advantage), strict=True):
            row.append(value.to(dtype) if value.is_floating_point() else value)
    return Trial(*(tuple(row) for row in rows))


def _segments(tokens: int, prompt: int, *, parsed: bool) -> torch.Tensor:
    """Structure, thought, structure, answer, or not parsed at all."""
    segments = torch.zeros(tokens, dtype=torch.int8)
    if parsed:
        place = torch.arange(tokens) - prompt
        segments[place >= 0] = 1
        segments[(place >= 1) & (place < tokens // 2)] = 2
        segments[place >= max(tokens // 2 + 2, 1)] = 3
    return segments


@dataclass(frozen=True, slots=True)
class Answer:
    """What a loss says of a batch: its value and its gradients, sequence by sequence."""

    loss: torch.Tensor
    gradients: tuple[torch.Tensor, ...]  # of the trainer's log-probabilities, then of the entropies
    metrics: Any = None


def ask(loss: Loss, batch: Trial, counts: Denominators, *, padding: int = 0) -> Answer:
    """Pack, evaluate, differentiate, unpack."""
    trainer = [values.clone().requires_grad_() for values in batch.trainer]
    entropy = [values.clone().requires_grad_() for values in batch.entropy]
    output = loss(**packed(replace(batch, trainer=tuple(trainer), entropy=tuple(entropy)), counts, padding))
    value = output if isinstance(output, torch.Tensor) else output.loss
    leaves = [*trainer, *entropy]
    found = torch.autograd.grad(value, leaves, allow_unused=True)
    gradients = tuple(
        torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)
    )
    metrics = output.metrics if isinstance(output, PolicyLossOutput) else None
    return Answer(value.data, gradients, metrics)  # .detach() may be standing in for a constant


def packed(batch: Trial, counts: Denominators, padding: int = 0) -> dict[str, Any]:
    """The loss's arguments. The padding is one more sequence, of garbage that no mask covers."""
    dtype = batch.trainer[0].dtype
    lengths = [len(values) for values in batch.trainer] + ([padding] if padding else [])
    tail = torch.full((padding,), 7.0, dtype=dtype)

    def joined(values: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return torch.cat([*values, tail.to(values[0].dtype)])

    return {
        "trainer_logprobs_T": joined(batch.trainer),
        "sampler_logprobs_T": joined(batch.sampler),
        "advantages": torch.stack(batch.advantages),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        "reference_logprobs_T": joined(batch.reference),
        "entropy_T": joined(batch.entropy),
        "sq_prob_T": joined(batch.sq_prob),
        "response_mask_T": torch.cat([*batch.mask, torch.zeros(padding, dtype=torch.bool)]),
        "denominators": counts,
        "segments_T": torch.cat([*batch.segments, torch.zeros(padding, dtype=torch.int8)]),
    }


def certify(loss: Loss) -> Iterator[Verdict]:
    """Every law that any policy loss must obey, one after the other."""
    yield gradient_is_that_of_the_value(loss)
    yield packing_order(loss)
    for parts in (2, 4):
        yield split(loss, parts, f"{parts} micro-batches add up to one")
    yield split(loss, 3, "dealt over 3 data-parallel ranks it adds up to one", dealt=True)
    yield from metrics_of_parts(loss)
    yield padding_is_nothing(loss)
    yield masked_tokens_are_nothing(loss)
    yield nothing_but_finite(loss)


def gradient_is_that_of_the_value(loss: Loss) -> Verdict:
    """Central differences in float64, with everything the loss detaches held at its value."""
    batch = trial(lengths=(4, 1, 6))
    counts = batch.denominators
    with constants_of(lambda: ask(loss, batch, counts)) as held:
        analytic = torch.cat(held.answer.gradients[: len(batch.trainer)])
        flat = torch.cat(batch.trainer)
        numeric = torch.zeros_like(flat)
        for index in range(len(flat)):
            values = []
            for step in (EPSILON, -EPSILON):
                moved = flat.clone()
                moved[index] += step
                parts = tuple(moved.split([len(t) for t in batch.trainer]))
                with held.replayed():
                    values.append(ask(loss, replace(batch, trainer=parts), counts).loss)
            numeric[index] = (values[0] - values[1]) / (2 * EPSILON)
    return Verdict("the gradient is that of the value (float64)", _distance(analytic, numeric), 1e-5)


class constants_of:
    """Inside, what `Tensor.detach` returned during the first evaluation can be replayed in the same order: a
    stop-gradient is then a constant, as it is to autograd."""

    def __init__(self, evaluate: Callable[[], Answer]):
        self._evaluate = evaluate
        self._detach = torch.Tensor.detach
        self._held: list[torch.Tensor] = []

    def __enter__(self) -> constants_of:
        def recording(tensor: torch.Tensor) -> torch.Tensor:
            self._held.append(self._detach(tensor))
            return self._held[-1]

        with self._patched(recording):
            self.answer = self._evaluate()
        return self

    def __exit__(self, *failure: object) -> None:
        self._held.clear()

    @contextmanager
    def replayed(self) -> Iterator[None]:
        held = iter(self._held)
        with self._patched(lambda tensor: next(held)):
            yield

    @contextmanager
    def _patched(self, stand_in: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        torch.Tensor.detach = stand_in  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.Tensor.detach = self._detach  # type: ignore[method-assign]


def packing_order(loss: Loss) -> Verdict:
    batch = trial()
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    whole = ask(loss, batch, batch.denominators)
    moved = ask(loss, batch.take(order), batch.denominators)
    count = len(order)
    back = [order.index(i) for i in range(count)]
    gradients = [moved.gradients[i] for i in back] + [moved.gradients[count + i] for i in back]
    return Verdict("the order of packing does not matter", _apart(whole, moved.loss, gradients), 1e-9)


def split(loss: Loss, parts: int, law: str, *, dealt: bool = False) -> Verdict:
    """Parts of a batch under the denominators of the whole: values add up, gradients are those of the
    whole."""
    batch = trial()
    whole = ask(loss, batch, batch.denominators)
    count = len(batch.trainer)
    answers = [
        (mine, ask(loss, batch.take(mine), batch.denominators)) for mine in shares(count, parts, dealt)
    ]
    gradients = list(whole.gradients)
    for mine, answer in answers:
        for place, index in enumerate(mine):
            gradients[index] = answer.gradients[place]
            gradients[count + index] = answer.gradients[len(mine) + place]
    total = torch.stack([answer.loss for _, answer in answers]).sum()
    return Verdict(law, _apart(whole, total, gradients), 1e-9)


def shares(count: int, parts: int, dealt: bool) -> list[list[int]]:
    """Sequences of each part: neighbours together, or dealt like cards."""
    if dealt:
        return [list(range(part, count, parts)) for part in range(parts)]
    cuts = [count * part // parts for part in range(parts + 1)]
    return [list(range(begin, end)) for begin, end in pairwise(cuts)]


def metrics_of_parts(loss: Loss) -> Iterator[Verdict]:
    """Metrics that carry denominators merge to those of the whole. A loss without metrics is not asked."""
    batch = trial()
    whole = ask(loss, batch, batch.denominators)
    if whole.metrics is None:
        return
    answers = [ask(loss, batch.take(mine), batch.denominators) for mine in shares(8, 3, True)]
    expected, merged = reduce(whole.metrics), reduce(merge(answer.metrics for answer in answers))
    missing = sorted(set(expected) ^ set(merged))
    errors = {name: abs(merged[name] - number) for name, number in expected.items() if name in merged}
    relative = {name: error / max(abs(expected[name]), 1e-3) for name, error in errors.items()}
    worst = max(relative, key=lambda name: relative[name])
    detail = f"only in one of both: {missing}" if missing else worst
    yield Verdict(
        "metrics of parts merge to those of the whole", relative[worst] + len(missing), 1e-6, detail
    )


def padding_is_nothing(loss: Loss) -> Verdict:
    batch = trial()
    whole = ask(loss, batch, batch.denominators)
    more = ask(loss, batch, batch.denominators, padding=37)
    return Verdict("padding does not matter", _apart(whole, more.loss, more.gradients), 1e-9)


def masked_tokens_are_nothing(loss: Loss) -> Verdict:
    """Prompts and holes: whatever stands there moves neither the value nor any gradient, and has none."""
    batch = trial()
    changed = {
        name: tuple(
            values.where(mask, -3.0) for values, mask in zip(getattr(batch, name), batch.mask, strict=True)
        )
        for name in ("trainer", "sampler", "reference", "entropy", "sq_prob")
    }
    whole = ask(loss, batch, batch.denominators)
    other = ask(loss, replace(batch, **changed), batch.denominators)
    outside = [~mask for mask in (*batch.mask, *batch.mask)]
    astray = torch.cat([g[m] for g, m in zip(whole.gradients, outside, strict=True)]).abs().sum()
    apart = _apart(whole, other.loss, other.gradients)
    return Verdict("tokens outside the mask do not matter", apart + float(astray), 1e-9)


def nothing_but_finite(loss: Loss) -> Verdict:
    """Log-ratios of +-50, no advantage, and a batch without any response token."""
    batch = trial()
    wild = tuple(values + 50.0 * (-1) ** i for i, values in enumerate(batch.sampler))
    silent = replace(batch, mask=tuple(torch.zeros_like(mask) for mask in batch.mask))
    idle = replace(batch, advantages=tuple(torch.zeros_like(a) for a in batch.advantages))
    wrong = 0
    for case in (replace(batch, sampler=wild), silent, idle):
        answer = ask(loss, case, case.denominators)
        wrong += sum(int((~value.isfinite()).sum()) for value in (answer.loss, *answer.gradients))
    return Verdict("extreme ratios, zero advantages, empty batches stay finite", float(wrong), 0.0)


def _apart(whole: Answer, loss: torch.Tensor, gradients: Sequence[torch.Tensor]) -> float:
    value = _distance(whole.loss[None], loss[None])
    return max(value, _distance(torch.cat(whole.gradients), torch.cat(list(gradients))))


def _distance(expected: torch.Tensor, found: torch.Tensor) -> float:
    """The largest difference, relative to the largest magnitude."""
    scale = expected.abs().max().clamp(min=1e-12)
    return float((expected.double() - found.double()).abs().max() / scale)
