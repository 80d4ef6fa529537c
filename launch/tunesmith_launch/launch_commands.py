"""`tunesmith launch …`: what a cluster's scheduler needs to start a run, printed or written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tunesmith.errors import UserError
from tunesmith_launch.inspect_commands import Overrides, RecipePath

Nodes = Annotated[int, typer.Option(min=1, help="Machines.", show_default=False)]
Gpus = Annotated[
    int,
    typer.Option(
        min=0, help="GPUs of each machine, a process each; 0: one process on the CPU.", show_default=False
    ),
]
Output = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write to a new file; default: standard output.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace the file.")]
Cpus = Annotated[int | None, typer.Option(min=1, help="CPU cores of each machine that the run needs.")]
Memory = Annotated[str | None, typer.Option(help="Memory of each machine, as the scheduler writes it.")]
Grace = Annotated[int, typer.Option(min=1, help="Seconds for the last save of a run that must stop.")]
MainIp = Annotated[str | None, typer.Option(help="The address of machine 0.")]
MainPort = Annotated[int, typer.Option(min=1, max=65535, help="A free port of machine 0.")]

app = typer.Typer(
    help="Generate what a cluster needs to start a run.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def slurm(
    recipe: RecipePath,
    nodes: Nodes,
    gpus_per_node: Gpus,
    overrides: Overrides = None,
    partition: Annotated[str | None, typer.Option(help="As sbatch's.")] = None,
    account: Annotated[str | None, typer.Option(help="As sbatch's.")] = None,
    time: Annotated[str | None, typer.Option(help="As sbatch's, such as 12:00:00.")] = None,
    cpus_per_node: Cpus = None,
    memory_per_node: Memory = None,
    grace: Grace = 300,
    requeue: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="Requeue up to N times after a stop or the loss of a node."),
    ] = 0,
    setup: Annotated[
        list[str] | None,
        typer.Option(metavar="LINE", help="A line of shell to run first, such as `module load cuda`."),
    ] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(metavar="OPTION", help="Another option of sbatch: --sbatch=--qos=high."),
    ] = None,
    output: Output = None,
    force: Force = False,
) -> None:
    """A batch script for Slurm. Without --cpus-per-node it asks for whole nodes.

    \b
    Example: tunesmith launch slurm r.yaml --nodes 4 --gpus-per-node 8 --output r.sbatch && sbatch r.sbatch
    """
    from tunesmith_launch.generate import slurm
    from tunesmith_launch.generate.job import read

    job, _ = read(recipe, overrides or [], nodes, gpus_per_node)
    options = slurm.Options(
        chdir=str(Path.cwd()),
        partition=partition,
        account=account,
        time=time,
        cpus_per_node=cpus_per_node,
        memory_per_node=memory_per_node,
        grace=grace,
        requeues=requeue,
        setup=tuple(setup or ()),
        sbatch=tuple(sbatch or ()),
    )
    _write(slurm.script(job, options), output, force)


@app.command()
def kubernetes(
    recipe: RecipePath,
    nodes: Nodes,
    gpus_per_node: Gpus,
    image: Annotated[
        str, typer.Option(help="The container image, with tunesmith in it.", show_default=False)
    ],
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="Of the JobSet; default: from run_name.")] = None,
    namespace: Annotated[str | None, typer.Option(help="Default: kubectl's.")] = None,
    pvc: Annotated[
        str | None,
        typer.Option(metavar="CLAIM:PATH", help="The volume for the run's folder, and where pods see it."),
    ] = None,
    secret: Annotated[
        str, typer.Option(help="The Secret that may hold HF_TOKEN and WANDB_API_KEY.")
    ] = "tunesmith",
    cpus_per_node: Cpus = None,
    memory_per_node: Memory = None,
    grace: Grace = 300,
    restarts: Annotated[int, typer.Option(min=0, help="How often all pods may start again.")] = 10,
    main_process_port: MainPort = 29500,
    output: Output = None,
    force: Force = False,
) -> None:
    """A JobSet for Kubernetes, and a ConfigMap with the recipe.

    \b
    Example: tunesmith launch kubernetes r.yaml --nodes 4 --gpus-per-node 8 --image me/train --pvc runs:/data
    """
    from tunesmith_launch.generate import kubernetes
    from tunesmith_launch.generate.job import read

    job, loaded = read(recipe, overrides or [], nodes, gpus_per_node)
    claim, mount = (None, None) if pvc is None else kubernetes.volume(pvc)
    options = kubernetes.Options(
        name=kubernetes.name_of(job.run_name, name),
        image=image,
        claim=claim,
        mount=mount,
        namespace=namespace,
        secret=secret,
        port=main_process_port,
        cpus_per_node=cpus_per_node,
        memory_per_node=memory_per_node,
        grace=grace,
        restarts=restarts,
    )
    text = recipe.read_bytes().decode("utf-8-sig")
    manifest = kubernetes.manifest(job, options, loaded, text)
    if pvc is None:
        shared = "" if nodes == 1 else ", and they share no folder for their checkpoints"
        print(f"without --pvc the run's folder is lost with its pods{shared}", file=sys.stderr)
    _write(manifest, output, force)


@app.command()
def accelerate(
    recipe: RecipePath,
    nodes: Nodes,
    gpus_per_node: Gpus,
    overrides: Overrides = None,
    main_process_ip: MainIp = None,
    main_process_port: MainPort = 29500,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The config; default: accelerate-NODESxGPUS.yaml here."),
    ] = None,
    force: Force = False,
) -> None:
    """A config of accelerate, and its command for each machine.

    \b
    Example: tunesmith launch accelerate r.yaml --nodes 2 --gpus-per-node 8 --main-process-ip node0
    """
    from tunesmith_launch.generate import direct
    from tunesmith_launch.generate.job import read

    job, _ = read(recipe, overrides or [], nodes, gpus_per_node)
    file = output or Path(f"accelerate-{job.topology}.yaml")
    config = direct.accelerate_config(job, direct.Address(main_process_ip, main_process_port))
    _write(config, file, force)
    print(direct.accelerate_lines(job, str(file)), end="")


@app.command()
def torchrun(
    recipe: RecipePath,
    nodes: Nodes,
    gpus_per_node: Gpus,
    overrides: Overrides = None,
    main_process_ip: MainIp = None,
    main_process_port: MainPort = 29500,
    output: Output = None,
    force: Force = False,
) -> None:
    """The command of torchrun for each machine.

    \b
    Example: tunesmith launch torchrun r.yaml --nodes 2 --gpus-per-node 8 --main-process-ip node0
    """
    from tunesmith_launch.generate import direct
    from tunesmith_launch.generate.job import read

    job, _ = read(recipe, overrides or [], nodes, gpus_per_node)
    _write(direct.torchrun_lines(job, direct.Address(main_process_ip, main_process_port)), output, force)


def _write(text: str, file: Path | None, force: bool) -> None:
    if file is None:
        if force:
            raise UserError("--force goes with --output")
        print(text, end="")
        return
    try:
        with file.open("w" if force else "x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise UserError(f"{file} exists already: replace it with --force, or name another file") from None
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from None
    print(f"written to {file}", file=sys.stderr)
