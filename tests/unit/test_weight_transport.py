"""What needs no server: fingerprints, buckets, the published folder, the laws of the recipe's block."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from grpo_mega.recipe.rollout_block import RolloutBlock
from grpo_mega.sync import servers
from grpo_mega.sync.fingerprint import Fingerprint, place_of
from grpo_mega.sync.servers import SyncFailed
from grpo_mega.sync.transport import MANIFEST, DiskTransport, NamedTensors, buckets, check_manifest, push
from tests.fake_sglang import FakeServer

LAYER = "model.layers.0"


def _server_hash(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).digest()[:8].hex()


def _tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (100, 8),
        f"{LAYER}.self_attn.k_proj.weight": (4, 8),  # before q, as a directory lists them
        f"{LAYER}.self_attn.q_proj.weight": (8, 8),
        f"{LAYER}.self_attn.v_proj.weight": (4, 8),
        f"{LAYER}.mlp.experts.0.down_proj.weight": (8, 6),
        f"{LAYER}.mlp.experts.0.gate_proj.weight": (6, 8),
        f"{LAYER}.mlp.experts.0.up_proj.weight": (6, 8),
        f"{LAYER}.mlp.experts.1.down_proj.weight": (8, 6),
        f"{LAYER}.mlp.experts.1.gate_proj.weight": (6, 8),
        f"{LAYER}.mlp.experts.1.up_proj.weight": (6, 8),
        "lm_head.weight": (100, 8),
    }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def _as_the_server_has_them(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    def padded(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, torch.zeros(28, 8)])  # 100 rows, to 128

    qkv = torch.cat([tensors[f"{LAYER}.self_attn.{part}_proj.weight"] for part in "qkv"])
    w13 = [
        torch.cat([tensors[f"{LAYER}.mlp.experts.{i}.{part}_proj.weight"] for part in ("gate", "up")])
        for i in (0, 1)
    ]
    w2 = [tensors[f"{LAYER}.mlp.experts.{i}.down_proj.weight"] for i in (0, 1)]
    whole = {
        "model.embed_tokens.weight": padded(tensors["model.embed_tokens.weight"]),
        f"{LAYER}.self_attn.qkv_proj.weight": qkv,
        f"{LAYER}.mlp.experts.w13_weight": torch.stack(w13),
        f"{LAYER}.mlp.experts.w2_weight": torch.stack(w2),
        "lm_head.weight": padded(tensors["lm_head.weight"]),
    }
    return {name: _server_hash(tensor) for name, tensor in whole.items()}


def _fingerprint(tensors: dict[str, torch.Tensor]) -> Fingerprint:
    fingerprint = Fingerprint()
    for name, tensor in tensors.items():
        fingerprint.add(name, tensor)
    return fingerprint


def test_parts_know_their_place():
    assert place_of("model.norm.weight") == ("model.norm.weight", 0)
    assert place_of(f"{LAYER}.self_attn.v_proj.bias") == (f"{LAYER}.self_attn.qkv_proj.bias", 2)
    assert place_of(f"{LAYER}.mlp.up_proj.weight") == (f"{LAYER}.mlp.gate_up_proj.weight", 1)
    assert place_of(f"{LAYER}.mlp.experts.3.up_proj.weight") == (f"{LAYER}.mlp.experts.w13_weight", 7)


def test_equal_weights_have_no_differences_in_whatever_order_they_come():
    tensors = _tensors()
    checksums = _as_the_server_has_them(tensors)
    assert _fingerprint(tensors).differences(checksums) == []
    assert _fingerprint(dict(reversed(tensors.items()))).differences(checksums) == []


def test_one_bit_one_missing_part_and_one_strange_tensor_are_differences():
    tensors = _tensors()
    checksums = _as_the_server_has_them(tensors)
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    changed[f"{LAYER}.mlp.experts.1.up_proj.weight"].view(torch.int32)[0, 0] ^= 1
    assert _fingerprint(changed).differences(checksums) == [f"{LAYER}.mlp.experts.w13_weight"]
    partial = {name: tensor for name, tensor in tensors.items() if "q_proj" not in name}
    assert _fingerprint(partial).differences(checksums) == [f"{LAYER}.self_attn.qkv_proj.weight"]
    assert _fingerprint(tensors).differences(checksums | {"strange": "00"}) == ["strange"]


def test_a_tied_output_layer_may_be_missing_on_one_side():
    tensors = _tensors()
    checksums = _as_the_server_has_them(tensors)
    del checksums["lm_head.weight"]
    assert _fingerprint(tensors).differences(checksums) == []


def test_buckets_hold_no_more_than_the_limit():
    sizes = [3, 3, 3, 20, 1, 1]
    stream = ((str(i), torch.zeros(size)) for i, size in enumerate(sizes))
    assert [[tensor.numel() for _, tensor in bucket] for bucket in buckets(stream, 28)] == [
        [3, 3],  # 28 bytes are seven numbers
        [3],
        [20],  # larger than the limit: alone
        [1, 1],
    ]


class _Broken:
    """Fails at the second bucket."""

    abandoned = False
    sent = 0

    def begin(self, version: str) -> None:
        pass

    def send(self, bucket: NamedTensors) -> None:
        self.sent += 1
        if self.sent == 2:
            raise OSError("no space left")

    def finish(self) -> None:
        raise AssertionError("not after a failure")

    def abandon(self) -> None:
        self.abandoned = True


def test_a_failure_still_reads_the_stream_to_its_end():
    """The other ranks send their parts until then."""
    transport, stream = _Broken(), iter([(str(i), torch.zeros(4)) for i in range(10)])
    with pytest.raises(SyncFailed, match="no space left"):
        push(stream, "v1", transport, lambda fingerprint: None, bucket_bytes=16)
    assert next(stream, None) is None and transport.abandoned


class _Servers:
    def __init__(self) -> None:
        self.posted: list[dict[str, Any]] = []

    def post(self, path: str, body: dict[str, Any]) -> None:
        self.posted.append(body)


def test_the_published_folder_is_complete_and_replaces_the_last(tmp_path: Path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    servers = _Servers()
    transport = DiskTransport(servers, tmp_path, model)  # type: ignore[arg-type]
    for version in ("a", "b"):
        push(iter(_tensors().items()), version, transport, lambda fingerprint: None, bucket_bytes=2000)
    assert [body["model_path"] for body in servers.posted] == [
        str((tmp_path / f"weights-{version}").resolve()) for version in "ab"
    ]
    (published,) = tmp_path.glob("weights-*")
    index = json.loads((published / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(_tensors()) and len(set(index.values())) > 1
    assert set(json.loads((published / MANIFEST).read_text())["sha256"]) == set(index.values())
    check_manifest(published)
    assert (published / "config.json").is_file()


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"sglang": {"mode": "external"}}, "needs rollout.sglang.urls"),
        ({"sglang": {"mode": "external", "urls": ["http://a:1"], "urls_file": "f"}}, "not both"),
        ({"sglang": {"urls": ["http://a:1"]}}, "external"),
        ({"sglang": {"urls_file": "f"}}, "external"),
        ({"sglang": {"mode": "external", "urls": ["a:1"]}}, "must begin with http"),
        ({"sglang": {"mode": "external", "urls": ["http://a:1"] * 2}}, "twice"),
        (
            {"sglang": {"mode": "external", "urls": ["http://a:1"], "deterministic": True}},
            "give them to the external ones",
        ),
        ({"engine": "sglang", "top_p": 0.9}, "before top_p and top_k cut"),
        ({"engine": "sglang", "top_k": 5}, "before top_p and top_k cut"),
        ({"max_staleness": 1}, "set it to 0, or rollout.engine to sglang"),
    ],
)
def test_laws_of_the_block(block: dict[str, Any], says: str):
    with pytest.raises(ValidationError, match=says):
        RolloutBlock.model_validate(block)


def test_a_call_longer_than_a_piece_arrives_whole(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(servers, "PIECE_BYTES", 7)
    said = "".join(chr(ord("a") + i % 26) for i in range(1000))
    with FakeServer() as server:
        control = servers.ControlPlane((server.url,))
        control.post("abort_request", {"rid": said})
        control.close()
    assert server.aborted == [said]
