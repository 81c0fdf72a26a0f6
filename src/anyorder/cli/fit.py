"""The command `anyorder fit`: the plan as people read it, the run, and what came out."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from anyorder import files
from anyorder.contracts import require
from anyorder.report import summary
from anyorder.stages import fit
from anyorder.stages.experiment import load_experiment


def fit_folder(
    config: fit.FitConfig, out: Path, overrides: Sequence[str], *, dry_run: bool, overwrite: bool
) -> None:
    """Plan unless there is a plan in `out`, print it, run it, and print the results; errors as of `plan`."""
    path = out / "experiment.yaml"
    text = _stored(path, config.source) if path.is_file() else plan(config, out, overrides)
    if dry_run:
        print(text)
        return
    lines = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")]
    print("\n".join(lines), flush=True)
    if path.is_file():
        print(f"going on with this plan, which is {path}; delete it for another", flush=True)
    else:
        with files.atomic(path) as temporary:
            temporary.write_text(text, "utf-8")
            load_experiment(temporary, overrides)  # or refuse
    load_experiment(path, [*overrides, f"out={out}"]).run(overwrite)  # a copied plan names another folder
    table = summary.report([out], out / "report.html")
    print(comparison(out) if table is None else f"{table.text()}\n{comparison(out)}")
    shown = out / "samples-ordered"
    print(f"samples: {shown}/grid.png, with their orders: orders.png, as an animation: generation.webp")


def _stored(path: Path, source: str) -> str:
    """The text of an earlier plan; a ValueError if it is for other images, or somebody's own experiment."""
    stages = load_experiment(path).stages
    planned = {"data", *fit.GENERATORS} <= stages.keys() and stages["data"][0] == "data"
    require(planned, f"{path} is no plan of anyorder fit, and is kept: choose another out=")
    stored = stages["data"][1].source
    other = f"{path} is a plan for {stored}, not for {source}: choose another out="
    require(files.expanded(stored).resolve() == files.expanded(source).resolve(), other)
    return path.read_text(encoding="utf-8")


def plan(config: fit.FitConfig, out: Path, overrides: Sequence[str]) -> str:
    """The text of an experiment file for these images; times a few real steps.

    Raises:
        FileNotFoundError, ValueError: no such images, unknown settings, or too little time.
    """
    facts = fit.look(config, overrides)
    seconds = fit.seconds_of(config.time or ("1h" if facts.gpu else "30m"))
    preset = (config.preset, "as asked for") if config.preset else fit.choose_preset(facts, seconds)
    given = {key: fit.typed(value) for key, _, value in (text.partition("=") for text in overrides)}
    values = fit.put(fit.adapt(fit.preset(preset[0], overrides), facts, config), given)
    logging.getLogger("anyorder").info("timing a few steps of preset %s ...", preset[0])
    rates = fit.rehearse(values, facts)
    values = fit.fill(values, rates, facts, seconds, list(given)) | {"out": str(out)}
    times = fit.expected(values, rates, facts)
    lines = describe(values, times, facts, preset)
    if sum(times.values()) < 0.8 * seconds:
        why = "more passes over the images teach nothing new"
        lines.append(f"the rest of {seconds / 60:.0f} min is not used: {why}")
    return "".join(f"# {line}\n" for line in lines) + fit.as_yaml(values)


def describe(
    values: fit.Values, times: Mapping[str, float], facts: fit.Facts, preset: Sequence[str]
) -> list[str]:
    """The plan in lines: what was found, what was chosen and why, the minutes of each stage."""
    stages, n, total = values["stages"], facts.train, sum(times.values())
    patch, model = fit.patch_side(stages["tokenizer"]), stages["any-order"]["model"]
    classes = f"{facts.classes} classes" if facts.classes > 1 else "one class"
    classes += ", captions" * bool(stages["data"].get("captions"))
    size = stages["data"]["size"]
    size = "x".join(map(str, size)) if isinstance(size, list) else size
    lines = [
        f"images: {n:,} to train, {facts.validation} to stop early, {facts.test:,} held out; {classes}; "
        f"about {facts.side} pixels, used at {size}",
        f"machine: {f'GPU of {facts.gpu} GiB' if facts.gpu else f'CPU, {facts.cores} threads'}, "
        f"{'bfloat16' if facts.bf16 else 'float32'}",
        f"preset {preset[0]}: {preset[1]}",
        f"model: patches of {patch} x {patch} pixels, {model['depth']} blocks of width {model['width']}",
        f"against learning by heart: dropout {model['dropout']}, "
        f"{'mirrored copies, ' if stages['tokens']['mirror'] else ''}early stop",
    ]
    if n < fit.FEW:
        lines.append(f"warning: {n} images are few: expect samples that resemble single images")
    if facts.classes > 1 and n < 20 * facts.classes:
        lines.append(f"warning: {n // facts.classes} images a class: 20 or more are better")
    for name, stage in stages.items():
        what = stage.get("num_images", "")
        if train := stage.get("train"):
            what = f"{train['steps']} steps of {train['batch_size']}"
        lines.append(f"  {name:16}{times[name] / 60:6.1f} min  {what}".rstrip())
    return [*lines, f"  {'together':16}{total / 60:6.1f} min, or less where a training stops early"]


def comparison(out: Path) -> str:
    """Held-out images under each order: cross-entropy in nats per token."""
    rows = {"raster order": "raster", "random orders": "any-order", "the model's order": "ordered"}
    found = {text: files.read_manifest(out / name)["test_nll"] for text, name in rows.items()}
    lines = [f"  {text:18}{value:7.3f}" for text, value in found.items()]
    return "\n".join(["held-out images, nats per token (lower is better):", *lines])
