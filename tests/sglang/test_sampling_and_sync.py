"""A real server: its samples have the trainer's log-probs, and after each sync it is the trainer's policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from grpo_mega.errors import UserError
from grpo_mega.rollout.local import LocalEngine
from grpo_mega.rollout.sampling import SamplingParams
from grpo_mega.rollout.sglang import SglangEngine
from grpo_mega.sync import transport as transports
from grpo_mega.sync.proof import Probe, Proof
from grpo_mega.sync.servers import ControlPlane, SyncFailed
from grpo_mega.types import Prompt
from tests import tiny
from tests.sglang.conftest import Model, Owner, Weights

pytestmark = pytest.mark.sglang

TRANSPORTS = ("disk", "tensor", "distributed")
GREEDY = SamplingParams(max_new_tokens=12, temperature=0.0, stop_ids=frozenset({7, 20}))
Engines = Callable[..., SglangEngine]
_GREEDY: dict[tuple[Path, float], list[tuple[int, ...]]] = {}


def prompts(count: int) -> list[Prompt]:
    return [
        Prompt(uid=f"train-{i}", index=i, text="", token_ids=tuple(range(3 + i, 7 + i + i % 3)), answer="")
        for i in range(count)
    ]


def greedy_of_trainer(model: Model, weights: Weights) -> list[tuple[int, ...]]:
    key = model.directory, weights.scale
    if key not in _GREEDY:
        _GREEDY[key] = _sampled_by_trainer(model, weights)
    return _GREEDY[key]


def _sampled_by_trainer(model: Model, weights: Weights) -> list[tuple[int, ...]]:
    engine = LocalEngine(model.hf, model.facts.tokenizer, torch.float32, torch.device("cpu"), 4)
    engine.load(weights)
    return [group.samples[0].response_ids for group in engine.generate(prompts(6), 1, GREEDY, 0)]


def greedy_of(engine: SglangEngine) -> list[tuple[int, ...]]:
    return [group.samples[0].response_ids for group in engine.generate(prompts(6), 1, GREEDY, 0)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_trainers(owner: Owner, model: Model, temperature: float):
    """Of the distribution that was sampled from, softmax(logits / temperature)."""
    engine = owner.engine
    engine.load(model.first)
    reference = tiny.load_model(model.directory)
    params = SamplingParams(max_new_tokens=16, temperature=temperature, stop_ids=frozenset({7, 20, 30}))
    groups = engine.generate(prompts(8), 4, params, seed=3)
    assert [group.prompt.uid for group in groups] == [f"train-{i}" for i in range(8)]
    worst = 0.0
    for group in groups:
        assert [s.uid for s in group.samples] == [f"{group.prompt.uid}/{i}" for i in range(4)]
        for sample in group.samples:
            start = len(group.prompt.token_ids)
            ids = torch.tensor([*group.prompt.token_ids, *sample.response_ids])
            logits = reference(ids[None]).logits.detach()[0, start - 1 : -1] / temperature
            expected = torch.log_softmax(logits, -1).gather(-1, ids[start:, None])
            difference = torch.tensor(sample.sampler_logprobs) - expected[:, 0]
            worst = max(worst, float(difference.abs().max()))
    assert worst < 1e-4
    assert len({s.response_ids for group in groups for s in group.samples}) > 16


def test_samples_end_like_the_local_engines(owner: Owner, model: Model):
    owner.engine.load(model.first)
    params = SamplingParams(max_new_tokens=10, stop_ids=frozenset({7, 20, 30}))
    samples = [s for group in owner.engine.generate(prompts(8), 4, params, 1) for s in group.samples]
    stopped = [sample for sample in samples if sample.finish_reason == "stop"]
    assert stopped and len(stopped) < len(samples)
    for sample in samples:
        assert not {7, 20, 30} & set(sample.response_ids[:-1])
        assert (sample.response_ids[-1] in {7, 20, 30}) == (sample.finish_reason == "stop")
        assert sample.finish_reason == "stop" or len(sample.response_ids) == 10


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_after_a_sync_the_server_is_the_trainer(
    external: Engines, model: Model, transport: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(transports, "BUCKET_BYTES", 100_000)  # several buckets
    monkeypatch.setattr(transports.push, "__defaults__", (100_000,))
    engine = external(transport=transport)
    expected = [greedy_of_trainer(model, weights) for weights in (model.first, model.second)]
    assert expected[0] != expected[1]
    for turn in (0, 1, 0):
        engine.load((model.first, model.second)[turn])
        assert greedy_of(engine) == expected[turn]
    assert engine.report is not None and engine.report.attempts == 1
    sent = sum(tensor.nbytes for _, tensor in model.first)
    assert engine.metrics["sync/bytes"] == sent and engine.metrics["sync/mb_per_second"] > 0


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_one_wrong_bit_is_noticed(external: Engines, model: Model, transport: str, monkeypatch):
    engine = external(transport=transport, retries=1)
    engine.load(model.first)
    assert engine._transport is not None
    kind = type(engine._transport)
    whole, name = kind.send, "model.layers.3.self_attn.v_proj.weight"

    def with_a_wrong_bit(self: object, bucket: transports.NamedTensors) -> None:
        sent = []
        for key, tensor in bucket:
            changed = tensor.clone()
            if key == name:
                changed.view(torch.int32)[0, 0] ^= 1
            sent.append((key, changed))
        whole(self, sent)  # type: ignore[arg-type]

    monkeypatch.setattr(kind, "send", with_a_wrong_bit)
    with pytest.raises(UserError, match=r"layers\.3\.self_attn\.qkv_proj\.weight"):
        engine.load(model.second)
    assert engine.version is None
    with pytest.raises(UserError, match="proved"):
        greedy_of(engine)
    monkeypatch.undo()
    engine.load(model.second)
    assert greedy_of(engine) == greedy_of_trainer(model, model.second)


def test_a_probe_proves_where_checksums_cannot(owner: Owner, model: Model):
    owner.engine.load(model.first)
    ids = tuple(range(3, 40))
    logits = tiny.load_model(model.directory)(torch.tensor(ids)[None]).logits.detach()[0, :-1]
    logprobs = torch.log_softmax(logits, -1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    servers = ControlPlane((owner.url,))
    try:
        for shift, right in ((0.0, True), (0.01, False)):
            proof = Proof(servers, Probe(ids, tuple(value + shift for value in logprobs), 1e-3))
            proof._by_checksum = False
            if right:
                proof(transports.Fingerprint())
            else:
                with pytest.raises(SyncFailed, match=r"off by 0\.01"):
                    proof(transports.Fingerprint())
    finally:
        servers.close()


def test_a_published_folder_is_a_whole_model(external: Engines, model: Model):
    """Anyone can load it: checksums in the manifest, no draft left, the previous one gone."""
    engine = external(transport="disk")
    engine.load(model.first)
    engine.load(model.second)
    folder = Path(engine.run_dir) / "servers"
    (published,) = folder.glob("weights-*")
    assert published.name == f"weights-{engine.version}"
    transports.check_manifest(published)
    loaded = tiny.load_model(published).state_dict()
    for name, tensor in model.second:
        assert torch.equal(loaded[name], tensor)
    shard = next(published.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(SyncFailed, match="not what was written"):
        transports.check_manifest(published)
