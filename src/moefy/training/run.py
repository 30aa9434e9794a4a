"""Continual pre-training: one plain loop on one device."""

from __future__ import annotations

import json
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int

from moefy.checkpoint.load import device, load_model, load_tokenizer
from moefy.checkpoint.reader import fingerprint, read_config, side_files
from moefy.checkpoint.source import resolve
from moefy.data.domains import Domain, documents_of, open_domains
from moefy.data.mixture import Mixture
from moefy.data.packing import pack
from moefy.data.strategies import initial_weights
from moefy.errors import TrainingError
from moefy.progress import Progress, ProgressFn, silent
from moefy.recipe import TrainRecipe
from moefy.storage import check_output, replace_file, storage_errors
from moefy.training.balance import RouterTrace, routers_of
from moefy.training.schedule import learning_rate
from moefy.training.state import LOG, load_state, read_log, remove_state, save_state

Windows = dict[str, Int[np.ndarray, "_windows sequence"]]


@dataclass(frozen=True)
class Training:
    """What `train` did.

    Attributes:
        folder: the trained model, with `recipe.yaml` and `log.jsonl` (one line a step) in it.
        recipe: every choice that was made.
        resumed_from_step: 0 for a fresh run.
        first_loss, last_loss: training loss of the first and the last step, nats per token.
        elapsed_s: seconds of this process's own steps.
    """

    folder: Path
    recipe: TrainRecipe
    resumed_from_step: int
    first_loss: float
    last_loss: float
    elapsed_s: float


def train(
    model: str | Path,
    out: str | Path,
    *,
    data: str | Path = "demo",
    recipe: str | Path | None = None,
    overwrite: bool = False,
    report: ProgressFn = silent,
    **choices: Any,
) -> Training:
    """Continue pre-training on a mixture of domains and write the trained model.

    The loss is next-token cross-entropy on packed windows plus `balance_coefficient` times the
    mean over layers of the load-balancing loss (see `training.balance`). Weights and optimizer are
    float32; matrix products run in bfloat16 where the processor has them. One document in twenty
    is held out (see `data.domains.is_held_out`).

    A run that was stopped goes on when the same call is made again, with the same result, bit for
    bit, on the same machine. The model appears in `out` when the run is complete.

    Args:
        model: a converted (or dense) model folder, or any source `convert` takes.
        out: the run's folder.
        data: a folder of `<domain>.jsonl(.gz)` files, or `demo`.
        recipe: a YAML file with `TrainRecipe` keys.
        overwrite: replace what is in `out`.
        report: told about progress.
        **choices: single `TrainRecipe` keys; they override the file.

    Raises:
        UsageError: recipe, model, text or output are not usable.
        TrainingError: the loss is not finite; the last checkpoint is kept.
        StorageError: the disk is full; the last checkpoint is kept.
    """
    out = Path(out).expanduser()
    choice = TrainRecipe.build(recipe, **choices)
    choice = choice.model_copy(update={"precision": _precision(choice)})
    is_fresh = overwrite or not _is_unfinished(out)
    if is_fresh:
        check_output(out, overwrite=overwrite, sources=(Path(model).expanduser(),))
    source = resolve(model, report=report)
    domains = open_domains(data, report=report)
    weights = initial_weights(
        choice.weights or "Uniform", [domain.name for domain in domains], normalise=True
    )
    network = load_model(source, dtype=torch.float32).to(device()).train()
    windows = _windows(domains, source, choice, report)
    mixture = Mixture(
        {name: len(found) for name, found in windows.items()},
        weights,
        seed=choice.seed,
        sequences_per_step=choice.sequences_per_step,
    )
    optimizer = _optimizer(network, choice)
    identity = {
        "source": fingerprint(source),
        "data": str(data),
        **choice.model_dump(mode="json"),
    }
    if is_fresh:  # only now is it sure that this run can begin
        shutil.rmtree(out, ignore_errors=True)
    first_step = load_state(out, identity=identity, model=network, optimizer=optimizer)
    mixture.skip(first_step)
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    replace_file(out / "recipe.yaml", choice.to_yaml())
    kept = read_log(out)[:first_step] if first_step else []
    replace_file(out / LOG, "".join(json.dumps(line) + "\n" for line in kept))

    started = time.perf_counter()
    for step in range(first_step, choice.num_steps):
        line = _step(step, network, optimizer, mixture, windows, choice)
        with storage_errors(out), (out / LOG).open("a") as log:
            log.write(json.dumps(line) + "\n")
        report(Progress("train", step + 1, choice.num_steps, f"loss {line['loss']:.3f}"))
        every = choice.checkpoint_every_steps
        if every and (step + 1) % every == 0 and step + 1 < choice.num_steps:
            save_state(out, step=step + 1, identity=identity, model=network, optimizer=optimizer)
    elapsed_s = time.perf_counter() - started
    _write_model(network, source, out, identity)
    remove_state(out)
    losses = [line["loss"] for line in read_log(out)]
    return Training(out, choice, first_step, losses[0], losses[-1], elapsed_s)


def _step(
    step: int,
    network: Any,
    optimizer: torch.optim.Optimizer,
    mixture: Mixture,
    windows: Windows,
    recipe: TrainRecipe,
) -> dict[str, Any]:
    """Do one optimizer step and return its line of the log."""
    started = time.perf_counter()
    rate = learning_rate(
        step,
        recipe.num_steps,
        peak=recipe.learning_rate,
        warmup_fraction=recipe.warmup_fraction,
        final_fraction=recipe.final_learning_rate_fraction,
    )
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_fraction"]
    num_passes = recipe.sequences_per_step // recipe.sequences_per_pass
    by_domain: dict[str, list[float]] = defaultdict(list)
    balance, loads = 0.0, torch.zeros(())
    batch = mixture.next_batch().samples
    with _dropout_of(recipe.seed, step), RouterTrace(network) as trace:
        for first in range(0, len(batch), recipe.sequences_per_pass):
            samples = batch[first : first + recipe.sequences_per_pass]
            ids = np.stack([windows[name][window_idx] for name, window_idx, _ in samples])
            tokens = torch.from_numpy(ids).to(network.device)
            trace.clear()
            with torch.autocast(
                tokens.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"
            ):
                logits = network(tokens, use_cache=False).logits
            losses = F.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
            ).view(len(samples), -1)
            balance_loss = trace.balance_loss().to(losses.device)
            loss = losses.mean() + recipe.balance_coefficient * balance_loss
            (loss / num_passes).backward()
            for (name, _, _), value in zip(samples, losses.detach().mean(1).tolist(), strict=True):
                by_domain[name].append(value)
            balance += balance_loss.item() / num_passes
            loads = loads + trace.loads().cpu() / num_passes
    grad_norm = torch.nn.utils.clip_grad_norm_(network.parameters(), recipe.clip_grad_norm).item()
    mean_loss = sum(map(sum, by_domain.values())) / recipe.sequences_per_step
    if not (mean_loss < float("inf") and grad_norm < float("inf")):
        drawn = ", ".join(f"{name}[{window_idx}]" for name, window_idx, _ in batch)
        raise TrainingError(
            f"step {step + 1}: loss {mean_loss}, gradient norm {grad_norm}, on the windows "
            f"{drawn}: lower --learning-rate, or look at these documents; the last "
            "checkpoint is kept"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    tokens_per_step = recipe.sequences_per_step * recipe.sequence_length
    return {
        "step": step + 1,
        "tokens": (step + 1) * tokens_per_step,
        "loss": mean_loss,
        "domain_loss": {name: sum(v) / len(v) for name, v in sorted(by_domain.items())},
        "balance_loss": balance,
        "learning_rate": rate,
        "grad_norm": grad_norm,
        "tokens_per_s": tokens_per_step / (time.perf_counter() - started),
        "expert_load": [[round(x, 5) for x in row] for row in loads.tolist()],
    }


@contextmanager
def _dropout_of(seed: int, step: int) -> Iterator[None]:
    """Give a step its own dropout stream, so that a resumed run drops the same units."""
    with torch.random.fork_rng():
        torch.manual_seed(seed * 1_000_003 + step)
        yield


def _is_unfinished(out: Path) -> bool:
    return (out / "recipe.yaml").is_file() and not (out / "config.json").exists()


def _precision(recipe: TrainRecipe) -> str:
    if recipe.precision != "auto":
        return recipe.precision
    if device().type == "cuda":
        return "bfloat16"
    flags = Path("/proc/cpuinfo")
    has_bf16 = flags.is_file() and "avx512_bf16" in flags.read_text()
    return "bfloat16" if has_bf16 else "float32"


def _windows(
    domains: list[Domain], source: Path, recipe: TrainRecipe, report: ProgressFn
) -> Windows:
    tokenizer = load_tokenizer(source)
    windows = {}
    for done, domain in enumerate(domains):
        report(Progress("tokenise", done, len(domains), domain.name))
        windows[domain.name] = pack(
            documents_of(domain, "train"),
            tokenizer,
            sequence_length=recipe.sequence_length,
            max_windows=recipe.num_steps * recipe.sequences_per_step,
        )
    report(Progress("tokenise", len(domains), len(domains)))
    return windows


def _optimizer(network: Any, recipe: TrainRecipe) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only; routers have a rate of their own."""
    routers = [parameter for router in routers_of(network) for parameter in router.parameters()]
    router_ids = set(map(id, routers))
    others = [p for p in network.parameters() if id(p) not in router_ids]
    matrices = [p for p in others if p.ndim > 1]
    vectors = [p for p in others if p.ndim <= 1]
    decay = recipe.weight_decay
    groups = [
        {"params": matrices, "weight_decay": decay, "rate_fraction": 1.0},
        {"params": vectors, "weight_decay": 0.0, "rate_fraction": 1.0},
        {"params": routers, "weight_decay": decay, "rate_fraction": recipe.router_rate_fraction},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=recipe.learning_rate,
        betas=recipe.adam_betas,
        fused=True,
    )


def _write_model(network: Any, source: Path, out: Path, identity: dict[str, Any]) -> None:
    """Put the finished model into the run's folder, config.json last.

    Weights go back to the dtype and the on-disk form of the source; its config.json is kept as it
    is, because other runtimes read spellings there that transformers would not write again.
    """
    config = read_config(source)
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"))
    finished = out / ".finished"
    shutil.rmtree(finished, ignore_errors=True)
    record = {
        "moefy": version("moefy"),
        "stage": "train",
        "run": identity,
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "from": json.loads((source / "moefy.json").read_text())
        if (source / "moefy.json").is_file()
        else None,
    }
    with storage_errors(out):
        network.to(dtype).cpu().save_pretrained(finished)
        for file in side_files(source):
            shutil.copyfile(file, finished / file.name)
        (finished / "moefy.json").write_text(json.dumps(record, indent=2) + "\n")
        shutil.copyfile(source / "config.json", finished / "config.json")
        for file in sorted(finished.iterdir(), key=lambda file: file.name == "config.json"):
            file.replace(out / file.name)
        finished.rmdir()
