"""An independent replay of the reference in float64, sharing no code with the package: recordings of any sizes.

It follows docs/internal/model_spec.md line by line, with the reference's rolling cache (section 5) where the package has KV
slots, and is itself held against the recorded cases R, J and J2. n tokens of a chunk, H heads of D channels, d = H * D.
"""

import json
import math

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

F64 = torch.float64


def random_state(c: dict, generator: torch.Generator) -> dict[str, Tensor]:
    """A random state dict under the reference's names."""
    d, state = c["dim"], {}

    def linear(name, rows, *columns):
        state[f"{name}.weight"] = torch.randn(rows, *columns, generator=generator) / math.sqrt(math.prod(columns))
        state[f"{name}.bias"] = 0.05 * torch.randn(rows, generator=generator)

    patch = (c["in_dim"], 1, *c["patch_size"][1:])
    linear("patch_embedding", d, *patch)
    linear("text_embedding.0", d, c["text_dim"])
    linear("text_embedding.2", d, d)
    linear("time_embedding.0", d, c["freq_dim"])
    linear("time_embedding.2", d, d)
    linear("time_projection.1", 6 * d, d)
    for i in range(c["num_layers"]):
        state[f"blocks.{i}.modulation"] = 0.2 * torch.randn(1, 6, d, generator=generator)
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                linear(f"blocks.{i}.{attention}.{part}", d, d)
            for part in ("norm_q", "norm_k"):
                weight = 1.35 + 0.35 * torch.randn(d, generator=generator)
                state[f"blocks.{i}.{attention}.{part}.weight"] = weight
        state[f"blocks.{i}.norm3.weight"] = 1 + 0.2 * torch.randn(d, generator=generator)
        state[f"blocks.{i}.norm3.bias"] = 0.1 * torch.randn(d, generator=generator)
        linear(f"blocks.{i}.ffn.0", c["ffn_dim"], d)
        linear(f"blocks.{i}.ffn.2", d, c["ffn_dim"])
    state["head.modulation"] = 0.2 * torch.randn(1, 2, d, generator=generator)
    linear("head.head", math.prod(patch), d)
    return state


def schedule(c: dict) -> tuple[list[float], list[float]]:
    """Timesteps fed to the model, and the sigma of each."""
    f32, i = np.float32, np.arange(1000)
    step, shift = np.float64(f32(-0.001)), f32(c["timestep_shift"])
    u = np.where(i < 500, 1 + step * i, -step * (1000 - i)).astype(f32)
    sigmas = (shift * u) / (f32(1) + f32(shift - 1) * u)
    table = f32(1000) * sigmas
    steps = c["denoising_step_list"]
    used = [float(np.append(table, f32(0))[1000 - s]) if c["warp_denoising_step"] else float(s) for s in steps]
    return used, [float(sigmas[np.abs(table - f32(t)).argmin()]) for t in used]


def sizes_of_chunks(c: dict) -> list[int]:
    """Frames of each chunk of the video, given ones first; one for an independent first frame."""
    frames, given = c["num_frame_per_block"], len(c.get("given_chunk_frames", []))
    sizes = [frames] * (given + c["num_chunks"])
    return [1, *sizes[1:]] if c.get("independent_first_frame") else sizes


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x * torch.sigmoid(x)


def attend(q, k, v):
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)


class Replay:
    """One rollout of batch size 1."""

    def __init__(self, c: dict, state: dict[str, Tensor], prompt: Tensor) -> None:
        self.c, self.w = c, {name: tensor.to(F64) for name, tensor in state.items()}
        self.ph, self.pw = c["patch_size"][1:]
        self.h, self.wd = c["latent_h"] // self.ph, c["latent_w"] // self.pw
        self.heads, self.sizes = c["num_heads"], sizes_of_chunks(c)
        self.tokens = self.h * self.wd
        self.take_prompt(prompt)
        window = c["local_attn_size"]
        self.capacity = (sum(self.sizes) if window == -1 else window) * self.tokens
        shape = (c["num_layers"], self.capacity, self.heads, c["dim"] // self.heads)
        self.k, self.v = torch.zeros(shape, dtype=F64), torch.zeros(shape, dtype=F64)
        self.global_end = self.local_end = 0

    def take_prompt(self, prompt):
        text = torch.zeros(self.c["text_len"], self.c["text_dim"], dtype=F64)
        text[: len(prompt)] = prompt
        self.context = self.linear("text_embedding.2", gelu(self.linear("text_embedding.0", text)))

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].flatten(1).T + self.w[f"{name}.bias"]

    def layer_norm(self, x):
        x = x - x.mean(-1, keepdim=True)
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.c["eps"])

    def heads_of(self, attention, part, x):
        """Projection, RMS norm over the full width for q and k, split into heads: [rows, H, D]."""
        y = self.linear(f"{attention}.{part}", x)
        if part != "v":
            y = (
                y
                / torch.sqrt((y * y).mean(-1, keepdim=True) + self.c["eps"])
                * self.w[f"{attention}.norm_{part}.weight"]
            )
        return y.unflatten(-1, (self.heads, -1))

    def rotate(self, x, start_frame):
        head_dim = x.shape[-1]
        width = 2 * (head_dim // 6)
        token = torch.arange(len(x))
        axes = (token // self.tokens + start_frame, token % self.tokens // self.wd, token % self.wd)
        angles = torch.cat(
            [
                position[:, None].to(F64) * 10000.0 ** (-2 * torch.arange(a // 2, dtype=F64) / max(a, 1))
                for position, a in zip(axes, (head_dim - 2 * width, width, width), strict=True)
            ],
            dim=1,
        )
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)

    def forward(self, x, timestep, start_frame):
        """[F, C, H, W] -> flow; the cache rules are those of section 5, in tokens."""
        c, frames = self.c, len(x)
        n = frames * self.tokens
        half = c["freq_dim"] // 2
        angle = timestep * 10000.0 ** (-torch.arange(half, dtype=F64) / half)
        e = self.linear("time_embedding.0", torch.cat([angle.cos(), angle.sin()]))
        e = self.linear("time_embedding.2", silu(e))
        e0 = self.linear("time_projection.1", silu(e)).unflatten(0, (6, -1))
        grid = x.reshape(frames, c["in_dim"], self.h, self.ph, self.wd, self.pw)
        rows = self.linear("patch_embedding", grid.permute(0, 2, 4, 1, 3, 5).reshape(n, -1))

        end, sink = start_frame * self.tokens + n, c["sink_size"] * self.tokens
        rolls = c["local_attn_size"] != -1 and end > self.global_end and n + self.local_end > self.capacity
        evicted = n + self.local_end - self.capacity if rolls else 0
        kept = self.local_end - evicted - sink
        local_end = self.local_end + end - self.global_end - evicted
        for i in range(c["num_layers"]):
            block = f"blocks.{i}"
            shift1, scale1, gate1, shift2, scale2, gate2 = self.w[f"{block}.modulation"][0] + e0
            y = self.layer_norm(rows) * (1 + scale1) + shift1
            q, k, v = (self.heads_of(f"{block}.self_attn", part, y) for part in "qkv")
            for cache, new in ((self.k[i], self.rotate(k, start_frame)), (self.v[i], v)):
                if rolls and kept > 0:
                    cache[sink : sink + kept] = cache[sink + evicted : sink + evicted + kept].clone()
                cache[local_end - n : local_end] = new
            out = attend(self.rotate(q, start_frame), self.k[i, :local_end], self.v[i, :local_end])
            rows = rows + gate1 * self.linear(f"{block}.self_attn.o", out)
            y = self.layer_norm(rows) * self.w[f"{block}.norm3.weight"] + self.w[f"{block}.norm3.bias"]
            q = self.heads_of(f"{block}.cross_attn", "q", y)
            k, v = (self.heads_of(f"{block}.cross_attn", part, self.context) for part in "kv")
            rows = rows + self.linear(f"{block}.cross_attn.o", attend(q, k, v))
            y = self.layer_norm(rows) * (1 + scale2) + shift2
            rows = rows + gate2 * self.linear(f"{block}.ffn.2", gelu(self.linear(f"{block}.ffn.0", y)))
        self.global_end, self.local_end = end, local_end
        shift, scale = self.w["head.modulation"][0] + e
        out = self.linear("head.head", self.layer_norm(rows) * (1 + scale) + shift)
        grid = out.reshape(frames, self.h, self.wd, self.ph, self.pw, c["in_dim"])
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)

    def switch(self, prompt, policy, latents):
        """Another prompt; `latents` are the clean chunks so far. No policy but `keep` is the reference's own.

        To recache: the chunks of which the window holds a frame are computed again, the others never were.
        """
        self.take_prompt(prompt)
        if policy == "keep":
            return
        self.local_end = 0
        starts = [sum(self.sizes[:i]) for i in range(len(latents) + 1)]
        sink, frames = self.c["sink_size"], self.c["num_frame_per_block"]
        oldest = starts[-1] - (self.capacity // self.tokens - sink - frames)
        for first, clean in zip(starts, latents, strict=False):
            if policy == "recache" and (first < sink or first + len(clean) > oldest):
                self.global_end = first * self.tokens
                self.forward(clean, float(self.c["context_noise"]), first)
        self.global_end = starts[-1] * self.tokens

    def rollout(self, noise, renoise, *, given=None, second=None, policy="keep"):
        """Noise [T, C, H, W], renoise by (chunk, step) -> outputs by the recording's names.

        `given` [G, C, H, W] comes before; from `prompt_switch_chunk` on the prompt is `second`.
        """
        timesteps, sigmas = schedule(self.c)
        outputs, latents = {}, []
        num_given = len(self.sizes) - self.c["num_chunks"]
        for chunk, size in enumerate(self.sizes[:num_given]):
            first = sum(self.sizes[:chunk])
            latents.append(given[first : first + size].to(F64))
            outputs[f"out.g{chunk}.ctx.flow"] = self.forward(latents[-1], 0.0, first)
        for chunk, size in enumerate(self.sizes[num_given:]):
            first = sum(self.sizes[: num_given + chunk])
            if chunk == self.c.get("prompt_switch_chunk"):
                self.switch(second, policy, latents)
            start = first - sum(self.sizes[:num_given])
            x = noise[start : start + size].to(F64)
            for s, timestep in enumerate(timesteps):
                flow = self.forward(x, timestep, first)
                x0 = x - sigmas[s] * flow
                outputs[f"out.c{chunk}.s{s}.flow"], outputs[f"out.c{chunk}.s{s}.x0"] = flow, x0
                if s + 1 < len(timesteps):
                    x = (1 - sigmas[s + 1]) * x0 + sigmas[s + 1] * renoise[chunk, s].to(F64)
            latents.append(x0)
            outputs[f"out.c{chunk}.ctx.flow"] = self.forward(x0, float(self.c["context_noise"]), first)
        return outputs | {"out.latents": torch.cat(latents)}


def record(c: dict, path, *, policy: str = "keep") -> None:
    """Write a synthetic recording of config `c`, in the format of tests/data/golden/README.md."""
    batch, chunks, sizes = c["batch_size"], c["num_chunks"], sizes_of_chunks(c)
    c = c | {"num_frames": sum(sizes), "total_frames": sum(sizes), "chunk_frames": sizes}
    generator = torch.Generator().manual_seed(c["seed"])
    state = random_state(c, generator)
    latent = (c["in_dim"], c["latent_h"], c["latent_w"])
    tensors = {
        "in.noise": torch.randn(batch, c["num_frames"], *latent, generator=generator),
        "in.prompt_embeds": torch.randn(batch, c["text_rows"], c["text_dim"], generator=generator),
    }
    draws = [(chunk, s) for chunk in range(chunks) for s in range(len(c["denoising_step_list"]) - 1)]
    for chunk, s in draws:
        tensors[f"in.renoise.c{chunk}.s{s}"] = torch.randn(batch * sizes[chunk], *latent, generator=generator)
    if c.get("prompt_switch_chunk") is not None:
        tensors["in.prompt_embeds.p1"] = torch.randn(batch, c["text_rows"], c["text_dim"], generator=generator)
    rollouts = []
    for b in range(batch):
        renoise = {(k, s): tensors[f"in.renoise.c{k}.s{s}"].chunk(batch)[b] for k, s in draws}
        second = tensors.get("in.prompt_embeds.p1", [None] * batch)[b]
        replay = Replay(c, state, tensors["in.prompt_embeds"][b])
        rollouts.append(replay.rollout(tensors["in.noise"][b], renoise, second=second, policy=policy))
    tensors |= {name: torch.stack([r[name] for r in rollouts]).float().contiguous() for name in rollouts[0]}
    tensors |= {f"model.{name}": tensor for name, tensor in state.items()}
    save_file(tensors, path, metadata={"config": json.dumps(c)})
