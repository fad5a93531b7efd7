"""``oatlite serve-oracle``: an oracle behind HTTP."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from oatlite.config.schema import OracleConfig

MODEL, PLACE, NETWORK, BATCHES = "Oracle", "Devices", "Network", "Batches"


def _described(option: str, panel: str) -> typer.models.OptionInfo:
    return typer.Option(help=OracleConfig.model_fields[option].description, min=1, rich_help_panel=panel)


def serve_oracle(
    model: Annotated[
        str,
        typer.Option(
            help="reward model (folder or hub id), pairrm, file.py:function, or demo",
            rich_help_panel=MODEL,
            show_default=False,
        ),
    ],
    chat_template: Annotated[
        bool | None,
        typer.Option(
            help="wrap prompt and response in the model's chat template; default: no, which is said where it has one",
            rich_help_panel=MODEL,
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[int | None, _described("max_tokens", MODEL)] = None,
    batch_tokens: Annotated[int, _described("batch_tokens", MODEL)] = 8192,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="auto: bfloat16 on a GPU, float32 on a CPU", rich_help_panel=MODEL),
    ] = "auto",
    devices: Annotated[
        str | None,
        typer.Option(
            help="numbers of GPUs, as in 0,1, or cpu; default: all GPUs, else cpu",
            rich_help_panel=PLACE,
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="on a CPU: processes, which share its cores; default: 1",
            min=1,
            rich_help_panel=PLACE,
            show_default=False,
        ),
    ] = None,
    devices_per_worker: Annotated[
        int, typer.Option(help="GPUs that one reward model is split over", min=1, rich_help_panel=PLACE)
    ] = 1,
    host: Annotated[
        str, typer.Option(help="address to listen at; 0.0.0.0: at all of this machine's", rich_help_panel=NETWORK)
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen at", min=1, max=65535, rich_help_panel=NETWORK)] = 8000,
    allow_anyone: Annotated[
        bool,
        typer.Option(
            "--allow-anyone",
            help="listen to other machines without a token (OATLITE_ORACLE_TOKEN in the environment)",
            rich_help_panel=NETWORK,
        ),
    ] = False,
    timeout: Annotated[
        float, typer.Option(help="seconds for a request, waiting included", min=0.1, rich_help_panel=NETWORK)
    ] = 60,
    max_request_mib: Annotated[
        int, typer.Option(help="a longer request is refused", min=1, max=1024, rich_help_panel=NETWORK)
    ] = 4,
    max_batch: Annotated[
        int, typer.Option(help="requests that a worker answers together", min=1, rich_help_panel=BATCHES)
    ] = 8,
    max_wait_ms: Annotated[
        int, typer.Option(help="wait so long for others to join them", min=1, rich_help_panel=BATCHES)
    ] = 5,
) -> None:
    """Serve an oracle over HTTP, to oatlite and to oat.

    Clients are started with --oracle remote --oracle-url http://HOST:PORT. It ends with Ctrl-C or SIGTERM.
    """
    from oatlite.oracles.serving import ServeOptions, serve

    if model == "demo":
        from oatlite.demo.build import ensure_demo

        model = str(ensure_demo().reward_model)
    options = ServeOptions(
        oracle=OracleConfig(
            path=(model,), chat_template=chat_template, max_tokens=max_tokens, batch_tokens=batch_tokens, dtype=dtype
        ),
        devices=devices,
        workers=workers,
        devices_per_worker=devices_per_worker,
        host=host,
        port=port,
        max_batch=max_batch,
        max_wait_ms=max_wait_ms,
        timeout_s=timeout,
        max_request_mib=max_request_mib,
        allow_anyone=allow_anyone,
    )
    raise typer.Exit(serve(options, lambda line: print(line, flush=True)))
