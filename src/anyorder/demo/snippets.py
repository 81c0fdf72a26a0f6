"""Python and commands that do what the page does, to be copied from it."""

import json
import re
import shlex
from typing import Any

from anyorder.demo import generation
from anyorder.inference.pipeline import Pipeline
from anyorder.method.policy_config import PolicyConfig

IMAGE, MASK = "image.png", "mask.png"
"""Under these names the page saves what is in its editor."""


def snippets(pipe: Pipeline, name: str, asked: generation.GenerateRequest) -> dict[str, str]:
    """`python` and `command`, for people who have the pipeline `name`; errors as of `generate_events`."""
    generation.generate_events(pipe, asked)  # refuses what cannot be generated; no step is made
    policies = generation.chosen(pipe, asked)
    return {
        "python": _python(pipe, name, asked, policies),
        "command": "\n".join(_command(pipe, name, asked, policy) for policy in policies),
    }


def _python(pipe: Pipeline, name: str, asked: generation.GenerateRequest, chosen: list[PolicyConfig]) -> str:
    orders = [_order(policy) for policy in chosen]
    arguments = {
        "class_labels": pipe.typed(asked.class_labels) if asked.class_labels else None,
        "prompt": asked.prompt or None, "num_images": asked.num_images, "generator": asked.seed,
        "guidance_scale": generation.guidance_scale(pipe, asked), "keep": asked.keep,
        "sampling": generation.sampling_settings(pipe, asked) or None,
    }  # fmt: skip
    given = [f'"{IMAGE}"'] * bool(asked.image) + [f'"{MASK}"'] * bool(asked.mask) + ["order=order"]
    given += [f"{key}={value!r}" for key, value in arguments.items() if value is not None]
    names = ["Pipeline"] + ["PolicyConfig"] * any("PolicyConfig" in order for order in orders)
    return f"""from anyorder import {", ".join(names)}

pipe = Pipeline.from_pretrained({name!r})
for number, order in enumerate([{", ".join(orders)}]):
    out = pipe{".complete" * bool(asked.image)}({", ".join(given)})
    out.save_animation(f"order-{{number}}.webp", columns=4)
    for i, image in enumerate(out.images):
        image.save(f"order-{{number}}-{{i}}.png")
"""


def _order(policy: PolicyConfig) -> str:
    given = "".join(f", {key}={value!r}" for key, value in policy.changed().items())
    return f"PolicyConfig({policy.order!r}{given})" if given else repr(policy.order)


def _command(pipe: Pipeline, name: str, asked: generation.GenerateRequest, policy: PolicyConfig) -> str:
    scale = generation.guidance_scale(pipe, asked)
    settings: dict[str, Any] = {
        "pipeline": name, "class_labels": _items(asked.class_labels),
        **({"prompt": asked.prompt} if asked.image else {"prompts": _items(asked.prompt)}),
        "num_images": asked.num_images, "seed": asked.seed,
        "guidance_scale": "" if scale is None else scale,
        **{f"sampling.{name}": value for name, value in generation.sampling_settings(pipe, asked).items()},
        "policy.order": policy.order,
        **{f"policy.{key}": value for key, value in policy.changed().items()},
        "image": IMAGE if asked.image else "", "mask": MASK if asked.mask else "",
        "keep": "" if asked.keep is None else asked.keep,
        "out": re.sub(r"\W+", "-", policy.label).strip("-"),
    }  # fmt: skip
    if not asked.image and not asked.class_labels and not asked.prompt and pipe.model.num_classes:
        settings["class_labels"] = "null"
    words = [f"{key}={value}" for key, value in settings.items() if value != ""]
    return shlex.join(["anyorder", "complete" if asked.image else "sample", *words])


def _items(text: str) -> str:
    """One item of a list as the command line takes it."""
    plain = re.fullmatch(r"([\w.+-]([\w .+-]*[\w.+-])?)?", text) and text.lower() not in ("null", "none", "~")
    return text if plain else json.dumps([text], ensure_ascii=False)
