"""That servers have exactly the weights that were sent: by checksum where one can be computed here, else by
the log-probs of a probe.

A probe sees every layer work together, but is as blunt as the arithmetic differs: in bfloat16 a small update
is below its tolerance. A checksum sees every bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from grpo_mega.sync.fingerprint import Fingerprint
from grpo_mega.sync.servers import ControlPlane, SyncFailed

NAMES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Probe:
    """A text and the trainer's log-probs of each of its tokens after the first.

    Example: Probe(token_ids=(3, 4, 5), logprobs=(-.7, -2.1), tolerance=1e-3)
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    tolerance: float  # of the mean absolute difference


@dataclass(eq=False)
class Proof:
    """Example: Proof(servers)(fingerprint) raises SyncFailed where a server has other weights."""

    servers: ControlPlane
    probe: Probe | None = None
    _by_checksum: bool | None = field(default=None, init=False)  # not asked yet

    @property
    def is_by_checksum(self) -> bool:
        if self._by_checksum is None:
            self._by_checksum = all(self._hashes_alike(url) for url in self.servers.urls)
        return self._by_checksum

    def __call__(self, fingerprint: Fingerprint) -> None:
        if self.is_by_checksum:
            self.servers.each(lambda _, url: self._check_sums(url, fingerprint))
        elif self.probe is not None:
            probe = self.probe
            self.servers.each(lambda _, url: self._check_probe(url, probe))
        else:
            raise SyncFailed("neither checksums nor a probe to prove the weights with")

    def _hashes_alike(self, url: str) -> bool:
        if not self.servers.has(url, "weights_checker"):
            return False
        info = self.servers.get(url, "server_info")
        return info.get("device") == "cpu" and info.get("tp_size") == 1

    def _check_sums(self, url: str, fingerprint: Fingerprint) -> None:
        answer = self.servers.call(url, "weights_checker", {"action": "checksum"})
        different = fingerprint.differences(answer["ranks"][0]["checksums"])
        if different:
            shown = ", ".join(different[:NAMES_SHOWN]) + (", ..." if len(different) > NAMES_SHOWN else "")
            raise SyncFailed(f"{url} has other weights in {len(different)} tensors: {shown}")

    def _check_probe(self, url: str, probe: Probe) -> None:
        body = {
            "input_ids": probe.token_ids,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        answer = self.servers.call(url, "generate", body)
        found = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"]][1:]
        error = mean_difference(found, probe.logprobs)
        if not error <= probe.tolerance:
            raise SyncFailed(
                f"{url} gives the probe other log-probs: off by {error:.2g} on average, "
                f"{probe.tolerance:g} is allowed"
            )


def mean_difference(found: Sequence[float], expected: Sequence[float]) -> float:
    pairs = list(zip(found, expected, strict=True))
    return sum(abs(a - b) for a, b in pairs) / len(pairs)
