"""What text-to-image families in the published diffusers folder layout share: CLIP text, VQ codec, files.

A family is a subclass of PublishedGenerator with `family`, `lora_targets` and `logits`, and a loader that takes
its parts from `generators.folder`:

    folder = require_files(folder, "owner/model", WANTED)     # one clear line where something is missing
    policy = load_part(TheFamilysClass, folder, "transformer")
    tokenizer, text_encoder = load_text(folder)
    codec = load_part(VQModel, folder, "vqvae")
    generator = FamilyGenerator(spec, policy, codec, tokenizer, text_encoder, negative_prompt).to(device)
    generator.load_policy(file)                               # where weights of one's own are given

In `logits` a family takes `self.picture(tokens)`, `self.text_of(cond)`, `self.micro_conditions(count)`, runs its
blocks through `self.run_block`, and ends with `code_logits(head, hidden, rows)`. Nothing asks the network.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from speedrl_lab.adapters import has_adapter, merged
from speedrl_lab.generator import Cond, GeneratorSpec, StepInfo
from speedrl_lab.generators.folder import fill, read_pace, read_tensors, write_policy
from speedrl_lab.pace import PaceHead
from speedrl_lab.precision import as_policy

AESTHETIC_SCORE = 6.0  # the published pipelines' default
MAX_CACHED = 4096  # encoded prompts kept in main memory, about 1 GB
ENCODE_BATCH = 64  # prompts at once through the text encoder
DECODE_BATCH = 8  # pictures at once through the codec


class PublishedGenerator(ABC):
    """A published text-to-image model behind the generator contract; a subclass adds `logits`."""

    family: str
    lora_targets: tuple[str, ...]
    revises = False

    def __init__(
        self,
        spec: GeneratorSpec,
        policy: nn.Module,
        codec: nn.Module,
        tokenizer: Any,
        text_encoder: nn.Module,
        negative_prompt: str = "",
        pace: PaceHead | None = None,
    ):
        """`codec` is a VQModel, `text_encoder` a CLIPTextModelWithProjection; both are frozen here.

        The codec's weights are laid out channels last, which convolutions are faster with.
        """
        self.spec, self.policy, self.pace, self.tokenizer = spec, policy.eval(), pace, tokenizer
        self.codec = codec.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.text_encoder = text_encoder.eval().requires_grad_(False)
        self.negative_prompt = negative_prompt
        self.gradient_checkpointing = False
        height, width = spec.image_size
        self._micro = torch.tensor([[width, height, 0.0, 0.0, AESTHETIC_SCORE]])  # (1, 5), width first
        self._encoded: dict[str, dict[str, Tensor]] = {}  # prompt -> one row of each tensor, on the CPU
        self._null: Cond | None = None

    @property
    def device(self) -> torch.device:
        return next(self.policy.parameters()).device

    def to(self, device: torch.device) -> Self:
        """Move every network; returns itself."""
        for network in (self.policy, self.codec, self.text_encoder, self.pace):
            if network is not None:
                network.to(device)
        return self

    def enable_gradient_checkpointing(self) -> None:
        """From now on recompute each block in the backward pass: less memory, the same gradients."""
        self.gradient_checkpointing = True

    # --- conditions

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        """CLIP states `text` (B, L, C) and projected sentence `pooled` (B, P); each prompt is encoded once."""
        if isinstance(prompts, str):
            raise TypeError(f"prompts={prompts!r}: expected a list of strings; nearest: [{prompts!r}]")
        unique = list(dict.fromkeys(prompts))
        known = {prompt: self._encoded[prompt] for prompt in unique if prompt in self._encoded}
        missing = [prompt for prompt in unique if prompt not in known]
        for start in range(0, len(missing), ENCODE_BATCH):
            known |= self._encode_batch(missing[start : start + ENCODE_BATCH])
        self._encoded |= {prompt: known[prompt] for prompt in missing}
        for prompt in list(self._encoded)[: max(0, len(self._encoded) - MAX_CACHED)]:
            del self._encoded[prompt]  # the oldest
        index = {prompt: row for row, prompt in enumerate(unique)}
        rows = torch.tensor([index[prompt] for prompt in prompts], device=self.device)
        stacked = {name: torch.stack([known[prompt][name] for prompt in unique]) for name in ("text", "pooled")}
        return Cond({name: value.to(self.device) for name, value in stacked.items()}).index(rows)

    def _encode_batch(self, prompts: list[str]) -> dict[str, dict[str, Tensor]]:
        longest = min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)
        ids = self.tokenizer(
            prompts, return_tensors="pt", padding="max_length", truncation=True, max_length=longest
        ).input_ids.to(self.text_encoder.device)  # fmt: skip
        outputs = self.text_encoder(ids, output_hidden_states=True, return_dict=True)
        text, pooled = outputs.hidden_states[-2].cpu(), outputs.text_embeds.cpu()  # (B, L, C), (B, P)
        return {
            prompt: {"text": text[row].clone(), "pooled": pooled[row].clone()} for row, prompt in enumerate(prompts)
        }

    def null(self, count: int) -> Cond:
        """`count` rows of the negative prompt."""
        if self._null is None or self._null.tensors["text"].device != self.device:
            self._null = self.encode([self.negative_prompt])
        return Cond({name: value.expand(count, *value.shape[1:]) for name, value in self._null.tensors.items()})

    # --- for a family's `logits`

    @abstractmethod
    def logits(self, tokens: Tensor, cond: Cond, step: StepInfo, rows: Tensor | None = None) -> Tensor:
        """float32 (B, N, V), or (len(rows), V) at flat indices into B*N."""

    def picture(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N) as rows and columns (B, h, w)."""
        return tokens.unflatten(1, self.spec.grid)

    def text_of(self, cond: Cond) -> tuple[Tensor, Tensor]:
        """`text` and `pooled` in the number format of the policy."""
        dtype = next(self.policy.parameters()).dtype
        return cond.tensors["text"].to(dtype), cond.tensors["pooled"].to(dtype)

    def micro_conditions(self, count: int) -> Tensor:
        """[width, height, crop top, crop left, aesthetic score], float32 (count, 5)."""
        self._micro = self._micro.to(self.device)
        return self._micro.expand(count, -1)

    def run_block(self, block: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
        """`block(*inputs, **named)`, recomputed in the backward pass where checkpointing is on."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, **named)
        return block(*inputs, **named)

    # --- pictures

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """As the contract says; computed in bfloat16 where the policy is."""
        bad = tokens[(tokens < 0) | (tokens >= self.spec.codebook_size)]
        if len(bad):
            raise ValueError(
                f"cannot decode token {int(bad[0])}: expected codes 0 to {self.spec.codebook_size - 1}, no mask"
            )
        channels = self.codec.config.latent_channels
        parts = []
        with as_policy(self.policy):
            for codes in self.picture(tokens).split(DECODE_BATCH):  # (b, h, w)
                decoded = self.codec.decode(codes, force_not_quantize=True, shape=(*codes.shape, channels))
                parts.append(decoded.sample.float().clamp(0, 1))  # (b, 3, H, W)
        return torch.cat(parts)

    @torch.no_grad()
    def tokenize(self, images: Tensor) -> Tensor:
        """The nearest codes; raises ValueError for pictures of another size."""
        if images.shape[1:] != (3, *self.spec.image_size):
            raise ValueError(f"images of shape {tuple(images.shape)}: expected (B, 3, {str(self.spec.image_size)[1:]}")
        parts = []
        for pictures in images.split(DECODE_BATCH):
            latents = self.codec.encode(pictures.to(self.codec.device, self.codec.dtype)).latents  # (b, C, h, w)
            parts.append(self.codec.quantize(latents)[2][2].reshape(len(pictures), self.spec.num_tokens))
        return torch.cat(parts)

    # --- weights

    def copy(self) -> Self:
        """The same generator with its own copy of policy and pace head; text encoder and codec are shared."""
        twin = copy(self)
        twin.policy, twin.pace = deepcopy(self.policy), deepcopy(self.pace)
        return twin

    def save_policy(self, path: Path | str, origin: str = "") -> None:
        """Write the policy under its published names, and a pace head to `<stem>.pace.safetensors` beside it.

        The family's own class loads the file: LoRA is merged, the number format is kept.
        """
        path = Path(path)
        policy = merged(self.policy) if has_adapter(self.policy) else self.policy
        config = {name: value for name, value in policy.config.items() if not name.startswith("_")}
        facts = {"family": self.family, "config": json.dumps(config, default=str), "origin": origin}
        write_policy(policy.state_dict(), path, facts, self.pace, self.revises)

    def load_policy(self, path: Path | str) -> None:
        """Replace the policy's weights, key by key, by those of a file; its pace head too, where it has one, and
        whether it revises.

        Raises FileNotFoundError or ValueError in one line; nothing is replaced then.
        """
        path = Path(path)
        tensors, facts = read_tensors(path)
        if facts.get("family", self.family) != self.family:
            raise ValueError(f"{path} holds a policy of {facts['family']!r}, expected {self.family!r}")
        pace = read_pace(path, self.device)
        tensors = {name.removeprefix("_orig_mod."): value for name, value in tensors.items()}  # of torch.compile
        fill(self.policy, tensors, path)
        self.pace, self.revises = pace, "revises" in facts


def code_logits(head: nn.Module, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
    """Logits of a ConvMlmLayer on hidden (B, C, h, w): float32 (B, N, V), or (R, V) at flat rows.

    Its convolutions are 1x1 and its norm is over channels, so that every position stands alone.
    """
    hidden = hidden.flatten(2).transpose(1, 2)  # (B, N, C)
    if rows is not None:
        hidden = hidden.flatten(0, 1)[rows]  # (R, C)
    hidden = head.layer_norm(functional.linear(hidden, head.conv1.weight[:, :, 0, 0], head.conv1.bias))
    return functional.linear(hidden, head.conv2.weight[:, :, 0, 0], head.conv2.bias).float()
