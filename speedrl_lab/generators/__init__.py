"""Adapters, one file a family; `load_generator` finds one by name."""

from pathlib import Path
from typing import Any, get_args

import torch

from speedrl_lab.config import PolicyDtype, nearest
from speedrl_lab.generator import MaskedGenerator
from speedrl_lab.precision import is_half

FAMILIES = {"emoji": "", "tiny": "", "amused": "<folder>", "meissonic": "<folder>", "maskgit": "<file>"}
"""What follows the colon in a generator's name; embedded ones take nothing."""
SETTINGS = {
    "emoji": ("compiled",),
    "tiny": ("compiled",),
    "amused": ("negative_prompt", "policy_dtype"),
    "meissonic": ("negative_prompt", "time_conditioning", "text_encoder", "policy_dtype"),
    "maskgit": ("policy_dtype",),
}
"""Settings that mean something to a family; the others take none."""


def resolve_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; raises ValueError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device={device!r} cannot be used ({str(error).splitlines()[0]}); expected 'auto', 'cpu' or 'cuda'"
        ) from None
    return torch.device(device)


def load_generator(
    name: str = "emoji",
    device: str = "auto",
    policy: Path | str | None = None,
    negative_prompt: str = "",
    time_conditioning: str = "auto",
    text_encoder: Path | str = "",
    compiled: bool = False,
    policy_dtype: PolicyDtype = "float32",
) -> MaskedGenerator:
    """Load a pretrained generator by name; `policy` replaces its policy weights by those of a file.

    Names: `emoji`, `tiny`, `amused:<folder>`, `meissonic:<folder>`, `maskgit:<file>`. Nothing is fetched.

    Args:
        negative_prompt: what guidance leads away from (amused, meissonic).
        time_conditioning: `step_index` or `mask_ratio` (meissonic); `auto` is the first.
        text_encoder: folder of another CLIP text model (meissonic); empty for the checkpoint's own.
        compiled: run the network, and copies of it, by torch.compile (emoji, tiny): the same up to rounding, faster
            after first calls of a minute or two; a CPU needs a C++ compiler.
        policy_dtype: `bfloat16` rounds the weights of the policy, and decodes in it (amused, meissonic, maskgit): for
            sampling and scoring, several times faster on a GPU, or a CPU that multiplies in it; not for training.

    Raises ValueError for an unknown name or a setting that means nothing to the family, ImportError where a library
    is missing, FileNotFoundError or ValueError for missing or broken weights, OSError where nothing can be compiled.
    """
    family, _, place = name.partition(":")
    if family not in FAMILIES or (place and not FAMILIES[family]):
        known = [key + (f":{value}" if value else "") for key, value in FAMILIES.items()]
        raise ValueError(f"unknown generator {name!r}; nearest: {nearest(name, known)!r} (one of {', '.join(known)})")
    given = {
        "negative_prompt": negative_prompt,
        "time_conditioning": "" if time_conditioning == "auto" else time_conditioning,
        "text_encoder": str(text_encoder),
        "compiled": compiled,
        "policy_dtype": "" if policy_dtype == "float32" else policy_dtype,
    }
    for setting, value in given.items():
        if value and setting not in SETTINGS.get(family, ()):
            raise ValueError(f"{setting}={value!r} means nothing to generator {family!r}; leave it out")
    if policy_dtype not in get_args(PolicyDtype):
        known = list(get_args(PolicyDtype))
        raise ValueError(f"policy_dtype={policy_dtype!r} is not known; nearest: {nearest(policy_dtype, known)!r}")
    if FAMILIES[family] and not place:
        raise FileNotFoundError(_where_to_get(family))
    where = resolve_device(device)
    match family:
        case "emoji":
            from speedrl_lab.generators.emoji import load_emoji

            generator = load_emoji(where, policy)
        case "tiny":
            from speedrl_lab.generators.tiny import load_tiny

            generator = load_tiny(where, policy)
        case "amused":
            from speedrl_lab.generators.amused import load_amused

            generator = load_amused(place, where, policy, negative_prompt)
        case "meissonic":
            from speedrl_lab.generators.meissonic import load_meissonic

            generator = load_meissonic(
                place, where, policy, negative_prompt,
                time_conditioning=given["time_conditioning"] or "step_index", text_encoder=text_encoder or None,
            )  # fmt: skip
        case "maskgit":
            from speedrl_lab.generators.maskgit import load_maskgit

            generator = load_maskgit(place, where, policy)
    if compiled:
        generator.compile()
    if policy_dtype == "bfloat16":
        generator.policy.bfloat16()
    return generator


def describe_generator(generator: MaskedGenerator) -> dict[str, Any]:
    """What a run card must say of a generator to repeat its pictures."""
    spec = generator.spec
    own = generator.describe() if hasattr(generator, "describe") else {}
    if not own and hasattr(generator, "negative_prompt"):
        own = {"negative_prompt": generator.negative_prompt}
    return {
        "family": spec.name.partition(":")[0],
        "name": spec.name,
        "tokens": f"{spec.grid[0]}x{spec.grid[1]} of {spec.codebook_size} codes",
        "pixels": f"{spec.image_size[0]}x{spec.image_size[1]}",
        "parameters": sum(value.numel() for value in generator.policy.parameters()),
        **({"policy_dtype": "bfloat16"} if is_half(generator.policy) else {}),
        **own,
    }


def prompts_for(generator: MaskedGenerator, prompt_file: str = "") -> tuple[list[str], list[str]]:
    """Prompts to train on, and prompts that are not trained on.

    Without a file: EmojiScenes' training and validation prompts, or the classes of ImageNet. Of a file and of the
    classes every tenth prompt is kept from training; a file of one prompt is both. Raises ValueError for a
    text-to-image model without a file, and what `load_prompts` raises for a broken one.
    """
    from speedrl_lab.prompts import load_prompts

    if not prompt_file and generator.spec.name in ("emoji", "tiny"):
        return load_prompts("train"), load_prompts("validation")
    if not prompt_file and generator.spec.conditioning == "text":
        raise ValueError(
            f"generator {generator.spec.name!r} needs prompts: give prompt_file=<a .txt with one a line, .jsonl, .tsv "
            "or .csv>, such as those of PartiPrompts, DrawBench or GenEval"
        )
    if prompt_file:
        prompts = load_prompts(prompt_file)
    else:
        from speedrl_lab.generators.maskgit import class_names

        prompts = list(dict.fromkeys(class_names()))
    return [text for number, text in enumerate(prompts) if number % 10 or len(prompts) == 1], prompts[::10]


def _where_to_get(family: str) -> str:
    """One line for a name without a place: the repository, its files, and what to write then."""
    if family == "maskgit":
        from speedrl_lab.generators.maskgit import VQ_FILE

        return (
            "generator 'maskgit:' names no file: put ImageNet_384_large.pth of repository llvictorll/Halton-Maskgit "
            f"and {VQ_FILE} of FoundationVision/LlamaGen (Hugging Face hub) into one folder, then "
            "generator='maskgit:<folder>/ImageNet_384_large.pth'"
        )
    from speedrl_lab.generators.folder import WANTED

    repository = {"amused": "amused/amused-256 or amused/amused-512", "meissonic": "MeissonFlow/Meissonic"}[family]
    example = repository.split()[0]
    return (
        f"generator '{family}:' names no folder: download repository {repository} from the Hugging Face hub "
        f"(hf download {example} --local-dir <folder>; wanted: {', '.join(WANTED)}), then generator='{family}:<folder>'"
    )
