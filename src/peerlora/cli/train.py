"""``peerlora train``."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from peerlora.cli.cluster_options import Address, Cluster, CpusPerWorker, GpusPerWorker, Workers, cluster_settings
from peerlora.cli.options import AsJson, Out, print_json, split_config
from peerlora.cli.watch import Watch, watched


def command(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG.yaml] [key=value ...]", help="a config file, and settings to change in it"),
    ] = None,
    out: Out = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="go on with the run in this folder")] = None,
    watch: Watch = False,
    json: AsJson = False,
    cluster: Cluster = None,
    address: Address = None,
    workers: Workers = None,
    cpus: CpusPerWorker = None,
    gpus: GpusPerWorker = None,
) -> None:
    """Train a federation as a config says, or go on with one that was stopped."""
    from peerlora.cli.progress import Progress, print_summary, stop_on_interrupt
    from peerlora.config.loading import load_config
    from peerlora.errors import ConfigError
    from peerlora.runs.resume import default_folder

    config, overrides = split_config(words)
    if resume is None and config is None and not overrides:
        raise ConfigError(
            "train needs a CONFIG.yaml, key=value settings, or --resume DIR; `peerlora init` writes a config"
        )
    if resume is not None and out is not None:
        raise ConfigError(f"--out {out} and --resume {resume} given; a resumed run stays in its folder, drop --out")
    wanted = load_config(config, overrides) if config or resume is None else None
    where = partial(
        cluster_settings, cluster, address=address, workers=workers, cpus_per_worker=cpus, gpus_per_worker=gpus
    )
    if watch and out is None and wanted is not None and resume is None:
        out = default_folder(wanted)  # known before the run begins
    with watched(watch, resume or out), Progress() as progress, stop_on_interrupt() as stop:
        from peerlora.runtime.cluster import run as runtime

        if resume is None:
            assert wanted is not None
            wanted = wanted.model_copy(update={"cluster": where(wanted.cluster)})
            result = runtime.simulate(wanted, out, sinks=[progress], stop=stop)
        else:
            result = runtime.resume(
                resume,
                where=where,
                expected=lambda stored: wanted or load_config(stored.model_dump(mode="json"), overrides),
                sinks=[progress],
                stop=stop,
            )
    print_summary([(result.summary["method"], result.summary)])
    if json:
        print_json(result.summary)
