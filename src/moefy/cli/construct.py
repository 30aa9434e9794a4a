"""Commands that make a model, or undo one."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import moefy
from moefy.cli.app import App, app
from moefy.cli.options import Json, Model, Out, Overwrite, recipe_options, text_words
from moefy.cli.output import call, log_lines, quiet_libraries, show, warn
from moefy.recipe import ConvertRecipe, own_recipes, recipe_text
from moefy.report import tables
from moefy.training.recipe import TrainRecipe

Counts = Annotated[dict[str, Any], ConvertRecipe(), "experts", "active"]


@app.command()
@recipe_options
def inspect(
    source: Annotated[
        str, typer.Argument(help="Model folder, config.json, smollm2-135m or llama-2-7b.")
    ],
    *,
    split: Counts,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Context length in tokens. [default: 4096, or the model's limit]"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Count parameters and FLOPs of a model and a split, without weights.

    Without --experts and --active: the LLaMA-MoE paper's splits, 8/16, and what `convert` makes.

    Example: `moefy inspect llama-2-7b --experts 16 --active 4`
    """
    found = moefy.inspect(source, context=context, **split)
    length = next(iter(found.costs.values())).context
    title = f"{found.name}, FLOPs at a context of {length:,} tokens"
    record = {label: vars(cost) for label, cost in found.costs.items()}
    is_dense = "dense" in found.costs
    then = ["plan", source, "--speedup", "1.4"] if is_dense else ["eval", source]
    show(record, (tables.inspection_rows(found), title), as_json=as_json, then=[then])


@app.command()
@recipe_options
def convert(
    source: Annotated[str, typer.Argument(help="Model folder, .gguf, hub name or smollm2-135m.")],
    out: Out,
    *,
    data: Annotated[
        str,
        typer.Option(help="Calibration text: file or folder, hf:DATASET, 'demo' or 'self'."),
    ] = "demo",
    max_loss: Annotated[
        float | None,
        typer.Option(
            help="Find the smallest --active that costs at most so many nats per token "
            "of held-out text."
        ),
    ] = None,
    recipe: ConvertRecipe,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Split a dense model into experts; the result loads with plain transformers.

    Example: `moefy convert smollm2-135m out/moe`
    """
    how: dict[str, Any] = {"data": data, "recipe": recipe, "overwrite": overwrite}
    curve: dict[str, Any] = {}
    tried = []
    if max_loss is None:
        done = call(moefy.convert, source, out, **how)
    else:
        from moefy.studies.search import curve_rows  # imports torch

        found = call(moefy.search, source, out, max_loss=max_loss, **how)
        done, curve["curve"] = found.conversion, [asdict(probe) for probe in found.curve]
        title = "Loss on held-out text, and measured speed relative to the dense model"
        tried = [(curve_rows(found), title)]
    made = done.recipe
    quality = ""
    if done.kl is not None:
        quality = f". KL to the dense model on calibration text: {done.kl:.3f} nats a token"
    if made.split.chosen:
        layers = f"{done.num_layers} layers of {made.experts} slices ({done.expert_size} neurons "
        layers += f"each), of which {made.active} run per token, {made.shared} of them always"
    else:
        size = made.split.shared * done.expert_size
        layers = f"a dense model of {done.num_layers} layers with {size} neurons each"
    text = text_words(data)
    taught = ["train", done.folder, f"{done.folder}-trained", "--teacher", source, *text]
    show(
        vars(done) | {"recipe": made.model_dump(mode="json")} | curve,
        *tried,
        as_json=as_json,
        text=f"{done.folder}: {layers}; {done.written_bytes / 1e6:.0f} MB{quality}",
        then=[["eval", source, done.folder, *text], taught],
    )


export = App(no_args_is_help=True, help="Write a model in another form.")
app.add_typer(export, name="export")


@export.command("gguf")
def export_to_gguf(
    model: Model,
    out: Annotated[Path, typer.Argument(help="File to write.")],
    quantize: Annotated[
        str,
        typer.Option(help="f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m or q4_0; routers stay f32."),
    ] = "f16",
    overwrite: Overwrite = False,
) -> None:
    """Write a GGUF file with llama.cpp's own converter and quantiser.

    `moefy eval` measures it in llama.cpp.

    Example: `moefy export gguf out/moe out/moe.gguf --quantize q4_k_m`
    """
    file = call(moefy.export_gguf, model, out, dtype=quantize, overwrite=overwrite)
    text = f"{file}: {file.stat().st_size / 1e6:.0f} MB; docs/tutorials/serve.md serves it"
    show(None, text=text, then=[["eval", model, file]])


@export.command("dense")
def export_to_dense(model: Model, out: Out, overwrite: Overwrite = False) -> None:
    """Undo a split whose weights were not fitted: all experts back into dense FFNs.

    Example: `moefy export dense out/moe out/dense`
    """
    folder = call(moefy.export_dense, model, out, overwrite=overwrite)
    show(None, text=f"{folder}: dense again", then=[["eval", model, folder]])


@app.command()
def push(
    model: Model,
    name: Annotated[str, typer.Argument(help="OWNER/MODEL on the hub; made if there is none.")],
    license: Annotated[
        str | None,
        typer.Option(help="Licence such as mit, where the model card names none."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Only OWNER sees the model.")] = False,
    as_json: Json = False,
) -> None:
    """Upload a model with its card to the Hugging Face hub, in one commit.

    Needs a token: `hf auth login`, or HF_TOKEN.

    Example: `moefy push out/moe someone/smollm2-moe --private`
    """
    from huggingface_hub.utils import enable_progress_bars

    from moefy.checkpoint.push import to_push, upload

    quiet_libraries()
    files, card = to_push(model, license)
    listed = ", ".join(f"{file} ({size:,})" for file, size in files.items())
    warn(f"{len(files)} files, {sum(files.values()):,} bytes: {listed}")
    if sys.stderr.isatty():  # the hub's own bars know what is sent, which no callback tells
        enable_progress_bars()
        with suppress(ImportError):  # its bar of large files leaves the time out
            from huggingface_hub.utils import _xet_progress_reporting as xet

            xet.XET_BYTES_BAR_FORMAT = "{l_bar}{bar}| {n_fmt}B/{total_fmt}B, {remaining} left"
    done = upload(Path(model).expanduser(), files, card, name, private=private, report=log_lines())
    dense = card.data.get("base_model")  # a name of the hub
    then = ["eval", *([dense] if dense else []), name]
    text = f"{done.url}: {len(files)} files, {sum(files.values()) / 1e6:.0f} MB, {done.license}"
    show(done, as_json=as_json, text=text, then=[then])


recipes = App(invoke_without_command=True)
app.add_typer(recipes, name="recipes")


@recipes.callback()
def list_recipes(context: typer.Context) -> None:
    """List the recipes that come with moefy; `--recipe NAME` takes one.

    Example: `moefy recipes`
    """
    if context.invoked_subcommand is None:
        texts = {name: file.read_text().partition("\n")[0] for name, file in own_recipes().items()}
        lines = [f"{name:19} {text.removeprefix('# ')}" for name, text in texts.items()]
        show(None, text="\n".join(lines), then=[["recipes", "show", next(iter(texts))]])


@recipes.command("show")
def show_recipe(
    name: Annotated[str, typer.Argument(help="As `moefy recipes` lists it.")],
) -> None:
    """Print a recipe.

    Example: `moefy recipes show llama-moe`
    """
    print(recipe_text(name), end="")


@app.command()
@recipe_options
def demo(
    out: Out = Path("moefy-demo"),
    *,
    split: Counts,
    recipe: Annotated[dict[str, Any], TrainRecipe(tokens=32_768), "tokens", "seed"],
    overwrite: Overwrite = False,
) -> None:
    """Do the whole job on SmolLM2-135M and write a report.

    Example: `moefy demo moefy-demo`
    """
    from moefy.report.demo import demo
    from moefy.report.write import verdict

    done = call(demo, out, overwrite=overwrite, **split, **recipe)
    show(
        None,
        (tables.comparison_rows(done.comparison), "SmolLM2-135M, held-out text"),
        text=f"{verdict(done)}\n{done.facts['elapsed_s'] / 60:.1f} minutes, "
        f"{done.facts['peak_rss_bytes'] / 2**30:.1f} GiB. Report: {done.folder / 'report.html'}",
        then=[["convert", "path/to/your-model", "out/moe"]],
    )
