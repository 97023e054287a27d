"""The conversion of a build as an Apache Beam pipeline, for Dataflow, Flink, Spark and the like.

Volumes spread over the workers of the pipeline; when all are staged, each shard is written by one
worker. The staging folder is the same as that of a build without Beam and must be reachable by all
workers under the same path; records and shards that are already there are not made again, so a
build that failed under one runner continues under another, or under none. Needs the extra `beam`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from brgsa_jax.config import UserError
from brgsa_jax.data import records
from brgsa_jax.data.records import Shard


def convert(staging: Path, shards: Sequence[Shard], options: str, flags: Sequence[str]) -> None:
    """Makes each record and shard that staging lacks.

    Args:
        staging: OUT/.staging, claimed and locked.
        shards: of the whole build.
        options: of the array_record writer.
        flags: of the pipeline, e.g. ["--runner=FlinkRunner", "--flink_master=host:8081"].

    Raises:
        UserError: Beam is not installed, does not know a flag, or the pipeline failed.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError(f"Apache Beam cannot be imported ({error}); install brgsa-jax[beam], or "
                        "build without --beam-runner") from error
    staging = staging.resolve()
    unmade = [shard for shard in shards if records.shard_entries(staging, shard) is None]
    tasks = [(shard.name, task, key) for shard in unmade
             for task, key in zip(shard.tasks, shard.keys, strict=True)
             if not records.is_staged(staging, key)]
    try:
        # Workers import this package for the functions and tasks; nothing of the main script.
        with beam.Pipeline(options=PipelineOptions(list(flags), save_main_session=False)) as line:
            made = (line | "tasks" >> beam.Create(tasks)
                    | "spread" >> beam.Reshuffle()
                    | "make records" >> beam.Map(_make, str(staging)))
            wanted = line | "shards" >> beam.Create(
                [(shard.name, shard._replace(tasks=())) for shard in unmade])
            ({"made": made, "wanted": wanted} | "all of a shard" >> beam.CoGroupByKey()
             | "write shards" >> beam.Map(_write, str(staging), options))
    except (UserError, OSError):
        raise
    except Exception as error:
        raise UserError(f"the Beam pipeline failed ({' '.join(str(error).split())[-300:]}); mend "
                        "that and run the same build again, it continues where it stopped"
                        ) from error


def _make(element: tuple[str, Any, str], staging: str) -> tuple[str, int]:
    shard, task, key = element
    # A bundle that is tried again has some of its records already.
    if not records.is_staged(Path(staging), key):
        records.make_record(Path(staging), task, key)
    return shard, 1


def _write(group: tuple[str, dict[str, Any]], staging: str, options: str) -> None:
    _, found = group
    for shard in found["wanted"]:
        if records.shard_entries(Path(staging), shard) is None:
            records.write_shard(Path(staging), shard, options)
