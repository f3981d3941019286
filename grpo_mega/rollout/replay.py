"""Samples kept on disk, so that training on them can be repeated without sampling.

A step is a folder, `stage_1_step_000003`, that appears when it is whole. In it lies a Parquet file for each
rank that sampled, with a row for each sample; its metadata says what the samples follow from. Every process
writes and reads its own part: nobody ever holds a whole step. Numbers come back to the last bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch.distributed as dist

from grpo_mega.errors import UserError
from grpo_mega.types import Group, Prompt, Sample, Score

FORMAT = 1
_HEADER = b"grpo_mega.rollouts"
_SCHEMA = pa.schema(
    [
        ("place", pa.int64()),  # of the prompt in the step's batch
        ("prompt_uid", pa.string()),
        ("prompt", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("answer", pa.string()),
        ("uid", pa.string()),
        ("rollout_index", pa.int64()),
        ("response", pa.string()),
        ("response_ids", pa.list_(pa.int32())),
        ("sampler_logprobs", pa.list_(pa.float32())),  # what training reads; servers tell them as such
        ("finish_reason", pa.string()),
        ("chosen", pa.list_(pa.bool_())),  # null: the policy chose every token
        # Null where the stage gives no reward. The score of a critic is none of these: it follows from them.
        ("reward", pa.float64()),
        ("components", pa.map_(pa.string(), pa.float64())),
        ("pass_rate", pa.float64()),
        ("passed_tests", pa.int64()),
        ("total_tests", pa.int64()),
    ]
)


@dataclass(frozen=True, slots=True)
class Origin:
    """Which step of which run's samples.

    Example: Origin(seed=0, stage_index=1, step=3, prompts_per_step=16, group_size=8)
    """

    seed: int
    stage_index: int
    step: int  # of the stage, from 0
    prompts_per_step: int
    group_size: int

    @property
    def folder(self) -> str:
        return f"stage_{self.stage_index}_step_{self.step:06d}"


@dataclass(frozen=True, slots=True)
class KeptRollouts:
    """One rank's groups of a step with their places and what they earned (None: no reward was asked)."""

    places: list[int]
    groups: list[Group]
    scores: list[tuple[Score, ...]] | None


@dataclass(frozen=True, slots=True)
class RolloutDump:
    """Example: RolloutDump(Path("dump"), rank=0, ranks=2).write(origin, kept)    on every rank"""

    directory: Path
    rank: int
    ranks: int

    def write(self, origin: Origin, kept: KeptRollouts) -> None:
        """A collective. What an earlier start left of the step is replaced."""
        whole = self.directory / origin.folder
        draft = whole.with_name(f"{whole.name}.writing")
        header = {"format": FORMAT, "rank": self.rank, "ranks": self.ranks, **asdict(origin)}
        table = pa.Table.from_pylist(list(_rows(kept)), _SCHEMA)
        table = table.replace_schema_metadata({_HEADER: json.dumps(header).encode()})
        try:
            draft.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, draft / _shard(self.rank), compression="zstd")
        except OSError as error:
            raise UserError(
                f"the rollouts cannot be kept: {error}",
                where=str(draft),
                law="--dump-rollouts names a folder that every rank may write to",
                remedy="name another folder, or make room there",
            ) from None
        if self.ranks > 1:
            dist.barrier()
        if self.rank == 0:
            self._publish(draft, whole)

    def _publish(self, draft: Path, whole: Path) -> None:
        wanted = {_shard(rank) for rank in range(self.ranks)}
        found = {path.name for path in draft.iterdir()}
        if missing := sorted(wanted - found):
            raise UserError(
                f"{missing[0]} is not where rank 0 looks for it",
                where=str(draft),
                law="--dump-rollouts names a folder on a file system that all ranks see",
                remedy="name a folder on a shared file system",
            )
        for stranger in found - wanted:  # of a start on more ranks that died here
            (draft / stranger).unlink()
        if whole.exists():
            shutil.rmtree(whole)
        draft.rename(whole)


@dataclass(frozen=True, slots=True)
class RolloutReplay:
    """Example: RolloutReplay(Path("dump")).read(origin, prompts, rank=0, ranks=2)"""

    directory: Path

    def read(self, origin: Origin, prompts: Sequence[Prompt], rank: int, ranks: int) -> KeptRollouts:
        """This rank's share of a step. `prompts` is the step's batch, which the samples must be of.

        On as many ranks as sampled each gets what it had, and so sums over ranks are the same to the last
        bit. Otherwise whole files go to ranks in turn, or several ranks share a file.
        """
        shards = self._shards(origin)
        mine = shards[rank::ranks] if ranks <= len(shards) else [shards[rank % len(shards)]]
        sharers = range(rank % len(shards), ranks, len(shards)) if ranks > len(shards) else [rank]
        places: list[int] = []
        groups: list[Group] = []
        scores: list[tuple[Score, ...]] = []
        for shard in mine:
            chunks = _by_place(_read(shard, origin, len(shards)))
            for number, (place, rows) in enumerate(chunks):
                if sharers[number % len(sharers)] != rank:
                    continue
                groups.append(_group(shard, prompts, place, rows, origin.group_size))
                places.append(place)
                scores.append(tuple(_score(row) for row in rows if row["reward"] is not None))
        rewarded = all(len(given) == origin.group_size for given in scores)
        return KeptRollouts(places, groups, scores if rewarded else None)

    def _shards(self, origin: Origin) -> list[Path]:
        folder = self.directory / origin.folder
        if shards := sorted(folder.glob("rank_*.parquet")):
            return shards
        kept = sorted(path.name for path in self.directory.glob(f"stage_{origin.stage_index}_step_??????"))
        last = f"the last one kept is {kept[-1]}" if kept else "none of this stage is kept"
        raise UserError(
            f"step {origin.step} of stage {origin.stage_index} is not among the rollouts: {last}",
            where=str(folder),
            law="a replay needs every step that it trains on; steps of a stage count from 0",
            remedy="let the stage end where the kept steps do (train.steps=N caps every stage), "
            "or keep more of them",
        )


def _shard(rank: int) -> str:
    return f"rank_{rank:05d}.parquet"


def _rows(kept: KeptRollouts) -> Iterator[dict[str, Any]]:
    for number, (place, group) in enumerate(zip(kept.places, kept.groups, strict=True)):
        for index, sample in enumerate(group.samples):
            row: dict[str, Any] = {
                "place": place,
                "prompt_uid": group.prompt.uid,
                "prompt": group.prompt.text,
                "prompt_ids": group.prompt.token_ids,
                "answer": group.prompt.answer,
                "uid": sample.uid,
                "rollout_index": sample.rollout_index,
                "response": sample.text,
                "response_ids": sample.response_ids,
                "sampler_logprobs": sample.sampler_logprobs,
                "finish_reason": sample.finish_reason,
                "chosen": sample.chosen,
            }
            if kept.scores is not None:
                score = kept.scores[number][index]
                row |= {
                    "reward": score.total,
                    "components": list(score.components.items()),
                    "pass_rate": score.pass_rate,
                    "passed_tests": score.passed_tests,
                    "total_tests": score.total_tests,
                }
            yield row


def _read(path: Path, origin: Origin, shards: int) -> list[dict[str, Any]]:
    try:
        table = pq.read_table(path)
        header = json.loads((table.schema.metadata or {})[_HEADER])
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read: {str(error).splitlines()[0]}",
            where=str(path),
            law="a replay reads what --dump-rollouts wrote",
            remedy="copy the folder again, or keep the rollouts anew",
        ) from None
    expected = {"format": FORMAT, "ranks": shards, **asdict(origin)}
    for key, wanted in expected.items():
        if header.get(key) != wanted:
            raise _another_run(path, key, header.get(key), wanted)
    return table.to_pylist()


def _another_run(path: Path, key: str, kept: object, wanted: object) -> UserError:
    if key == "ranks":
        what = f"{wanted} files lie beside each other, of {kept} that ranks wrote"
        remedy = "copy the folder again, whole"
    elif key == "format":
        what = f"these rollouts are of format {kept}, not {wanted}"
        remedy = "keep them anew with this version"
    else:
        named = {"prompts_per_step": "rollout.prompts_per_step", "group_size": "rollout.group_size"}
        recipe_key = named.get(key, key)
        what = f"these rollouts were made with {recipe_key} {kept}, the recipe has {wanted}"
        remedy = f"set {recipe_key}={kept}, or keep rollouts of this recipe"
    return UserError(
        what,
        where=str(path),
        law="a replay has the seed, the prompts and the group size of the run that sampled",
        remedy=remedy,
    )


def _by_place(rows: list[dict[str, Any]]) -> list[tuple[int, list[dict[str, Any]]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["place"], []).append(row)
    return list(found.items())


def _group(
    path: Path, prompts: Sequence[Prompt], place: int, rows: list[dict[str, Any]], group_size: int
) -> Group:
    assert len(rows) == group_size, f"{path}: {len(rows)} samples of a group of {group_size}"
    prompt, kept = prompts[place], rows[0]
    if (prompt.uid, prompt.token_ids) != (kept["prompt_uid"], tuple(kept["prompt_ids"])):
        raise UserError(
            f"prompt {place} of the step was {kept['prompt_uid']} ({kept['prompt'][:60]!r}) when it was "
            f"answered, and is {prompt.uid} ({prompt.text[:60]!r}) in this recipe",
            where=str(path),
            law="a replay has the seed, the prompts and the group size of the run that sampled",
            remedy="give the data and the tokenizer of that run, or keep rollouts of this recipe",
        )
    return Group(prompt, tuple(_sample(row) for row in rows))


def _sample(row: dict[str, Any]) -> Sample:
    return Sample(
        uid=row["uid"],
        rollout_index=row["rollout_index"],
        response_ids=tuple(row["response_ids"]),
        sampler_logprobs=tuple(row["sampler_logprobs"]),
        text=row["response"],
        finish_reason=row["finish_reason"],
        chosen=None if row["chosen"] is None else tuple(row["chosen"]),
    )


def _score(row: dict[str, Any]) -> Score:
    return Score(
        total=row["reward"],
        components=dict(row["components"]),
        pass_rate=row["pass_rate"],
        passed_tests=row["passed_tests"],
        total_tests=row["total_tests"],
    )
